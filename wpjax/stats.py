"""Intervals and tests over prompts. The unit of resampling is the query: phrasings of one query are not independent."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binomtest, false_discovery_control, norm, rankdata
from scipy.stats import t as student


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float


class Resamples(NamedTuple):
    """Bootstrap samples of queries.

    Attributes:
        weights: [R, B], how often each sample holds each prompt.
        n_queries: how many queries a sample draws.
    """

    weights: Float[np.ndarray, "R B"]
    n_queries: int

    def tails(self, level: float) -> tuple[float, float]:
        """Percentiles of the resampled figure that bound its interval, expanded for few queries.

        Plain percentiles of n queries are too narrow by sqrt((n - 1) / n) and take the normal for Student's
        distribution; the expanded ones put both right: alpha' / 2 = Phi(-sqrt(n / (n - 1)) t_{alpha/2, n-1})
        (Hesterberg, arXiv 1411.5279, section 5.3).
        """
        n = max(self.n_queries, 2)
        tail = 100 * float(norm.cdf(np.sqrt(n / (n - 1)) * student.ppf((1 - level) / 2, n - 1)))
        return tail, 100 - tail


def resample(queries: Int[np.ndarray, " B"], n_resamples: int = 1000, seed: int = 0) -> Resamples:
    """Bootstrap samples of prompts: each draws as many queries as there are, with replacement.

    Args:
        queries: query index of each prompt.
        n_resamples: R.
        seed: of the draws.
    """
    distinct, member = np.unique(queries, return_inverse=True)
    n = len(distinct)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    return Resamples(draws[:, member].astype(np.float64), n)


def ratio_of_means(
    delta: Float[np.ndarray, "C B"], gap: Float[np.ndarray, " B"], resamples: Resamples, level: float = 0.95
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """mean(delta) / mean(gap) of each component, with an expanded percentile interval of the resampled ratio.

    The gap is resampled together with the effects, so its uncertainty is in the interval.

    Args:
        delta: change of score by component and prompt.
        gap: expert minus base by prompt.
        resamples: from `resample`.
        level: of the interval.

    Returns:
        (effect, low, high), each [C].
    """
    weights, tails = resamples.weights, resamples.tails(level)
    bounds = np.empty((2, len(delta)))
    total = weights @ gap
    for first in range(0, len(delta), 4096):  # keep R x C in bounds for tens of thousands of neurons
        part = slice(first, first + 4096)
        bounds[:, part] = np.percentile((weights @ delta[part].T) / total[:, None], tails, axis=0)
    return delta.mean(1) / gap.mean(), bounds[0], bounds[1]


def mean_interval(values: Float[np.ndarray, " B"], resamples: Resamples, level: float = 0.95) -> Interval:
    """The mean of one value a prompt, with its expanded percentile interval."""
    weights = resamples.weights
    means = (weights @ values) / weights.sum(1)
    low, high = np.percentile(means, resamples.tails(level))
    return Interval(float(values.mean()), float(low), float(high))


def sign_flip_p(
    delta: Float[np.ndarray, "C B"], queries: Int[np.ndarray, " B"], n_flips: int = 4096, seed: int = 0
) -> Float[np.ndarray, " C"]:
    """Two-sided p-value of "the effect is symmetric about zero", flipping the sign of whole queries.

    All patterns of signs are tried where there are at most `n_flips` of them, otherwise `n_flips` random ones, whose
    smallest p is 1 / (n_flips + 1). Where that is too coarse for many components, Hoeffding's bound on the same
    distribution is smaller and takes its place: p <= 2 exp(-(sum x)^2 / (2 sum x^2)) over queries' sums x.

    Args:
        delta: change of score by component and prompt.
        queries: query index of each prompt.
        n_flips: patterns of signs.
        seed: of random patterns.
    """
    distinct, member = np.unique(queries, return_inverse=True)
    n = len(distinct)
    sums = np.zeros((len(delta), n))
    np.add.at(sums.T, member, delta.T)
    every = 2**n <= n_flips
    if every:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_flips, n))
    p = np.empty(len(delta))
    for first in range(0, len(delta), 4096):
        part = sums[first : first + 4096]
        observed = np.abs(part.sum(1))
        # Rounding must not let a pattern that equals the data count as smaller than the data.
        as_large = (np.abs(signs @ part.T) >= observed * (1 - 1e-9)).sum(0)
        bound = 2 * np.exp(-np.square(observed) / (2 * np.maximum(np.square(part).sum(1), 1e-300)))
        found = as_large / len(signs) if every else np.minimum((1 + as_large) / (n_flips + 1), bound)
        p[first : first + 4096] = found
    return p


def benjamini_hochberg(p: Float[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
    """q-values: the false discovery rate at which each component would be reported."""
    return np.asarray(false_discovery_control(p, method="bh"))


def split_half_reliability(
    delta: Float[np.ndarray, "C B"], queries: Int[np.ndarray, " B"], n_splits: int = 100, seed: int = 0
) -> float:
    """How well the ranking of components by mean effect would repeat on other queries, in [-1, 1].

    The mean rank correlation r of two random halves of the queries, stepped up to the whole number of queries by
    Spearman and Brown: 2 r / (1 + r). NaN for fewer than three components or two queries.

    Args:
        delta: change of score by component and prompt.
        queries: query index of each prompt.
        n_splits: random halvings.
        seed: of the halvings.
    """
    rng, distinct = np.random.default_rng(seed), np.unique(queries)
    if len(delta) < 3 or len(distinct) < 2:
        return float("nan")
    found = []
    for _ in range(n_splits):
        half = np.isin(queries, rng.permutation(distinct)[: len(distinct) // 2])
        ranks = [rankdata(delta[:, mine].mean(1)) for mine in (half, ~half)]
        if all(np.ptp(r) for r in ranks):
            found.append(float(np.corrcoef(*ranks)[0, 1]))
    r = float(np.mean(found)) if found else float("nan")
    return 2 * r / (1 + r) if r > -1 else float("nan")


def missed(n_hits: int, n_sampled: int, n_rest: int, level: float = 0.95) -> Interval:
    """How many of the rest would be hits, from a random sample of it: estimate and Clopper-Pearson interval.

    Args:
        n_hits: hits in the sample.
        n_sampled: size of the sample, part of the rest.
        n_rest: how many the sample was drawn from.
        level: of the interval.
    """
    if n_sampled == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    if n_sampled == n_rest:
        return Interval(n_hits, n_hits, n_hits)
    share = binomtest(n_hits, n_sampled).proportion_ci(level, method="exact")
    return Interval(n_rest * n_hits / n_sampled, max(float(share.low * n_rest), n_hits), float(share.high * n_rest))
