"""Routed experts: how they are chosen, how they are stored, what patches of them do, and what is refused."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.helpers import exact, make_anchor, make_anchor_of
from tests.oracles import hf_layers, hf_sites
from tests.tiny import as_pair, build, build_pair, patched_torch
from wpjax.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from wpjax.checkpoints.rewrite import open_model, rewrite_folder
from wpjax.components import Component, enumerate_components, n_parameters, parse_component
from wpjax.engines.exact import exact_changes
from wpjax.engines.joint import scores_of_sets
from wpjax.engines.packing import pack
from wpjax.engines.plan import make_plan
from wpjax.engines.reference import patched_score
from wpjax.engines.replay import run_packed
from wpjax.errors import CheckpointError, ComponentError, FactError, PairError
from wpjax.facts.facts import Fact
from wpjax.facts.rank_one import check_layer
from wpjax.models import ops
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import forward
from wpjax.models.experts import Weights, routed_products, rows_of_block
from wpjax.models.secant import Secant
from wpjax.models.sharding import spec_of, weight_bytes
from wpjax.models.sites import Site
from wpjax.pairs import load_pair
from wpjax.patching import PatchMask, patch
from wpjax.results.sweep_result import SweepResult


@pytest.fixture(scope="module")
def hf_pair(tmp_path_factory):
    return build_pair("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize("renormalise", [True, False])
def test_the_largest_weights_of_a_softmax_are_those_of_torch(renormalise):
    logits = np.random.default_rng(0).standard_normal((40, 7)).astype(np.float32)
    p = torch.tensor(logits).softmax(-1)
    values, chosen = p.topk(3, dim=-1)
    values = values / values.sum(-1, keepdim=True) if renormalise else values
    expected = torch.zeros_like(p).scatter(1, chosen, values).numpy()
    np.testing.assert_allclose(ops.top_k_softmax(jnp.asarray(logits), 3, renormalise), expected, atol=1e-6)


@pytest.mark.parametrize("renormalise", [True, False])
def test_the_secant_of_a_choice_leaves_no_remainder_and_is_linear(renormalise):
    """Rows where base and expert choose the same, and rows where they do not."""
    rng = np.random.default_rng(1)
    base, way, part = (jnp.asarray(rng.standard_normal((60, 5)), jnp.float32) for _ in range(3))

    def change(d):
        return ops.top_k_softmax(Secant(base, base + way, d), 2, renormalise).change

    ends = [ops.top_k_softmax(x, 2, renormalise) for x in (base, base + way)]
    jumps = np.any((np.asarray(ends[0]) > 0) != (np.asarray(ends[1]) > 0), axis=1)
    assert 10 < jumps.sum() < 50
    np.testing.assert_allclose(change(way), ends[1] - ends[0], atol=1e-6)
    np.testing.assert_allclose(change(way + 2 * part), change(way) + 2 * change(part), atol=1e-5)


def test_blocks_of_one_expert_each_give_what_all_experts_at_all_tokens_give():
    """Values, slopes, rows under vmap, layers under vmap; tokens that all go to the same two experts, too."""
    cfg = ModelConfig("mixtral", 1, 12, 4, 2, 3, 64, 50, 64, n_experts=8, n_active=2, norm_routing=True)
    assert rows_of_block(cfg, 256) == 32
    rng = np.random.default_rng(2)
    x, router, *weights = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 256, 12), (12, 8), (12, 64), (12, 64), (64, 12))
    )
    weights, silu = Weights(*weights), jax.nn.silu

    def plain(x, routing, w):
        return (silu(x @ w.gate) * (x @ w.inner) * jnp.repeat(routing, 8, -1)) @ w.out

    def ours(x, routing, w):
        return routed_products(cfg, silu, x, routing, w)

    routing = ops.top_k_softmax(x @ router, 2, renormalise=True)
    skewed = jnp.zeros_like(routing).at[..., jnp.array([3, 7])].set(0.5)
    for r in (routing, skewed):
        np.testing.assert_allclose(ours(x[0], r[0], weights), plain(x[0], r[0], weights), rtol=1e-4, atol=1e-4)
        rows = jax.vmap(ours, (0, 0, None))(x, r, weights)
        np.testing.assert_allclose(rows, plain(x, r, weights), rtol=1e-4, atol=1e-4)
    layers = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), weights)
    got = jax.vmap(ours, (None, None, 0))(x[0], routing[0], layers)
    np.testing.assert_allclose(got[1], plain(x[0], routing[0], jax.tree.map(lambda w: 2 * w, weights)), rtol=1e-4)
    slopes = [
        jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), (0, 1, 2))(x[0], routing[0], weights) for f in (ours, plain)
    ]
    chex.assert_trees_all_close(*slopes, rtol=1e-3, atol=1e-3)
    jaxpr = str(jax.make_jaxpr(lambda x: ours(x, routing, weights))(x))
    assert "scan" in jaxpr  # over blocks: it is not the plain way that was compared


def test_names_and_sizes_of_an_expert_its_neurons_and_the_router(hf_pair):
    cfg = load_checkpoint(hf_pair.base.folder).cfg
    assert [c.name for c in enumerate_components(cfg, ["router", "routed_expert"], [1])] == [
        "L1.router", *(f"L1.routed_expert.{i}" for i in range(5))
    ]  # fmt: skip
    expert, neuron = (parse_component(cfg, name) for name in ("L1.routed_expert.3", "L1.neuron.24"))
    assert n_parameters(cfg, expert) == 8 * n_parameters(cfg, neuron) == 3 * 8 * 24
    of_expert = [f"L1.neuron.{24 + i}" for i in range(8)]
    masks = [PatchMask.of(cfg, names).units["neuron"] for names in (expert.name, of_expert)]
    np.testing.assert_array_equal(*masks)
    with pytest.raises(ComponentError, match="a layer of this model has routed_expert 0 to 4"):
        parse_component(cfg, "L1.routed_expert.5")
    with pytest.raises(ComponentError, match=r"L1\.router: this model has none"):
        parse_component(load_pair("tiny:base", "tiny:expert").cfg, "L1.router")


def test_experts_are_cut_over_a_mesh_by_their_neurons(hf_pair):
    cfg = load_checkpoint(hf_pair.base.folder).cfg
    assert tuple(spec_of("blocks/mlp/W_in", (3, 24, 40), 5)) == (None, None, "model")
    assert tuple(spec_of("blocks/mlp/W_out", (3, 40, 24), 5)) == (None, "model", None)
    assert "model" not in tuple(spec_of("blocks/mlp/W_router", (3, 24, 5), 5))
    experts = 3 * 3 * 24 * 40 * 4
    assert weight_bytes(cfg, "float32") - weight_bytes(cfg, "float32", 5) == experts * 4 // 5


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe"])
def test_experts_that_are_stored_together_are_read_one_by_one(name, tmp_path):
    """As transformers holds them in memory; saved again, they are tensors of their own, as in published models."""
    hf = build(name, tmp_path / "apart")
    hf.model.save_pretrained(tmp_path / "together", save_original_format=False)
    stored = load_file(tmp_path / "together" / "model.safetensors")
    assert stored["model.layers.2.mlp.experts.gate_up_proj"].shape == (5, 16, 24)
    apart, together = (load_checkpoint(tmp_path / form) for form in ("apart", "together"))
    chex.assert_trees_all_equal(apart.params, together.params)
    save_checkpoint(tmp_path / "again", together)
    rewrite_folder(tmp_path / "together", tmp_path / "out", lambda name, w: w)
    expected = load_file(tmp_path / "apart" / "model.safetensors")
    for folder in ("again", "out"):
        chex.assert_trees_all_equal(load_file(tmp_path / folder / "model.safetensors"), expected)
    opened = [open_model(tmp_path / form) for form in ("apart", "together")]
    assert opened[0].fingerprint() == opened[1].fingerprint()
    stored["model.layers.2.mlp.experts.down_proj"] = stored["model.layers.2.mlp.experts.down_proj"][:4]
    save_file(stored, tmp_path / "together" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"experts.down_proj has shape \(4, 24, 8\), config.json says \(5, 24, 8\)"
    ):
        load_checkpoint(tmp_path / "together")


def test_activation_patches_equal_hf_torch_with_hooks(hf_pair, pair, batch):
    """The donor's own output of a neuron, of an expert and of a router: the weights that it gives to experts."""
    cfg, metric = pair.cfg, make_anchor(pair, 2).metric_along(batch)
    components = [Component("router", 0), Component("router", 1)]
    components += [Component(kind, layer, i) for layer in (0, 1) for kind, i in (("routed_expert", 2), ("neuron", 17))]
    packing = pack(metric)
    runs = tuple(run_packed(cfg, params, metric, packing, with_flow=False) for params in (pair.base, pair.expert))
    plan = make_plan(cfg, components, packing)
    got = {}
    for chunk, delta, _ in exact_changes(
        cfg, pair.base, pair.expert, runs, metric, packing, plan, weights="donor", inputs="donor"
    ):
        got |= dict(zip(chunk.components, delta, strict=True))
    for kind in ("router", "routed_expert", "neuron"):
        assert max(np.abs(got[c]).max() for c in components if c.kind == kind) > 1e-3, kind
    models, vector = (hf_pair.base.model, hf_pair.expert.model), np.asarray(make_anchor(pair, 2).vector)
    tokens = batch.with_instruction
    for row in (0, 3):
        ids = tokens.ids[row : row + 1, : tokens.lengths[row]]
        neurons = [torch.tensor(hf_sites(model, ids)[1][Site.NEURON]) for model in models]
        routed = [record_routing(model, ids) for model in models]
        before = hf_sites(models[0], ids)[1][Site.RESID_POST][2, 0, -1] @ vector
        for c in components:
            own, other = (hf_layers(model)[c.layer].mlp for model in models)
            at = {"routed_expert": slice(16, 24), "neuron": slice(17, 18)}.get(c.kind)
            if c.kind == "router":
                handle = own.gate.register_forward_hook(lambda m, a, out, to=routed[1][c.layer]: to)
            else:
                w = [mlp.experts.down_proj.detach().transpose(1, 2).reshape(40, 24)[at] for mlp in (own, other)]
                add = neurons[1][c.layer, :, :, at] @ w[1] - neurons[0][c.layer, :, :, at] @ w[0]
                handle = own.register_forward_hook(lambda m, a, out, add=add: out + add)
            after = hf_sites(models[0], ids)[1][Site.RESID_POST][2, 0, -1] @ vector
            handle.remove()
            np.testing.assert_allclose(got[c][row], after - before, atol=1e-4, err_msg=c.name)


