"""Intervals and tests over prompts against SciPy, exact enumeration and known distributions."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from wpjax.stats import (
    benjamini_hochberg,
    confidence_sequence,
    mean_interval,
    missed_interval,
    n_needed,
    ratio_difference,
    ratio_of_means,
    resample,
    sign_flip_p,
    smallest_p,
    split_half_reliability,
)


def test_bootstrap_of_a_mean_equals_scipy():
    values = np.random.default_rng(0).gamma(2.0, size=40)
    resamples = resample(np.arange(40), 20_000)
    got = mean_interval(values, resamples)
    low, high = resamples.tails(0.95)
    expected = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", confidence_level=(high - low) / 100, rng=0
    )
    assert got.mean == values.mean()
    assert got.low == pytest.approx(expected.confidence_interval.low, abs=0.02)
    assert got.high == pytest.approx(expected.confidence_interval.high, abs=0.02)


def test_queries_are_the_unit_of_resampling():
    """Copying every prompt five times under the same query must not narrow the interval."""
    values = np.random.default_rng(1).normal(1, 1, 30)
    one = mean_interval(values, resample(np.arange(30), 4000))
    copied = mean_interval(np.repeat(values, 5), resample(np.repeat(np.arange(30), 5), 4000))
    assert copied.low == pytest.approx(one.low, abs=0.02)
    assert copied.high == pytest.approx(one.high, abs=0.02)


def test_intervals_of_many_queries_have_the_normals_tails_and_of_few_students():
    assert resample(np.arange(100_000), 1).tails(0.95) == pytest.approx((2.5, 97.5), abs=1e-3)
    n = 6  # mean +- t sd / sqrt(n), where the bootstrap's own standard error is sd sqrt((n - 1) / n) / sqrt(n)
    values = np.random.default_rng(5).normal(size=(400, n))
    low, _ = resample(np.arange(n), 1).tails(0.95)
    expected = scipy_stats.t.ppf(0.025, n - 1) * values.std(1, ddof=1) / np.sqrt(n)
    got = scipy_stats.norm.ppf(low / 100) * values.std(1) / np.sqrt(n)
    np.testing.assert_allclose(got, expected)


@pytest.mark.parametrize("n_queries", [8, 40])
def test_ratio_interval_covers_as_often_as_it_says(n_queries):
    rng, hits, n = np.random.default_rng(2), 0, 400
    for _ in range(n):
        gap = rng.normal(3, 1, n_queries)
        delta = 0.3 * gap + rng.normal(0, 0.5, n_queries)
        effect, low, high = ratio_of_means(delta[None], gap, resample(np.arange(n_queries), 1000))
        hits += low[0] <= 0.3 <= high[0]
        assert effect[0] == pytest.approx(delta.sum() / gap.sum())
    assert 0.915 <= hits / n <= 0.985


def test_the_difference_of_two_effects_is_an_effect_where_the_gap_is_the_same():
    rng, queries = np.random.default_rng(9), np.repeat(np.arange(6), 2)
    mine, theirs, gap = rng.normal(1, 1, (3, 12)), rng.normal(1, 1, (3, 12)), rng.normal(3, 1, 12)
    got = ratio_difference((mine, theirs), (gap, gap), resample(queries))
    np.testing.assert_allclose(got, ratio_of_means(mine - theirs, gap, resample(queries)))
    alone = ratio_difference((mine, 0 * theirs), (gap, gap + 1), resample(queries))
    np.testing.assert_allclose(alone, ratio_of_means(mine, gap, resample(queries)))


def test_sign_flips_equal_exact_enumeration():
    rng = np.random.default_rng(3)
    delta, queries = rng.normal(0.6, 1, (3, 8)), np.repeat(np.arange(4), 2)
    sums = delta.reshape(3, 4, 2).sum(2)
    flips = np.array(list(itertools.product([-1, 1], repeat=4)))
    exact = (np.abs(flips @ sums.T) >= np.abs(sums.sum(1)) - 1e-12).mean(0)
    np.testing.assert_allclose(sign_flip_p(delta, queries), exact)
    drawn = sign_flip_p(np.hstack([delta] * 4), np.repeat(np.arange(16), 2), n_flips=2**16 - 1)
    np.testing.assert_allclose(
        drawn, sign_flip_p(np.hstack([delta] * 4), np.repeat(np.arange(16), 2), 2**16), atol=0.01
    )


def test_hoeffdings_bound_lies_above_the_exact_p_and_below_what_draws_can_show():
    delta = np.random.default_rng(6).normal(2.0, 0.3, (5, 16))
    bounded = sign_flip_p(delta, np.arange(16), n_flips=50)
    assert (bounded < 1 / 51).all()
    assert (bounded >= sign_flip_p(delta, np.arange(16), n_flips=2**16)).all()


def test_p_values_are_uniform_under_the_null():
    delta = np.random.default_rng(4).normal(size=(800, 24))
    p = sign_flip_p(delta, np.arange(24))
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01


@pytest.mark.parametrize("n", [1, 4, 6, 11, 12, 13, 19, 30])
def test_no_p_is_smaller_than_that_of_equal_effects(n):
    rng = np.random.default_rng(n)
    others = np.concatenate([rng.exponential(size=(50, n)), 1 + 0.01 * rng.normal(size=(50, n)), np.eye(n)])
    assert sign_flip_p(others, np.arange(n)).min() >= smallest_p(n) * (1 - 1e-12)
    if n <= 12:  # every pattern was counted one by one
        patterns = np.array(list(itertools.product([-1, 1], repeat=n)))
        assert smallest_p(n) == (np.abs(patterns.sum(1)) >= n).mean() == 2 / 2**n
    else:
        assert smallest_p(n) >= min(1 / 4097, 2 * np.exp(-n / 2))
        assert n < 19 or smallest_p(n) == pytest.approx(2 * np.exp(-n / 2))


@pytest.mark.parametrize(("p", "n"), list(itertools.product((1e-5, 1 / 128, 0.029, 0.06), (1, 20, 64))))
def test_how_many_must_have_a_small_p_by_trying_all_numbers(p, n):
    found = [k for k in range(1, n + 1) if benjamini_hochberg(np.repeat([p, 1.0], [k, n - k]))[0] < 0.05]
    assert n_needed(p, n) == found[0] if found else n_needed(p, n) > n


def test_benjamini_hochberg_by_hand():
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.5])), [0.04, 0.16 / 3, 0.16 / 3, 0.5])


def test_split_half_reliability_of_two_queries_is_spearman_stepped_up():
    delta = np.random.default_rng(7).normal(size=(30, 4))
    queries = np.array([0, 0, 1, 1])
    r = scipy_stats.spearmanr(delta[:, :2].mean(1), delta[:, 2:].mean(1)).statistic
    assert split_half_reliability(delta, queries) == pytest.approx(2 * r / (1 + r))


def test_split_half_reliability_knows_signal_from_noise():
    rng = np.random.default_rng(8)
    noise = rng.normal(size=(300, 24))
    assert abs(split_half_reliability(noise, np.arange(24))) < 0.2
    signal = rng.normal(size=(300, 1))
    # of 24 queries the mean has signal variance 1 and noise variance 24 / 24: reliability 1 / 2
    assert split_half_reliability(signal + 24**0.5 * noise, np.arange(24)) == pytest.approx(0.5, abs=0.1)
    assert np.isnan(split_half_reliability(noise[:2], np.arange(24)))
    assert np.isnan(split_half_reliability(noise, np.zeros(24, int)))


def test_the_number_missed_by_hand():
    none = missed_interval(0, 64, 1000)
    assert (none.mean, none.low) == (0, 0)
    assert none.high == pytest.approx(1000 * (1 - 0.025 ** (1 / 64)))
    some = missed_interval(3, 30, 300)
    by_quantiles = scipy_stats.beta.ppf(0.025, 3, 28), scipy_stats.beta.ppf(0.975, 4, 27)  # Clopper and Pearson's
    assert some.mean == 30
    assert (some.low, some.high) == pytest.approx((300 * by_quantiles[0], 300 * by_quantiles[1]))
    assert missed_interval(2, 5, 5) == (2, 2, 2)
    assert np.isnan(missed_interval(0, 0, 7).mean)


def capital(x, m, side, alpha=0.05):
    """What a gambler has at each step, by the formulas of arXiv 2010.09686, (24) to (27), written out step by step."""
    money, variance = [1.0], 0.25
    for i, value in enumerate(x, 1):
        bet = np.sqrt(2 * np.log(2 / alpha) / (variance * i * np.log(i + 1)))
        bet = min(bet, 0.75 / m if side > 0 else 0.75 / (1 - m))
        money.append(money[-1] * (1 + side * bet * (value - m)))
        seen = np.array(x[:i])
        means = [(0.5 + seen[: j + 1].sum()) / (j + 2) for j in range(i)]
        variance = (0.25 + sum((s - u) ** 2 for s, u in zip(seen, means, strict=True))) / (i + 1)
    return np.array(money[1:])


def test_a_confidence_sequence_is_what_a_gambler_cannot_rule_out():
    values = np.random.default_rng(0).choice([-1.0, 0.0, 0.5, 1.0], 12, p=[0.1, 0.2, 0.2, 0.5])
    _, low, high = confidence_sequence(values)
    x, enough = (values + 1) / 2, 2 / 0.05
    for m, is_in in ((low + 0.01, True), (high - 0.01, True), (low - 0.01, False), (high + 0.01, False)):
        most = max(capital(x, (m + 1) / 2, side).max() for side in (1, -1))
        assert (most < enough) == is_in


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_a_confidence_sequence_holds_at_every_look(p):
    rng, missed = np.random.default_rng(0), 0
    for _ in range(200):
        values = 2.0 * (rng.random(40) < p) - 1
        looks = [confidence_sequence(values[:n]) for n in range(4, 41, 4)]
        missed += any(not low <= 2 * p - 1 <= high for _, low, high in looks)
        assert all(b.low >= a.low - 1e-9 and b.high <= a.high + 1e-9 for a, b in itertools.pairwise(looks))
    assert missed <= 0.05 * 200 + 8  # within chance of 1 in 20
