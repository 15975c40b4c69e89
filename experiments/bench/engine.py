r"""What the engine costs, against what the matrix unit could do: exact sweeps, joint patches, screens, compilation.

    python -m experiments.bench.engine --base work/smollm2/base --expert work/smollm2/english_capital \
        --behaviour english_capital --n-prompts 8 --out experiments/bench/engine.json

The ceiling is the best rate of one large product measured in the same run. Operations are counted by METHOD's rule: a
patch of layer l costs what comes after it up to the layer that is read, for every token once; in that layer keys and
values only. Times are medians, compilation left out; what is compared runs alternately. Peak memory is read from /proc:
elsewhere than on Linux, pass --pair-only.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments.records import machine, made, table, write
from wpjax import PatchMask, behaviour, enumerate_components, load_pair, sweep
from wpjax.anchors import Anchor, fit_anchor
from wpjax.behaviours import Behaviour, Tokens
from wpjax.components import Component
from wpjax.metrics import Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, decoder, init_params
from wpjax.pairs import Pair
from wpjax.readouts import Along
from wpjax.sweeps.exact import exact_changes, make_plan
from wpjax.sweeps.joint import scores_of_sets
from wpjax.sweeps.packing import Packing, pack
from wpjax.sweeps.replay import run_packed
from wpjax.sweeps.screens import output_linearised

DEPTHS = (4, 8, 16)
WIDTHS = (128, 256, 512)
PATCHES = (64, 256, 1024)
DEVICES = (1, 2)
SHARE_TOUCHED = 0.04


def seconds(run: Callable[[], Any]) -> float:
    """How long something takes, result included."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def medians(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of several things that run alternately, after one run each that does not count."""
    for run in runs.values():
        run()
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            took[name].append(seconds(run))
    return {name: statistics.median(times) for name, times in took.items()}


def ceiling(dtype: Any, repeats: int = 5) -> float:
    """Operations a second of the best of some large products."""
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    best = 0.0
    for n in (1024, 2048, 4096, *(() if jax.default_backend() == "cpu" else (8192, 16384))):
        a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
        product(a, a).block_until_ready()
        best = max(best, 2 * n**3 / min(seconds(functools.partial(product, a, a)) for _ in range(repeats)))
    return best


def operations(cfg: ModelConfig, packing: Packing, last: int, components: Iterable[Component]) -> float:
    """Floating-point operations of the weights' products that the exact effects of some heads or neurons need."""
    mlp = 2 * (3 if cfg.gated else 2) * cfg.d_model * cfg.d_mlp
    keys = 2 * 2 * cfg.d_model * cfg.n_kv_heads * cfg.d_head
    layer = mlp + keys + 2 * 2 * cfg.d_model * cfg.n_heads * cfg.d_head
    n_tokens, total = packing.n_tokens - packing.n_empty, 0.0
    for c in components:
        own = mlp if c.kind == "head" and c.layer < last else 0
        total += n_tokens * (own + max(0, last - c.layer - 1) * layer + (keys if c.layer < last else 0))
    return total


class Sweep:
    """The exact changes of some components of one pair, metric and packing."""

    def __init__(self, cfg: ModelConfig, base: Params, expert: Params, metric: Metric):
        self.cfg, self.base, self.expert, self.metric = cfg, base, expert, metric
        self.packing = pack(metric)
        self.run = run_packed(cfg, base, metric, self.packing)

    def __call__(self, components: list[Component]) -> np.ndarray:
        """Changes [C, B]."""
        plan = make_plan(self.cfg, components, self.packing)
        args = (self.cfg, self.base, self.expert, (self.run, None), self.metric, self.packing, plan)
        return np.concatenate([part.delta for part in exact_changes(*args)])


