"""Scores of edges by every method, against the same rules in torch by autograd; conservation; linear models."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.test_edges import ANSWERS, CLEAN, CORRUPTED, FOILS, LENGTHS, two, with_tokens
from tests.tiny import build
from wpjax.behaviours import Tokens
from wpjax.checkpoints.checkpoint import load_checkpoint
from wpjax.circuits.contrast import Contrast
from wpjax.circuits.edges import METHODS, edge_patch, score_edges
from wpjax.circuits.ioi_study import MASKS
from wpjax.circuits.nodes import Graph
from wpjax.cli.circuit import run as command
from wpjax.errors import WpjaxError
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import Projection
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import init_params


class InTorch:
    """A decoder in torch from the weights of HF modules, whose receivers each read the stream plus a shift of theirs.

    With `rules` its slopes are those of relevance: constants are detached, as in the code that is released with RelP.
    """

    def __init__(self, hf, rules):
        self.hf, self.rules, self.is_gpt2 = hf, rules, hf.config.model_type == "gpt2"
        self.n_heads = hf.config.num_attention_heads
        self.n_kv = getattr(hf.config, "num_key_value_heads", self.n_heads)
        self.layers = hf.transformer.h if self.is_gpt2 else hf.model.layers

    def norm(self, module, x):
        if self.is_gpt2:
            x = x - x.mean(-1, keepdim=True)
        eps = module.eps if self.is_gpt2 else module.variance_epsilon
        factor = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        y = x * (factor if self.rules is None else factor.detach()) * module.weight
        return y + module.bias if self.is_gpt2 else y

    def activation(self, f, x):
        return f(x) if self.rules is None else x * (f(x) / x).detach()

    def half(self, a, b, product):
        return (product(a, b.detach()) + product(a.detach(), b)) / 2

    def embed(self, ids):
        ids = torch.tensor(ids).long()
        if self.is_gpt2:
            return self.hf.transformer.wte(ids) + self.hf.transformer.wpe(torch.arange(ids.shape[1]))
        return self.hf.model.embed_tokens(ids)

    def project(self, layer, part, i, x):
        """Queries, keys or values of one head (or group)."""
        dh = self.hf.config.hidden_size // self.n_heads if self.is_gpt2 else self.hf.config.head_dim
        if self.is_gpt2:
            at = "qkv".index(part) * self.n_heads * dh + i * dh
            return x @ layer.attn.c_attn.weight[:, at : at + dh] + layer.attn.c_attn.bias[at : at + dh]
        y = x @ layer.self_attn.get_submodule(f"{part}_proj").weight[i * dh : (i + 1) * dh].T
        if part == "v":
            return y
        cos, sin = self.hf.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        return y * cos + torch.cat([-y[..., dh // 2 :], y[..., : dh // 2]], -1) * sin

    def mix(self, q, k, v):
        if self.rules == "attnlrp":
            scores = self.half(q, k, lambda a, b: a @ b.transpose(-1, -2))
        else:
            scores = q @ k.transpose(-1, -2)
        scores = scores / q.shape[-1] ** 0.5
        pattern = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -1e30).softmax(-1)
        if self.rules == "relp":
            pattern = pattern.detach()
        return self.half(pattern, v, torch.matmul) if self.rules == "attnlrp" else pattern @ v

    def mlp(self, layer, x):
        if self.is_gpt2:
            hidden = layer.mlp.c_fc(x)
            return layer.mlp.c_proj(self.activation(layer.mlp.act, hidden))
        gate, up = self.activation(layer.mlp.act_fn, layer.mlp.gate_proj(x)), layer.mlp.up_proj(x)
        return layer.mlp.down_proj(gate * up if self.rules is None else self.half(gate, up, torch.mul))

    def run(self, start, shift, held=("", None)):
        """Metric of each prompt, what every sender writes, and what every module adds.

        Args:
            start: what is embedded.
            shift: what is added for each receiver.
            held: name of a module, and the value that it adds to the stream whatever it reads.
        """
        x, writes, added = start, {"embed": start}, {}
        for i, layer in enumerate(self.layers):
            names = ("ln_1", "ln_2") if self.is_gpt2 else ("input_layernorm", "post_attention_layernorm")
            norms = [layer.get_submodule(name) for name in names]
            stream = x

            def read(name, norm, x):
                return self.norm(norm, x + shift[name])

            z = []
            for h in range(self.n_heads):
                group = h // (self.n_heads // self.n_kv)
                names = {"q": (f"L{i}.head.{h}.q", h)} | {p: (f"L{i}.kv_group.{group}.{p}", group) for p in "kv"}
                parts = (self.project(layer, p, n, read(name, norms[0], stream)) for p, (name, n) in names.items())
                z.append(self.mix(*parts))
            dh = z[0].shape[-1]
            w_o = layer.attn.c_proj.weight if self.is_gpt2 else layer.self_attn.o_proj.weight.T
            own = {f"L{i}.head.{h}": z[h] @ w_o[h * dh : (h + 1) * dh] for h in range(self.n_heads)}
            out = sum(own.values()) + (layer.attn.c_proj.bias if self.is_gpt2 else 0)
            x = x + (held[1] if held[0] == f"L{i}.attn" else out)
            mlp = self.mlp(layer, read(f"L{i}.mlp", norms[1], x))
            x = x + (held[1] if held[0] == f"L{i}.mlp" else mlp)
            writes |= own | {f"L{i}.mlp": mlp}
            added |= {f"L{i}.attn": out, f"L{i}.mlp": mlp}
        final = self.hf.transformer.ln_f if self.is_gpt2 else self.hf.model.norm
        last = self.hf.lm_head(self.norm(final, (x + shift["logits"])[:, -1]))
        return last[range(2), ANSWERS] - last[range(2), FOILS], writes, added


def scores_in_torch(hf, graph, method, steps):
    """[B, S, R] by loops: one run after the other."""
    model = InTorch(hf, method if method in ("relp", "attnlrp") else None)
    start, other = model.embed(CLEAN).detach(), model.embed(CORRUPTED).detach()
    shift = {r.name: torch.zeros_like(start, requires_grad=True) for r in graph.receivers}
    score, ours, added = model.run(start, shift)
    _, theirs, added_there = model.run(other, shift)
    change = torch.stack([theirs[s.name] - ours[s.name] for s in graph.senders]).detach()

    def slopes(start, held=("", None)):
        total = model.run(start, shift, held)[0].sum()
        found = torch.autograd.grad(total, list(shift.values()), allow_unused=True)
        return torch.stack([torch.zeros_like(start) if g is None else g for g in found])

    shares = [(i + 0.5) / steps for i in range(steps)]
    between = lambda a, b: [(b + share * (a - b)).detach() for share in shares]  # noqa: E731
    got = np.zeros((2, *graph.exists.shape))
    for i, sender in enumerate(graph.senders):
        if method == "eap-ig-activations" and sender.kind != "embed":
            module = f"L{sender.layer}.{'attn' if sender.kind == 'head' else 'mlp'}"
            runs = [slopes(start, (module, value)) for value in between(added[module], added_there[module])]
        elif method.startswith("eap-ig"):
            runs = [slopes(x) for x in between(start, other)]
        else:
            runs = [slopes(start)]
        got[:, i] = torch.einsum("btd,rbtd->br", change[i], torch.stack(runs).mean(0)).numpy()
    return np.where(graph.exists, got, 0), score.detach().numpy()


CASES = [("llama-gqa3", name) for name in METHODS if name != "eap"] + [("gpt2-untied", n) for n in ("relp", "attnlrp")]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_scores_are_those_of_torch(tmp_path_factory, name, method):
    hf = build(name, tmp_path_factory.mktemp(name))
    ours = load_checkpoint(str(hf.folder))
    pair = two(ours.cfg)
    graph = Graph.of(ours.cfg)
    expected, clean = scores_in_torch(hf.model, graph, method, 2)
    np.testing.assert_allclose(pair.clean(ours.cfg, ours.params), clean, atol=1e-4)  # it is the same model
    got = score_edges(ours.cfg, ours.params, pair, method, steps=2)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got.by_prompt, expected, atol=1e-4, rtol=1e-3)
    if method == "relp":  # who attends to whom is a constant
        into = [r.kind in ("q", "k") for r in graph.receivers]
        assert not got.by_prompt[:, :, into].any()


@pytest.mark.parametrize("experts", [0, 4])
def test_relevance_is_conserved_without_biases(one_pair, experts):
    """The corrupted tokens are embedded as zeros, so every node of that run writes zeros: scores are -relevance."""
    cfg, params = one_pair.cfg, one_pair.base
    if experts:  # routed: the weights that choose are constants
        cfg = dataclasses.replace(cfg, n_experts=experts, n_active=2, norm_routing=True)
        router = 3 * jax.random.normal(jax.random.key(0), (cfg.n_layers, cfg.d_model, experts))
        blocks = params["blocks"]
        params = {**params, "blocks": {**blocks, "mlp": {**blocks["mlp"], "W_router": router}}}
    params = with_tokens(params, {60: jnp.zeros(cfg.d_model)})
    pair = two(cfg, CLEAN.clip(0, 59), np.full_like(CLEAN, 60))
    scores = score_edges(cfg, params, pair, "relp")
    nodes, edges = scores.nodes(("embed", "head", "mlp")).by_prompt, scores.by_prompt
    graph, clean = scores.graph, np.asarray(pair.clean(cfg, params))
    assert np.abs(clean).min() > 0.05
    np.testing.assert_allclose(nodes[:, 0], -clean, rtol=1e-4, atol=1e-5)  # all of it comes from the embedding
    np.testing.assert_allclose(edges[:, :, -1].sum(-1), -clean, rtol=1e-4, atol=1e-5)  # all of it goes to the logits
    for i in range(cfg.n_layers):  # what a module passes on is what arrives at it
        arrives = edges[:, :, graph.receiver(f"L{i}.mlp")].sum(-1)
        np.testing.assert_allclose(nodes[:, graph.sender(f"L{i}.mlp")], arrives, rtol=1e-3, atol=1e-5)
        values = [graph.receiver(f"L{i}.kv_group.{k}.v") for k in range(cfg.n_kv_heads)]
        heads = [graph.sender(f"L{i}.head.{h}") for h in range(cfg.n_heads)]
        np.testing.assert_allclose(nodes[:, heads].sum(-1), edges[:, :, values].sum((1, 2)), rtol=1e-3, atol=1e-5)


def test_activations_are_exact_in_a_linear_model():
    """Uniform attention, no norms, no MLPs, a projection read; and relevance, whose rules then change nothing."""
    rng = np.random.default_rng(5)
    cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 8, 61, 64, pre_norm=False)
    params = init_params(cfg, jax.random.key(0))
    flat = {**params["blocks"]["attn"], "W_Q": params["blocks"]["attn"]["W_Q"] * 0}
    params = {**params, "blocks": {"attn": flat, "mlp": jax.tree.map(jnp.zeros_like, params["blocks"]["mlp"])}}
    readout = Projection(jnp.asarray(rng.standard_normal(16), jnp.float32))
    metric = Metric(Tokens(CLEAN, LENGTHS), jnp.full((2, 1), 5), jnp.ones((2, 1)), readout, 1, "projection")
    pair = Contrast.of(metric, Tokens(CORRUPTED, LENGTHS))
    graph = Graph.of(cfg)
    edges = [(graph.senders[s].name, graph.receivers[r].name) for s, r in np.argwhere(graph.exists)]
    exact = edge_patch(cfg, params, pair, edges).change
    assert np.abs(exact).max() > 0.01
    for method in ("eap-ig-activations", "relp"):
        scores = score_edges(cfg, params, pair, method, steps=2)
        got = np.stack([scores.by_prompt[(slice(None), *graph.edge(*e))] for e in edges])
        np.testing.assert_allclose(got, exact, atol=1e-5, err_msg=method)


def test_the_command_knows_every_method(one_pair):
    hints = typing.get_type_hints(command, include_extras=True)["method"]
    assert typing.get_args(typing.get_args(hints)[0]) == (*METHODS, MASKS)
    with pytest.raises(WpjaxError, match="unknown method 'acdc'; methods: eap, eap-ig"):
        score_edges(one_pair.cfg, one_pair.base, two(one_pair.cfg), "acdc")
