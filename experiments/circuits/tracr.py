"""Does a discovery method find the edges and nodes of a program that was compiled into weights? AUROC, by ablation.

    python -m experiments.circuits.tracr --out experiments/circuits/tracr.json

Tracr (arXiv 2301.05062) compiles a program into a decoder without norms, whose every weight has a purpose. So the true
circuit can be read from the weights. But what it is depends on what stands in the place of an ablated edge (arXiv
2407.08734): an edge that always carries the same is needed if it is set to zero, and not if it is resampled. So:

    an edge is true if, on some prompt, its receiver reads something else when the edge is ablated than when it is not,
    and the receiver's node has a true edge itself, or is the answer.

Reads: the product of what the sender writes and the receiver's weights. No run of the model with a patch is needed.
A node (a head or an MLP) is true if an edge that leaves it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

import wpjax as wp
from experiments.records import made, table, write
from wpjax.behaviours import Tokens
from wpjax.circuits.circuit import Ablation, AblationKind
from wpjax.circuits.edges import METHODS
from wpjax.circuits.nodes import Graph, parse_receiver
from wpjax.circuits.scores import EdgeScores, Level, NodeScores, Scores
from wpjax.circuits.wiring import writes
from wpjax.metrics.readouts import Projection
from wpjax.relax.learn import RelaxConfig
from wpjax.relax.parametrisations import HardConcrete, Nested, Parametrisation

LENGTH = 6
"""Tokens after the first, which is always the same."""


def _shifted() -> rasp.SOp:
    """How often the word before was an x: a head that looks one back, an MLP, and a head that takes the mean."""
    before = rasp.Select(rasp.indices, rasp.indices, lambda key, query: key == query - 1)
    return lib.make_frac_prevs(rasp.Map(lambda word: word == "x", rasp.Aggregate(before, rasp.tokens)))


PROGRAMS: dict[str, tuple[Callable[[], rasp.SOp], str, str]] = {
    "share of x": (lambda: lib.make_frac_prevs(rasp.tokens == "x"), "xyz", "frac_prevs"),
    "share of x, one back": (_shifted, "xyz", "frac_prevs"),
    "balance of brackets": (lambda: lib.make_pair_balance(rasp.tokens, "(", ")"), "()a", "pair_balance"),
    "how often so far": (lib.make_hist, "abc", "hist"),
}
"""Name -> the program, its words, and what Tracr calls its answer. All may be run causally."""


MASKS: dict[str, Parametrisation] = {
    "masks, nested": Nested(),
    "masks, open at a price": HardConcrete(0.3, initial=3.0),
}
"""Learned masks, by what they are called: the default, and gates that begin open."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program as a model of ours.

    Attributes:
        name: the program.
        cfg: the model.
        params: its parameters.
        two: prompts; the metric is the first number of the answer, the larger one is the clean version.
        assembled: what Tracr made.
    """

    name: str
    cfg: wp.ModelConfig
    params: dict[str, Any]
    two: wp.Contrast
    assembled: Any


def load(name: str, n_prompts: int = 24, seed: int = 0) -> Compiled:
    """Compile a program, and draw prompts in two versions."""
    program, words, called = PROGRAMS[name]
    with jax.numpy_dtype_promotion("standard"):  # Tracr mixes dtypes
        assembled = compiling.compile_rasp_to_model(
            program(), vocab=set(words), max_seq_len=LENGTH, causal=True, compiler_bos="bos"
        )
    of, w = assembled.model_config, assembled.params
    n_ctx, d = w["pos_embed"]["embeddings"].shape
    v, n, h, dh = len(w["token_embed"]["embeddings"]), of.num_layers, of.num_heads, of.key_size
    cfg = wp.ModelConfig(
        "gpt2", n, d, h, h, dh, of.mlp_hidden_size, v, n_ctx, act="relu", rope=None, pre_norm=False, gated=False,
        qkv_bias=True, out_bias=True, mlp_bias=True,
    )  # fmt: skip

    def stacked(part: str, leaf: str, *shape: int) -> jnp.ndarray:
        return jnp.stack([jnp.asarray(w[f"transformer/layer_{i}/{part}"][leaf]).reshape(shape) for i in range(n)])

    attn = {f"W_{x[0].upper()}": stacked(f"attn/{x}", "w", d, h, dh) for x in ("query", "key", "value")}
    attn |= {f"b_{x[0].upper()}": stacked(f"attn/{x}", "b", h, dh) for x in ("query", "key", "value")}
    attn |= {"W_O": stacked("attn/linear", "w", h, dh, d), "b_O": stacked("attn/linear", "b", d)}
    mlp = {"W_in": stacked("mlp/linear_1", "w", d, cfg.d_mlp), "b_in": stacked("mlp/linear_1", "b", cfg.d_mlp)}
    mlp |= {"W_out": stacked("mlp/linear_2", "w", cfg.d_mlp, d), "b_out": stacked("mlp/linear_2", "b", d)}
    tables = {"W_E": "token_embed", "W_pos": "pos_embed"}
    params = {
        "embed": {ours: jnp.asarray(w[theirs]["embeddings"]) for ours, theirs in tables.items()},
        "blocks": {"attn": attn, "mlp": mlp},
        "final_norm": {"scale": jnp.ones(d)},
        "unembed": {"W_U": jnp.zeros((d, v))},
    }
    return Compiled(name, cfg, params, _prompts(cfg, params, assembled, (words, called), n_prompts, seed), assembled)


def _prompts(
    cfg: wp.ModelConfig, params: dict[str, Any], assembled: Any, program: tuple[str, str], n_prompts: int, seed: int
) -> wp.Contrast:
    """Random words in two versions; clean is the one with the larger answer."""
    words, called = program
    rng, ids = np.random.default_rng(seed), assembled.input_encoder.encoding_map
    drawn = np.array([ids[word] for word in words])[rng.integers(0, len(words), (2, 8 * n_prompts, LENGTH))]
    first = np.full((2, len(drawn[0]), 1), ids["bos"])
    both = np.concatenate([first, drawn], 2).astype(np.int32)
    reads = answer(assembled.residual_labels, called)
    resid = [np.asarray(wp.forward(cfg, params, jnp.asarray(rows), logits=False).resid)[:, -1] for rows in both]
    clean, corrupted = (r @ reads for r in resid)
    both = np.where((clean >= corrupted)[:, None], both, both[::-1])
    apart = np.flatnonzero(np.abs(clean - corrupted) > 1e-3)[:n_prompts]
    lengths = np.full(len(apart), LENGTH + 1)
    metric = wp.Metric(
        Tokens(both[0, apart], lengths),
        jnp.full((len(apart), 1), LENGTH),
        jnp.ones((len(apart), 1)),
        Projection(jnp.asarray(reads, jnp.float32)),
        cfg.n_layers - 1,
        "answer",
    )
    return wp.Contrast.of(metric, Tokens(both[1, apart], lengths))


def answer(labels: list[str], called: str) -> np.ndarray:
    """The direction that the answer is read from: its number, or the numbers that its words stand for."""
    found = [re.fullmatch(rf"{called}_\d+(?::(\d+))?", label) for label in labels]
    return np.array([0.0 if match is None else float(match[1] or 1) for match in found])


def truth(of: Compiled, ablated: Ablation) -> np.ndarray:
    """Which edges are true, [S, R]."""
    cfg, attn = of.cfg, of.params["blocks"]["attn"]
    graph, clean = Graph.of(cfg), of.two.clean
    ours = np.asarray(writes(cfg, of.params, jnp.asarray(clean.tokens.ids), cfg.n_layers)[1])
    change = np.asarray(ablated.writes)[:, np.asarray(ablated.group)] - ours  # [S, B, T, D]

    def reads(receiver: Any, x: np.ndarray) -> np.ndarray:
        if receiver.kind == "logits":
            return x[..., -1, :] @ np.asarray(clean.readout.vector)  # type: ignore[attr-defined]
        if receiver.kind == "mlp":
            return x @ np.asarray(of.params["blocks"]["mlp"]["W_in"])[receiver.layer]
        return x @ np.asarray(attn[f"W_{receiver.kind.upper()}"])[receiver.layer, :, receiver.index]

    arrives = np.array([[np.abs(reads(r, x)).max() > 1e-3 for r in graph.receivers] for x in change]) & graph.exists
    needed = np.array([r.kind == "logits" for r in graph.receivers])
    for s in reversed(graph.senders):  # a node is needed if something needed reads it
        if s.kind != "embed" and (arrives[graph.senders.index(s)] & needed).any():
            parts = [f"{s.name}.{part}" for part in "qkv"] if s.kind == "head" else [s.name]
            own = {parse_receiver(cfg, part).name for part in parts}
            needed |= np.array([r.name in own for r in graph.receivers])
    return arrives & needed


def scored(of: Compiled, method: str, ablated: Ablation, level: Level = "edges", seed: int = 0) -> Scores:
    """Scores of all edges, or of all heads and MLPs, by a method. A node's is the sum of those of its edges."""
    cfg, params, two = of.cfg, of.params, of.two
    if method in MASKS:
        config = RelaxConfig(steps=300, seed=seed)
        return wp.learn_circuit(cfg, params, two, ablated, level, MASKS[method], config)
    edges = _edges(of, method)
    return edges if level == "edges" else edges.nodes()


