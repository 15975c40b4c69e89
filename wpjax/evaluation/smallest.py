"""The smallest set that reaches a goal: searched along a ranking, then thinned out. Pure functions of a test of a set.

    1. along the ranking     the shortest beginning of the ranking that reaches the goal, by halving a grid of sizes
    2. by dropping           blocks of the set are left out, and stay out if the rest still reaches the goal

A set is a tuple of places in the ranking: 0 is the best component. Whoever calls says by a function whether a set
reaches the goal, say by letting a patched model answer (ours; step 2 is the greedy half of delta debugging, Zeller and
Hildebrandt, "Simplifying and isolating failure-inducing input", 2002).

Both steps suppose that more components do not do less. Where that fails, what is found still reaches the goal, but a
smaller set may exist. Even where it holds, it is a set from which nothing can be dropped, not the smallest of all
subsets: that would take a test of each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Int

from wpjax.components import n_within

Members: TypeAlias = tuple[int, ...]
"""Places in the ranking of the components of a set, in order."""

Reaches: TypeAlias = Callable[[Members], bool]
"""Whether a set reaches the goal."""

COARSE = 4
"""Where the whole ranking does not reach the goal, every such point of the grid is tried, from the largest down."""


FIRST_BLOCKS = 8
"""Blocks at first. The set is a beginning of the ranking that is hardly too long, so larger ones are needed anyway."""


def prefix_sizes(sizes: Int[np.ndarray, " C"], n_points: int) -> list[int]:
    """Numbers of leading components to try: the budgets of parameters are evenly spaced on a logarithmic scale.

    Args:
        sizes: [C], number of parameters of each component, in the order of the ranking.
        n_points: number of budgets, from those of the first component to those of all.

    Returns:
        for each budget the number of leading components that fit into it, at least 1; equal ones once.

    >>> prefix_sizes(np.full(100, 10), 5)
    [1, 3, 10, 31, 100]
    """
    budgets = np.geomspace(sizes[0], sizes.sum(), n_points)
    return np.unique([max(n_within(sizes, budget), 1) for budget in budgets]).tolist()


def smallest_prefix(points: Sequence[int], reaches: Callable[[int], bool]) -> int | None:
    """The smallest number on a grid that reaches a goal, by binary search.

    The largest is tried first. If it fails, every `COARSE`-th point is tried from the largest down: components that
    work against the behaviour may stand at the end of a ranking.

    Args:
        points: numbers to try, ascending.
        reaches: whether a number of leading components reaches the goal.

    Returns:
        the number; the one before it on the grid was tried and failed, unless it is the first. None if nothing that
        was tried reaches the goal.

    >>> smallest_prefix([1, 3, 10, 31, 100], lambda k: k >= 7)
    10
    >>> smallest_prefix([1, 3, 10, 31, 100], lambda k: k > 100) is None
    True
    """
    high = next((i for i in range(len(points) - 1, -1, -COARSE) if reaches(points[i])), None)
    if high is None:
        return None
    low = -1
    while high - low > 1:
        middle = (low + high) // 2
        if reaches(points[middle]):
            high = middle
        else:
            low = middle
    return points[high]


def drop_blocks(members: Members, sizes: Int[np.ndarray, " C"], reaches: Reaches, most: int) -> Members:
    """A smaller set that still reaches the goal: blocks of the set are left out, and stay out where that does no harm.

    The set is cut into blocks of about as many parameters. Those that rank lowest are tried first. Then blocks are half
    as large, and so on down to single components. If there are tests enough for that, and larger sets never do less,
    no component of what is left can be dropped. What follows from earlier tests, if larger sets never do less, is not
    tested: where a block was needed, what is left of it is needed still, and so is all that holds it.

    Args:
        members: a set that reaches the goal.
        sizes: [C], number of parameters of each component of the ranking.
        reaches: whether a set reaches the goal.
        most: number of tests, at most.

    >>> needed = {0, 5, 6}
    >>> drop_blocks(tuple(range(10)), np.ones(10, int), lambda some: needed <= set(some), most=100)
    (0, 5, 6)
    """
    n_blocks, n_tests, needed = FIRST_BLOCKS, 0, list[frozenset[int]]()
    while True:
        blocks = _blocks(members, sizes, n_blocks)
        for block in reversed(blocks):
            left = [other.intersection(members) for other in needed]
            rest = tuple(m for m in members if m not in block)
            if not rest or any(other and other <= block for other in left):
                continue
            if n_tests == most:
                return members
            n_tests += 1
            if reaches(rest):
                members = rest
            else:
                needed.append(block)
        if all(len(block) == 1 for block in blocks):
            return members
        n_blocks *= 2


def _blocks(members: Members, sizes: Int[np.ndarray, " C"], n_blocks: int) -> list[frozenset[int]]:
    """A set cut into at most so many blocks of neighbours in the ranking, of about as many parameters each.

    The block of a component is where its middle falls. So a component larger than a block is one by itself.
    """
    own = sizes[list(members)].astype(np.float64)
    middle = np.cumsum(own) - own / 2
    number = np.minimum(middle / own.sum() * n_blocks, n_blocks - 1).astype(int)
    return [frozenset(np.asarray(members)[number == i].tolist()) for i in np.unique(number)]
