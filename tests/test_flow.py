"""Flow from suppliers to targets: against HF torch with hooks, and its rows against the effects."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import make_anchor
from tests.oracles import NAMES, hf_final_norm, hf_layers
from tests.tiny import as_pair, build_pair, patched_torch
from wpjax.components import Component, enumerate_components
from wpjax.engines.exact import exact_changes
from wpjax.engines.flow import flow_targets
from wpjax.engines.packing import pack
from wpjax.engines.plan import make_plan
from wpjax.engines.reference import reference_changes
from wpjax.engines.replay import run_packed
from wpjax.metrics.answers import decision_metric, kl_metric
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import LogProb

ANCHOR_LAYER = 2
KINDS = ("head", "kv_group", "neuron", "mlp", "layer", "norm", "embed")


@pytest.fixture(scope="module", params=["granite", "gpt2-tied", "gemma3", "gpt-neox"])
def hf_pair(request, tmp_path_factory):
    return build_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def swept(pair, batch):
    """Components, their flow [C, U] and their mean change [C]."""
    components = [c for kind in KINDS for c in enumerate_components(pair.cfg, [kind])[:: 5 if kind == "neuron" else 1]]
    return components, *flow_of(pair, make_anchor(pair, ANCHOR_LAYER).metric_along(batch), components)


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
    assert flow.shape[1] == len(flow_targets(pair.cfg, make_anchor(pair, ANCHOR_LAYER).metric_along(batch)))
    assert np.abs(effect).max() > 0.1
    np.testing.assert_allclose(flow.sum(1), effect, atol=3e-5)


@torch.no_grad()
def hf_written(model, batch):
    """At the last token of each prompt, of every layer: what heads write (before W_O), all of them together, and what
    the MLP adds to the stream.
    """
    names, tokens, handles, seen = NAMES[model.config.model_type], batch.with_instruction, [], []

    def keep_heads(module, args, out):
        seen[-1].append([args[0][0, -1], out[0, -1]])

    def keep_mlp(module, args, out):
        seen[-1][-1].append(out[0, -1])

    for layer in hf_layers(model):
        handles.append(layer.get_submodule(names.w_o).register_forward_hook(keep_heads))
        handles.append(layer.get_submodule(names.norm_mlp_out or names.mlp).register_forward_hook(keep_mlp))
    for ids, n in zip(tokens.ids, tokens.lengths, strict=True):
        seen.append([])
        model(torch.tensor(ids[:n])[None])
    for handle in handles:
        handle.remove()
    return seen


def through_the_norm(norm, before, after, slope):
    """The slope by what a post-norm reads, from that by what it makes, between two values: by hand.

    n(r) = w r / s, s^2 = mean(r^2) + eps:  n' - n = w [(1/s + 1/s') I / 2 - (r + r')(r + r')^T /
    (2 d s s' (s + s'))] (r' - r), and the matrix in brackets is symmetric. Gemma's checkpoints hold w - 1.
    """
    is_gemma = type(norm).__name__.startswith("Gemma")
    eps = norm.eps if is_gemma else norm.variance_epsilon
    s, after_s = ((r.square().mean() + eps).sqrt() for r in (before, after))
    both, slope = before + after, (norm.weight + 1 if is_gemma else norm.weight) * slope
    shrunk = both * (both @ slope) / (2 * len(both) * s * after_s * (s + after_s))
    return (1 / s + 1 / after_s) / 2 * slope - shrunk


@torch.no_grad()
def hf_flow(model, before, after, vectors):
    """How far what each head and MLP adds to the stream moves along a vector a prompt, mean over prompts, by name."""
    names, total = NAMES[model.config.model_type], {}
    factor = getattr(model.config, "residual_multiplier", 1.0)
    for prompt, others, vector in zip(before, after, vectors, strict=True):
        for i, (layer, one, other) in enumerate(zip(hf_layers(model), prompt, others, strict=True)):
            slope = factor * vector
            if names.norm_attn_out:
                slope = through_the_norm(layer.get_submodule(names.norm_attn_out), one[1], other[1], vector)
            w_o = layer.get_submodule(names.w_o).weight
            along = slope @ (w_o.T if model.config.model_type == "gpt2" else w_o)  # [H Dh]
            parts = ((other[0] - one[0]) * along).reshape(model.config.num_attention_heads, -1).sum(1).tolist()
            moved = {f"L{i}.head.{h}": x for h, x in enumerate(parts)} | {
                f"L{i}.mlp": float((other[2] - one[2]) @ vector * factor)
            }
            total |= {name: total.get(name, 0.0) + x / len(before) for name, x in moved.items()}
    return total


def test_flow_equals_hf_torch_with_hooks(hf_pair, pair, batch, swept):
    """Of a head, a KV group, a neuron, an MLP and a layer: the change of what every later head and MLP writes."""
    metric = make_anchor(pair, ANCHOR_LAYER).metric_along(batch)
    vectors = [torch.tensor(np.asarray(metric.readout.vector))] * len(batch)
    components, flow, _ = swept
    expect_flow(hf_pair, batch, vectors, components, flow, flow_targets(pair.cfg, metric))


def expect_flow(hf_pair, batch, vectors, components, flow, targets):
    before = hf_written(hf_pair.base.model, batch)
    parallel = getattr(hf_pair.base.config, "use_parallel_residual", False)
    first = [Component("head", 0, 1), Component("neuron", 0, 5)]
    for c in (*first, Component("kv_group", 1, 0), Component("mlp", 1), Component("layer", 1)):
        moved = hf_flow(hf_pair.base.model, before, hf_written(patched_torch(hf_pair, c), batch), vectors)
        row = dict(zip(targets, flow[components.index(c)], strict=True))
        feeds_mlp = c.kind in ("head", "kv_group") and not parallel
        assert row.keys() & moved.keys()
        for name in row.keys() & moved.keys():
            layer, part = int(name[1]), name[3:]
            if layer > c.layer or (layer == c.layer and feeds_mlp and part == "mlp"):
                np.testing.assert_allclose(row[name], moved[name], atol=1e-4, err_msg=f"{c.name} {name}")
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
    inner, found = hf_final_norm(model), []
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
    for step in (0.03, 0.003):
        near = jax.tree.map(lambda b, e, step=step: b + step * (e - b), pair.base, pair.expert)
        flow, effect = flow_of(pair, metric, components, near)
        assert flow.shape[1] == len(flow_targets(pair.cfg, metric))
        rest.append(np.abs(flow[:, -1]).max() / np.abs(effect).max())
    assert rest[0] < 0.2
    assert rest[1] < 0.2 * rest[0]


def test_what_nothing_reads_flows_nowhere(pair, batch, swept):
    """A neuron of the last layer: all of it is its own; a head there: its own and what that layer's MLP makes of it."""
    components, flow, effect = swept
    targets = flow_targets(pair.cfg, make_anchor(pair, ANCHOR_LAYER).metric_along(batch))
    for i, c in enumerate(components):
        if c.layer == ANCHOR_LAYER and c.kind in ("neuron", "head"):
            reached = {targets[u] for u in np.flatnonzero(flow[i])}
            assert reached <= {"self", *([f"L{ANCHOR_LAYER}.mlp"] if c.kind == "head" else [])}
            np.testing.assert_allclose(flow[i].sum(), effect[i], atol=1e-5)
