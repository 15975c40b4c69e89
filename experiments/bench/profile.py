r"""What keeps an exact sweep of neurons from the ceiling: where its time goes, on a CPU.

    python -m experiments.bench.profile --n-prompts 16 --out experiments/bench/profile.tiny.json
    python -m experiments.bench.profile --base work/smollm2/base --expert work/smollm2/english_capital \
        --behaviour english_capital --n-prompts 8 --per-layer 24 --out experiments/bench/profile.smollm2.json

The sweep is the one of neurons that `experiments.bench.engine` times with the same options. It runs under JAX's
profiler, and every moment of it counts once: for the products with weights if one runs on any core, otherwise for
attention, otherwise for anything else that runs, otherwise for nothing. The share of the ceiling is then the share of
the time in products, times the rate at which these run. Times are medians of runs with and without the profiler, which
alternate.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData

from experiments.bench.measure import Sweep, ceiling, operations, seconds
from experiments.records import machine, made, table, write
from wpjax import behaviour, enumerate_components, load_pair
from wpjax.anchors import fit_anchor
from wpjax.components import Component

CLASSES = ("products with weights", "attention", "everything else", "nothing")


def classes_of(engine: Sweep, components: list[Component]) -> dict[str, str]:
    """Which of `CLASSES` each operation of the sweep's program belongs to, by its name."""
    text, found = engine.program(components).as_text() or "", {}
    for name, scope in re.findall(r"%([\w.-]+) = .*?op_name=\"([^\"]*)\"", text):
        product = scope.endswith("dot_general")
        found[name] = CLASSES[1] if "attention" in scope else CLASSES[0] if product else CLASSES[2]
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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pair, task = load_pair(args.base, args.expert), behaviour(args.behaviour)
    anchor = fit_anchor(pair, task, causal="skip")
    metric = anchor.metric(pair, task.encode(pair.tokenizer, "sweep", args.n_prompts))
    layers = [int(n) for n in args.layers.split(",")] if args.layers else list(range(anchor.layer + 1))
    components = [c for c in enumerate_components(pair.cfg, ["neuron"], layers) if c.index < args.per_layer]
    engine = Sweep(pair.cfg, pair.base, pair.expert, metric)
    run = functools.partial(engine, components)
    run()
    names, top = classes_of(engine, components), ceiling(jnp.float32)
    unprofiled: list[float] = []
    profiled: list[dict[str, float]] = []
    for _ in range(args.repeats):
        unprofiled.append(seconds(run))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                run()
            profiled.append(times(Path(folder), names))
    report = {
        "components": len(components),
        "rows": engine.plan(components).rows["neuron"],
        "seconds": {name: statistics.median(some[name] for some in profiled) for name in CLASSES},
        "unprofiled": statistics.median(unprofiled),
        "operations": operations(pair.cfg, engine.packing, metric.layer, components),
        "ceiling": max(top, ceiling(jnp.float32)),
        "machine": machine(),
        **made(),
    }
    write(args.out, report)
    print(markdown(report))


if __name__ == "__main__":
    main()
