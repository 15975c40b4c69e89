"""Patches against their definition, against HF torch with copied slices, and under jit, vmap and grad."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import make_anchor
from tests.tiny import patched_torch
from wpjax.checkpoints.convert import flatten
from wpjax.components import KINDS, LEAVES, Component, enumerate_components, unit_names, unit_shapes
from wpjax.errors import ComponentError
from wpjax.metrics.anchor import Anchor
from wpjax.models.decoder import forward
from wpjax.models.edits import Edit, Scale
from wpjax.models.sites import Site
from wpjax.patching import PatchMask, components_of, materialize, patch, permuted

TOKENS = np.random.default_rng(1).integers(0, 61, (2, 10))


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params):
    return forward(cfg, params, jnp.asarray(TOKENS)).logits


def random_mask(cfg, seed, share=0.5):
    rng = np.random.default_rng(seed)
    return PatchMask({g: jnp.asarray(rng.random(shape) < share) for g, shape in unit_shapes(cfg).items()})


@pytest.mark.parametrize("dtype", [bool, jnp.float32])
def test_empty_is_base_and_full_is_expert_bit_for_bit(pair, dtype):
    for mask, model in ((PatchMask.empty, pair.base), (PatchMask.full, pair.expert)):
        units = mask(pair.cfg, dtype)
        chex.assert_trees_all_equal(materialize(pair.base, pair.expert, units), model)
        lazy = logits(pair.cfg, patch(pair.base, pair.expert, units))
        # Beside each other, XLA adds what attention and MLP write in an order that depends on how they were made.
        rounding = 2e-6 if pair.cfg.parallel and dtype is not bool else 0.0
        np.testing.assert_allclose(lazy, logits(pair.cfg, model), rtol=0, atol=rounding)


def test_scaled_components_are_those_with_scaled_outputs(family_pair):
    pair = family_pair
    cfg, rng, ids = pair.cfg, np.random.default_rng(0), jnp.asarray(TOKENS)
    heads, neurons = (
        jnp.asarray(rng.uniform(0, 2, (cfg.n_layers, 1, n)), jnp.float32) for n in (cfg.n_heads, cfg.d_mlp)
    )
    blocks = pair.base["blocks"]
    attn = blocks["attn"] | {"W_O": blocks["attn"]["W_O"] * heads[:, 0, :, None, None]}
    mlp = blocks["mlp"] | {"W_out": blocks["mlp"]["W_out"] * neurons[:, 0, :, None]}
    scaled = pair.base | {"blocks": blocks | {"attn": attn, "mlp": mlp}}
    edits = (Edit(Site.Z, Scale(heads[:, :, None, :, None])), Edit(Site.NEURON, Scale(neurons[:, :, None])))
    got = jax.jit(lambda: forward(cfg, pair.base, ids, edits=edits).logits)()
    np.testing.assert_allclose(got, logits(cfg, scaled), rtol=1e-5, atol=1e-5)
    one = np.repeat(np.asarray(heads), 2, axis=1)  # prompt by prompt
    one[:, 1] = 1
    edits = (Edit(Site.Z, Scale(jnp.asarray(one)[:, :, None, :, None])),)
    got = jax.jit(lambda: forward(cfg, pair.base, ids, edits=edits).logits)()
    np.testing.assert_allclose(got[1], logits(cfg, pair.base)[1], rtol=1e-5, atol=1e-5)


def test_lazy_equals_materialised(pair):
    for seed in range(3):
        mask = random_mask(pair.cfg, seed)
        lazy = logits(pair.cfg, patch(pair.base, pair.expert, mask))
        plain = logits(pair.cfg, materialize(pair.base, pair.expert, mask))
        np.testing.assert_allclose(lazy, plain, atol=2e-5, rtol=1e-5)


def test_disjoint_patches_commute_and_unpatching_restores_the_base(pair):
    one = random_mask(pair.cfg, 0)
    other = random_mask(pair.cfg, 1) & ~one
    step = functools.partial(materialize, pair.base)
    first = materialize(step(pair.expert, one), pair.expert, other)
    second = materialize(step(pair.expert, other), pair.expert, one)
    chex.assert_trees_all_equal(first, second)
    chex.assert_trees_all_equal(first, step(pair.expert, one | other))
    chex.assert_trees_all_equal(materialize(step(pair.expert, one), pair.base, one), pair.base)


def test_knock_out_is_the_reverse_patch(pair):
    mask = random_mask(pair.cfg, 2)
    chex.assert_trees_all_equal(materialize(pair.expert, pair.base, mask), materialize(pair.base, pair.expert, ~mask))


@pytest.mark.parametrize("kind", KINDS)
def test_every_component_equals_hf_with_its_slices_copied(hf_pair, pair, kind):
    """Through HF's own layout, so GQA groups and fused matrices are checked component by component."""
    components = enumerate_components(pair.cfg, [kind])
    for c in components if kind != "neuron" else components[::17]:
        ours = logits(pair.cfg, patch(pair.base, pair.expert, PatchMask.of(pair.cfg, [c])))
        with torch.no_grad():
            theirs = patched_torch(hf_pair, c)(torch.tensor(TOKENS)).logits.numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4, err_msg=c.name)
        np.testing.assert_raises(
            AssertionError, np.testing.assert_allclose, theirs, logits(pair.cfg, pair.base), atol=1e-6
        )


