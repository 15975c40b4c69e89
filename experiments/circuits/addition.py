"""Which frequencies does a model that adds modulo 113 compute with? Found by ablation, in a released model.

    python -m experiments.circuits.addition MODEL.safetensors --out experiments/circuits/addition.json

The model is of the repository of "Progress measures for grokking via mechanistic interpretability" (arXiv 2301.05217):
one layer with a ReLU MLP and no norms, prompts "a b =", answer a + b modulo 113. It is known that it embeds numbers as
cos and sin of a few frequencies, multiplies these in attention and MLP, and that the MLP alone writes the answer.

A frequency is ablated in what the embedding writes: its part is replaced by its mean over all numbers, which is 0. It
is ablated along all edges of the embedding, or along some. Which frequencies the embedding holds at all is read from
its weights, and is no part of the ablation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import wpjax as wp
from experiments.records import made, table, write
from wpjax.behaviours import Tokens
from wpjax.circuits.circuit import Ablation, masked_scores
from wpjax.circuits.nodes import Graph
from wpjax.circuits.wiring import writes
from wpjax.metrics.readouts import LogProb

P = 113
"""The modulus; the token "=" is this number."""

N_PROMPTS = 512

FAR = 1e6
"""The model has no norm at its end, and ours has one: sqrt(mean(x^2) + FAR^2) is FAR, to rounding."""

KEY = 10
"""A frequency is a key frequency if the loss without it is over so many times that of the model (ours)."""


def load(path: Path) -> tuple[wp.ModelConfig, dict[str, Any]]:
    """The model as ours."""
    w = {name: jnp.asarray(value) for name, value in load_file(path).items()}
    d, v = w["embed.W_E"].shape
    h, dh, _ = w["blocks.0.attn.W_Q"].shape
    f, n_ctx = len(w["blocks.0.mlp.b_in"]), len(w["pos_embed.W_pos"])
    cfg = wp.ModelConfig(
        "gpt2", 1, d, h, h, dh, f, v, n_ctx, norm_eps=FAR**2, act="relu", rope=None, pre_norm=False, gated=False,
        mlp_bias=True,
    )  # fmt: skip
    attn = {f"W_{n}": jnp.moveaxis(w[f"blocks.0.attn.W_{n}"], 2, 0)[None] for n in "QKV"}
    attn["W_O"] = w["blocks.0.attn.W_O"].T.reshape(1, h, dh, d)
    mlp = {"W_in": w["blocks.0.mlp.W_in"].T[None], "b_in": w["blocks.0.mlp.b_in"][None]}
    mlp |= {"W_out": w["blocks.0.mlp.W_out"].T[None], "b_out": w["blocks.0.mlp.b_out"][None]}
    params = {
        "embed": {"W_E": w["embed.W_E"].T, "W_pos": w["pos_embed.W_pos"]},
        "blocks": {"attn": attn, "mlp": mlp},
        "final_norm": {"scale": jnp.full(d, FAR)},
        "unembed": {"W_U": w["unembed.W_U"]},
    }
    return cfg, params


def waves(frequency: int) -> np.ndarray:
    """cos and sin of a frequency over all numbers, of length 1: [P, 2]."""
    t = 2 * np.pi * frequency * np.arange(P) / P
    return np.stack([np.cos(t), np.sin(t)], 1) * np.sqrt(2 / P)


def prompts(seed: int) -> wp.Contrast:
    """Random sums; corrupted, others. The metric is the log-probability of the answer."""
    rows = np.random.default_rng(seed).integers(0, P, (2, N_PROMPTS, 2)).astype(np.int32)
    ids = np.concatenate([rows, np.full((2, N_PROMPTS, 1), P, np.int32)], 2)
    lengths, ones = np.full(N_PROMPTS, 3), jnp.ones((N_PROMPTS, 1))
    answers = jnp.asarray(rows[0].sum(1, keepdims=True) % P)
    metric = wp.Metric(Tokens(ids[0], lengths), jnp.full((N_PROMPTS, 1), 2), ones, LogProb(answers), 0, "log_p")
    return wp.Contrast.of(metric, Tokens(ids[1], lengths))


def measure(path: Path, seed: int = 0) -> dict[str, Any]:
    """Loss without each frequency, without sets of them along some edges, and edges exactly patched."""
    cfg, params = load(path)
    two, graph = prompts(seed), Graph.of(cfg)
    ids = jnp.asarray(two.clean.tokens.ids)
    logits = wp.forward(cfg, params, ids).logits
    assert logits is not None
    right = np.asarray(logits[:, -1].argmax(-1)) == np.asarray(two.clean.readout.tokens)[:, 0]  # type: ignore[attr-defined]
    table_of = np.asarray(params["embed"]["W_E"])[:P]
    own = np.asarray(writes(cfg, params, ids, 1)[1])

    def without(frequencies: list[int], receivers: tuple[str, ...] = ("q", "k", "v", "mlp", "logits")) -> float:
        """Loss if the embedding writes without some frequencies, along the edges into some receivers."""
        part = sum((w @ (w.T @ table_of) for w in map(waves, frequencies)), np.zeros_like(table_of))
        changed = own.copy()
        changed[0, :, :2] -= part[np.asarray(ids)[:, :2]]
        kept = graph.exists.copy()
        kept[0, [r.kind in receivers for r in graph.receivers]] = False
        ablated = Ablation(jnp.asarray(changed), jnp.arange(N_PROMPTS), "mean")
        return float(-masked_scores(cfg, params, two, ablated, kept[None]).mean())

    loss = without([])
    alone = {f: without([f]) for f in range(1, P // 2 + 1)}
    key = [f for f, of in alone.items() if of > KEY * loss]
    others = [f for f in alone if f not in key]
    power = {f: float(np.linalg.norm(waves(f).T @ table_of)) for f in alone}
    paths = {
        "queries": ("q",),
        "keys": ("k",),
        "values": ("v",),
        "the MLP, past attention": ("mlp",),
        "the logits, past all": ("logits",),
    }
    heads = [f"L0.head.{h}" for h in range(cfg.n_heads)]
    edges = {
        "heads to the MLP": [(h, "L0.mlp") for h in heads],
        "heads to the logits": [(h, "logits") for h in heads],
        "embedding to the MLP": [("embed", "L0.mlp")],
        "embedding to the logits": [("embed", "logits")],
        "MLP to the logits": [("L0.mlp", "logits")],
    }
    return {
        "prompts": N_PROMPTS,
        "right": float(right.mean()),
        "loss": loss,
        "chance": float(np.log(P)),
        "without": {str(f): of for f, of in alone.items()},
        "power": {str(f): of for f, of in power.items()},
        "key": key,
        "without_key": without(key),
        "without_others": without(others),
        "without_key_into": {name: without(key, receivers) for name, receivers in paths.items()},
        "edges": {
            name: float(wp.edge_patch(cfg, params, two, some, together=True).share[0]) for name, some in edges.items()
        },
        **made(),
    }


def markdown(report: dict[str, Any]) -> str:
    """The frequencies that raise the loss most, and those that the embedding holds most of."""
    shown = sorted(report["without"], key=lambda f: -report["without"][f])[: len(report["key"]) + 3]
    by_power = sorted(report["power"], key=lambda f: -report["power"][f])
    rows = [
        (f, f"{report['without'][f]:.4f}", "key" if int(f) in report["key"] else "", f"{report['power'][f]:.1f}",
         str(by_power.index(f) + 1))
        for f in shown
    ]  # fmt: skip
    return table(("frequency", "loss without it", "", "norm in the embedding", "rank by norm"), rows)


def paths(report: dict[str, Any]) -> str:
    """Losses without sets of frequencies, and shares of the gap by edges."""
    into = report["without_key_into"]
    rows = [
        ("nothing", f"{report['loss']:.4f}"),
        ("all but the key frequencies", f"{report['without_others']:.4f}"),
        ("the key frequencies", f"{report['without_key']:.4f}"),
        *((f"the key frequencies, on the way to {name}", f"{of:.4f}") for name, of in into.items()),
        ("(chance)", f"{report['chance']:.4f}"),
    ]
    shares = [(name, f"{share:.3f}") for name, share in report["edges"].items()]
    return (
        table(("ablated in what the embedding writes", "loss"), rows)
        + "\n\n"
        + table(("edges with the values of another sum", "share of the gap"), shares)
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = measure(arguments.model)
    write(arguments.out, report)
    print(json.dumps(report, indent=1))
    print(markdown(report))
    print(paths(report))


if __name__ == "__main__":
    main()
