"""Sweeps over components: exact suffix replay, first-order screens, and the reference they are tested against."""

from wpjax.sweeps.on_policy import OnPolicy
from wpjax.sweeps.run import DEFAULT_KINDS, sweep
from wpjax.sweeps.sets import add_set_score

__all__ = ["DEFAULT_KINDS", "OnPolicy", "add_set_score", "sweep"]
