"""Work on many rows, a few at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def in_parts(n: int, at_once: int, run: Callable[[np.ndarray], Any], axis: int = 0, what: str = "prompts") -> Any:
    """Run something on rows 0 to n - 1 in equal parts, the last filled up, so that one program serves all.

    Where the device runs out of memory, it starts again with half as many rows at once.

    Args:
        n: rows, at least 1.
        at_once: rows of a part, at most.
        run: takes row numbers, returns a tree of arrays with a row axis.
        axis: of the rows in what is returned.
        what: the rows are, for a warning.

    Returns:
        the parts put together, on the host.
    """
    while True:
        size = -(-n // -(-n // at_once))
        rows = [np.minimum(np.arange(first, first + size), n - 1) for first in range(0, n, size)]
        try:
            parts = [jax.tree.map(np.asarray, run(some)) for some in rows]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or size == 1:
                raise
            at_once = (size + 1) // 2
            warnings.warn(f"out of memory: {what} go on {at_once} at a time", stacklevel=2)
        else:
            return jax.tree.map(lambda *some: np.concatenate(some, axis).take(range(n), axis), *parts)
