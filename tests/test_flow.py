"""Flow from suppliers to targets: against HF torch with hooks, and its rows against the effects."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.conftest import as_pair
from tests.test_sweeps import make_anchor
from tests.tiny import build_pair, patched_torch
from wpjax.components import Component, enumerate_components
from wpjax.sweeps.exact import exact_changes, make_plan
from wpjax.sweeps.packing import pack
from wpjax.sweeps.reference import reference_changes
from wpjax.sweeps.replay import flow_targets, run_packed

ANCHOR_LAYER = 2
KINDS = ("head", "kv_group", "neuron", "mlp", "layer", "norm", "embed")


@pytest.fixture(scope="module", params=["llama-biases", "gpt2-tied"])
def hf_pair(request, tmp_path_factory):
    return build_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def pair(hf_pair):
    return as_pair(hf_pair)


@pytest.fixture(scope="module")
def swept(pair, batch):
    """Components, their flow [C, U] and their mean change [C]."""
    components = [c for kind in KINDS for c in enumerate_components(pair.cfg, [kind])[:: 5 if kind == "neuron" else 1]]
    metric = make_anchor(pair, ANCHOR_LAYER).on(batch)
    packing = pack(metric)
    plan = make_plan(pair.cfg, components, packing)
    runs = run_packed(pair.cfg, pair.base, metric, packing), None
    found = {}
    for chunk, delta, flow in exact_changes(pair.cfg, pair.base, pair.expert, runs, metric, packing, plan):
        found |= dict(zip(chunk.components, zip(flow, delta.mean(1), strict=True), strict=True))
    return components, np.stack([found[c][0] for c in components]), np.array([found[c][1] for c in components])


def test_rows_sum_to_the_effects(pair, swept):
    _, flow, effect = swept
    assert flow.shape[1] == len(flow_targets(pair.cfg, ANCHOR_LAYER))
    assert np.abs(effect).max() > 0.1
    np.testing.assert_allclose(flow.sum(1), effect, atol=3e-5)


@torch.no_grad()
def hf_writes(model, batch, vector):
    """<v, what each head and MLP writes> at the last prompt token, mean over prompts, by name."""
    llama = hasattr(model, "model")
    layers = model.model.layers if llama else model.transformer.h
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for i, layer in enumerate(layers):

        def before(module, args, i=i):
            seen[f"{i}.z"] = args[0][0, -1]

        def after(module, args, out, i=i):
            seen[f"{i}.mlp"] = out[0, -1]

        projection = layer.self_attn.o_proj if llama else layer.attn.c_proj
        handles += [projection.register_forward_pre_hook(before), layer.mlp.register_forward_hook(after)]
    tokens, found = batch.with_instruction, []
    for ids, n in zip(tokens.ids, tokens.lengths, strict=True):
        model(torch.tensor(ids[:n])[None])
        writes = {}
        for i, layer in enumerate(layers):
            w_o = layer.self_attn.o_proj.weight if llama else layer.attn.c_proj.weight.T  # [D, H Dh]
            z, n_heads = seen[f"{i}.z"], model.config.num_attention_heads
            for h in range(n_heads):
                part = slice(h * len(z) // n_heads, (h + 1) * len(z) // n_heads)
                writes[f"L{i}.head.{h}"] = float((w_o[:, part] @ z[part]) @ vector)
            writes[f"L{i}.mlp"] = float(seen[f"{i}.mlp"] @ vector)
        found.append(writes)
    for handle in handles:
        handle.remove()
    return {name: np.mean([w[name] for w in found]) for name in found[0]}


def test_flow_equals_hf_torch_with_hooks(hf_pair, pair, batch, swept):
    """Of a head, a KV group, a neuron, an MLP and a layer: the change of what every later head and MLP writes."""
    vector = torch.tensor(np.asarray(make_anchor(pair, ANCHOR_LAYER).vector))
    components, flow, _ = swept
    targets = flow_targets(pair.cfg, ANCHOR_LAYER)
    before = hf_writes(hf_pair.base.model, batch, vector)
    first = [Component("head", 0, 1), Component("neuron", 0, 5)]
    for c in (*first, Component("kv_group", 1, 0), Component("mlp", 1), Component("layer", 1)):
        after = hf_writes(patched_torch(hf_pair, c), batch, vector)
        row = dict(zip(targets, flow[components.index(c)], strict=True))
        attention = c.kind in ("head", "kv_group")
        for name, value in after.items():
            layer, part = int(name[1]), name[3:]
            if layer > c.layer or (layer == c.layer and attention and part == "mlp"):
                np.testing.assert_allclose(row[name], value - before[name], atol=1e-4, err_msg=f"{c.name} {name}")
            else:
                assert row[name] == 0, (c.name, name)


def test_an_anchor_read_on_answers_has_effects_and_rows_too(batch, tmp_path):
    pair = as_pair(build_pair("llama-gqa3", tmp_path))
    metric = dataclasses.replace(make_anchor(pair, ANCHOR_LAYER), n_response=3).metric(pair, batch)
    components = enumerate_components(pair.cfg, ["head", "mlp"])
    packing = pack(metric)
    plan = make_plan(pair.cfg, components, packing)
    runs = run_packed(pair.cfg, pair.base, metric, packing), None
    expected = dict(
        zip(components, reference_changes(pair.cfg, pair.base, pair.expert, components, metric), strict=True)
    )
    for chunk, delta, flow in exact_changes(pair.cfg, pair.base, pair.expert, runs, metric, packing, plan):
        np.testing.assert_allclose(delta, [expected[c] for c in chunk.components], atol=2e-5)
        np.testing.assert_allclose(flow.sum(1), delta.mean(1), atol=3e-5)


def test_what_nothing_reads_flows_nowhere(pair, swept):
    """A neuron of the last layer: all of it is its own; a head there: its own and what that layer's MLP makes of it."""
    components, flow, effect = swept
    targets = flow_targets(pair.cfg, ANCHOR_LAYER)
    for i, c in enumerate(components):
        if c.layer == ANCHOR_LAYER and c.kind in ("neuron", "head"):
            reached = {targets[u] for u in np.flatnonzero(flow[i])}
            assert reached <= {"self", *([f"L{ANCHOR_LAYER}.mlp"] if c.kind == "head" else [])}
            np.testing.assert_allclose(flow[i].sum(), effect[i], atol=1e-5)
