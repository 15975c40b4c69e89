"""Which elements of a change are kept: the largest, all but the largest, or a random part of them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

Rescale = Literal["l1", "density", "none"]

_CHUNK = 2**18
"""Elements that are looked at together."""

_SMALLEST = 1e-7
"""Sums of sizes below this one are not rescaled, as in mergekit."""


def largest(tau: Float[np.ndarray, "*shape"], k: int) -> Bool[np.ndarray, "*shape"]:
    """Marks the k elements that are largest in size. Of equal ones the first count, in the order of the flat array.

    One partial sort finds the k-th largest (`np.partition`): O(n), where a sort takes O(n log n).

    Args:
        tau: a change.
        k: number of elements, from 0 to all.

    >>> largest(np.array([[1.0, -3.0], [2.0, -2.0]], np.float32), 2).astype(int).tolist()
    [[0, 1], [1, 0]]
    """
    if k <= 0:
        return np.zeros(tau.shape, bool)
    if k >= tau.size:
        return np.ones(tau.shape, bool)
    flat = tau.reshape(-1)
    sizes = np.abs(flat)
    sizes.partition(tau.size - k)
    threshold = sizes[tau.size - k]
    del sizes  # as large as the tensor
    keep = flat >= threshold
    keep |= flat <= -threshold
    surplus = int(np.count_nonzero(keep)) - k
    # Of those that stand on the threshold, the last ones go. There may be many: of what did not change all are 0.
    for start in reversed(range(0, tau.size, _CHUNK)):
        if surplus == 0:
            break
        part = flat[start : start + _CHUNK]
        on_it = np.flatnonzero((part == threshold) | (part == -threshold))[-surplus:]
        keep[start + on_it] = False
        surplus -= len(on_it)
    return keep.reshape(tau.shape)


def largest_share(tau: Float[np.ndarray, "*shape"], density: float) -> Bool[np.ndarray, "*shape"]:
    """Marks the largest elements: k = max(1, floor(density n)) of n, or none if the density is 0 (arXiv:2306.01708).

    >>> int(largest_share(np.arange(10, dtype=np.float32), 0.25).sum())
    2
    """
    return largest(tau, max(1, int(density * tau.size)) if density > 0 else 0)


def without_outliers(tau: Float[np.ndarray, "*shape"], density: float, gamma: float) -> Bool[np.ndarray, "*shape"]:
    """Marks floor(density n) of n elements: the largest after the floor(gamma n) largest of all (arXiv:2312.06795).

    Fewer of the largest are left out where the density could not be kept otherwise.

    Args:
        tau: a change.
        density: share of elements that are kept.
        gamma: share of elements that are left out as outliers.

    >>> without_outliers(np.array([4.0, 3.0, 2.0, 1.0], np.float32), 0.5, 0.25).tolist()
    [False, True, True, False]
    """
    n_kept = int(density * tau.size)
    n_out = min(int(gamma * tau.size), tau.size - n_kept)
    return largest(tau, n_out + n_kept) & ~largest(tau, n_out)


def keep_probabilities(tau: Float[np.ndarray, "*shape"], density: float, epsilon: float) -> Float[np.ndarray, "*shape"]:
    """Probability that each element is kept, by its rank in size within its row (DELLA, arXiv:2406.11617).

        p = (density - epsilon) + 2 epsilon (rank - 1) / (columns - 1)        rank 1 is the smallest

    A vector is one row. Where a row has one element, p is the density.

    Args:
        tau: a change.
        density: mean probability.
        epsilon: how far probabilities go from it; 0 < density - epsilon and density + epsilon < 1.

    >>> keep_probabilities(np.array([3.0, 1.0, 2.0], np.float32), 0.5, 0.25).tolist()
    [0.75, 0.25, 0.5]
    """
    columns = tau.shape[-1] if tau.ndim else 1
    if columns < 2:
        return np.full(tau.shape, density, np.float32)
    order = np.argsort(np.abs(tau), axis=-1, kind="stable")
    ranks = np.empty(tau.shape, np.float32)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(columns, dtype=np.float32), tau.shape), axis=-1)
    ranks /= np.float32(columns - 1)
    return np.float32(density - epsilon) + ranks * np.float32(2) * np.float32(epsilon)


def drawn(
    probability: Float[np.ndarray, "*shape"] | float, shape: tuple[int, ...], rng: np.random.Generator
) -> Bool[np.ndarray, "*shape"]:
    """Marks elements at random, each with its probability.

    It takes one number from `rng.random` for each element, in the order of the flat array. So the same generator gives
    the same mask, and another program that draws these numbers does too.
    """
    return rng.random(shape, dtype=np.float32) < np.float32(probability)


def rescaled(
    tau: Float[np.ndarray, "*shape"],
    keep: Bool[np.ndarray, "*shape"],
    rescale: Rescale,
    probability: Float[np.ndarray, "*shape"] | float,
) -> Float[np.ndarray, "*shape"]:
    """What is kept of a change, made larger for what was dropped.

    Args:
        tau: a change.
        keep: marks what is kept.
        rescale: "l1": so that the sum of sizes is that of `tau`, over the whole tensor (mergekit); "density": each
            element divided by its probability to be kept, so that its mean is right (DARE's paper, PEFT); "none".
        probability: that of each element, or one for all.

    >>> tau, keep = np.array([1.0, -3.0], np.float32), np.array([False, True])
    >>> [rescaled(tau, keep, how, 0.5).tolist() for how in ("l1", "density")]
    [[0.0, -4.0], [0.0, -6.0]]
    """
    kept = tau * keep
    if rescale == "density":
        return np.divide(kept, np.float32(probability), out=kept)
    if rescale == "l1":
        before, after = (float(np.abs(x).sum(dtype=np.float64)) for x in (tau, kept))
        if before >= _SMALLEST and after >= _SMALLEST:
            kept *= np.float32(before / after)
    return kept