def record_routing(model, ids):
    """What the router of every layer returns."""
    kept = []
    handles = [layer.mlp.gate.register_forward_hook(lambda m, a, out: kept.append(out)) for layer in hf_layers(model)]
    with torch.no_grad():
        model(torch.tensor(ids))
    for handle in handles:
        handle.remove()
    return kept


def test_what_follows_a_patch_is_routed_anew(hf_pair, pair):
    """Later routers choose other experts than in the base, and the patched models agree."""
    ids = np.random.default_rng(5).integers(0, 61, (2, 24))
    for name in ("L0.router", "L0.head.1", "L0.routed_expert.2"):
        patched = patched_torch(hf_pair, parse_component(pair.cfg, name))
        choices = [record_routing(model, ids)[2][2].sort()[0] for model in (hf_pair.base.model, patched)]
        assert not torch.equal(*choices), name
        with torch.no_grad():
            expected = patched(torch.tensor(ids)).logits.numpy()
        mask = PatchMask.of(pair.cfg, [name])
        got = forward(pair.cfg, patch(pair.base, pair.expert, mask), jnp.asarray(ids)).logits
        np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=name)


def test_patches_where_queries_and_keys_are_normed_together_and_clipped(tmp_path, batch):
    """OLMoE: lazy patches, and suffix replay, against torch models with copied slices."""
    hf_pair = build_pair("olmoe", tmp_path)
    pair, anchor = as_pair(hf_pair), make_anchor_of(load_checkpoint(hf_pair.base.folder).cfg, 2)
    names = ["L0.head.1", "L1.kv_group.0", "L1.routed_expert.2"]
    components = [parse_component(pair.cfg, name) for name in names]
    changes = exact(pair, batch, anchor, components)
    ids, n = batch.with_instruction.ids[:1], batch.with_instruction.lengths[0]
    run = jax.jit(lambda mask: forward(pair.cfg, patch(pair.base, pair.expert, mask), jnp.asarray(ids)).logits)
    before = hf_sites(hf_pair.base.model, ids[:, :n])[1][Site.RESID_POST][2, 0, -1] @ np.asarray(anchor.vector)
    for c, change in zip(components, changes, strict=True):
        logits, sites = hf_sites(patched_torch(hf_pair, c), ids[:, :n])
        after = sites[Site.RESID_POST][2, 0, -1] @ np.asarray(anchor.vector)
        np.testing.assert_allclose(change[0], after - before, atol=1e-4, err_msg=c.name)
        np.testing.assert_allclose(run(PatchMask.of(pair.cfg, [c]))[:, :n], logits, atol=1e-4, err_msg=c.name)
    assert np.abs(changes[:, 0]).min() > 1e-4


