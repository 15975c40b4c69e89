"""Suffix replay against the lazy patch, the materialised patch and HF torch; its noise floor and compile counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import compiled, exact, make_anchor
from tests.oracles import hf_layers
from tests.tiny import patched_torch
from wpjax.behaviours import PromptBatch, Tokens, behaviour
from wpjax.components import KINDS, enumerate_components
from wpjax.engines.exact import exact_changes
from wpjax.engines.memory import groups
from wpjax.engines.packing import pack, shared_tokens
from wpjax.engines.plan import make_plan, sham_plan
from wpjax.engines.reference import reference_changes
from wpjax.engines.replay import replay, run_packed, suffix
from wpjax.estimators.screens import output_linearised, weight_gradient, zero_beyond_reach
from wpjax.estimators.sweep import sweep
from wpjax.models.decoder import block, take_layer
from wpjax.models.sites import Site
from wpjax.pairs import load_pair
from wpjax.patching import PatchMask, materialize

SWEPT = ("head", "kv_group", "neuron", "attn", "mlp", "layer", "norm", "embed")
ROUTED = ("routed_expert", "router")
"""Kinds that only families with routed experts have."""

ATTENTION_DIFFERS = ("gpt2-untied", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
"""Architectures that others of the table cover but for their heads and embeddings."""


@pytest.fixture(scope="module")
def swept(hf_pair, pair, batch):
    """Every component and its changes up to the last layer, by suffix replay."""
    kinds = ("head", "kv_group", "attn", "embed") if hf_pair.name in ATTENTION_DIFFERS else SWEPT + ROUTED
    components = enumerate_components(pair.cfg, kinds, range(3))
    return components, exact(pair, batch, make_anchor(pair, 2), components)


def assert_equals_reference(pair, batch, layer, components, got):
    expected = reference_changes(
        pair.cfg, pair.base, pair.expert, components, make_anchor(pair, layer).metric_along(batch)
    )
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_suffix_replay_equals_the_lazy_patch_for_every_kind_and_layer(pair, batch, swept):
    assert_equals_reference(pair, batch, 2, *swept)


def test_suffix_replay_to_lower_anchors(family_pair, batch):
    layer = 0 if family_pair.cfg.gated else 1
    components = enumerate_components(family_pair.cfg, ("head", "neuron", "layer"), range(layer + 1))
    got = exact(family_pair, batch, make_anchor(family_pair, layer), components)
    assert_equals_reference(family_pair, batch, layer, components, got)


def test_suffix_replay_equals_the_materialised_patch(pair, batch, swept):
    anchor = make_anchor(pair, 2)
    score = jax.jit(lambda params: anchor.score(pair.cfg, params, batch))
    before = score(pair.base)
    for c, change in list(zip(*swept, strict=True))[::7]:
        after = score(materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, [c])))
        np.testing.assert_allclose(change, after - before, atol=2e-5, err_msg=c.name)


@torch.no_grad()
def hf_resid_post(model, prompt, layer):
    """By a hook: the last of HF's own hidden states is normed."""
    kept = []
    handle = hf_layers(model)[layer].register_forward_hook(lambda module, args, out: kept.append(out))
    model(prompt)
    handle.remove()
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


def test_effects_equal_hf_torch_with_slices_copied(hf_pair, pair, batch, swept):
    """Anchor scores of heads, KV groups and routed experts by HF's own forward, prompt by prompt without padding."""
    anchor = make_anchor(pair, 2)

    def hf_scores(model):
        tokens = batch.with_instruction
        prompts = [torch.tensor(ids[:n])[None] for ids, n in zip(tokens.ids, tokens.lengths, strict=True)]
        resid = [hf_resid_post(model, prompt, anchor.layer)[0, -1] for prompt in prompts]
        return np.array([float(r @ torch.tensor(np.asarray(anchor.vector))) for r in resid])

    before = hf_scores(hf_pair.base.model)
    for c, change in zip(*swept, strict=True):
        if c.kind in ("head", "kv_group", "attn", "norm", *ROUTED):
            after = hf_scores(patched_torch(hf_pair, c))
            np.testing.assert_allclose(change, after - before, atol=1e-4, err_msg=c.name)


def test_chunk_size_does_not_matter(one_pair, batch):
    pair = one_pair
    anchor = make_anchor(pair, 2)
    components = enumerate_components(pair.cfg, ("head", "neuron"), range(3))
    whole = exact(pair, batch, anchor, components)
    np.testing.assert_allclose(exact(pair, batch, anchor, components, budget=1), whole, atol=1e-5)
    np.testing.assert_allclose(exact(pair, batch, anchor, components[::5], budget=10**6), whole[::5], atol=1e-5)


