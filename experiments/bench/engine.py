r"""What the engine costs, against what the matrix unit could do: exact sweeps, joint patches, screens, compilation.

    python -m experiments.bench.engine --base work/smollm2/base --expert work/smollm2/english_capital \
        --behaviour english_capital --n-prompts 8 --out experiments/bench/engine.json

The ceiling is the best rate of one large product measured in the same run. Operations are counted by the rule of
docs/method.md, "Counting operations": a patch of layer l costs what comes after it up to the layer that is read, for
every token once; in that layer keys and values only. Times are medians, compilation left out; what is compared runs
alternately. Memory is what the compiled program says that it needs; on an accelerator the peak that the device saw is
there too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments.bench import scaling
from experiments.bench.measure import Sweep, ceiling, compilations, medians, operations, peak_bytes
from experiments.records import machine, made, table, write
from wpjax import PatchMask, behaviour, enumerate_components, load_pair, sweep
from wpjax.behaviours import Behaviour
from wpjax.checkpoints.checkpoint import PRECISIONS
from wpjax.components import KINDS, Component
from wpjax.engines.joint import scores_of_sets
from wpjax.engines.packing import Packing, pack
from wpjax.estimators.screens import output_linearised
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.metric import Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, decoder
from wpjax.pairs import Pair

SHARE_TOUCHED = 0.04
FINE = ("head", "kv_group", "neuron")


def exact_rates(pair: Pair, metric: Metric, per_layer: int, repeats: int) -> dict[str, Any]:
    """Share of the ceiling that exact sweeps of heads and of some neurons of every layer reach."""
    engine, layers = Sweep(pair.cfg, pair.base, pair.expert, metric), range(metric.layer + 1)
    found: dict[str, Any] = {}
    for kind in ("head", "neuron"):
        every = enumerate_components(pair.cfg, [kind], layers)
        components = [c for c in every if kind == "head" or c.index < per_layer]
        dtype = pair.base["embed"]["W_E"].dtype
        top = ceiling(dtype)
        took = medians({kind: functools.partial(engine, components)}, repeats)[kind]
        top = max(top, ceiling(dtype))  # before and after: the machine may be slower at either time
        needed = operations(pair.cfg, engine.packing, metric.layer, components)
        found[kind] = {"components": len(components), "of": len(every), "seconds": took, "operations": needed,
                       "ceiling": top, "share": needed / took / top, "peak_bytes": peak_bytes()}  # fmt: skip
    return found


@functools.partial(jax.jit, static_argnames=("cfg", "stop"))
def plain_forward(cfg: ModelConfig, params: Params, ids: jax.Array, packing: Packing, stop: int) -> jax.Array:
    """A model's own forward pass over packed prompts, up to a layer, where they are read."""
    return packing.pick(decoder(cfg, params)(ids, stop=stop, logits=False, layout=packing.packed).resid)


@functools.partial(jax.jit, static_argnames="cfg")
def plain_score(cfg: ModelConfig, params: Params, metric: Metric) -> jax.Array:
    """A model's own forward pass over padded prompts, up to where they are read."""
    return metric(cfg, params)


