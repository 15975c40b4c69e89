"""Flow from suppliers to targets: against HF torch with hooks, and its rows against the effects."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import make_anchor
from tests.oracles import hf_layers
from tests.tiny import as_pair, build_pair, patched_torch
from wpjax.components import Component, enumerate_components
from wpjax.metrics import Metric, decision_metric, kl_metric
from wpjax.readouts import LogProb
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
def swept(pair, batch):
    """Components, their flow [C, U] and their mean change [C]."""
    components = [c for kind in KINDS for c in enumerate_components(pair.cfg, [kind])[:: 5 if kind == "neuron" else 1]]
    return components, *flow_of(pair, make_anchor(pair, ANCHOR_LAYER).on(batch), components)


def flow_of(pair, metric, components, donor=None):
    """The flow [C, U] of components and their mean change [C]."""
    donor = pair.expert if donor is None else donor
    packing = pack(metric)
    plan = make_plan(pair.cfg, components, packing)
    runs = run_packed(pair.cfg, pair.base, metric, packing), None
    found = {}
    for chunk, delta, flow in exact_changes(pair.cfg, pair.base, donor, runs, metric, packing, plan):
        found |= dict(zip(chunk.components, zip(flow, delta.mean(1), strict=True), strict=True))
    return np.stack([found[c][0] for c in components]), np.array([found[c][1] for c in components])


def test_rows_sum_to_the_effects(pair, batch, swept):
    _, flow, effect = swept
    assert flow.shape[1] == len(flow_targets(pair.cfg, make_anchor(pair, ANCHOR_LAYER).on(batch)))
    assert np.abs(effect).max() > 0.1
    np.testing.assert_allclose(flow.sum(1), effect, atol=3e-5)


@torch.no_grad()
def hf_writes(model, batch, vectors):
    """<v, what each head and MLP writes> at the last prompt token, a v a prompt, mean over prompts, by name."""
    llama = hasattr(model, "model")
    layers = hf_layers(model)
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
    for ids, n, vector in zip(tokens.ids, tokens.lengths, vectors, strict=True):
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
    metric = make_anchor(pair, ANCHOR_LAYER).on(batch)
    vectors = [torch.tensor(np.asarray(metric.readout.vector))] * len(batch)
    components, flow, _ = swept
    expect_flow(hf_pair, batch, vectors, components, flow, flow_targets(pair.cfg, metric))


def expect_flow(hf_pair, batch, vectors, components, flow, targets):
    before = hf_writes(hf_pair.base.model, batch, vectors)
    first = [Component("head", 0, 1), Component("neuron", 0, 5)]
    for c in (*first, Component("kv_group", 1, 0), Component("mlp", 1), Component("layer", 1)):
        after = hf_writes(patched_torch(hf_pair, c), batch, vectors)
        row = dict(zip(targets, flow[components.index(c)], strict=True))
        attention = c.kind in ("head", "kv_group")
        for name in row.keys() & after.keys():
            value = after[name]
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


def log_prob(pair, batch):
    """Log-probability of a token after each prompt."""
    tokens = batch.with_instruction
    chosen = np.arange(len(batch))[:, None] % pair.cfg.d_vocab
    ones, last = jnp.ones((len(batch), 1)), pair.cfg.n_layers - 1
    return Metric(tokens, jnp.asarray(tokens.last)[:, None], ones, LogProb(jnp.asarray(chosen)), last, "response")


def hf_slopes(model, batch, chosen):
    """Gradient of log p(token | prompt) by what the final norm reads at the last prompt token."""
    inner, found = model.model.norm if hasattr(model, "model") else model.transformer.ln_f, []
    for ids, n, token in zip(batch.with_instruction.ids, batch.with_instruction.lengths, chosen, strict=True):
        seen = []

        def keep(module, args, seen=seen):
            seen.append(args[0].detach().requires_grad_())
            return (seen[0],)

        handle = inner.register_forward_pre_hook(keep)
        logits = model(torch.tensor(ids[:n])[None]).logits
        handle.remove()
        (slope,) = torch.autograd.grad(logits[0, -1].log_softmax(-1)[int(token)], seen[0])
        found.append(slope[0, -1])
    return found


def test_flow_to_logits_is_along_hf_torch_s_gradient(hf_pair, pair, batch):
    metric = log_prob(pair, batch)
    components = enumerate_components(pair.cfg, ["head", "kv_group", "mlp", "layer"])
    components += enumerate_components(pair.cfg, ["neuron"], [0])
    flow, effect = flow_of(pair, metric, components)
    (last,) = enumerate_components(pair.cfg, ["final_norm"])
    readers, all_of_it = flow_of(pair, metric, [last])
    np.testing.assert_allclose(readers[0, -1], all_of_it[0], atol=3e-5)
    vectors = hf_slopes(hf_pair.base.model, batch, np.asarray(metric.readout.tokens)[:, 0])
    expect_flow(hf_pair, batch, vectors, components, flow, flow_targets(pair.cfg, metric))
    np.testing.assert_allclose(flow.sum(1), effect, atol=3e-5)


@pytest.mark.parametrize("make", [decision_metric, kl_metric])
def test_the_rest_is_of_second_order(pair, batch, make):
    """A tenth of the change leaves a hundredth of what the slope does not tell."""
    metric = make(pair, batch)
    components = enumerate_components(pair.cfg, ["head"])
    rest = []
    for step in (0.1, 0.01):
        near = jax.tree.map(lambda b, e, step=step: b + step * (e - b), pair.base, pair.expert)
        flow, effect = flow_of(pair, metric, components, near)
        assert flow.shape[1] == len(flow_targets(pair.cfg, metric))
        rest.append(np.abs(flow[:, -1]).max() / np.abs(effect).max())
    assert rest[0] < 0.2
    assert rest[1] < 0.2 * rest[0]


def test_what_nothing_reads_flows_nowhere(pair, batch, swept):
    """A neuron of the last layer: all of it is its own; a head there: its own and what that layer's MLP makes of it."""
    components, flow, effect = swept
    targets = flow_targets(pair.cfg, make_anchor(pair, ANCHOR_LAYER).on(batch))
    for i, c in enumerate(components):
        if c.layer == ANCHOR_LAYER and c.kind in ("neuron", "head"):
            reached = {targets[u] for u in np.flatnonzero(flow[i])}
            assert reached <= {"self", *([f"L{ANCHOR_LAYER}.mlp"] if c.kind == "head" else [])}
            np.testing.assert_allclose(flow[i].sum(), effect[i], atol=1e-5)