def test_positions_may_count_against_each_other(one_pair, batch):
    """A contrast of two positions: the change at one of them less that at the other."""
    whole = make_anchor(one_pair, 2).metric_along(batch)
    last = np.asarray(whole.at)[:, :1]
    at = np.concatenate([last, last - 2], axis=1)
    metric = dataclasses.replace(whole, at=jnp.asarray(at), weight=jnp.broadcast_to(jnp.array([1.0, -1.0]), at.shape))
    components = enumerate_components(one_pair.cfg, ("head", "neuron"), [0])[:8]
    changes = exact(one_pair, batch, metric, components)
    expected = reference_changes(one_pair.cfg, one_pair.base, one_pair.expert, components, metric)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(changes, expected, atol=2e-5)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_rows_in_groups_are_those_of_one(one_pair, batch, monkeypatch, kind, splits):
    """Changes and flow; in bfloat16 there is one more row, the host's, so that the last group is filled up."""
    pair, metric = one_pair, make_anchor(one_pair, 2).metric_along(batch)
    if splits == 2:
        models = {end: jax.tree.map(lambda a: a.astype("bfloat16"), getattr(pair, end)) for end in ("base", "expert")}
        pair = dataclasses.replace(pair, cfg=dataclasses.replace(pair.cfg, activation_splits=2), **models)
    packing, components = pack(metric), enumerate_components(pair.cfg, (kind,), range(3))
    runs = run_packed(pair.cfg, pair.base, metric, packing), None

    def swept():
        plan = make_plan(pair.cfg, components, packing)
        parts = list(exact_changes(pair.cfg, pair.base, pair.expert, runs, metric, packing, plan))
        n_groups, _ = groups(pair.cfg, packing, plan.rows[kind])
        return n_groups, *(np.concatenate([getattr(part, name) for part in parts]) for name in ("delta", "flow"))

    n_groups, *together = swept()
    assert n_groups == 1
    monkeypatch.setattr("wpjax.engines.memory.CPU_BUDGET", 1)
    monkeypatch.setattr("wpjax.engines.memory.CPU_TOKENS", 1.5 * packing.n_tokens)
    jax.clear_caches()
    n_groups, *in_groups = swept()
    jax.clear_caches()
    assert n_groups > 1
    for got, expected in zip(in_groups, together, strict=True):
        tolerance = 2e-5 if splits == 1 else 1e-3 * np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=tolerance)


def test_a_padded_batch_equals_single_prompts(one_pair, batch):
    pair = one_pair
    anchor = make_anchor(pair, 2)
    components = enumerate_components(pair.cfg, ("head",), range(3))[::3]
    together = exact(pair, batch, anchor, components)
    tokens = batch.with_instruction
    for i in (4,):
        n = tokens.lengths[i]
        alone = Tokens(tokens.ids[i : i + 1, :n], tokens.lengths[i : i + 1])
        single = PromptBatch("one", "sweep", alone, alone, batch.texts[i : i + 1], batch.pairs[i : i + 1])
        np.testing.assert_allclose(exact(pair, single, anchor, components)[:, 0], together[:, i], atol=2e-5)


def test_one_program_a_kind_and_none_the_second_time(one_pair, batch):
    pair = one_pair
    anchor = make_anchor(pair, 2)
    components = enumerate_components(pair.cfg, SWEPT, range(3))
    replay.clear_cache()
    with compiled() as programs:
        exact(pair, batch, anchor, components, budget=2 * 10**6)
    assert programs.count("replay") == len(SWEPT)
    with compiled() as programs:
        exact(pair, batch, anchor, components, budget=2 * 10**6)
    assert not programs


def test_a_whole_sweep_runs_in_one_program_a_kind(one_pair, batch):
    """Its shams and nulls too; and another of the same shape compiles nothing that replaces components."""
    pair, anchor = one_pair, make_anchor(one_pair, 2)
    components = enumerate_components(pair.cfg, ("head", "neuron"), range(3))
    replay.clear_cache()
    for seed, expected in ((0, 2), (1, 0)):
        with compiled() as programs:
            sweep(pair, batch, anchor, components=components, seed=seed)
        assert programs.count("replay") == expected


