"""Patched edges against the same sums in torch, and scores of edges where they must be exact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.oracles import hf_final_norm, hf_layers, hf_patched_run
from tests.tiny import build
from wpjax.behaviours import Tokens
from wpjax.checkpoints.checkpoint import load_checkpoint
from wpjax.circuits.contrast import Contrast
from wpjax.circuits.edges import edge_patch, score_edges
from wpjax.circuits.nodes import Graph
from wpjax.circuits.paths import path_patch
from wpjax.errors import ComponentError, WpjaxError
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import Projection
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import init_params

rng = np.random.default_rng(4)
CLEAN, CORRUPTED = rng.integers(0, 61, (2, 2, 6)).astype(np.int32)
LENGTHS = np.array([6, 6])
ANSWERS, FOILS = np.array([4, 9]), np.array([11, 2])


def two(cfg, clean=CLEAN, corrupted=CORRUPTED):
    n = LENGTHS[: len(clean)]
    return Contrast.of_tokens(cfg, Tokens(clean, n), Tokens(corrupted, n), ANSWERS[: len(clean)], FOILS[: len(clean)])


def names_of(graph, mask):
    return [(graph.senders[s].name, graph.receivers[r].name) for s, r in np.argwhere(mask & graph.exists)]


def edges_by_modules(model, patched):
    """Logits at the last token of a torch Llama whose receivers each read their own sum: module by module.

    Args:
        model: the torch model.
        patched: function of two names, whether that edge is patched.
    """
    config, dh = model.config, model.config.head_dim
    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads
    _, theirs = hf_patched_run(model, CORRUPTED)

    def written(layer, z, h):
        return z[:, :, h] @ hf_layers(model)[layer].self_attn.o_proj.weight[:, h * dh : (h + 1) * dh].T

    donor, live = {"embed": theirs["resid"][0]}, {"embed": model.model.embed_tokens(torch.tensor(CLEAN).long())}
    for i in range(config.num_hidden_layers):
        donor |= {f"L{i}.head.{h}": written(i, theirs["z"][i], h) for h in range(n_heads)}
        donor[f"L{i}.mlp"] = theirs["mlp"][i]

    def read(receiver):
        return sum(donor[s] if patched(s, receiver) else live[s] for s in live)

    set_to = {}  # (part, layer) -> value; the model is run again and again with what is known so far
    change = lambda part, i, x: set_to.get((part, i), x)  # noqa: E731
    for i, layer in enumerate(hf_layers(model)):
        for part, n, kind in (("q", n_heads, "head"), ("k", n_kv, "kv_group"), ("v", n_kv, "kv_group")):
            projection = layer.self_attn.get_submodule(f"{part}_proj")
            rows = [projection(layer.input_layernorm(read(f"L{i}.{kind}.{j}.{part}"))) for j in range(n)]
            heads = [row.reshape(*row.shape[:2], n, dh)[:, :, j] for j, row in enumerate(rows)]
            set_to[part, i] = torch.stack(heads, 2)
        z = hf_patched_run(model, CLEAN, change)[1]["z"][i]
        live |= {f"L{i}.head.{h}": written(i, z, h) for h in range(n_heads)}
        live[f"L{i}.mlp"] = layer.mlp(layer.post_attention_layernorm(read(f"L{i}.mlp")))
    last = model.lm_head(hf_final_norm(model)(read("logits")))[:, -1]
    return np.array([float(last[b, ANSWERS[b]] - last[b, FOILS[b]]) for b in range(2)])


@torch.no_grad()
def test_any_set_of_edges_is_that_of_torch_modules(tmp_path_factory):
    hf = build("llama-gqa3", tmp_path_factory.mktemp("gqa"))
    ours = load_checkpoint(str(hf.folder))
    graph, pair = Graph.of(ours.cfg), two(ours.cfg)
    clean = edges_by_modules(hf.model, lambda s, r: False)
    for share in (0.2, 0.7):
        edges = set(names_of(graph, np.random.default_rng(1).random(graph.exists.shape) < share))
        got = edge_patch(ours.cfg, ours.params, pair, sorted(edges), together=True)
        expected = edges_by_modules(hf.model, lambda s, r, edges=edges: (s, r) in edges)
        np.testing.assert_allclose(got.clean, clean, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(got.clean + got.change[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wired_pair", ["granite", "cohere2", "gemma3", "olmo2"], indirect=True)
def test_each_edge_is_the_path_with_frozen_mlps(wired_pair):
    """Every edge of the graph; where heads are normed together, the edges of what stands alone."""
    cfg, params, pair = wired_pair.cfg, wired_pair.base, two(wired_pair.cfg)
    graph = Graph.of(cfg)
    paths = path_patch(
        cfg, params, pair, [s.name for s in graph.senders], [r.name for r in graph.receivers], mlps="frozen"
    )
    assert (np.isnan(paths.change).all(-1) == ~graph.exists).all()
    edges = [*names_of(graph, graph.exists)[::5], ("embed", "logits"), ("L2.mlp", "logits")]
    got = edge_patch(cfg, params, pair, edges)
    np.testing.assert_allclose(got.corrupted, paths.corrupted, atol=1e-4)  # all edges patched: the corrupted run
    for edge, change in zip(edges, got.change, strict=True):
        if not (cfg.post_norm and ".head." in edge[0]):
            np.testing.assert_allclose(change, paths.change[graph.edge(*edge)], atol=1e-4, rtol=1e-4, err_msg=edge)


def test_scores_are_exact_in_a_linear_model():
    """Uniform attention, no norms, no MLPs, a projection read: then no edge needs more than its slope."""
    cfg = ModelConfig("llama", 3, 16, 4, 2, 4, 8, 61, 64, pre_norm=False)
    params = init_params(cfg, jax.random.key(0))
    flat = {**params["blocks"]["attn"], "W_Q": params["blocks"]["attn"]["W_Q"] * 0}
    params = {**params, "blocks": {**params["blocks"], "attn": flat}}
    params["blocks"]["mlp"] = jax.tree.map(jnp.zeros_like, params["blocks"]["mlp"])
    readout = Projection(jnp.asarray(rng.standard_normal(16), jnp.float32))
    metric = Metric(Tokens(CLEAN, LENGTHS), jnp.full((2, 1), 5), jnp.ones((2, 1)), readout, 2, "projection")
    pair = Contrast.of(metric, Tokens(CORRUPTED, LENGTHS))
    graph = Graph.of(cfg)
    edges = names_of(graph, graph.exists)
    exact = edge_patch(cfg, params, pair, edges).change
    assert np.abs(exact).max() > 0.01
    scores = score_edges(cfg, params, pair, steps=3)
    got = np.stack([scores.by_prompt[(slice(None), *graph.edge(*e))] for e in edges])
    np.testing.assert_allclose(got, exact, atol=1e-5)
    # What reaches the logits in a straight line adds up to the whole gap, as every bias and norm is missing.
    into_logits = edge_patch(cfg, params, pair, [e for e in edges if e[1] == "logits"], together=True)
    np.testing.assert_allclose(into_logits.change[0], exact[[e[1] == "logits" for e in edges]].sum(0), atol=1e-5)


def with_tokens(params, rows):
    """Parameters in which some tokens are embedded as given."""
    table = params["embed"]["W_E"]
    for token, row in rows.items():
        table = table.at[token].set(row)
    return {**params, "embed": {**params["embed"], "W_E": table}}


@pytest.mark.parametrize("wired_pair", ["gemma3"], indirect=True)
def test_a_small_corruption_is_told_by_its_slope(wired_pair):
    """Token 60 is embedded almost as token 50: EAP is right to first order, for every edge."""
    cfg = wired_pair.cfg
    e = wired_pair.base["embed"]["W_E"]
    step = jnp.asarray(rng.standard_normal(cfg.d_model), jnp.float32)
    params = with_tokens(wired_pair.base, {60: e[50] + 3e-3 * step / (cfg.embed_scale or 1.0)})
    clean = CLEAN.clip(0, 49)
    clean[:, 1] = 50
    corrupted = clean.copy()
    corrupted[:, 1] = 60
    pair, graph = two(cfg, clean, corrupted), Graph.of(cfg)
    edges = names_of(graph, graph.exists)[::7]
    exact = edge_patch(cfg, params, pair, edges).change
    scores = score_edges(cfg, params, pair, "eap")
    got = np.stack([scores.by_prompt[(slice(None), *graph.edge(*edge))] for edge in edges])
    assert np.corrcoef(got.ravel(), exact.ravel())[0, 1] > 0.999
    np.testing.assert_allclose(got, exact, atol=0.03 * np.abs(exact).max())


def test_steps_stand_between_the_two_embeddings(one_pair):
    """One step: the slope at the middle. A prompt whose token IS the middle has that slope at its clean run."""
    cfg, e = one_pair.cfg, one_pair.base["embed"]["W_E"]
    middle = (e[50] + e[51]) / 2
    params = with_tokens(one_pair.base, {59: middle, 60: middle + e[51] - e[50]})
    clean = CLEAN.clip(0, 49)

    def prompts(token):
        ids = clean.copy()
        ids[:, 2] = token
        return ids

    graph = Graph.of(cfg)
    ig = score_edges(cfg, params, two(cfg, prompts(50), prompts(51)), steps=1)
    eap = score_edges(cfg, params, two(cfg, prompts(59), prompts(60)), "eap")
    np.testing.assert_allclose(ig.by_prompt[:, 0], eap.by_prompt[:, 0], atol=1e-5)  # edges of "embed"
    assert np.abs(ig.by_prompt[:, 0]).max() > 1e-2
    assert not ig.by_prompt[:, ~graph.exists].any()


def test_ranking_and_stability(one_pair):
    graph = Graph.of(one_pair.cfg)
    values = np.zeros((4, *graph.exists.shape))
    strongest, helping = graph.edge("L0.mlp", "logits"), graph.edge("embed", "L1.mlp")
    values[:, *strongest], values[:, *helping] = 3.0, -2.0  # a patch of the first raises the metric
    scores = score_edges(one_pair.cfg, one_pair.base, two(one_pair.cfg), "eap")
    scores = dataclasses.replace(scores, by_prompt=values)
    assert scores.listed(1) == [("L0.mlp->logits", 3.0)]
    assert scores.listed(1, absolute=False) == [("embed->L1.mlp", -2.0)]
    assert scores.top(2).sum() == 2
    assert scores.stability(2) == (1.0, 1.0, 1.0)
    values[0, *strongest] = 0
    values[1:, *strongest] = 0.0
    values[0, *graph.edge("L1.mlp", "logits")] = 50  # one prompt alone: in the top only of draws that have it
    mean, low, high = dataclasses.replace(scores, by_prompt=values).stability(1)
    assert (low, high) == (0.0, 1.0)
    assert 0.5 < mean < 0.85  # 1 - (3/4)^4 = .68 of all draws


def test_edges_that_cannot_be_are_refused(one_pair):
    pair = two(one_pair.cfg)
    with pytest.raises(ComponentError, match=r"L0\.mlp comes before L1\.head\.0 has written"):
        edge_patch(one_pair.cfg, one_pair.base, pair, [("L1.head.0", "L0.mlp")])
    with pytest.raises(ComponentError, match=r"'L1\.head\.0' is no receiver"):
        edge_patch(one_pair.cfg, one_pair.base, pair, [("embed", "L1.head.0")])
    with pytest.raises(WpjaxError, match="0 steps: give 1 or more"):
        score_edges(one_pair.cfg, one_pair.base, pair, steps=0)
