"""Random masks against every subset, the variance formula against repeated draws, and sets of a real forward pass."""

import itertools

import numpy as np
import pytest

from tests.helpers import make_anchor
from wpjax.behaviours import behaviour
from wpjax.components import KINDS, Component, enumerate_components
from wpjax.engines.reference import patched_score
from wpjax.errors import WpjaxError
from wpjax.estimators.masks import UnitMasks, draw_masks, estimate_beta, random_masks
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.pairs import load_pair
from wpjax.patching import PatchMask
from wpjax.report.page import render_page

EVERY = np.array(list(itertools.product([False, True], repeat=6)))


def game(masks):
    """Two of which either suffices, two that need each other, one that adds, one that does nothing; two prompts."""
    a, b, c, d, e, _ = np.asarray(masks, bool).T
    value = 1.0 * (a | b) + 2.0 * (c & d) + 0.5 * e
    return np.stack([value, 3 * value], axis=1)


def by_enumeration(p):
    """beta by its definition."""
    found = []
    for c in range(6):
        others = np.delete(np.arange(6), c)
        subsets = EVERY[~EVERY[:, c]]
        weight = np.prod(np.where(subsets[:, others], p, 1 - p), axis=1)
        joined = subsets.copy()
        joined[:, c] = True
        found.append(((game(joined) - game(subsets)) * weight[:, None]).sum(0))
    return np.stack(found)


def test_all_masks_once_give_the_banzhaf_value():
    got = estimate_beta(EVERY, game(EVERY))
    np.testing.assert_allclose(got.beta, by_enumeration(0.5), atol=1e-12)
    np.testing.assert_allclose(got.beta[:, 0], [0.5, 0.5, 1, 1, 0.5, 0], atol=1e-12)


def test_what_no_mask_tells_apart_is_unknown():
    """A component in every mask, one in none, one in a single mask, on a metric far from zero."""
    masks = np.array([[1, 0, 0, 1], [1, 0, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0]], bool)
    got = estimate_beta(masks, np.array([[-30.0], [-31.0], [-29.0], [-31.0]]))
    np.testing.assert_allclose(got.beta[:, 0], [np.nan, np.nan, 5 / 3, 1.5])
    np.testing.assert_allclose(got.se, [np.nan, np.nan, np.nan, 0.5])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_random_masks_meet_the_definition_within_their_error(p):
    masks = draw_masks(20_000, 6, p, seed=3)
    truth = by_enumeration(p)
    for slopes in (None, truth * 0.8):  # any control variate leaves the expectation
        got = estimate_beta(masks, game(masks), slopes)
        error = np.abs(got.beta - truth).mean(1)
        assert (error <= 4 * got.se + 1e-12).all()
    assert truth[0, 0] == pytest.approx(1 - p)  # either suffices: the more others, the less it does
    assert truth[2, 0] == pytest.approx(2 * p)  # it takes the other


def test_the_variance_formula_holds_over_repeated_draws():
    for p in (0.2, 0.5):
        got = [estimate_beta(m, game(m)) for m in (draw_masks(200, 6, p, seed) for seed in range(600))]
        spread = np.std([g.beta.mean(1) for g in got], axis=0)
        np.testing.assert_allclose(np.sqrt(np.mean([g.se**2 for g in got], axis=0)), spread, rtol=0.1)


def test_of_a_linear_game_the_control_variate_leaves_nothing_to_chance():
    slopes = np.random.default_rng(0).normal(size=(40, 3))
    masks = draw_masks(64, 40, 0.3, seed=0)
    got = estimate_beta(masks, masks @ slopes + 5.0, slopes)
    np.testing.assert_allclose(got.beta, slopes, atol=1e-12)
    np.testing.assert_allclose(got.se, 0, atol=1e-12)
    assert estimate_beta(masks, masks @ slopes).se.min() > 0.1


def test_masks_of_sets_are_their_unions(one_pair):
    cfg, rng = one_pair.cfg, np.random.default_rng(1)
    components = enumerate_components(cfg, KINDS)
    units = UnitMasks(cfg, components)
    for share in (0.02, 0.5):
        chosen = rng.random(len(components)) < share
        expected = PatchMask.of(cfg, [c for c, here in zip(components, chosen, strict=True) if here])
        got = units.mask(chosen)
        assert set(got.units) == set(expected.units)
        for unit, value in expected.units.items():
            np.testing.assert_array_equal(got.units[unit], value)
    fine = enumerate_components(cfg, ["head", "neuron"])
    half = UnitMasks(cfg, fine).mask(np.full(len(fine), 0.5, np.float32))
    np.testing.assert_array_equal(half.units["neuron"], np.full((cfg.n_layers, cfg.d_mlp), 0.5))
    assert float(half.units["norm_attn"].max()) == 0


def test_random_masks_of_a_model_meet_every_subset(one_pair, batch):
    pair, metric = one_pair, make_anchor(one_pair, 2).metric_along(batch)
    components = [Component("attn", 0), Component("mlp", 0), Component("head", 1, 1), Component("mlp", 1)]
    units = UnitMasks(pair.cfg, components)
    subsets = EVERY[:16, 2:]
    f = np.stack([patched_score(pair.cfg, pair.base, pair.expert, units.mask(s), metric) for s in subsets])
    truth = estimate_beta(subsets, f.astype(np.float64)).beta
    plain, controlled = (
        random_masks(pair.cfg, pair.base, pair.expert, components, metric, 0.5, n_masks=128, control=control)
        for control in (False, True)
    )
    for got in (plain, controlled):
        assert (np.abs((got.beta - truth).mean(1)) <= 4 * got.se).all()
    assert np.abs(truth.mean(1)).max() > 5 * plain.se.max()


def test_a_sweep_of_masks_says_what_is_redundant_and_resumes():
    pair, task = load_pair("tiny:base", "tiny:planted"), behaviour("tiny:english_capital")
    anchor = fit_anchor(pair, task, layer=5, n_prompts=16, causal="skip")
    batch = task.encode(pair.tokenizer, n_prompts=4)
    options = {"components": ["L0.head.3", "L2.mlp", "L3.head.0"], "method": "masks", "n_masks": 40}
    done = {}
    result = sweep(pair, batch, anchor, done=done, **options)
    data = result.dataset
    assert sum(key.startswith("masks-") for key in done) == 6
    np.testing.assert_allclose(data["redundancy"], data["beta_low"] - data["beta_high"], atol=1e-12)
    assert (data["banzhaf_low"] <= data["banzhaf"]).all()
    assert data["banzhaf"].values[0] > 0.2 > abs(data["banzhaf"].values[1])
    shown = render_page(result, {}, 10)
    assert "ranking below is by banzhaf.\n" in shown
    assert np.isfinite(result.best()).all()
    kept = {key: value + (key == "masks-0.5-0") for key, value in done.items()}
    again = sweep(pair, batch, anchor, done=kept, **options).dataset
    np.testing.assert_array_equal(again["beta_low"], data["beta_low"])
    assert np.abs(again["banzhaf"] - data["banzhaf"]).max() > 0
    with pytest.raises(WpjaxError, match=r"part masks-0.5-0 has shape \(2, 4\)"):
        sweep(pair, batch, anchor, done=kept | {"masks-0.5-0": np.zeros((2, 4))}, **options)
    with pytest.raises(WpjaxError, match="at least 2 sets"):
        sweep(pair, batch, anchor, **options | {"n_masks": 1})
