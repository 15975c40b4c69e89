"""Path estimators: integrated gradients and the secant adjoint add up to the gap, and meet the gradient nearby."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import make_anchor
from tests.tiny import as_pair, build_pair
from wpjax.components import KINDS, enumerate_components
from wpjax.estimators.screens import integrated_gradients, weight_gradient
from wpjax.estimators.secant import secant_adjoint, secant_change, secant_scores
from wpjax.estimators.unit_slopes import unit_slopes
from wpjax.metrics.answers import decision_metric, kl_metric, response_metric
from wpjax.metrics.metric import scores
from wpjax.models.secant import logarithmic_mean
from wpjax.patching import PatchMask


@pytest.fixture(scope="module", params=["llama-biases", "gpt2-tied", "gemma2", "gpt-neox", "olmo2", "mixtral"])
def hf_pair(request, tmp_path_factory):
    return build_pair(request.param, tmp_path_factory.mktemp(request.param))


def metrics(pair, batch):
    if (
        not pair.cfg.gated or pair.cfg.attn_softcap is not None or pair.cfg.joint_qk_norm or pair.cfg.n_experts
    ):  # others have them all
        return [response_metric(pair, batch, 4)]
    anchor = dataclasses.replace(make_anchor(pair, 1), n_response=2)
    made = [make(pair, batch, 4) for make in (response_metric, kl_metric, decision_metric)]
    return [anchor.metric(pair, batch), *made]


def gap(pair, metric):
    return scores(pair.cfg, pair.expert, metric) - scores(pair.cfg, pair.base, metric)


def total(by_unit):
    return sum(np.asarray(v, np.float64).reshape(len(v), -1).sum(1) for v in by_unit.values())


def test_the_logarithmic_mean_of_probabilities_far_apart():
    """(b - a) / (log b - log a), symmetric; e^-120 and e^-1, equal ones, and nearly equal ones."""
    a, b = jnp.array([-120.0, -1.0, -2.0, -2.0]), jnp.array([-1.0, -120.0, -2.0, -2.00001])
    expected = [np.exp(-1) / 119, np.exp(-1) / 119, np.exp(-2), np.exp(-2.000005)]
    np.testing.assert_allclose(logarithmic_mean(a, b), expected, rtol=1e-5)


def test_secant_scores_of_all_units_sum_to_the_gap_of_each_prompt(pair, batch):
    for metric in metrics(pair, batch):
        assert np.abs(gap(pair, metric)).max() > 0.1
        by_unit = secant_scores(pair.cfg, pair.base, pair.expert, metric)
        np.testing.assert_allclose(total(by_unit), gap(pair, metric), atol=1e-4, err_msg=metric.name)


def test_the_secant_change_is_linear_in_the_units(pair, batch):
    metric = response_metric(pair, batch, 4)
    rng = np.random.default_rng(0)
    units = [
        jax.tree.map(lambda g: jnp.asarray(rng.uniform(size=g.shape), jnp.float32), PatchMask.full(pair.cfg))
        for _ in range(2)
    ]
    run = jax.jit(lambda mask: secant_change(pair.cfg, pair.base, pair.expert, mask, metric))
    both = jax.tree.map(lambda a, b: a + 2 * b, *units)
    np.testing.assert_allclose(run(both), run(units[0]) + 2 * run(units[1]), atol=1e-4)
    np.testing.assert_allclose(run(PatchMask.full(pair.cfg, jnp.float32)), gap(pair, metric), atol=1e-4)


def test_nearby_the_secant_is_the_gradient(pair, batch):
    step = 3e-3 if pair.cfg.n_experts else 1e-2  # so small that every token keeps its routed experts
    near = jax.tree.map(lambda b, e: b + step * (e - b), pair.base, pair.expert)
    components = [c for kind in KINDS for c in enumerate_components(pair.cfg, [kind])]
    for metric in metrics(pair, batch)[-1:]:
        some = [c for c in components if metric.reaches(c)]
        slope = weight_gradient(pair.cfg, pair.base, near, some, metric)
        share = secant_adjoint(pair.cfg, pair.base, near, some, metric)
        assert np.abs(share - slope).max() < 0.06 * np.abs(slope).max()


def test_integrated_gradients_of_all_units_sum_to_the_gap(batch, tmp_path):
    pair = as_pair(build_pair("llama-gqa3", tmp_path))
    metric = response_metric(pair, batch, 4)
    steps = 48
    summed = sum(total(unit_slopes(pair.cfg, pair.base, pair.expert, metric, (i + 0.5) / steps)) for i in range(steps))
    np.testing.assert_allclose(summed / steps, gap(pair, metric), rtol=0.02, atol=0.02)
    heads = enumerate_components(pair.cfg, ["head"])
    two = integrated_gradients(pair.cfg, pair.base, pair.expert, heads, metric, steps=2)
    by_hand = [unit_slopes(pair.cfg, pair.base, pair.expert, metric, at)["head"] for at in (0.25, 0.75)]
    expected = np.mean(by_hand, axis=0).reshape(len(batch), -1).T
    np.testing.assert_allclose(two, expected, atol=1e-6)