def batches_of_sets(pair: Pair, metric: Metric, n_sets: int) -> dict[str, list[PatchMask]]:
    """Batches of sets that touch all channels, few of all layers, or one layer's."""
    cfg, rng = pair.cfg, np.random.default_rng(0)

    def drawn(some: list[Component], n: int) -> list[Component]:
        return [some[i] for i in rng.permutation(len(some))[:n]]

    def sets(within: list[Component]) -> list[PatchMask]:
        return [PatchMask.of(cfg, drawn(within, math.ceil(len(within) / 2))) for _ in range(n_sets)]

    def share_of_each(share: float) -> list[Component]:
        return [c for some in kinds.values() for c in drawn(some, math.ceil(share * len(some)))]

    kinds = {kind: enumerate_components(cfg, [kind]) for kind in FINE}
    layer = enumerate_components(cfg, ["neuron"], [metric.layer // 2])
    few_neurons = drawn(kinds["neuron"], math.ceil(SHARE_TOUCHED * len(kinds["neuron"])))
    n_half = len(few_neurons) // 2
    few = f"sets within {SHARE_TOUCHED:.0%} of"
    return {
        "arbitrary sets": sets(share_of_each(1.0)),
        f"{few} the neurons": sets(few_neurons),
        f"{few} the neurons, half of them of one layer": sets(few_neurons[n_half:] + drawn(layer, n_half)),
        f"{few} heads, KV groups and neurons": sets(share_of_each(SHARE_TOUCHED)),
        "sets within one layer": sets(layer),
    }


def joint_costs(pair: Pair, metric: Metric, repeats: int, n_sets: int = 32, n_copies: int = 8) -> dict[str, Any]:
    """What a set costs, in plain forward passes over the same packed prompts, several copies of them at once."""
    cfg, packing = pair.cfg, pack(metric)
    copies = jnp.tile(jnp.asarray(packing.ids), (n_copies, 1))

    def plain() -> list[jax.Array]:
        return [plain_forward(cfg, pair.base, copies, packing, metric.layer + 1) for _ in range(n_sets // n_copies)]

    runs: dict[str, Callable[[], Any]] = {"plain forward": plain}
    for name, masks in batches_of_sets(pair, metric, n_sets).items():
        runs[name] = functools.partial(scores_of_sets, cfg, pair.base, pair.expert, masks, metric)
    each = {name: took / n_sets for name, took in medians(runs, repeats).items()}
    return {"sets": n_sets, "seconds": each, "forwards": {name: t / each["plain forward"] for name, t in each.items()}}


def race_cost(
    pair: Pair, task: Behaviour, anchor: Anchor, repeats: int, top: int = 32, n_prompts: int = 32
) -> dict[str, Any]:
    """Whole sweeps of the embedded pair, full and as a race for the top of each kind: time, replacements, agreement."""
    if not pair.base_checkpoint.source.startswith("tiny:"):
        pair, task = load_pair("tiny:base", "tiny:expert"), behaviour("tiny:english_capital")
        anchor = fit_anchor(pair, task, causal="skip")
    batch = task.encode(pair.tokenizer, n_prompts=n_prompts)
    runs = {m: functools.partial(sweep, pair, batch, anchor, method=m, top=top) for m in ("exact", "race")}
    cold, found = {}, {}
    for method, run in runs.items():
        jax.clear_caches()
        start = time.perf_counter()
        with compilations() as compiled:
            found[method] = run()
        cold[method] = {"seconds": time.perf_counter() - start, "compiling": sum(compiled), "programs": len(compiled)}
    data = found["exact"].dataset
    counts = dict(
        zip(data["swept_kind"].values.astype(str).tolist(), data["n_components"].values.tolist(), strict=True)
    )
    agreement = {}
    for kind in (kind for kind, n in counts.items() if n > top):  # of fewer, everything is the top
        exact, race = ({row.name for row in r.top(top, kinds=(kind,), absolute=True)} for r in found.values())
        agreement[kind] = len(exact & race) / top
    return {"top": top, "components": counts, "cold": cold, "seconds": medians(runs, repeats),
            "share": float(found["race"].dataset.attrs["race_share"]), "agreement": agreement}  # fmt: skip


def rounding(pair: Pair, metric: Metric, per_layer: int = 4) -> dict[str, Any]:
    """How far exact effects of heads and some neurons in bfloat16, or bfloat16x2, are from those in float32.

    "products": of the same weights, which bfloat16 holds; "weights and products": of the pair's own.
    """

    def effects(splits: int, host: Params, donor: Params) -> np.ndarray:
        cfg = dataclasses.replace(pair.cfg, activation_splits=splits)
        return Sweep(cfg, host, donor, metric)(components).mean(1)

    every = enumerate_components(pair.cfg, ["head", "neuron"], range(metric.layer, -1, -4))
    components = [c for c in every if c.kind == "head" or c.index < per_layer]
    rounded = [jax.tree.map(lambda a: a.astype(jnp.bfloat16), model) for model in (pair.base, pair.expert)]
    again = [jax.tree.map(lambda a: a.astype(jnp.float32), model) for model in rounded]
    exact = {"products": effects(1, *again), "weights and products": effects(1, pair.base, pair.expert)}
    found: dict[str, Any] = {"components": len(components)}
    for dtype, (weights, splits) in PRECISIONS.items():
        if weights == "float32":
            continue
        got, found[dtype] = effects(splits, *rounded), {}
        for name, true in exact.items():
            error = np.abs(got - true) / np.abs(true).max()
            found[dtype][name] = {"spearman": float(scipy.stats.spearmanr(true, got)[0]),
                                  "median_error": float(np.median(error)),
                                  "largest_error": float(error.max())}  # fmt: skip
    return found


def screen_cost(pair: Pair, metric: Metric, repeats: int) -> dict[str, Any]:
    """First-order scores of the components up to the layer that is read, in plain forward passes."""
    runs: dict[str, Callable[[], Any]] = {"plain forward": lambda: plain_score(pair.cfg, pair.base, metric)}
    counts = {}
    for name, kinds in {"heads, KV groups and neurons": FINE, "components of every kind": tuple(KINDS)}.items():
        every = enumerate_components(pair.cfg, kinds, range(metric.layer + 1))
        components = [c for c in every if metric.reaches(c)]
        runs[name] = functools.partial(output_linearised, pair.cfg, pair.base, pair.expert, components, metric)
        counts[name] = len(components)
    took = medians(runs, repeats)
    return {"components": counts, "seconds": took,
            "forwards": {name: took[name] / took["plain forward"] for name in counts}}  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """One line a question."""
    rows = [
        [f"exact sweep of {e['components']:,} {kind}s", f"{e['seconds']:.1f} s",
         f"{e['share']:.2f} of the ceiling of {e['ceiling'] / 1e9:,.0f} · 10⁹ operations a second"
         + (f"; up to {e['peak_bytes'] / 2**30:.1f} GiB of the device" if e["peak_bytes"] else "")]
        for kind, e in report["exact"].items()
    ]  # fmt: skip
    joint, screen = report["joint"], report["screen"]
    rows += [
        [name, f"{1000 * took:.0f} ms", f"{joint['forwards'][name]:.2f} plain forward passes"]
        for name, took in joint["seconds"].items()
        if name != "plain forward"
    ]
    rows += [
        [f"first-order scores of {screen['components'][name]:,} {name}", f"{screen['seconds'][name]:.1f} s",
         f"{forwards:.1f} plain forward passes"]
        for name, forwards in screen["forwards"].items()
    ]  # fmt: skip
    rounded = report.get("rounding", {})
    rows += [
        [f"effects of {rounded['components']:,} heads and neurons, {name} in {dtype}", "",
         f"wrong by {coarse['median_error']:.1e} (median) to {coarse['largest_error']:.1e} of the largest; "
         f"Spearman {coarse['spearman']:.4f}"]
        for dtype in PRECISIONS if dtype in rounded
        for name, coarse in rounded[dtype].items()
    ]  # fmt: skip
    if "race" in report:
        rows += race_rows(report["race"]) + scaling.rows(report)
    return table(["what", "time", "that is"], rows)


def race_rows(race: dict[str, Any]) -> list[list[str]]:
    """Of the race and the full sweep: with nothing compiled yet, and again."""
    n, cold, took = sum(race["components"].values()), race["cold"], race["seconds"]
    tops = " and ".join(f"{share:.0%} of its top {kind}s" for kind, share in race["agreement"].items())
    names = {"exact": f"whole sweep of {n:,} components, controls included",
             "race": f"race for the top {race['top']} of a kind among them"}  # fmt: skip
    share = f"{took['race'] / took['exact']:.2f} of the full sweep's time, {race['share']:.2f} of its replacements"
    rows = []
    for method, name in names.items():
        first = cold[method]
        compiling = f"{first['compiling']:.1f} s of it compile {first['programs']} programs, small ones included"
        rows.append([f"{name}, nothing compiled yet", f"{first['seconds']:.1f} s", compiling])
        again = f"{share}, {tops}" if method == "race" else ""
        rows.append([f"{name}, compiled", f"{took[method]:.1f} s", again])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny:base")
    parser.add_argument("--expert", default="tiny:expert")
    parser.add_argument("--behaviour", default="tiny:english_capital")
    parser.add_argument("--n-prompts", type=int, default=8)
    parser.add_argument("--layer", type=int, help="anchor layer; chosen if absent")
    parser.add_argument("--per-layer", type=int, default=16, help="neurons of every layer")
    parser.add_argument("--pair-only", action="store_true", help="leave out what does not depend on the pair")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled counts
    pair, task = load_pair(args.base, args.expert, args.dtype), behaviour(args.behaviour)
    anchor = fit_anchor(pair, task, layer=args.layer, causal="skip")
    metric = anchor.metric_along(task.encode(pair.tokenizer, n_prompts=args.n_prompts))
    screened = anchor.metric_along(task.encode(pair.tokenizer, n_prompts=32))
    packing = pack(metric)
    report: dict[str, Any] = {
        "model": {"base": Path(args.base).name, "layers": pair.cfg.n_layers, "d_model": pair.cfg.d_model},
        "anchor_layer": anchor.layer,
        "prompts": args.n_prompts,
        "tokens": {"padded": int(np.size(metric.tokens.ids)), "packed": packing.n_tokens, "empty": packing.n_empty},
        "exact": exact_rates(pair, metric, args.per_layer, args.repeats),
        "joint": joint_costs(pair, metric, 2 * args.repeats + 1),  # short runs, noisy ones
        "screen": screen_cost(pair, screened, args.repeats),
        "machine": machine(),
        "dtype": args.dtype,
        **made(),
    }
    if args.dtype == "float32":
        report["rounding"] = rounding(pair, metric)
    if not args.pair_only:
        report |= {"race": race_cost(pair, task, anchor, args.repeats), **scaling.measure(args.repeats)}
    print(markdown(report))
    write(args.out, report)


if __name__ == "__main__":
    main()
