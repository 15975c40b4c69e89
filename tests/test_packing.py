"""Packing: every token that counts stands once, sees what it sees in its own prompt, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wpjax.behaviours import Tokens
from wpjax.engines.packing import Shape, common_shape, first_fit, pack
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import Projection
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import block, init_params, take_layer
from wpjax.models.edits import ClampTo, Edit
from wpjax.models.layouts import Causal, Window
from wpjax.models.sites import Site

PROMPTS = ([7, 7, 3, 1, 2], [7, 7, 4], [7, 7, 3, 5, 6, 8, 9], [7, 7, 4, 4], [7, 7, 5, 1])


def metric_of(prompts, at=None, weight=None) -> Metric:
    lengths = np.array([len(p) for p in prompts])
    ids = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    at = lengths[:, None] - 1 if at is None else np.array(at)
    weight = np.ones(at.shape, np.float32) if weight is None else np.array(weight, np.float32)
    along = Projection(jnp.ones(8))
    return Metric(Tokens(ids, lengths), jnp.asarray(at), jnp.asarray(weight), along, 0, "anchor")


def seen_from(packing, slot, window=None) -> list[tuple[int, int]]:
    """(token id, position) of what a packed token sees, by the bin's keys."""
    c, width = packing.packed.n_shared, packing.packed.segments.shape[1]
    bin_, offset = divmod(slot - c, width)
    keys = np.concatenate([np.arange(c), c + bin_ * width + np.arange(width)])
    here = keys[np.asarray(packing.packed.visible(window))[bin_, offset]]
    return [(int(packing.ids[0, i]), int(packing.packed.positions[0, i])) for i in here]


def test_prompts_by_hand():
    """Two shared tokens; rests of 5, 3, 2, 2 and 1 take three bins of 5 or 6 tokens, two of 7 with one left over."""
    packing = pack(metric_of(PROMPTS))
    assert packing.packed.n_shared == 2
    assert packing.packed.segments.tolist() == [[2, 2, 2, 2, 2, 3, 3], [0, 0, 0, 4, 4, 1, -1]]
    assert packing.ids[0].tolist() == [7, 7, 3, 5, 6, 8, 9, 4, 4, 3, 1, 2, 5, 1, 4, 7]
    assert (packing.n_tokens, packing.n_empty) == (16, 1)
    where = first_fit(np.array([3, 1, 5, 2, 2]), 5)
    assert where.tolist() == [[1, 0], [2, 2], [0, 0], [1, 3], [2, 0]]


def test_each_position_that_is_read_sees_its_prompt_and_nothing_else():
    packing = pack(metric_of(PROMPTS))
    visible, width = np.asarray(packing.packed.visible()), packing.packed.segments.shape[1]
    for b, (prompt, (slot,)) in enumerate(zip(PROMPTS, np.asarray(packing.at), strict=True)):
        assert packing.seen()[b, 0].tolist() == visible[divmod(int(slot) - 2, width)].tolist()
        assert seen_from(packing, int(slot)) == [(token, i) for i, token in enumerate(prompt)]


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_a_window_counts_tokens_of_the_prompt_not_of_the_pack(size):
    packing = pack(metric_of(PROMPTS))
    for prompt, (slot,) in zip(PROMPTS, np.asarray(packing.at), strict=True):
        whole = [(token, i) for i, token in enumerate(prompt)]
        assert seen_from(packing, int(slot), Window(size, jnp.array(True))) == whole[-size:]
        assert seen_from(packing, int(slot), Window(size, jnp.array(False))) == whole


