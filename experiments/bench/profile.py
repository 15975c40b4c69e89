r"""What keeps an exact sweep of neurons from the ceiling, and sets of few channels and first-order scores from the cost
of plain forward passes: where the time goes, on a CPU.

    python -m experiments.bench.profile --n-prompts 16 --out experiments/bench/profile.tiny.json
    python -m experiments.bench.profile --base work/smollm2/base --expert work/smollm2/english_capital \
        --behaviour english_capital --n-prompts 8 --per-layer 24 --out experiments/bench/profile.smollm2.json
    python -m experiments.bench.profile --of sets --n-prompts 16 --out experiments/bench/profile.sets.json
    python -m experiments.bench.profile --of screens --base work/smollm2/base --expert work/smollm2/english_capital \
        --behaviour english_capital --n-prompts 32 --out experiments/bench/profile.screens.json

What runs is what `experiments.bench.engine` times with the same options. It runs under JAX's
profiler, and every moment of it counts once: for the products with weights if one runs on any core, otherwise for
attention, otherwise for anything else that runs, otherwise for nothing. The share of the ceiling is then the share of
the time in products, times the rate at which these run. Times are medians of runs with and without the profiler, which
alternate.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData

from experiments.bench.engine import batches_of_sets, plain_forward, plain_score
from experiments.bench.measure import Sweep, ceiling, operations, seconds
from experiments.records import machine, made, table, write
from wpjax import behaviour, enumerate_components, load_pair
from wpjax.components import KINDS
from wpjax.engines import joint
from wpjax.engines.joint import scores_of_sets
from wpjax.engines.packing import pack
from wpjax.estimators import screens
from wpjax.estimators.screens import output_linearised
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.metrics.metric import Metric
from wpjax.pairs import Pair

CLASSES = ("products with weights", "attention", "everything else", "nothing")

SETS = "sets within 4% of heads, KV groups and neurons"


def classes_of(program: jax.stages.Compiled) -> dict[str, str]:
    """Which of `CLASSES` each operation of a program belongs to, by its name; what is fused with a product is one."""
    found: dict[str, str] = {}
    products, computation = set[str](), ""
    for line in (program.as_text() or "").splitlines():
        if opened := re.match(r"(?:ENTRY )?%([\w.-]+) .*{$", line):
            computation = opened[1]
        if not (made := re.match(r" +(?:ROOT )?%([\w.-]+) = ", line)):
            continue
        called, scope = re.search(r"calls=%([\w.-]+)", line), re.search(r'op_name="([^"]*)"', line)
        is_product = re.search(r"\bdot\(", line) is not None or (called is not None and called[1] in products)
        if is_product:
            products.add(computation)
        is_attention = scope is not None and "attention" in scope[1]
        found[made[1]] = CLASSES[1] if is_attention else CLASSES[0] if is_product else CLASSES[2]
    return found


def times(trace: Path, names: dict[str, str]) -> dict[str, float]:
    """Seconds of each class, every moment counted once, for the first class that runs."""
    (file,) = trace.rglob("*.xplane.pb")
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in CLASSES}
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in names and not event.name.startswith(("while", "cond")):
                    spans[names[event.name]].append((event.start_ns, event.start_ns + event.duration_ns))
    edges = np.unique([t for some in spans.values() for span in some for t in span])
    counted, found = np.zeros(len(edges) - 1, bool), {}
    for name in CLASSES[:-1]:
        runs = np.zeros(len(edges), int)
        for start, end in spans[name]:
            runs[np.searchsorted(edges, start)] += 1
            runs[np.searchsorted(edges, end)] -= 1
        here = (runs.cumsum()[:-1] > 0) & ~counted
        counted |= here
        found[name] = float(np.diff(edges)[here].sum() / 1e9)
    return found | {CLASSES[-1]: float(np.diff(edges)[~counted].sum() / 1e9)}


def profiled(run: Callable[[], Any], program: jax.stages.Compiled, repeats: int) -> dict[str, Any]:
    """Median seconds of each class, and of the whole without the profiler."""
    names = classes_of(program)
    run()
    unprofiled: list[float] = []
    found: list[dict[str, float]] = []
    for _ in range(repeats):
        unprofiled.append(seconds(run))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(run())
            found.append(times(Path(folder), names))
    return {"seconds": {name: statistics.median(some[name] for some in found) for name in CLASSES},
            "unprofiled": statistics.median(unprofiled)}  # fmt: skip


def called(module: ModuleType, name: str, run: Callable[[], Any]) -> list[Any]:
    """Arguments of every call of a module's program."""
    with mock.patch.object(module, name, wraps=getattr(module, name)) as seen:
        run()
    return list(seen.call_args_list)


