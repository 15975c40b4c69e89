"""Intervals and tests over prompts against SciPy, exact enumeration and known distributions."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from wpjax.stats import benjamini_hochberg, mean_interval, ratio_of_means, resample, sign_flip_p


def test_bootstrap_of_a_mean_equals_scipy():
    values = np.random.default_rng(0).gamma(2.0, size=40)
    got = mean_interval(values, resample(np.arange(40), 20_000))
    expected = scipy_stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=0)
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


def test_ratio_interval_covers_as_often_as_it_says():
    rng, hits, n = np.random.default_rng(2), 0, 300
    for _ in range(n):
        gap = rng.normal(3, 1, 40)
        delta = 0.3 * gap + rng.normal(0, 0.5, 40)
        effect, low, high = ratio_of_means(delta[None], gap, resample(np.arange(40), 400))
        hits += low[0] <= 0.3 <= high[0]
        assert effect[0] == pytest.approx(delta.sum() / gap.sum())
    assert 0.89 <= hits / n <= 0.98


def test_sign_flips_equal_exact_enumeration():
    rng = np.random.default_rng(3)
    delta, queries = rng.normal(0.6, 1, (3, 8)), np.repeat(np.arange(4), 2)
    sums = delta.reshape(3, 4, 2).sum(2)
    flips = np.array(list(itertools.product([-1, 1], repeat=4)))
    exact = (np.abs(flips @ sums.T) >= np.abs(sums.sum(1)) - 1e-12).mean(0)
    np.testing.assert_allclose(sign_flip_p(delta, queries, 20_000), exact, atol=0.015)


def test_p_values_are_uniform_under_the_null():
    delta = np.random.default_rng(4).normal(size=(800, 24))
    p = sign_flip_p(delta, np.arange(24))
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01


def test_benjamini_hochberg_by_hand():
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.5])), [0.04, 0.16 / 3, 0.16 / 3, 0.5])