def test_what_follows_the_last_position_that_counts_is_left_out():
    at = [[2, 3], [2, 0], [3, 4], [3, 0], [2, 3]]
    weight = [[1, 1], [1, 0], [1, 1], [1, 0], [0, 0]]
    packing = pack(metric_of(PROMPTS, at, weight))
    assert packing.packed.n_shared == 2
    lengths = np.bincount(np.asarray(packing.packed.segments)[np.asarray(packing.packed.segments) >= 0])
    assert lengths.tolist() == [2, 1, 3, 2, 2]
    read = np.asarray(packing.ids)[0][np.asarray(packing.at)]
    assert read[[0, 2, 4]].tolist() == [[3, 1], [5, 6], [5, 1]]


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [([[5, 6, 7]], 0), ([[5, 6, 7], [5, 6, 7]], 2), ([[5, 6], [6, 6]], 0), ([[5, 6, 7], [5, 6]], 1)],
    ids=["one prompt", "equal prompts", "nothing in common", "one begins the other"],
)
def test_how_many_tokens_are_shared(prompts, shared):
    packing = pack(metric_of(prompts))
    assert packing.packed.n_shared == shared
    for prompt, (slot,) in zip(prompts, np.asarray(packing.at), strict=True):
        assert seen_from(packing, int(slot)) == [(token, i) for i, token in enumerate(prompt)]


def test_different_prompts_fit_one_shape():
    """The first two share two tokens, the others one; the bins that the first two do not need stay empty."""
    few, more = metric_of([[7, 7, 3, 1], [7, 7, 4]]), metric_of([[7, 5, 1, 1, 1], [7, 6], [7, 1, 1, 2]])
    assert [pack(metric).packed.n_shared for metric in (few, more)] == [2, 1]
    shape = common_shape(few, more)
    assert shape == Shape(1, 4, 2)
    for metric in (few, more):
        packing = pack(metric, shape)
        assert packing.packed.segments.shape == (2, 4)
        assert packing.n_tokens == 9
        for ids, n, (slot,) in zip(metric.tokens.ids, metric.tokens.lengths, np.asarray(packing.at), strict=True):
            assert seen_from(packing, int(slot)) == [(int(ids[i]), i) for i in range(n)]
    roomy = pack(few, Shape(1, 5, 3))
    assert roomy.packed.segments.tolist() == [[0, 0, 0, 1, 1], [-1] * 5, [-1] * 5]


def test_tokens_that_a_state_is_given_at_are_not_shared():
    metric = metric_of([[5, 6, 7, 8], [5, 6, 7, 9]])
    held = Edit(Site.RESID_POST, ClampTo(jnp.ones(8), jnp.ones(8), jnp.float32(1)), layer=0, start=jnp.array([2, 1]))
    assert pack(metric).packed.n_shared == 3
    assert pack(dataclasses.replace(metric, held=held)).packed.n_shared == 1


@pytest.mark.parametrize(("n_kv_heads", "window"), [(1, None), (2, None), (4, None), (2, 1), (2, 3)])
def test_a_packed_layer_is_the_layer(n_kv_heads, window):
    cfg = ModelConfig("llama", 1, 32, 4, n_kv_heads, 8, 48, 16, 16, window=window, sliding=(True,))
    layer = block(cfg, take_layer(init_params(cfg, jax.random.key(0))["blocks"], 0), 0)
    metric = metric_of(PROMPTS)
    ids, packing = jnp.asarray(metric.tokens.ids), pack(metric)
    stream = jax.random.normal(jax.random.key(1), (ids.shape[1], 16, 32))  # depends on position and token alone
    resid = stream[jnp.arange(ids.shape[1]), ids]
    expected = layer(resid, Causal.of(ids.shape[1])).resid_post
    # The second prompt's first tokens are the others' too; layer outputs there agree as well.
    got = layer(packing.gather(resid[None])[0], packing.packed).resid_post[0]
    used = np.concatenate([np.full(2, True), np.asarray(packing.packed.segments).ravel() >= 0])
    np.testing.assert_allclose(got[used], expected[packing.prompt, packing.token][used], atol=2e-6)
    assert used.sum() == 2 + sum(len(p) - 2 for p in PROMPTS)
