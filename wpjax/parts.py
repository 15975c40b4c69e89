"""Work on many rows, a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def in_parts(n: int, at_once: int, run: Callable[[np.ndarray], Any], axis: int = 0) -> Any:
    """Run something on rows 0 to n - 1 in equal parts, the last filled up, so that one program serves all.

    Args:
        n: rows, at least 1.
        at_once: rows of a part, at most.
        run: takes row numbers, returns a tree of arrays with a row axis.
        axis: of the rows in what is returned.

    Returns:
        the parts put together, on the host.
    """
    size = -(-n // -(-n // at_once))
    parts = [
        jax.tree.map(np.asarray, run(np.minimum(np.arange(first, first + size), n - 1))) for first in range(0, n, size)
    ]
    return jax.tree.map(lambda *some: np.concatenate(some, axis).take(range(n), axis), *parts)
