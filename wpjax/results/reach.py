"""How small the q-values of a sweep can get: with few queries none is small, however large an effect is."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from wpjax.stats import n_needed, smallest_p

LEVEL = 0.05
"""The false discovery rate below which an effect counts as found."""


class Reach(NamedTuple):
    """What the tests of a sweep can show at best.

    Attributes:
        n_queries: number of queries.
        n_components: number of components that were swept: the family of tests.
        n_replaced: number of those that were replaced. The others count with p = 1.
        smallest_p: no p-value can be smaller.
        smallest_q: no q-value can be smaller: all that were replaced would have the smallest p.
        n_needed: how many components must have the smallest p, for any of them to have q < `LEVEL`.
    """

    n_queries: int
    n_components: int
    n_replaced: int
    smallest_p: float
    smallest_q: float
    n_needed: int

    @classmethod
    def of(cls, n_queries: int, n_components: int, n_replaced: int, seed: int = 0) -> Reach:
        """What so many queries and components can show.

        >>> Reach.of(n_queries=8, n_components=640, n_replaced=160).n_needed  # 640 * 0.0078 / 100 = 0.05
        101
        """
        p = smallest_p(n_queries, seed=seed)
        q = min(n_components * p / n_replaced, 1.0)
        return cls(n_queries, n_components, n_replaced, p, q, n_needed(p, n_components, LEVEL))

    @property
    def is_out_of_reach(self) -> bool:
        """Whether no component can have q < `LEVEL`."""
        return self.n_needed > self.n_replaced

    @property
    def enough_queries(self) -> int:
        """The fewest queries with which a component can have q < `LEVEL` whatever the others do."""
        return next(n for n in itertools.count(1) if n_needed(smallest_p(n), self.n_components, LEVEL) == 1)

    def __str__(self) -> str:
        """What it means, in words; empty if there are queries enough for a single component to be found."""
        if self.n_needed == 1:
            return ""
        few = f"With {self.n_queries} queries no p is below {self.smallest_p:.2g}"
        needed = f"q < {LEVEL:g} takes at least {self.n_needed:,} of {self.n_components:,} components with that p"
        none = f"no component can have q < {LEVEL:g}, however large its effect. None found is not none there."
        more = f"With {self.enough_queries} queries a single component can be found."
        if self.smallest_p >= LEVEL:
            return f"{few}, and no q below p: {none} {more}"
        if self.is_out_of_reach:
            return f"{few}. {needed}, and {self.n_replaced:,} are replaced: {none} {more}"
        return f"{few}. {needed}: fewer large effects than that do not count as found, even if they are there. {more}"
