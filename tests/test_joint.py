"""Many sets at once: against the lazy patch one at a time, wide and narrow, packed and given a state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import make_anchor
from tests.tiny import as_pair, build_pair
from wpjax.components import KINDS, enumerate_components
from wpjax.engines.joint import scores_at_once, scores_of_sets, touched
from wpjax.engines.reference import patched_score
from wpjax.estimators.masks import random_masks
from wpjax.metrics.answers import answer_metric
from wpjax.models.edits import ClampTo, Edit
from wpjax.models.generate import Generation
from wpjax.models.sites import Site
from wpjax.patching import PatchMask


def sets_of(cfg, kinds, size, n=5, seed=0):
    rng, every = np.random.default_rng(seed), enumerate_components(cfg, kinds)
    return [PatchMask.of(cfg, [every[i] for i in rng.permutation(len(every))[:size]]) for _ in range(n)]


def one_by_one(pair, masks, metric):
    return np.stack([patched_score(pair.cfg, pair.base, pair.expert, mask, metric) for mask in masks])


@pytest.mark.parametrize(
    ("kinds", "size"), [(tuple(KINDS), 40), (("neuron",), 3), (("head", "neuron"), 2), (("kv_group",), 1)]
)
def test_sets_score_as_one_at_a_time(family_pair, batch, kinds, size):
    expect_one_at_a_time(family_pair, batch, kinds, size)


def test_sets_score_as_one_at_a_time_where_layers_differ(batch, tmp_path):
    """In windows and rotary embeddings; and there are norms of queries and keys, and after modules."""
    expect_one_at_a_time(as_pair(build_pair("gemma3", tmp_path)), batch, tuple(KINDS), 40)


def expect_one_at_a_time(pair, batch, kinds, size):
    metric = make_anchor(pair, 2).metric_along(batch)
    masks = [*sets_of(pair.cfg, kinds, size), PatchMask.of(pair.cfg, [])]
    expected = one_by_one(pair, masks, metric)
    assert np.ptp(expected, axis=0).max() > 0.02
    for budget in (None, 1):  # all at once, and each alone
        got = scores_of_sets(pair.cfg, pair.base, pair.expert, masks, metric, budget=budget)
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_sets_of_one_layer_score_as_one_at_a_time(one_pair, batch):
    """They open most of its neurons, so the whole of the donor's matrices is used there and nothing elsewhere."""
    pair, metric = one_pair, make_anchor(one_pair, 2).metric_along(batch)
    rng, layer = np.random.default_rng(0), enumerate_components(pair.cfg, ["neuron"], [1])
    masks = [PatchMask.of(pair.cfg, [layer[i] for i in rng.permutation(len(layer))[: len(layer) // 2]]) for _ in "ab"]
    got = scores_of_sets(pair.cfg, pair.base, pair.expert, masks, metric)
    np.testing.assert_allclose(got, one_by_one(pair, masks, metric), atol=2e-5)


def test_bfloat16_sets_score_as_the_rounded_weights_do(family_pair, batch):
    """Within bfloat16's digits of what the sets change."""
    pair, metric = family_pair, make_anchor(family_pair, 2).metric_along(batch)
    coarse = [jax.tree.map(lambda a: a.astype("bfloat16"), model) for model in (pair.base, pair.expert)]
    fine = [jax.tree.map(lambda a: a.astype("float32"), model) for model in coarse]
    masks = [*sets_of(pair.cfg, tuple(KINDS), 40, n=2), *sets_of(pair.cfg, ("neuron",), 3, n=2)]
    masks = [*masks, PatchMask.of(pair.cfg, [])]
    got = scores_of_sets(pair.cfg, *coarse, masks, metric)
    expected = np.stack([patched_score(pair.cfg, *fine, mask, metric) for mask in masks])
    largest = np.abs(expected - expected[-1]).max()
    assert np.abs(got - expected).max() < 0.05 * largest
    twice = scores_of_sets(dataclasses.replace(pair.cfg, activation_splits=2), *coarse, masks, metric)
    assert np.abs(twice - expected).max() < 1e-3 * largest


def test_prompts_in_parts_score_as_together(one_pair, batch, monkeypatch):
    """20 prompts, of which a program takes 16: the second part is filled up, and packed in its own way."""
    pair, metric = one_pair, make_anchor(one_pair, 2).metric_along(batch)
    many = metric.take(jnp.arange(20) % len(batch))
    masks = sets_of(pair.cfg, ("head", "neuron"), 6, n=3)
    expected = scores_of_sets(pair.cfg, pair.base, pair.expert, masks, metric)
    monkeypatch.setattr("wpjax.engines.joint.TOKENS_AT_ONCE", 1)
    got = scores_of_sets(pair.cfg, pair.base, pair.expert, masks, many)
    np.testing.assert_allclose(got, expected[:, np.arange(20) % len(batch)], atol=2e-5)


def test_answers_and_given_states_too(family_pair, batch):
    pair, prompts = family_pair, batch.with_instruction
    rng = np.random.default_rng(3)
    answers = Generation(rng.integers(0, pair.cfg.d_vocab, (len(batch), 3)), np.full(len(batch), 3))
    metric = answer_metric(pair.cfg, prompts, answers)
    v = jnp.asarray(make_anchor(pair, 0).vector)
    held = Edit(Site.RESID_POST, ClampTo(v, v, jnp.float32(0.5)), layer=0, start=jnp.asarray(prompts.last))
    masks = sets_of(pair.cfg, tuple(KINDS), 20, n=3)
    for one in (metric, dataclasses.replace(metric, held=held)):
        got = scores_of_sets(pair.cfg, pair.base, pair.expert, masks, one)
        np.testing.assert_allclose(got, one_by_one(pair, masks, one), atol=5e-5)


def test_channels_that_a_batch_touches_by_hand():
    opened = np.zeros((2, 2, 16), bool)
    opened[0, 0, [3, 9]] = opened[1, 0, 5] = opened[1, 1, 15] = True
    few = touched(opened)
    assert few.fits is None
    assert few.channels.tolist() == [[3, 5, 9], [15, 0, 0]]
    assert few.place[0, [3, 5, 9]].tolist() == [0, 1, 2]
    assert touched(np.ones((1, 1, 16), bool)) is None  # the whole of it is wanted
    assert touched(np.zeros((1, 1, 16), bool)).channels.tolist() == [[0]]  # nothing costs next to nothing
    opened[0, 1, 2:12] = True  # eleven of a layer: all of it there, few elsewhere
    few = touched(opened)
    assert few.fits.tolist() == [True, False]
    assert few.channels.tolist() == [[3, 5, 9], [0, 0, 0]]


@pytest.mark.parametrize("crowded", [0, 2])
def test_sets_of_few_channels_but_for_one_layer_score_as_one_at_a_time(family_pair, batch, crowded):
    """All forms in one program: a layer that takes all of the donor's, one a few channels, one none."""
    pair, metric = family_pair, make_anchor(family_pair, 2).metric_along(batch)
    rng, kinds = np.random.default_rng(0), ("neuron", "head", "kv_group")
    layer = enumerate_components(pair.cfg, kinds, [crowded])
    few = [c for c in enumerate_components(pair.cfg, ("neuron",), [1]) if c.index < 3]
    masks = [PatchMask.of(pair.cfg, [layer[i] for i in rng.permutation(len(layer))[:30]] + few[n:]) for n in range(3)]
    opened = np.stack([mask.units["neuron"] for mask in masks])
    few_there = touched(opened)
    assert few_there is not None
    assert few_there.fits.tolist() == [layer != crowded for layer in range(3)]
    got = scores_of_sets(pair.cfg, pair.base, pair.expert, masks, metric)
    np.testing.assert_allclose(got, one_by_one(pair, masks, metric), atol=2e-5)


def test_out_of_memory_sets_go_on_with_less_at_once(one_pair, batch, monkeypatch):
    """The device is said to hold two sets at a time; after the first batch of random ones, no more are tried."""
    pair, metric = one_pair, make_anchor(one_pair, 2).metric_along(batch)
    masks = sets_of(pair.cfg, ("head",), 2)
    sizes: list[int] = []

    def small(*args):
        sizes.append(len(args[-1]["head"]))
        if sizes[-1] > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        return scores_at_once(*args)

    monkeypatch.setattr("wpjax.engines.joint.scores_at_once", small)
    with pytest.warns(UserWarning, match="out of memory: joint patches go on 2 at a time"):
        got = scores_of_sets(pair.cfg, pair.base, pair.expert, masks, metric)
    np.testing.assert_allclose(got, one_by_one(pair, masks, metric), atol=2e-5)
    assert sizes[:2] == [5, 3]
    sizes.clear()
    heads = enumerate_components(pair.cfg, ["head"])
    with pytest.warns(UserWarning, match="out of memory"):
        random_masks(pair.cfg, pair.base, pair.expert, heads, metric, 0.5, n_masks=96, control=False)
    tried = [size for size in sizes if size > 2]
    assert sizes[: len(tried)] == tried == [32, 16, 8, 4]


def test_channel_zero_is_open_only_where_it_is_opened(one_pair, batch):
    """It fills up lists of touched channels, and must not be added for that."""
    pair, metric = one_pair, make_anchor(one_pair, 2).metric_along(batch)
    masks = [
        PatchMask.of(pair.cfg, names) for names in (["L0.neuron.0"], ["L1.neuron.0", "L0.neuron.1", "L0.neuron.2"])
    ]
    got = scores_of_sets(pair.cfg, pair.base, pair.expert, masks, metric)
    np.testing.assert_allclose(got, one_by_one(pair, masks, metric), atol=2e-5)