def test_masks_join_whatever_units_they_hold(pair):
    whole = random_mask(pair.cfg, 4)
    head = PatchMask({"head": whole.units["head"]})
    rest = PatchMask({unit: value for unit, value in whole.units.items() if unit != "head"})
    chex.assert_trees_all_equal((head | rest).units, dict(whole.units))
    chex.assert_trees_all_equal((head & whole).units, dict(head.units))
    assert not (head & rest).units
    with pytest.raises(ComponentError, match="lacks kv_group, neuron"):
        _ = ~head
    soft = jax.tree.map(lambda unit: jnp.full(unit.shape, 0.25, jnp.float32), whole)
    for got, value in ((~soft, 0.75), (soft | whole, None), (soft & ~soft, 0.25)):
        for unit, found in got.units.items():
            expected = np.where(whole.units[unit], 1.0, 0.25) if value is None else np.full(found.shape, value)
            np.testing.assert_array_equal(found, expected)


def test_masks_that_do_not_fit_are_refused(pair):
    for apply in (patch, materialize):
        for units, says in (
            ({"heads": jnp.ones(3)}, "no unit 'heads'"),
            ({"neuron": jnp.ones((2, pair.cfg.d_mlp))}, r"unit neuron has shape \(2, 40\), the model needs \(3, 40\)"),
            ({"head": jnp.ones((5, 3, pair.cfg.n_heads))}, "jax.vmap over the leading axis"),
        ):
            with pytest.raises(ComponentError, match=says):
                apply(pair.base, pair.expert, PatchMask(units))
        with pytest.raises(ComponentError, match="patched already"):
            apply(patch(pair.base, pair.expert, PatchMask.full(pair.cfg)), pair.expert, PatchMask.full(pair.cfg))
    chex.assert_trees_all_equal(dict(PatchMask.of(pair.cfg, "L2").units), dict(PatchMask.of(pair.cfg, ["L2"]).units))


def scored(pair, anchor, batch):
    return lambda mask: anchor.score(pair.cfg, patch(pair.base, pair.expert, mask), batch)


def test_vmap_over_masks_equals_one_at_a_time_and_shares_the_weights(pair, batch):
    anchor = make_anchor(pair, 2)
    masks = [random_mask(pair.cfg, seed) for seed in range(16)]
    stacked = jax.tree.map(lambda *units: jnp.stack(units), *masks)
    score = scored(pair, anchor, batch)
    together = jax.jit(jax.vmap(score))
    one = jax.jit(score)
    np.testing.assert_allclose(together(stacked), [one(m) for m in masks], atol=2e-5)


