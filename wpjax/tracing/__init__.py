"""How an effect gets from the weights that make it to the behaviour."""

from wpjax.tracing.hierarchy import Hierarchy, hierarchy

__all__ = ["Hierarchy", "hierarchy"]
