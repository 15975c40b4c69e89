"""Work on many rows, in batches that fit in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, MutableMapping
from typing import Any

import jax
import numpy as np

from wpjax.runtime import interrupts
from wpjax.runtime.placement import fetch


def map_batches(
    n: int,
    at_once: int,
    run: Callable[[np.ndarray], Any],
    axis: int = 0,
    what: str = "prompts",
    fits: MutableMapping[str, int] | None = None,
    parts: int = 1,
) -> Any:
    """Run a function on rows 0 to n - 1, some rows at a time, and put the results together.

    All runs have the same number of rows, so that one compiled program serves them all; the last one is filled up.
    If the device runs out of memory, the rows that are left go on, half as many at a time.

    Args:
        n: number of rows, at least 1.
        at_once: largest number of rows of one run, on each device.
        run: function of row numbers [N]; returns a tree of arrays with one entry a row along `axis`.
        axis: axis of the rows in the arrays that `run` returns.
        what: name of the rows in the warning of memory that ran out, and in `fits`.
        fits: rows that fit at a time on each device, by `what`. Memory that ran out is noted here, so that the next
            call, given the same mapping, starts with what fits. None to remember nothing.
        parts: number of devices that the rows of a run are divided among (`Placement.n_patch`).

    Returns:
        the tree that `run` returns, with all n rows, on the host.

    >>> map_batches(5, 2, lambda rows: rows**2)
    array([ 0,  1,  4,  9, 16])
    """
    fits = {} if fits is None else fits
    made: list[Any] = []
    first = size = 0
    while first < n:
        interrupts.check()
        if not size:
            # as few parts as fit, then all of one size: 10 rows, 8 at most, are 5 and 5, not 8 and 2
            rest, at_most = -(-(n - first) // parts), min(at_once, fits.get(what, at_once))
            size = parts * -(-rest // -(-rest // at_most))
        try:
            # the last run repeats the last row to keep its size; the repeats are cut off at the end
            made.append(fetch(run(np.minimum(np.arange(first, first + size), n - 1))))
            first += size
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or size == parts or jax.process_count() > 1:
                raise
            fits[what] = (size // parts + 1) // 2
            warnings.warn(f"out of memory: {what} go on {parts * fits[what]} at a time", stacklevel=2)
            size = 0  # chosen anew
    first_n = (*[slice(None)] * axis, slice(n))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis)[first_n], *made)