def test_vmap_over_masks_takes_no_memory_for_weights(batch):
    """Temporary memory of 16 masks stays far below 16 copies of the weights they choose between."""
    from wpjax.models.config import ModelConfig
    from wpjax.models.decoder import init_params

    cfg = ModelConfig("llama", 3, 256, 4, 2, 64, 1024, 61, 64)
    base, expert = (init_params(cfg, jax.random.key(i)) for i in range(2))
    units = jax.tree.map(lambda unit: jnp.stack([unit] * 16), dict(PatchMask.empty(cfg).units))
    anchor = Anchor(jnp.ones(cfg.d_model) / 16, 2)

    def score(base, expert, units):
        return anchor.score(cfg, patch(base, expert, PatchMask(units)), batch)

    compiled = jax.jit(jax.vmap(score, in_axes=(None, None, 0))).lower(base, expert, units).compile()
    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(base["blocks"]))
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * n_bytes


def test_gradient_equals_finite_differences(family_pair, batch):
    pair = family_pair
    anchor = make_anchor(pair, 2)
    total = jax.jit(lambda mask: scored(pair, anchor, batch)(mask).sum())
    mask = random_mask(pair.cfg, 3).astype(jnp.float32)
    mask = jax.tree.map(lambda unit: 0.25 + 0.5 * unit, mask)
    slope = jax.jit(jax.grad(total))(mask)
    step = 1e-2
    for seed in range(4):
        towards = random_mask(pair.cfg, 10 + seed).astype(jnp.float32)
        ahead, behind = (
            float(total(jax.tree.map(lambda m, d, s=sign: m + s * step * d, mask, towards))) for sign in (1, -1)
        )
        expected = sum(
            float((s * d).sum()) for s, d in zip(jax.tree.leaves(slope), jax.tree.leaves(towards), strict=True)
        )
        assert (ahead - behind) / (2 * step) == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_gradient_equals_the_exact_effect_where_the_model_is_linear_in_the_patch(family_pair, batch):
    """Output weights of the anchor's own layer enter the score linearly: slope and difference are one number."""
    pair = family_pair
    layer = 1
    anchor = make_anchor(pair, layer)
    only_out = dict(flatten(pair.base))
    only_out["blocks/mlp/W_out"] = flatten(pair.expert)["blocks/mlp/W_out"]
    from wpjax.checkpoints.convert import unflatten

    score = jax.jit(lambda mask: anchor.score(pair.cfg, patch(pair.base, unflatten(only_out), mask), batch).sum())
    slope = jax.grad(score)(PatchMask.empty(pair.cfg, jnp.float32)).units["neuron"][layer]
    start = float(score(PatchMask.empty(pair.cfg, jnp.float32)))
    for f in range(0, pair.cfg.d_mlp, 9):
        patched = PatchMask.of(pair.cfg, [Component("neuron", layer, f)]).astype(jnp.float32)
        assert float(score(patched)) - start == pytest.approx(float(slope[f]), abs=2e-5)


def test_changes_dealt_out_anew_keep_their_size_and_stay_whole(pair):
    """Each head, KV group and neuron of a layer has the whole change of one of its kind there."""
    null = permuted(pair.base, pair.expert, seed=1)
    of_null = dataclasses.replace(pair, expert=null)
    for kind in ("head", "kv_group", "neuron"):
        for layer in range(pair.cfg.n_layers):
            components = enumerate_components(pair.cfg, [kind], [layer])
            np.testing.assert_allclose(
                np.sort(of_null.delta_norms(components)), np.sort(pair.delta_norms(components)), rtol=1e-4
            )
    ours, theirs, dealt = (flatten(tree) for tree in (pair.base, pair.expert, null))
    for layer in range(pair.cfg.n_layers):

        def changes(tree, path, axis, layer=layer):
            change = np.asarray(tree[path] - ours[path])[layer]
            return np.moveaxis(change, axis, 0).reshape(change.shape[axis], -1)

        whole = [np.hstack([changes(t, p, a) for p, (g, a) in LEAVES.items() if g == "neuron" and p in ours])
                 for t in (theirs, dealt)]  # fmt: skip
        distance = np.abs(whole[0][:, None] - whole[1][None]).max(-1)
        assert sorted(distance.argmin(0)) == list(range(pair.cfg.d_mlp))
        assert distance.min(0).max() < 1e-5
    np.testing.assert_array_equal(dealt["embed/W_E"], ours["embed/W_E"])


