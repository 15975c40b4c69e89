"""Intervals and tests over prompts. The unit of chance is the query, as phrasings of one query are not independent.

So whole queries are resampled, flipped and halved (docs/method.md, "Controls and statistics").
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binomtest, false_discovery_control, norm, rankdata
from scipy.stats import t as student


class Interval(NamedTuple):
    """An estimate with its interval.

    Attributes:
        mean: the estimate.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    mean: float
    low: float
    high: float


class Resamples(NamedTuple):
    """R bootstrap samples of queries.

    Attributes:
        weights: [R, B], number of times that each prompt is in each sample.
        n_queries: number of queries in a sample.
    """

    weights: Float[np.ndarray, "R B"]
    n_queries: int

    def tails(self, level: float) -> tuple[float, float]:
        """Percentiles, in [0, 100], of the resampled figure that are the ends of its interval.

        With few queries, the plain percentiles make intervals that are too narrow: by a factor sqrt((n - 1) / n), and
        because they use the normal distribution where Student's applies. Expanded percentiles correct both
        (Hesterberg, arXiv 1411.5279, section 5.3):

            alpha' / 2 = Phi(-sqrt(n / (n - 1)) t_{alpha/2, n-1})        1 - alpha: the level, n: queries

        Args:
            level: the level of the interval, such as 0.95.

        >>> import numpy as np
        >>> from wpjax.stats import resample
        >>> few, many = resample(np.arange(5)), resample(np.arange(500))
        >>> [round(few.tails(0.95)[0], 2), round(many.tails(0.95)[0], 2)]
        [0.1, 2.46]
        """
        n = max(self.n_queries, 2)
        tail = 100 * float(norm.cdf(np.sqrt(n / (n - 1)) * student.ppf((1 - level) / 2, n - 1)))
        return tail, 100 - tail


def resample(queries: Int[np.ndarray, " B"], n_resamples: int = 1000, seed: int = 0) -> Resamples:
    """Bootstrap samples of prompts. Each sample draws queries with replacement, as many as there are.

    Args:
        queries: [B], index of each prompt's query.
        n_resamples: number of samples, R.
        seed: seed of the draws.

    >>> import numpy as np
    >>> from wpjax.stats import resample
    >>> weights = resample(np.array([0, 0, 1, 2]), n_resamples=100).weights
    >>> bool((weights[:, 0] == weights[:, 1]).all())  # the two phrasings of query 0 are always drawn together
    True
    """
    distinct, member = np.unique(queries, return_inverse=True)
    n = len(distinct)
    # How often each query is drawn is multinomial; every phrasing of a query counts that often.
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    return Resamples(draws[:, member].astype(np.float64), n)


