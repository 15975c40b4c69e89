"""How a patch file holds the values of its slices: exactly, or as a smaller change to a stated error.

    exact       after                        in the expert's dtype
    low rank    after = before + A B         A [a, r], B [r, b], float32; the truncated SVD of after - before
    int8        after = before + q s         q [a, b], 8 bits; s [n], float32, one number for each row or column

The best approximation of rank r is the truncated singular value decomposition (Eckart and Young 1936). All sums are
taken number by number in a fixed order, so that they give the same bits on every machine; without that, a patch could
not be found again in a model and undone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from wpjax.errors import PatchError

EXACT, LOW_RANK, INT8 = ("after",), ("delta_A", "delta_B"), ("delta_q", "delta_scale")
"""The tensors that a patch file holds of one slice, besides its positions and what stood there before."""

_LEVELS = 127


class Encoding(NamedTuple):
    """How a change is to be stored. Without any of these, exactly.

    Attributes:
        rank: highest rank of a change; None for no bound.
        tolerance: the relative error of a low-rank change of one tensor, in the Frobenius norm; the smallest rank
            within it is taken, at most `rank`.
        int8: whether to store a change in 8 bits.
    """

    rank: int | None = None
    tolerance: float | None = None
    int8: bool = False

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            PatchError: the rank or the tolerance is out of bounds, or both ways are asked for.
        """
        if self.int8 and not (self.rank is None and self.tolerance is None):
            raise PatchError("int8 and a low rank are two ways to store a change; choose one of them")
        if self.rank is not None and self.rank < 1:
            raise PatchError(f"rank={self.rank}: give at least 1")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise PatchError(f"tolerance={self.tolerance}: give a relative error from 0 to below 1")

    @property
    def in_words(self) -> str:
        """What it is, in words.

        >>> Encoding(rank=8).in_words, Encoding().in_words
        ('changes of rank 8 at most', 'exact')
        """
        if self.int8:
            return "changes in 8 bits"
        said = [] if self.rank is None else [f"of rank {self.rank} at most"]
        said += [] if self.tolerance is None else [f"to a relative error of {self.tolerance:g} in each tensor"]
        return f"changes {', '.join(said)}" if said else "exact"


def truncated(
    delta: Float[np.ndarray, "a b"], rank: int | None, tolerance: float
) -> tuple[Float[np.ndarray, "a r"], Float[np.ndarray, "r b"]]:
    """The factors of a change, of the smallest rank r whose error is within a tolerance, but at most `rank`.

    Args:
        delta: the change.
        rank: highest rank; None for no bound.
        tolerance: relative error in the Frobenius norm.

    Returns:
        A and B, in float32; their product approximates the change.

    >>> a, b = truncated(np.outer([1.0, 2.0], [3.0, 4.0, 5.0]), None, 1e-6)
    >>> a.shape, b.shape, bool(np.allclose(a @ b, np.outer([1, 2], [3, 4, 5])))
    ((2, 1), (1, 3), True)
    """
    u, s, v = np.linalg.svd(np.asarray(delta, np.float64), full_matrices=False)
    left = np.append(np.cumsum(s[::-1] ** 2)[::-1], 0.0)  # squared error of each rank from 0 on
    r = int(np.argmax(left <= tolerance**2 * left[0]))
    r = max(1, r if rank is None else min(r, rank))
    root = np.sqrt(s[:r])
    return (u[:, :r] * root).astype(np.float32), (root[:, None] * v[:r]).astype(np.float32)


def encode(before: np.ndarray, after: np.ndarray, axis: int, how: Encoding) -> dict[str, np.ndarray]:
    """What to store of a slice.

    Args:
        before: the host's rows or columns.
        after: what takes their place.
        axis: 0 for rows, 1 for columns.
        how: the encoding. Vectors, and changes that would not get smaller, are stored exactly.

    Returns:
        the tensors of `EXACT`, `LOW_RANK` or `INT8`.
    """
    if after.ndim == 2 and how != Encoding():
        delta = after.astype(np.float64) - before.astype(np.float64)
        if how.int8:
            largest = np.abs(delta).max(1 - axis)
            scale = np.where(largest > 0, largest / _LEVELS, 1).astype(np.float32)
            along = np.expand_dims(scale, 1 - axis)
            return {"delta_q": np.clip(np.rint(delta / along), -_LEVELS, _LEVELS).astype(np.int8), "delta_scale": scale}
        a, b = truncated(delta, how.rank, how.tolerance or 0.0)
        if a.nbytes + b.nbytes < after.nbytes:
            return {"delta_A": a, "delta_B": b}
    return {"after": after}


def decode(before: np.ndarray, axis: int, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The values that take the place of a slice: the inverse of `encode`.

    Args:
        before: the host's rows or columns.
        axis: 0 for rows, 1 for columns.
        parts: the tensors of `EXACT`, `LOW_RANK` or `INT8`.

    Returns:
        of the shape of `before`; in float32 unless it was stored exactly.

    >>> before, after = np.zeros((1, 3), np.float32), np.array([[1.0, 12.7, -5.04]], np.float32)
    >>> [round(value, 4) for value in decode(before, 0, encode(before, after, 0, Encoding(int8=True)))[0].tolist()]
    [1.0, 12.7, -5.0]
    """
    if "after" in parts:
        return parts["after"]
    if "delta_q" in parts:
        delta = parts["delta_q"].astype(np.float32) * np.expand_dims(parts["delta_scale"], 1 - axis)
    else:
        delta = np.zeros(before.shape, np.float32)
        for column, row in zip(parts["delta_A"].T, parts["delta_B"], strict=True):
            delta += np.multiply.outer(column, row)
    return widened(before) + delta


def widened(values: np.ndarray) -> np.ndarray:
    """Values in the precision that sums are taken in: float32, of float64 itself."""
    return values.astype(np.float64 if values.dtype == np.float64 else np.float32)