def _edges(of: Compiled, method: str) -> EdgeScores:
    """Scores of all edges by a first-order method, or by patching each of them alone."""
    cfg, params, two = of.cfg, of.params, of.two
    if method in METHODS:
        return wp.score_edges(cfg, params, two, method, steps=10)
    graph = Graph.of(cfg)
    ends = np.argwhere(graph.exists)
    names = [(graph.senders[s].name, graph.receivers[r].name) for s, r in ends]
    by_prompt = np.zeros((len(two.clean), *graph.exists.shape))
    by_prompt[:, ends[:, 0], ends[:, 1]] = wp.edge_patch(cfg, params, two, names).change.T
    return EdgeScores(graph, by_prompt, "exact")


def auroc(scores: Scores, true: np.ndarray) -> float | None:
    """How often a true edge (or node) has a larger score than a false one; ties count half. None if all are true.

    Args:
        scores: of edges or of nodes.
        true: [S, R], which edges are true.
    """
    which = np.asarray(true.any(1) if isinstance(scores, NodeScores) else true)[scores.members]
    return None if which.all() else float(roc_auc_score(which, np.abs(scores.mean)[scores.members]))


def measure() -> dict[str, Any]:
    """AUROC of every method, for every program and ablation that the method can be given."""
    report: dict[str, Any] = {}
    for name in PROGRAMS:
        of = load(name)
        kinds: tuple[AblationKind, ...] = ("resample", "mean", "zero")
        ablations = {kind: wp.ablation(of.cfg, of.params, of.two, kind) for kind in kinds}
        trues = {kind: truth(of, ablated) for kind, ablated in ablations.items()}
        cells: dict[Level, dict[str, dict[str, float | None]]] = {"edges": {}, "nodes": {}}
        of_method = {**dict.fromkeys((*METHODS, "exact"), kinds[:1]), **dict.fromkeys(MASKS, kinds)}
        for level, by in cells.items():
            for method, kind in [(method, kind) for method, some in of_method.items() for kind in some]:
                by.setdefault(method, {})[kind] = auroc(scored(of, method, ablations[kind], level), trues[kind])
                print(name, level, method, kind, by[method][kind], flush=True)
        graph = Graph.of(of.cfg)
        alive = [s.kind != "embed" for s in graph.senders]
        report[name] = {
            "edges": graph.n_edges,
            "nodes": sum(alive),
            "prompts": len(of.two.clean),
            "true": {kind: int(true.sum()) for kind, true in trues.items()},
            "true_nodes": {kind: int(np.any(true[alive], 1).sum()) for kind, true in trues.items()},
            "auroc": cells["edges"],
            "auroc_nodes": cells["nodes"],
        }
    return {"programs": report, **made()}


def markdown(report: dict[str, Any]) -> str:
    """AUROC by method and program: of edges, and of nodes."""
    programs, tables = report["programs"], []
    for level, true, auroc in (("edges", "true", "auroc"), ("nodes", "true_nodes", "auroc_nodes")):
        sizes = [
            (f"(true {level}, of all)", kind, *(f"{p[true][kind]} of {p[level]}" for p in programs.values()))
            for kind in ("resample", "mean", "zero")
        ]
        rows = [
            (method, kind, *(_number(p[auroc][method][kind]) for p in programs.values()))
            for method, kinds in next(iter(programs.values()))[auroc].items()
            for kind in kinds
        ]
        tables.append(table((f"method, {level}", "ablation", *programs), [*sizes, *rows]))
    return "\n\n".join(tables)


def _number(value: float | None) -> str:
    """Two digits; a dash where nothing is false."""
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    report = measure()
    write(parser.parse_args().out, report)
    print(json.dumps(report, indent=1))
    print(markdown(report))


if __name__ == "__main__":
    main()