def test_a_sweep_from_the_command_line(tmp_path, tiny_pair, wpjax):
    """Two folders that differ in three experts: these come first, and nothing else has an effect."""
    config = transformers.AutoConfig.for_model(
        "mixtral", vocab_size=tiny_pair.cfg.d_vocab, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=512, initializer_range=0.3, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name in ("base", "expert"):
        model.save_pretrained(tmp_path / name)
        tiny_pair.tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for layer, expert in ((0, 1), (0, 3), (1, 2)):
                for weights in model.model.layers[layer].mlp.experts.parameters():
                    weights[expert] += 0.5 * torch.randn_like(weights[expert])
    sweep = "--metric kl --causal skip --n-prompts 6 --max-new-tokens 3 --method exact --kinds routed_expert,router"
    code, said, errors = wpjax(
        "sweep", "--base", "base", "--expert", "expert", "--behaviour", "tiny:english_capital", *sweep.split(),
        "--answers", "0", "--no-set-score", "--out", "caps.nc",
    )  # fmt: skip
    assert code == 0, errors
    rows = SweepResult.from_netcdf(tmp_path / "caps.nc").top(10)
    changed = {"L0.routed_expert.1", "L0.routed_expert.3", "L1.routed_expert.2"}
    assert {row.name for row in rows if abs(row.effect) > 1e-5} == changed
    assert "routed_expert 100%" in said


@pytest.mark.parametrize("kinds", [("neuron",), ("routed_expert", "router", "head", "neuron")])
def test_sets_score_as_one_at_a_time(pair, batch, kinds):
    """Few neurons, so that the donor's weights are cut down to them; and experts with routers."""
    metric, rng = make_anchor(pair, 2).metric_along(batch), np.random.default_rng(0)
    every = enumerate_components(pair.cfg, kinds)
    masks = [PatchMask.of(pair.cfg, [every[i] for i in rng.permutation(len(every))[:4]]) for _ in range(3)]
    expected = np.stack([patched_score(pair.cfg, pair.base, pair.expert, mask, metric) for mask in masks])
    assert np.ptp(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(scores_of_sets(pair.cfg, pair.base, pair.expert, masks, metric), expected, atol=2e-5)


def test_norms_of_changes_are_those_of_the_slices(pair):
    components = enumerate_components(pair.cfg, ["routed_expert", "router"])
    got = dict(zip(components, pair.delta_norms(components), strict=True))
    change = jax.tree.map(lambda b, e: np.asarray(e - b, np.float64), pair.base, pair.expert)["blocks"]["mlp"]
    for c in components:
        at = slice(8 * c.index, 8 * c.index + 8)
        parts = [change["W_router"]] if c.kind == "router" else [
            change["W_gate"][..., at], change["W_in"][..., at], change["W_out"][:, at]
        ]  # fmt: skip
        assert got[c] == pytest.approx(np.sqrt(sum((p[c.layer] ** 2).sum() for p in parts)), rel=1e-4), c.name


def test_routers_of_two_shapes_are_no_pair(hf_pair, tmp_path):
    raw = json.loads((hf_pair.base.folder / "config.json").read_text())
    tensors = load_file(hf_pair.base.folder / "model.safetensors")
    fewer = {name: w[:4] if ".gate." in name else w for name, w in tensors.items() if ".experts.4." not in name}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_local_experts": 4}))
    save_file(fewer, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PairError, match="n_experts: 5 != 4"):
        load_pair(hf_pair.base.folder, tmp_path)


def test_facts_are_edited_in_one_matrix_alone(pair):
    with pytest.raises(FactError, match="5 routed experts: no one matrix holds its facts"):
        check_layer(pair.cfg, Fact("{} lives in", "Ann", "", " Rome"), 1)