def ratio_of_means(
    delta: Float[np.ndarray, "C B"], gap: Float[np.ndarray, " B"], resamples: Resamples, level: float = 0.95
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """The effect of each component, mean(delta) / mean(gap), with its bootstrap interval (expanded percentiles).

    The gap is resampled together with the changes, so its uncertainty is in the interval.

    Args:
        delta: [C, B], change of the metric by each component on each prompt.
        gap: [B], metric of the expert minus that of the base.
        resamples: bootstrap samples of these prompts, from `resample`.
        level: level of the interval.

    Returns:
        effect, lower end and upper end, [C] each, as shares of the gap.

    >>> import numpy as np
    >>> from wpjax.stats import ratio_of_means, resample
    >>> gap = np.array([1.0, 2.0, 3.0, 4.0])
    >>> effect, low, high = ratio_of_means(0.5 * gap[None], gap, resample(np.arange(4)))
    >>> effect.tolist(), low.tolist(), high.tolist()  # the same share of every prompt's gap: no uncertainty
    ([0.5], [0.5], [0.5])
    """
    weights, tails = resamples.weights, resamples.tails(level)
    bounds = np.empty((2, len(delta)))
    total = weights @ gap
    for first in range(0, len(delta), 4096):  # [R, C] would not fit in memory for tens of thousands of neurons
        part = slice(first, first + 4096)
        bounds[:, part] = np.percentile((weights @ delta[part].T) / total[:, None], tails, axis=0)
    return delta.mean(1) / gap.mean(), bounds[0], bounds[1]


def ratio_difference(
    delta: tuple[Float[np.ndarray, "C B"], Float[np.ndarray, "C B"]],
    gap: tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]],
    resamples: Resamples,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """The effect of each component in one sweep minus that in another of the same prompts, with its interval.

    Both are resampled together, so what an easy query adds to both drops out (expanded percentiles, as for
    `ratio_of_means`).

    Args:
        delta: changes of the metric in each sweep, [C, B]; prompts in one order.
        gap: metric of the expert minus that of the base in each sweep, [B].
        resamples: bootstrap samples of these prompts, from `resample`.
        level: level of the interval.

    Returns:
        difference, lower end and upper end, [C] each, as shares of the gaps.

    >>> import numpy as np
    >>> from wpjax.stats import ratio_difference, resample
    >>> gap = np.array([1.0, 2.0, 3.0, 4.0])
    >>> found = ratio_difference((0.5 * gap[None], 0.25 * gap[None]), (gap, gap), resample(np.arange(4)))
    >>> tuple(values.tolist() for values in found)
    ([0.25], [0.25], [0.25])
    """
    weights, tails = resamples.weights, resamples.tails(level)
    totals = [weights @ g for g in gap]
    bounds = np.empty((2, len(delta[0])))
    for first in range(0, bounds.shape[1], 4096):
        part = slice(first, first + 4096)
        a, b = ((weights @ d[part].T) / total[:, None] for d, total in zip(delta, totals, strict=True))
        bounds[:, part] = np.percentile(a - b, tails, axis=0)
    a, b = (d.mean(1) / g.mean() for d, g in zip(delta, gap, strict=True))
    return a - b, bounds[0], bounds[1]


def mean_interval(values: Float[np.ndarray, " B"], resamples: Resamples, level: float = 0.95) -> Interval:
    """The mean over prompts, with its bootstrap interval (expanded percentiles).

    Args:
        values: [B], a value for each prompt.
        resamples: bootstrap samples of these prompts, from `resample`.
        level: level of the interval.

    >>> import numpy as np
    >>> from wpjax.stats import mean_interval, resample
    >>> interval = mean_interval(np.array([1.0, 2.0, 3.0, 4.0]), resample(np.arange(4)))
    >>> interval.mean, 0 < interval.low < 2.5 < interval.high < 5
    (2.5, True)
    """
    weights = resamples.weights
    means = (weights @ values) / weights.sum(1)
    low, high = np.percentile(means, resamples.tails(level))
    return Interval(float(values.mean()), float(low), float(high))


def sign_flip_p(
    delta: Float[np.ndarray, "C B"], queries: Int[np.ndarray, " B"], n_flips: int = 4096, seed: int = 0
) -> Float[np.ndarray, " C"]:
    """Two-sided p-value of each component's effect, by flipping the signs of whole queries.

    The null hypothesis: the effect on a query is as likely x as -x. p is the share of sign patterns whose sum over
    queries is as large as the observed one.

    All patterns are tried if there are at most `n_flips` of them. Otherwise `n_flips` random patterns are tried, and
    their p is at least 1 / (n_flips + 1). That is too coarse to correct for many components. So Hoeffding's bound on
    the same distribution is used where it is smaller: p <= 2 exp(-(sum x)^2 / (2 sum x^2)); x is the sum of a query's
    prompts.

    Args:
        delta: [C, B], change of the metric by each component on each prompt.
        queries: [B], index of each prompt's query.
        n_flips: number of sign patterns, at most.
        seed: seed of random patterns.

    >>> import numpy as np
    >>> from wpjax.stats import sign_flip_p
    >>> sign_flip_p(np.array([[1.0, 2.0, 3.0]]), np.arange(3)).tolist()  # 2 of 8 patterns: all signs kept, all flipped
    [0.25]
    """
    distinct, member = np.unique(queries, return_inverse=True)
    n = len(distinct)
    sums = np.zeros((len(delta), n))  # of each query's prompts, [C, queries]
    np.add.at(sums.T, member, delta.T)
    tries_all = 2**n <= n_flips
    if tries_all:
        # Row i holds the binary digits of i as signs, so the rows are all patterns.
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_flips, n))
    p = np.empty(len(delta))
    for first in range(0, len(delta), 4096):
        part = sums[first : first + 4096]
        observed = np.abs(part.sum(1))
        # Rounding must not make the pattern that is the data itself count as smaller than the data.
        as_large = (np.abs(signs @ part.T) >= observed * (1 - 1e-9)).sum(0)
        bound = 2 * np.exp(-np.square(observed) / (2 * np.maximum(np.square(part).sum(1), 1e-300)))
        # Random patterns may lack the data itself, so it is counted as one more of them.
        of_part = as_large / len(signs) if tries_all else np.minimum((1 + as_large) / (n_flips + 1), bound)
        p[first : first + 4096] = of_part
    return p


