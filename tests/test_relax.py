"""Learned masks against planted truth, finite differences and hand-worked thresholds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wpjax import PatchMask, enumerate_components, materialize
from wpjax.components import n_parameters
from wpjax.errors import ComponentError
from wpjax.metrics.metric import scores
from wpjax.patching import patch
from wpjax.relax.gates import Gates
from wpjax.relax.learn import RelaxConfig, learn
from wpjax.relax.objectives import Recover, Weighted
from wpjax.relax.parametrisations import HardConcrete, Nested, StraightThrough, threshold

KINDS = ("head", "kv_group", "neuron")


def test_gates_of_zeros_and_ones_are_the_hard_patch(family_pair):
    cfg, rng = family_pair.cfg, np.random.default_rng(0)
    components = enumerate_components(cfg, (*KINDS, "norm"))
    gates = Gates.of(cfg, components)
    values = rng.integers(0, 2, len(components))
    chosen = [c for c, value in zip(components, values, strict=True) if value]
    relaxed = materialize(family_pair.base, family_pair.expert, gates.mask(jnp.asarray(values, jnp.float32)))
    hard = materialize(family_pair.base, family_pair.expert, PatchMask.of(cfg, chosen))
    jax.tree.map(np.testing.assert_array_equal, relaxed, hard)


def test_shares_are_those_of_the_parameters(family_pair):
    components = enumerate_components(family_pair.cfg, KINDS)
    sizes = np.array([n_parameters(family_pair.cfg, c) for c in components])
    np.testing.assert_allclose(Gates.of(family_pair.cfg, components).share, sizes / sizes.sum(), rtol=1e-5)


def test_components_that_overlap_are_refused(family_pair):
    components = enumerate_components(family_pair.cfg, ("attn", "head"))
    with pytest.raises(ComponentError, match=r"L0\.head\.0 and L0\.attn own the same weights"):
        Gates.of(family_pair.cfg, components)
    with pytest.raises(ComponentError, match="no component"):
        Gates.of(family_pair.cfg, [])


def test_a_budget_is_filled_and_not_exceeded(family_pair):
    components = enumerate_components(family_pair.cfg, KINDS)
    gates = Gates.of(family_pair.cfg, components)
    order = np.random.default_rng(0).permutation(len(components)).astype(np.float32)
    for share in (0.0, 0.1, 0.5, 1.0):
        chosen = np.asarray(gates.largest(jnp.asarray(order), share)) > 0
        taken = np.asarray(gates.share)[chosen].sum()
        assert taken <= share + 1e-5
        left = order[~chosen]
        if left.size:  # the next one would have been too much
            assert taken + np.asarray(gates.share)[~chosen][left.argmax()] > share
        assert not left.size or not chosen.any() or order[chosen].min() > left.max()


@pytest.mark.parametrize("budget", [0.03, 0.4, 0.9])
def test_threshold_keeps_the_budget_and_its_slope_is_the_implicit_one(budget):
    rng = np.random.default_rng(1)
    numbers, share = jnp.asarray(rng.normal(size=9), jnp.float32), rng.uniform(0.1, 1, 9)
    share = jnp.asarray(share / share.sum(), jnp.float32)
    target, temperature = jnp.asarray(budget, jnp.float32), 0.3
    t = threshold(numbers, share, target, temperature)
    assert float(share @ jax.nn.sigmoid((numbers - t) / temperature)) == pytest.approx(budget, abs=1e-5)
    slope = jax.grad(lambda s: threshold(s, share, target, temperature))(numbers)
    for c, step in itertools.product(range(9), (0.01,)):
        up, down = (threshold(numbers.at[c].add(d), share, target, temperature) for d in (step, -step))
        assert float(slope[c]) == pytest.approx(float(up - down) / (2 * step), abs=2e-3)


def test_straight_through_is_hard_and_has_the_slope_of_the_sigmoid(family_pair):
    gates = Gates.of(family_pair.cfg, enumerate_components(family_pair.cfg, ["head"]))
    numbers = jnp.linspace(-1.0, 1.0, len(gates))
    drawn, back = jax.vjp(lambda a: StraightThrough().draw(a, gates, jax.random.key(0)), numbers)
    assert set(np.asarray(drawn).round(6).tolist()) == {0.0, 1.0}
    soft = np.asarray(jax.nn.sigmoid(numbers))
    np.testing.assert_allclose(back(jnp.ones(len(gates)))[0], soft * (1 - soft), rtol=1e-5)


def test_price_of_hard_concrete_is_the_chance_that_a_gate_is_open(family_pair):
    gates = Gates.of(family_pair.cfg, enumerate_components(family_pair.cfg, ["head"]))
    numbers, gate = jnp.linspace(-2.0, 2.0, len(gates)), HardConcrete(weight=1.0)
    draws = jax.vmap(lambda key: gate.draw(numbers, gates, key))(jax.random.split(jax.random.key(0), 4000))
    expected = float(((draws > 0).mean(0) * gates.share).sum())
    assert float(gate.price(numbers, gates)) == pytest.approx(expected, abs=0.01)