def test_at_the_last_layer_only_the_positions_that_are_read_are_computed(one_pair, batch):
    """By XLA's own count of operations: the MLP after a patched head there, against that MLP at every token."""
    cfg, blocks, packing = one_pair.cfg, one_pair.base["blocks"], pack(make_anchor(one_pair, 2).metric_along(batch))
    mid = jnp.zeros((4, packing.n_tokens, cfg.d_model))

    def operations(function):
        return jax.jit(function).lower(mid).compile().cost_analysis()["flops"]

    read = operations(lambda x: suffix(cfg, blocks, x, jnp.asarray(3), 2, packing, mlp_first=True)[0])
    everywhere = operations(
        lambda x: block(cfg, take_layer(blocks, 2), 2)(x, packing.packed, known={Site.RESID_MID: x}).resid_post
    )
    assert read < 1.2 * everywhere * packing.at.size / packing.n_tokens < everywhere / 2


def test_a_sham_without_rounding_changes_nothing_and_with_it_little(one_pair, batch):
    pair = one_pair
    anchor = make_anchor(pair, 2)
    components = enumerate_components(pair.cfg, ("head", "neuron", "attn"), range(3))
    still = exact(pair, batch, anchor, components, donor=pair.base)
    assert np.abs(still).max() < 1e-5
    moved = np.abs(exact(pair, batch, anchor, components, donor=pair.base, jitter_seed=0)).max()
    effects = np.abs(exact(pair, batch, anchor, components)).max()
    assert 0 < moved < 1e-4 * effects


def test_bfloat16_effects_are_those_of_the_rounded_weights(one_pair, batch):
    """Within bfloat16's digits; a sham, compared within one program, changes far less."""
    pair, anchor = one_pair, make_anchor(one_pair, 2)
    coarse = dataclasses.replace(
        pair, **{end: jax.tree.map(lambda a: a.astype("bfloat16"), getattr(pair, end)) for end in ("base", "expert")}
    )
    components = enumerate_components(pair.cfg, [kind for kind in SWEPT if kind != "neuron"], range(3))
    components += [c for c in enumerate_components(pair.cfg, ("neuron",), range(3)) if c.index < 4]
    got = exact(coarse, batch, anchor, components, budget=1 << 16)
    fine = [jax.tree.map(lambda a: a.astype("float32"), params) for params in (coarse.base, coarse.expert)]
    expected = reference_changes(pair.cfg, *fine, components, anchor.metric_along(batch))
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()
    assert np.abs(exact(coarse, batch, anchor, components, donor=coarse.base)).max() < 1e-3 * np.abs(expected).max()
    twice = dataclasses.replace(coarse, cfg=dataclasses.replace(pair.cfg, activation_splits=2))
    error = np.abs(exact(twice, batch, anchor, components, budget=1 << 16) - expected).max()
    assert error < 1e-3 * np.abs(expected).max()
    assert error < 0.1 * np.abs(got - expected).max()
    floors = [
        np.abs(exact(one, batch, anchor, components, donor=one.base, jitter_seed=0)).max() for one in (coarse, twice)
    ]
    assert 0 < floors[1] < 0.1 * floors[0]


@jax.numpy_dtype_promotion("strict")
@pytest.mark.parametrize(
    ("screen", "splits", "most"),
    [
        (output_linearised, 1, 0.05),
        (output_linearised, 2, 0.005),
        (weight_gradient, 1, 0.05),
        (weight_gradient, 2, 0.03),
    ],
)
def test_bfloat16_screens_are_those_of_the_rounded_weights(family_pair, batch, screen, splits, most):
    """To their digits, kind by kind; with the host as its own donor nothing is left, though each half is rounded."""
    metric, cfg = (
        make_anchor(family_pair, 2).metric_along(batch),
        dataclasses.replace(family_pair.cfg, activation_splits=splits),
    )
    base, near = (
        jax.tree.map(lambda b, e, far=far: (b + far * (e - b)).astype("bfloat16"), family_pair.base, family_pair.expert)
        for far in (0, 0.2)
    )
    fine = [jax.tree.map(lambda a: a.astype("float32"), params) for params in (base, near)]
    components = enumerate_components(cfg, SWEPT, range(3))
    exact = screen(family_pair.cfg, *fine, components, metric)
    got, nothing = (screen(cfg, base, donor, components, metric) for donor in (near, base))
    for kind in SWEPT:
        mine = [i for i, c in enumerate(components) if c.kind == kind]
        assert np.linalg.norm(got[mine] - exact[mine]) < most * np.linalg.norm(exact[mine]), kind
        assert np.abs(nothing[mine]).max() < 1e-4 * np.abs(exact[mine]).max(), kind