def exact_rates(pair: Pair, metric: Metric, per_layer: int, repeats: int) -> dict[str, Any]:
    """Share of the ceiling that exact sweeps of heads and of some neurons of every layer reach."""
    engine, layers = Sweep(pair.cfg, pair.base, pair.expert, metric), range(metric.layer + 1)
    sets = {
        "head": enumerate_components(pair.cfg, ["head"], layers),
        "neuron": [c for c in enumerate_components(pair.cfg, ["neuron"], layers) if c.index < per_layer],
    }
    found: dict[str, Any] = {}
    for kind, components in sets.items():
        dtype = pair.base["embed"]["W_E"].dtype
        top = ceiling(dtype)
        took = medians({kind: functools.partial(engine, components)}, repeats)[kind]
        top = max(top, ceiling(dtype))  # before and after: the machine may be slower at either time
        needed = operations(pair.cfg, engine.packing, metric.layer, components)
        found[kind] = {"components": len(components), "seconds": took, "operations": needed, "ceiling": top,
                       "share": needed / took / top}  # fmt: skip
    return found


def joint_costs(pair: Pair, metric: Metric, repeats: int, n_sets: int = 4) -> dict[str, Any]:
    """What a set costs, in plain forward passes over the same packed prompts."""
    cfg, packing, rng = pair.cfg, pack(metric), np.random.default_rng(0)

    @jax.jit
    def forward(params: Params, packing: Packing) -> jax.Array:
        ids = jnp.asarray(packing.ids)
        resid = decoder(cfg, params)(ids, stop=metric.layer + 1, logits=False, packed=packing.packed).resid
        return packing.pick(resid)

    def sets(kinds: list[str], size: float, pool: float) -> list[PatchMask]:
        every = enumerate_components(cfg, kinds)
        some = [every[i] for i in rng.permutation(len(every))[: int(pool * len(every))]]
        return [PatchMask.of(cfg, [some[i] for i in rng.permutation(len(some))[: int(size * len(every))]])
                for _ in range(n_sets)]  # fmt: skip

    fine = ["head", "kv_group", "neuron"]
    layer = enumerate_components(cfg, ["neuron"], [metric.layer // 2])
    halves = [[layer[i] for i in rng.permutation(len(layer))[: len(layer) // 2]] for _ in range(n_sets)]
    runs: dict[str, Callable[[], Any]] = {"plain forward": lambda: forward(pair.base, packing)}
    for name, masks in {
        "arbitrary sets": sets(fine, 0.5, 1.0),
        f"sets within {SHARE_TOUCHED:.0%} of the neurons": sets(["neuron"], SHARE_TOUCHED / 2, SHARE_TOUCHED),
        f"sets within {SHARE_TOUCHED:.0%} of heads and neurons": sets(
            ["head", "neuron"], SHARE_TOUCHED / 2, SHARE_TOUCHED
        ),
        "sets within one layer": [PatchMask.of(cfg, some) for some in halves],
    }.items():
        runs[name] = functools.partial(scores_of_sets, cfg, pair.base, pair.expert, masks, metric)
    took = medians(runs, repeats)
    each = {name: t / (1 if name == "plain forward" else n_sets) for name, t in took.items()}
    return {"seconds": each, "forwards": {name: t / each["plain forward"] for name, t in each.items()}}


def race_cost(pair: Pair, task: Behaviour, anchor: Anchor, top: int = 32, n_prompts: int = 32) -> dict[str, Any]:
    """A race for the top of each kind against the full sweep of the embedded pair: time, replacements, agreement."""
    if not pair.base_checkpoint.source.startswith("tiny:"):
        pair, task = load_pair("tiny:base", "tiny:expert"), behaviour("tiny:english_capital")
        anchor = fit_anchor(pair, task, causal="skip")
    batch, took, found = task.encode(pair.tokenizer, n_prompts=n_prompts), {}, {}
    for method in ("exact", "race") * 2:  # the first of each compiles
        start = time.perf_counter()
        found[method] = sweep(pair, batch, anchor, method=method, top=top)
        took[method] = time.perf_counter() - start
    kinds = [str(kind) for kind in found["exact"].dataset["swept_kind"].values]
    tops = {m: {row.name for kind in kinds for row in r.top(top, kinds=(kind,), absolute=True)}
            for m, r in found.items()}  # fmt: skip
    return {"top": top, "components": found["exact"].dataset.sizes["component"], "seconds": took,
            "share": float(found["race"].dataset.attrs["race_share"]),
            "agreement": len(tops["exact"] & tops["race"]) / len(tops["exact"])}  # fmt: skip


def rounding(pair: Pair, metric: Metric, per_layer: int = 4) -> dict[str, Any]:
    """How far exact effects of heads and some neurons in bfloat16 are from those in float32.

    "products": of the same weights, which bfloat16 holds; "weights and products": of the pair's own.
    """
    every = enumerate_components(pair.cfg, ["head", "neuron"], range(metric.layer, -1, -4))
    components = [c for c in every if c.kind == "head" or c.index < per_layer]
    rounded = [jax.tree.map(lambda a: a.astype(jnp.bfloat16), model) for model in (pair.base, pair.expert)]
    again = [jax.tree.map(lambda a: a.astype(jnp.float32), model) for model in rounded]
    effects = [
        Sweep(pair.cfg, host, donor, metric)(components).mean(1)
        for host, donor in (rounded, again, (pair.base, pair.expert))
    ]
    found: dict[str, Any] = {"components": len(components)}
    for name, exact in (("products", effects[1]), ("weights and products", effects[2])):
        error = np.abs(effects[0] - exact) / np.abs(exact).max()
        found[name] = {"spearman": float(scipy.stats.spearmanr(exact, effects[0])[0]),
                       "median_error": float(np.median(error)), "largest_error": float(error.max())}  # fmt: skip
    return found


def screen_cost(pair: Pair, metric: Metric, repeats: int) -> dict[str, Any]:
    """First-order scores of every component up to the layer that is read, in plain forward passes."""

    @jax.jit
    def forward(params: Params, metric: Metric) -> jax.Array:
        return metric(pair.cfg, params)

    components = enumerate_components(pair.cfg, ["head", "kv_group", "neuron"], range(metric.layer + 1))
    screen = functools.partial(output_linearised, pair.cfg, pair.base, pair.expert, components, metric)
    took = medians({"forward": lambda: forward(pair.base, metric), "screen": screen}, repeats)
    return {"components": len(components), "seconds": took, "forwards": took["screen"] / took["forward"]}


def random_sweep(
    cfg: ModelConfig, n_prompts: int = 8, n_tokens: int = 24, last: int | None = None, dtype: Any = jnp.float32
) -> Sweep:
    """A pair of random weights, and a direction after layer `last` (or the last one) on random prompts."""
    base, expert = (init_params(cfg, jax.random.key(seed), dtype) for seed in (0, 1))
    ids = np.random.default_rng(0).integers(0, cfg.d_vocab, (n_prompts, n_tokens)).astype(np.int32)
    at, weight = jnp.full((n_prompts, 1), n_tokens - 1), jnp.ones((n_prompts, 1))
    along, tokens = Along(jnp.ones(cfg.d_model) / cfg.d_model**0.5), Tokens(ids, np.full(n_prompts, n_tokens))
    last = cfg.n_layers - 1 if last is None else last
    return Sweep(cfg, base, expert, Metric(tokens, at, weight, along, last, "anchor"))


def small(n_layers: int = 8, width: int = 128) -> ModelConfig:
    """The shape of the embedded models, at any depth and width."""
    return ModelConfig("llama", n_layers, width, width // 16, width // 32, 16, width * 5 // 2, 1408, 64)


def spread(cfg: ModelConfig, n: int) -> list[Component]:
    """So many neurons, the same number in every layer."""
    return [c for c in enumerate_components(cfg, ["neuron"]) if c.index < n // cfg.n_layers]


def scaling(repeats: int) -> dict[str, Any]:
    """Time of an exact sweep when one thing at a time is doubled, as a ratio to the time without."""
    cases: dict[str, tuple[int, dict[str, int], int]] = {
        "as it is": (8, {}, 512),
        "patches": (8, {}, 1024),
        "prompts": (8, {"n_prompts": 16}, 512),
        "tokens": (8, {"n_tokens": 48}, 512),
        "layers": (16, {}, 512),
    }
    runs: dict[str, Callable[[], Any]] = {}
    for name, (depth, sizes, n) in cases.items():
        engine = random_sweep(small(depth), **sizes)
        runs[name] = functools.partial(engine, spread(engine.cfg, n))
    took = medians(runs, repeats)
    return {"seconds": took, "ratio": {name: t / took["as it is"] for name, t in took.items() if name != "as it is"}}


def compilation() -> dict[str, Any]:
    """Programs of a whole exact sweep of three kinds, and the seconds their compilation takes, by depth."""
    events: list[float] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    found = {}
    for depth in DEPTHS:
        engine = random_sweep(small(depth))
        components = [c for c in enumerate_components(engine.cfg, ["head", "kv_group", "neuron"]) if c.index < 8]
        events.clear()
        engine(components)
        slow = [t for t in events if t > 0.1]  # the programs of the kinds; copies and the like take milliseconds
        found[str(depth)] = {"programs": len(slow), "seconds": sum(slow)}
    return found


def alone(n_patches: int, n_layers: int, width: int, repeats: int) -> dict[str, float]:
    """Peak resident bytes of this process after exact sweeps of so many neurons, and the median of their times."""
    engine = random_sweep(small(n_layers, width))
    took = medians({"sweep": functools.partial(engine, spread(engine.cfg, n_patches))}, repeats)["sweep"]
    status = Path("/proc/self/status").read_text()  # of this program; getrusage counts what started it as well
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    weights = sum(leaf.nbytes for model in (engine.base, engine.expert) for leaf in jax.tree.leaves(model))
    return {"bytes": peak * 1024, "weights": weights, "seconds": took}


def apart(
    n_patches: int, n_layers: int = 8, width: int = 128, n_devices: int = 1, repeats: int = 1
) -> dict[str, float]:
    """`alone` in a fresh process, a CPU divided into so many devices."""
    command = [sys.executable, "-m", "experiments.bench.engine", "--repeats", str(repeats)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n_devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    options = ["--alone", str(n_patches), "--layers", str(n_layers), "--width", str(width)]
    return json.loads(subprocess.check_output([*command, *options], text=True, env=env).splitlines()[-1])


def processes(repeats: int) -> dict[str, dict[str, Any]]:
    """Peak memory by number of patches, depth and width; time by number of devices, which take turns."""
    times = [{n: apart(1024, n_devices=n, repeats=repeats)["seconds"] for n in DEVICES} for _ in range(repeats)]
    return {
        "memory": {str(n): apart(n) for n in PATCHES},
        "memory_by_depth": {str(n): apart(256, n_layers=n) for n in DEPTHS},
        "memory_by_width": {str(n): apart(256, width=n) for n in WIDTHS},
        "devices": {str(n): statistics.median(took[n] for took in times) for n in DEVICES},
    }


def markdown(report: dict[str, Any]) -> str:
    """One line a question."""
    rows = [
        [f"exact sweep of {e['components']:,} {kind}s", f"{e['seconds']:.1f} s",
         f"{e['share']:.2f} of the ceiling of {e['ceiling'] / 1e9:,.0f} · 10⁹ operations a second"]
        for kind, e in report["exact"].items()
    ]  # fmt: skip
    joint = report["joint"]
    rows += [
        [name, f"{1000 * took:.0f} ms", f"{joint['forwards'][name]:.2f} plain forward passes"]
        for name, took in joint["seconds"].items()
        if name != "plain forward"
    ]
    screen = report["screen"]
    rows.append([f"first-order scores of {screen['components']:,} components", f"{screen['seconds']['screen']:.1f} s",
                 f"{screen['forwards']:.1f} plain forward passes"])  # fmt: skip
    for name in ("products", "weights and products"):
        coarse = report["rounding"][name]
        rows.append([f"effects of {report['rounding']['components']:,} heads and neurons, {name} in bfloat16", "",
                     f"wrong by {coarse['median_error']:.1e} (median) to {coarse['largest_error']:.1e} of the largest; "
                     f"Spearman {coarse['spearman']:.4f}"])  # fmt: skip
    if "race" not in report:
        return table(["what", "time", "that is"], rows)
    rows += [
        [f"compiling a sweep of three kinds, {depth} layers", f"{c['seconds']:.1f} s", f"{c['programs']} programs"]
        for depth, c in report["compilation"].items()
    ]
    rows += [
        [f"exact sweep with twice the {name}", f"{report['scaling']['seconds'][name]:.2f} s", f"{ratio:.2f} times"]
        for name, ratio in report["scaling"]["ratio"].items()
    ]
    race = report["race"]
    rows.append([f"race for the top {race['top']} of a kind, {race['components']:,} components",
                 f"{race['seconds']['race']:.1f} s",
                 f"{race['seconds']['race'] / race['seconds']['exact']:.2f} of the full sweep's time, "
                 f"{race['share']:.2f} of its replacements, {race['agreement']:.0%} of its top"])  # fmt: skip
    for key, of in (("memory", "{:,} patches"), ("memory_by_depth", "256 patches, {} layers"),
                    ("memory_by_width", "256 patches, width {}")):  # fmt: skip
        rows += [["peak memory, " + of.format(int(n)), "",
                  f"{m['bytes'] / 2**20:,.0f} MiB, of which the two models {m['weights'] / 2**20:,.0f}"]
                 for n, m in report[key].items()]  # fmt: skip
    rows += [[f"exact sweep, the CPU's cores as {n} device{'s' * (n != '1')}", f"{t:.2f} s", ""]
             for n, t in report["devices"].items()]  # fmt: skip
    return table(["what", "time", "that is"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", type=int, help="measure a small sweep of so many patches in this process, and stop")
    parser.add_argument("--layers", type=int, default=8, help="of that sweep's model")
    parser.add_argument("--width", type=int, default=128, help="of that sweep's model")
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
    if args.alone:
        print(json.dumps(alone(args.alone, args.layers, args.width, args.repeats)))
        return
    pair, task = load_pair(args.base, args.expert, args.dtype), behaviour(args.behaviour)
    anchor = fit_anchor(pair, task, layer=args.layer, causal="skip")
    metric = anchor.on(task.encode(pair.tokenizer, n_prompts=args.n_prompts))
    screened = anchor.on(task.encode(pair.tokenizer, n_prompts=32))
    packing = pack(metric)
    report: dict[str, Any] = {
        "model": {"base": Path(args.base).name, "layers": pair.cfg.n_layers, "d_model": pair.cfg.d_model},
        "anchor_layer": anchor.layer,
        "prompts": args.n_prompts,
        "tokens": {"padded": int(np.size(metric.tokens.ids)), "packed": packing.n_tokens, "empty": packing.n_empty},
        "exact": exact_rates(pair, metric, args.per_layer, args.repeats),
        "joint": joint_costs(pair, metric, args.repeats),
        "screen": screen_cost(pair, screened, args.repeats),
        "rounding": rounding(pair, metric),
        "machine": machine(),
        "dtype": args.dtype,
        **made(),
    }
    if not args.pair_only:
        report |= {
            "race": race_cost(pair, task, anchor),
            "scaling": scaling(args.repeats),
            "compilation": compilation(),
            **processes(args.repeats),
        }
    print(markdown(report))
    write(args.out, report)


if __name__ == "__main__":
    main()
