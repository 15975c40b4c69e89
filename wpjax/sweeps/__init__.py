"""Sweeps over components: exact suffix replay, first-order screens, and the reference they are tested against."""

from wpjax.sweeps.run import DEFAULT_KINDS, METHODS, sweep
from wpjax.sweeps.sets import add_set_score

__all__ = ["DEFAULT_KINDS", "METHODS", "add_set_score", "sweep"]