def smallest_p(n_queries: int, n_flips: int = 4096, seed: int = 0) -> float:
    """The smallest p-value that `sign_flip_p` can give with so many queries: that of an equal effect on all of them.

    The data itself and the data with all signs flipped always count as being as large; here no other pattern does. With
    all patterns tried that is 2 / 2^n. And (sum x)^2 <= n sum x^2, so Hoeffding's bound is smallest here, too.

    Args:
        n_queries: number of queries, n; at least 1.
        n_flips: as for `sign_flip_p`.
        seed: likewise.

    >>> from wpjax.stats import smallest_p
    >>> smallest_p(4), smallest_p(8)
    (0.125, 0.0078125)
    """
    return float(sign_flip_p(np.ones((1, n_queries)), np.arange(n_queries), n_flips, seed)[0])


def n_needed(p: float, n_tests: int, level: float = 0.05) -> int:
    """How many tests of a family must have a p-value as small as p, for their q-values to be below a level.

    If k of n tests have p and the others more, then by Benjamini and Hochberg the k have q = n p / k.

    Args:
        p: the p-value.
        n_tests: n, number of tests in the family.
        level: the level.

    >>> from wpjax.stats import n_needed
    >>> n_needed(0.01, 100)  # with 20 of them q would be 0.05, which is not below it
    21
    """
    return max(1, int(np.floor(n_tests * p / level)) + 1)