def test_a_mask_names_the_components_that_it_opens(wired_pair):
    """The fewest names of random sets open the same mask again; every kind alone is found by its own name."""
    cfg = wired_pair.cfg
    kinds = [kind for kind in KINDS if enumerate_components(cfg, [kind])]
    everything = enumerate_components(cfg, kinds)
    rng = np.random.default_rng(0)
    for n in (1, 5, 40):
        mask = PatchMask.of(cfg, rng.permutation(np.array(everything, object))[:n].tolist())
        chex.assert_trees_all_equal(PatchMask.of(cfg, components_of(cfg, mask)), mask)
    for kind in kinds:
        some = enumerate_components(cfg, [kind])[:3]
        assert components_of(cfg, PatchMask.of(cfg, some), [kind]) == some
    assert [c.kind for c in components_of(cfg, PatchMask.full(cfg))][: cfg.n_layers] == ["layer"] * cfg.n_layers
    assert components_of(cfg, PatchMask.empty(cfg)) == []
    only_heads = PatchMask({"head": PatchMask.full(cfg).units["head"]})  # other units are absent, so they are closed
    assert components_of(cfg, only_heads) == enumerate_components(cfg, ["head"])


def test_masks_that_no_names_open_are_refused(wired_pair):
    cfg = wired_pair.cfg
    half = {"head": jnp.full(unit_shapes(cfg)["head"], 0.5)}
    with pytest.raises(ComponentError, match="between 0 and 1; make the mask boolean"):
        components_of(cfg, PatchMask(half))
    with pytest.raises(ComponentError, match=r"unit 'head' has shape \(1, 1\), the model has shape"):
        components_of(cfg, PatchMask({"head": jnp.ones((1, 1), bool)}))
    with pytest.raises(ComponentError, match=r"unit 'arm' has shape .*, the model has none"):
        components_of(cfg, PatchMask({"arm": jnp.ones((1, 1), bool)}))
    if "mlp_bias" in unit_shapes(cfg):
        bias = PatchMask({"mlp_bias": jnp.ones(unit_shapes(cfg)["mlp_bias"], bool)})
        with pytest.raises(ComponentError, match="opens unit mlp_bias, which no component owns alone"):
            components_of(cfg, bias)
        assert components_of(cfg, bias, ["head"]) == []


def test_the_largest_entries_of_a_relaxed_mask():
    """Against sorting by hand, with ties, under jit and vmap; and a threshold."""
    rng = np.random.default_rng(0)
    units = {"head": rng.integers(0, 5, (3, 4)) / 4, "embed": np.array(0.5), "neuron": rng.random((3, 7))}
    units = {name: units[name] for name in unit_names() if name in units}
    relaxed = PatchMask({name: jnp.asarray(values, jnp.float32) for name, values in units.items()})
    flat = np.concatenate([np.ravel(values) for values in units.values()])
    for k in (0, 1, 9, len(flat)):
        expected = np.zeros(len(flat), bool)
        expected[sorted(range(len(flat)), key=lambda i: -np.float32(flat[i]))[:k]] = True
        for found in (relaxed.top_k(k), jax.jit(lambda mask, k=k: mask.top_k(k))(relaxed)):
            np.testing.assert_array_equal(np.concatenate([np.ravel(found.units[name]) for name in units]), expected)
            assert all(unit.dtype == bool for unit in found.units.values())
    two = jax.tree.map(lambda unit: jnp.stack([unit, 1 - unit]), relaxed)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda unit: unit[0], jax.vmap(lambda m: m.top_k(4))(two)), relaxed.top_k(4)
    )
    assert set(relaxed.top_k(3, units=["head"]).units) == {"head"}
    for at in (0.0, 0.5, 1.1):
        for name, unit in relaxed.threshold(at).units.items():
            np.testing.assert_array_equal(unit, units[name].astype(np.float32) >= np.float32(at))
    chex.assert_trees_all_equal(relaxed.top_k(3).threshold(0.9), relaxed.top_k(3))
    with pytest.raises(ComponentError, match="k=99: this mask has 34 entries"):
        relaxed.top_k(99)
    with pytest.raises(ComponentError, match="no unit 'arm', only "):
        relaxed.top_k(1, units=["arm"])