def test_shams_are_spread_over_the_layers(one_pair, batch):
    pair = one_pair
    components = enumerate_components(pair.cfg, ("head", "neuron"), range(3))
    plan = make_plan(pair.cfg, components, pack(make_anchor(pair, 2).metric_along(batch)))
    shams = sham_plan(plan)
    assert [(c.kind, c.layer) for c in shams.chunks] == [("head", 0), ("head", 2), ("neuron", 0), ("neuron", 2)]


def test_screens_are_exact_where_nothing_nonlinear_follows(wired_pair, batch):
    """At the anchor's layer an MLP output enters the score linearly: the output-linearised screen is the effect.

    With a norm after the MLP only that norm's own output does; beside an MLP, attention's does too.
    """
    pair = wired_pair
    anchor = make_anchor(pair, 1)
    components = enumerate_components(pair.cfg, ("neuron", "mlp", *ROUTED), [1])
    if pair.cfg.post_norm:
        components = [c for c in enumerate_components(pair.cfg, ("norm",), [1]) if c.name == "L1.norm.mlp_out"]
    if pair.cfg.parallel:
        components = enumerate_components(pair.cfg, ("head", "kv_group", "attn"), [1]) + components
    got = output_linearised(pair.cfg, pair.base, pair.expert, components, anchor.metric_along(batch))
    np.testing.assert_allclose(got, exact(pair, batch, anchor, components), atol=2e-5)


def test_screens_approach_the_exact_effect_of_a_small_change(wired_pair, batch):
    """For a task vector scaled by 3e-3 both screens meet exact replacement to first order, for every kind."""
    pair = wired_pair
    anchor = make_anchor(pair, 2)
    near = jax.tree.map(lambda b, e: b + 3e-3 * (e - b), pair.base, pair.expert)
    components = enumerate_components(pair.cfg, SWEPT + ROUTED, range(3))
    effect = exact(pair, batch, anchor, components, donor=near)
    for screen in (output_linearised, weight_gradient):
        got = screen(pair.cfg, pair.base, near, components, anchor.metric_along(batch))
        for kind in {c.kind for c in components}:
            mine = [i for i, c in enumerate(components) if c.kind == kind]
            error = np.abs(got[mine] - effect[mine]).max() / np.abs(effect[mine]).max()
            assert error < 0.03, (screen.__name__, kind, error)


def test_what_a_metric_cannot_feel_is_not_screened(one_pair, batch):
    components = enumerate_components(one_pair.cfg, SWEPT, range(3))

    @zero_beyond_reach
    def screen(cfg, host, donor, some, metric):
        assert some == [c for c in components if c.layer <= 1]
        return np.ones((len(some), len(metric)))

    got = screen(one_pair.cfg, one_pair.base, one_pair.expert, components, make_anchor(one_pair, 1).metric_along(batch))
    assert got.shape == (len(components), len(batch))
    assert got.all(1).tolist() == [c.layer <= 1 for c in components]


@pytest.mark.parametrize("kind", [k for k in KINDS if k in SWEPT])
def test_an_expert_that_differs_in_one_component_is_found_first(one_pair, batch, kind):
    pair = one_pair
    anchor = make_anchor(pair, 2)
    planted = enumerate_components(pair.cfg, [kind], range(2))[-1]
    expert = materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, [planted]))
    components = enumerate_components(pair.cfg, [kind], range(3))
    effect = np.abs(exact(pair, batch, anchor, components, donor=expert)).mean(1)
    assert components[int(np.argmax(effect))] == planted
    others = np.delete(effect, int(np.argmax(effect)))
    assert others.size == 0 or others.max() < 1e-5


@pytest.mark.parametrize("screen", [weight_gradient, output_linearised])
def test_the_slopes_of_many_prompts_are_those_of_each_alone(screen):
    """Alone, a prompt shares no token. XLA once returned uninitialised memory here: see `wpjax.models.leaves`."""
    pair, task = load_pair("tiny:base", "tiny:planted"), behaviour("tiny:english_capital")
    anchor, tokens = make_anchor(pair, 6), task.encode(pair.tokenizer, n_prompts=16).with_instruction
    components = enumerate_components(pair.cfg, SWEPT, range(7))
    assert shared_tokens(anchor.metric_along(tokens)) > 0
    together = screen(pair.cfg, pair.base, pair.expert, components, anchor.metric_along(tokens))
    for i in (0, 9):
        alone = Tokens(tokens.ids[i : i + 1], tokens.lengths[i : i + 1])
        one = screen(pair.cfg, pair.base, pair.expert, components, anchor.metric_along(alone))[:, 0]
        np.testing.assert_allclose(together[:, i], one, atol=1e-4)