def benjamini_hochberg(p: Float[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
    """q-values: the smallest false discovery rate at which each component is reported (Benjamini and Hochberg).

    Args:
        p: [C], p-values of the whole family of tests.
    """
    return np.asarray(false_discovery_control(p, method="bh"))


def split_half_reliability(
    delta: Float[np.ndarray, "C B"], queries: Int[np.ndarray, " B"], n_splits: int = 100, seed: int = 0
) -> float:
    """How well the ranking of components by mean effect would repeat on other queries; at most 1.

    r is the mean rank correlation of the effects on two random halves of the queries. A ranking from all queries is
    more reliable than one from half of them, so r is stepped up by Spearman and Brown: 2 r / (1 + r).

    Args:
        delta: [C, B], change of the metric by each component on each prompt.
        queries: [B], index of each prompt's query.
        n_splits: number of random halvings.
        seed: seed of the halvings.

    Returns:
        the reliability; NaN for fewer than three components or fewer than two queries.
    """
    rng, distinct = np.random.default_rng(seed), np.unique(queries)
    if len(delta) < 3 or len(distinct) < 2:
        return float("nan")
    correlations = []
    for _ in range(n_splits):
        half = np.isin(queries, rng.permutation(distinct)[: len(distinct) // 2])
        ranks = [rankdata(delta[:, prompts].mean(1)) for prompts in (half, ~half)]
        if all(np.ptp(r) for r in ranks):  # without any spread there is no correlation
            correlations.append(float(np.corrcoef(*ranks)[0, 1]))
    r = float(np.mean(correlations)) if correlations else float("nan")
    return 2 * r / (1 + r) if r > -1 else float("nan")


def missed_interval(n_hits: int, n_sampled: int, n_rest: int, level: float = 0.95) -> Interval:
    """Number of hits among the components that were left out, estimated from a random sample of them.

    Args:
        n_hits: number of hits in the sample.
        n_sampled: size of the sample.
        n_rest: number of components that the sample was drawn from; the sample is part of them.
        level: level of the interval.

    Returns:
        the estimate with its Clopper-Pearson interval; NaN without a sample.

    >>> from wpjax.stats import missed_interval
    >>> missed_interval(3, 10, 10)  # all were sampled, so the number is known
    Interval(mean=3, low=3, high=3)
    >>> missed_interval(1, 10, 100).mean
    10.0
    """
    if n_sampled == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    if n_sampled == n_rest:
        return Interval(n_hits, n_hits, n_hits)
    share = binomtest(n_hits, n_sampled).proportion_ci(level, method="exact")
    return Interval(n_rest * n_hits / n_sampled, max(float(share.low * n_rest), n_hits), float(share.high * n_rest))


def confidence_sequence(values: Float[np.ndarray, " n"], level: float = 0.95) -> Interval:
    """The mean of numbers in [-1, 1], with an interval that holds at every n at once.

    One may look after every new number and stop when one likes: the chance that the interval ever misses the true mean
    is at most 1 - level, whatever the distribution. An interval for one fixed n is narrower, but not valid so.

    The method is betting (Waudby-Smith and Ramdas, arXiv 2010.09686, Theorem 3: hedged capital, predictable plug-in
    bets, c = 3/4). For x = (value + 1) / 2 and every possible mean m

        K+_n(m) = prod_i 1 + min(|l_i|, c / m) (x_i - m),    K-_n(m) = prod_i 1 - min(|l_i|, c / (1 - m)) (x_i - m)

    are what a gambler has who bets that the mean is above m, or below. m is ruled out once either exceeds
    2 / (1 - level). l_i depends on x_1 to x_(i-1) alone.

    Args:
        values: [n], in [-1, 1], in the order in which they came; one for each independent unit (query).
        level: probability that the interval holds.

    Returns:
        the mean of `values`, and the interval; [-1, 1] before the first.

    >>> confidence_sequence(np.ones(6)).low > 0, confidence_sequence(np.ones(7)).low > 0
    (False, True)
    """
    x, alpha = (np.asarray(values, float) + 1) / 2, 1 - level
    if not len(x):
        return Interval(float("nan"), -1.0, 1.0)
    i = np.arange(1, len(x) + 1)
    # Running estimates that start from a mean of 1/2 and a variance of 1/4, as if one number had been seen before.
    mean = (0.5 + np.cumsum(x)) / (i + 1)
    variance = (0.25 + np.cumsum(np.square(x - mean))) / (i + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    bet = np.sqrt(2 * np.log(2 / alpha) / (before * i * np.log(i + 1)))[:, None]
    m = np.linspace(0, 1, 2001)[None, 1:-1]
    above = np.log1p(np.minimum(bet, 0.75 / m) * (x[:, None] - m)).cumsum(0)
    below = np.log1p(-np.minimum(bet, 0.75 / (1 - m)) * (x[:, None] - m)).cumsum(0)
    # Once ruled out, a mean stays so.
    possible = np.flatnonzero(np.maximum(above, below).max(0) < np.log(2 / alpha))
    if not len(possible):  # an interval narrower than the grid
        return Interval(float(np.mean(values)), *(2 * float(x.mean()) - 1 + step for step in (-2e-3, 2e-3)))
    # One step of the grid wider, so that what lies between two points of it is not ruled out by mistake.
    low, high = (float(m[0, possible[at]]) + step for at, step in ((0, -5e-4), (-1, 5e-4)))
    return Interval(float(np.mean(values)), max(2 * low - 1, -1.0), min(2 * high - 1, 1.0))
