"""Intervals and tests over prompts. The unit of resampling is the query: phrasings of one query are not independent."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import false_discovery_control


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float


def resample(queries: Int[np.ndarray, " B"], n_resamples: int = 1000, seed: int = 0) -> Float[np.ndarray, "R B"]:
    """Bootstrap weights of prompts: each row draws as many queries as there are, with replacement.

    Args:
        queries: query index of each prompt.
        n_resamples: R.
        seed: of the draws.
    """
    distinct, member = np.unique(queries, return_inverse=True)
    n = len(distinct)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    return draws[:, member].astype(np.float64)


def ratio_of_means(
    delta: Float[np.ndarray, "C B"],
    gap: Float[np.ndarray, " B"],
    weights: Float[np.ndarray, "R B"],
    level: float = 0.95,
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """mean(delta) / mean(gap) of each component, with a percentile interval of the resampled ratio.

    The gap is resampled together with the effects, so its uncertainty is in the interval.

    Args:
        delta: change of score by component and prompt.
        gap: expert minus base by prompt.
        weights: from `resample`.
        level: of the interval.

    Returns:
        (effect, low, high), each [C].
    """
    tails = [50 * (1 - level), 50 * (1 + level)]
    bounds = np.empty((2, len(delta)))
    total = weights @ gap
    for first in range(0, len(delta), 4096):  # keep R x C in bounds for tens of thousands of neurons
        part = slice(first, first + 4096)
        bounds[:, part] = np.percentile((weights @ delta[part].T) / total[:, None], tails, axis=0)
    return delta.mean(1) / gap.mean(), bounds[0], bounds[1]


def mean_interval(values: Float[np.ndarray, " B"], weights: Float[np.ndarray, "R B"], level: float = 0.95) -> Interval:
    """The mean of one value a prompt, with its bootstrap interval."""
    means = (weights @ values) / weights.sum(1)
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    return Interval(float(values.mean()), float(low), float(high))


def sign_flip_p(
    delta: Float[np.ndarray, "C B"], queries: Int[np.ndarray, " B"], n_flips: int = 4000, seed: int = 0
) -> Float[np.ndarray, " C"]:
    """Two-sided p-value of "the effect is symmetric about zero", flipping the sign of whole queries at random.

    Args:
        delta: change of score by component and prompt.
        queries: query index of each prompt.
        n_flips: random sign patterns; the smallest possible p is 1 / (n_flips + 1).
        seed: of the patterns.
    """
    distinct, member = np.unique(queries, return_inverse=True)
    sums = np.zeros((len(delta), len(distinct)))
    np.add.at(sums.T, member, delta.T)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_flips, len(distinct)))
    p = np.empty(len(delta))
    for first in range(0, len(delta), 4096):
        part = sums[first : first + 4096]
        observed = np.abs(part.sum(1))
        # Rounding must not let a pattern that equals the data count as smaller than the data.
        as_large = np.abs(signs @ part.T) >= observed * (1 - 1e-9)
        p[first : first + 4096] = (1 + as_large.sum(0)) / (n_flips + 1)
    return p


def benjamini_hochberg(p: Float[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
    """q-values: the false discovery rate at which each component would be reported."""
    return np.asarray(false_discovery_control(p, method="bh"))
