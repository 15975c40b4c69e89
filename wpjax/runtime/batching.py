"""Work on many rows, a few at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, MutableMapping
from typing import Any

import jax
import numpy as np


def map_batches(
    n: int,
    at_once: int,
    run: Callable[[np.ndarray], Any],
    axis: int = 0,
    what: str = "prompts",
    fits: MutableMapping[str, int] | None = None,
) -> Any:
    """Run something on rows 0 to n - 1 in equal parts, the last filled up, so that one program serves all.

    Where the device runs out of memory, the rows that are left go on, half as many at once.

    Args:
        n: rows, at least 1.
        at_once: rows of a part, at most.
        run: takes row numbers, returns a tree of arrays with a row axis.
        axis: of the rows in what is returned.
        what: the rows are, for a warning.
        fits: how many rows go on after running out of memory, by what they are; extended, for the next call to heed.

    Returns:
        the parts put together, on the host.
    """
    fits = {} if fits is None else fits
    parts: list[Any] = []
    first = size = 0
    while first < n:
        if not size:
            rest, at_most = n - first, min(at_once, fits.get(what, at_once))
            size = -(-rest // -(-rest // at_most))
        try:
            parts.append(jax.tree.map(np.asarray, run(np.minimum(np.arange(first, first + size), n - 1))))
            first += size
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or size == 1:
                raise
            fits[what] = (size + 1) // 2
            warnings.warn(f"out of memory: {what} go on {fits[what]} at a time", stacklevel=2)
            size = 0
    wanted = (*[slice(None)] * axis, slice(n))
    return jax.tree.map(lambda *some: np.concatenate(some, axis)[wanted], *parts)