def of_sets(pair: Pair, metric: Metric, repeats: int, n_sets: int = 32) -> dict[str, Any]:
    """A batch of sets of few channels, and as many plain forward passes."""
    packing, masks = pack(metric), batches_of_sets(pair, metric, n_sets)[SETS]
    run = functools.partial(scores_of_sets, pair.cfg, pair.base, pair.expert, masks, metric)
    calls = called(joint, "scores_at_once", run)
    together = len(next(iter(calls[0].args[-1].values())))
    args = (pair.cfg, pair.base, jnp.tile(jnp.asarray(packing.ids), (together, 1)), packing, metric.layer + 1)
    plain = plain_forward.lower(*args).compile()
    program = joint.scores_at_once.lower(*calls[0].args).compile()
    return {
        "what": f"{n_sets} of them, {together} at once",
        "plain forward passes": profiled(lambda: [plain_forward(*args) for _ in calls], plain, repeats),
        SETS: profiled(run, program, repeats),
    }


def of_screens(pair: Pair, metric: Metric, repeats: int) -> dict[str, Any]:
    """First-order scores of components of every kind, and a plain forward pass over their prompts."""
    every = enumerate_components(pair.cfg, tuple(KINDS), range(metric.layer + 1))
    components = [c for c in every if metric.reaches(c)]
    run = functools.partial(output_linearised, pair.cfg, pair.base, pair.expert, components, metric)
    with jax.numpy_dtype_promotion("standard"):  # as it runs itself
        jitted = inspect.unwrap(screens.linearised_by_kind, stop=lambda f: hasattr(f, "lower"))
        call = called(screens, "linearised_by_kind", run)[0]
        program = jitted.lower(*call.args, **call.kwargs).compile()  # type: ignore[attr-defined]
    args = (pair.cfg, pair.base, metric)
    return {
        "what": f"{len(metric)} prompts",
        "a plain forward pass": profiled(lambda: plain_score(*args), plain_score.lower(*args).compile(), repeats),
        f"first-order scores of {len(components):,} components": profiled(run, program, repeats),
    }


def beside(report: dict[str, Any]) -> str:
    """What of each class two things take, side by side."""
    runs = {name: run for name, run in report.items() if isinstance(run, dict) and "seconds" in run}
    rows = [[name, *(f"{1000 * run['seconds'][name]:,.1f} ms" for run in runs.values())] for name in CLASSES]
    rows.append(["without a profiler", *(f"{1000 * run['unprofiled']:,.1f} ms" for run in runs.values())])
    return table([report["what"], *runs], rows)


def markdown(report: dict[str, Any]) -> str:
    """One line a class."""
    total = sum(report["seconds"].values())
    rows = [[name, f"{t:.2f} s", f"{t / total:.0%}"] for name, t in report["seconds"].items()]
    rate = report["operations"] / report["seconds"][CLASSES[0]] / report["ceiling"]
    rows.append(["the products' rate, of the ceiling", "", f"{rate:.2f}"])
    rows.append(["the sweep's, without a profiler", f"{report['unprofiled']:.2f} s",
                 f"{report['operations'] / report['unprofiled'] / report['ceiling']:.2f}"])  # fmt: skip
    return table(["an exact sweep of " + f"{report['components']:,} neurons", "time", "share"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny:base")
    parser.add_argument("--expert", default="tiny:expert")
    parser.add_argument("--behaviour", default="tiny:english_capital")
    parser.add_argument("--n-prompts", type=int, default=16)
    parser.add_argument("--per-layer", type=int, default=100000, help="neurons of every layer")
    parser.add_argument("--layers", help="comma-separated; all up to the anchor's if absent")
    parser.add_argument("--of", choices=("neurons", "sets", "screens"), default="neurons")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pair, task = load_pair(args.base, args.expert), behaviour(args.behaviour)
    anchor = fit_anchor(pair, task, causal="skip")
    metric = anchor.metric(pair, task.encode(pair.tokenizer, "sweep", args.n_prompts))
    if args.of != "neurons":
        found = of_sets(pair, metric, 3 * args.repeats) if args.of == "sets" else of_screens(pair, metric, args.repeats)
        write(args.out, found | {"machine": machine(), **made()})
        print(beside(found))
        return
    layers = [int(n) for n in args.layers.split(",")] if args.layers else list(range(anchor.layer + 1))
    components = [c for c in enumerate_components(pair.cfg, ["neuron"], layers) if c.index < args.per_layer]
    engine = Sweep(pair.cfg, pair.base, pair.expert, metric)
    top = ceiling(jnp.float32)
    report = {
        "components": len(components),
        "rows": engine.plan(components).rows["neuron"],
        **profiled(functools.partial(engine, components), engine.program(components), args.repeats),
        "operations": operations(pair.cfg, engine.packing, metric.layer, components),
        "ceiling": max(top, ceiling(jnp.float32)),
        "machine": machine(),
        **made(),
    }
    write(args.out, report)
    print(markdown(report))


if __name__ == "__main__":
    main()
