r"""What a step of a learned mask costs, in plain forward passes over the same prompts.

    python -m experiments.bench.relax --base work/smollm2/base --expert work/smollm2/lora_english_capital \
        --behaviour english_capital --out experiments/bench/relax.smollm2.json
    python -m experiments.bench.relax --restarts 4 --out experiments/bench/relax.tiny.json

The gates are those of all heads, KV groups and neurons. Each step chooses eight prompts, draws a budget, blends base
and expert, goes forward and back, and moves the scores. A plain forward pass is the same metric of the base on eight
such prompts. They run alternately; CPU seconds of all threads, the least of some runs, compilation left out.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.measure import compilations
from experiments.records import machine, made, table, write
from wpjax import behaviour, enumerate_components, load_pair
from wpjax.evaluation.learned import Aim, parts_of
from wpjax.metrics.metric import Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.pairs import Pair
from wpjax.relax.gates import Gates
from wpjax.relax.learn import RelaxConfig, State, adam, take_steps
from wpjax.relax.objectives import Objective, Recover, Weighted
from wpjax.relax.parametrisations import Nested

KINDS = ("head", "kv_group", "neuron")
STEPS = 200


@functools.partial(jax.jit, static_argnames="cfg")
def plain(cfg: ModelConfig, params: Params, metric: Metric) -> jax.Array:
    """The metric of one model."""
    return metric(cfg, params)


def cpu_seconds(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least CPU seconds, of all threads together, of several things that run alternately.

    Other processes make a run wait; its CPU seconds hardly grow by that.
    """
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            jax.block_until_ready(run())
            took[name].append(time.process_time() - start)
    return {name: min(times) for name, times in took.items()}


class Steps:
    """A step of some restarts, again and again; the state goes on."""

    def __init__(self, objective: Objective, gates: Gates, restarts: int):
        self.objective, self.gates, self.optimiser = objective, gates, adam(RelaxConfig())
        numbers = jnp.zeros((restarts, len(gates)))
        states = jax.vmap(self.optimiser.init)(numbers)
        self.state = State(numbers, states, jnp.zeros(restarts, jnp.int32))
        self.keys = jnp.stack([jax.random.key(r) for r in range(restarts)])

    def __call__(self) -> jax.Array:
        """Take one step; its losses."""
        self.state, losses = take_steps(
            self.state, self.objective, self.gates, self.keys,
            parametrisation=Nested(), optimiser=self.optimiser, n_steps=1,
        )  # fmt: skip
        return losses


def measured(pair: Pair, task: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps and of plain forward passes, and how many programs were compiled after the first step."""
    batch = task.encode(pair.tokenizer, "sweep", 4 * args.prompts_a_step)
    gates = Gates.of(pair.cfg, enumerate_components(pair.cfg, KINDS))
    aim = Aim("kl+decision", prompts_a_step=args.prompts_a_step, max_new_tokens=args.max_new_tokens)
    parts = {part.name.split(",")[0]: part for part in parts_of(pair, task, batch, aim)}
    objectives: dict[str, Objective] = {}
    rows = jnp.arange(min(args.prompts_a_step, len(batch)))
    runs: dict[str, Callable[[], Any]] = {}
    for name, part in parts.items():
        assert isinstance(part.objective, Recover)
        objectives[name] = part.objective
        runs[f"plain, {name}"] = functools.partial(plain, pair.cfg, pair.base, part.objective.metric.take(rows))
    weights = jnp.array([part.weight for part in parts.values()])
    objectives["kl+decision"] = Weighted(tuple(objectives.values()), weights)
    for name, objective in objectives.items():
        for restarts in dict.fromkeys((1, args.restarts)):
            runs[f"{name}, {restarts}"] = Steps(objective, gates, restarts)
    for run in runs.values():
        run()
    with compilations() as compiled:
        seconds = cpu_seconds(runs, args.repeats)
    plains = {name: seconds[f"plain, {name}"] for name in parts} | {
        "kl+decision": sum(seconds[f"plain, {name}"] for name in parts)
    }
    steps = {}
    for name in objectives:
        for restarts in dict.fromkeys((1, args.restarts)):
            took = seconds[f"{name}, {restarts}"]
            steps[f"{name}, {restarts} {'run' if restarts == 1 else 'restarts at once'}"] = {
                "seconds": took, "forwards": took / restarts / plains[name],
                "minutes": STEPS * took / 60,
            }  # fmt: skip
    return {
        "gates": len(gates),
        "prompts_a_step": len(rows),
        "tokens": int(np.asarray(parts["kl"].objective.metric.tokens.ids).shape[1]),  # type: ignore[union-attr]
        "plain_seconds": plains,
        "steps": steps,
        "compiled_later": len(compiled),
    }


def markdown(report: dict[str, Any]) -> str:
    """One row an objective."""
    what = f"{report['model']}: a step of {report['gates']:,} gates, {report['prompts_a_step']} prompts of up to "
    rows = [
        [name, f"{step['seconds'] * 1e3:,.0f} ms", f"{step['forwards']:.2f}", f"{step['minutes']:.1f} min"]
        for name, step in report["steps"].items()
    ]
    return table(
        [f"{what}{report['tokens']} tokens", "CPU time", "plain forward passes, a run", f"CPU time of {STEPS} steps"],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny:base")
    parser.add_argument("--expert", default="tiny:expert")
    parser.add_argument("--behaviour", default="tiny:english_capital")
    parser.add_argument("--prompts-a-step", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pair = load_pair(args.base, args.expert)
    report = {"model": "embedded pair" if args.base.startswith("tiny:") else "SmolLM2"}
    report |= measured(pair, behaviour(args.behaviour), args)
    report |= {"dtype": "float32", **made(), "machine": machine()}
    print(markdown(report))
    write(args.out, report)


if __name__ == "__main__":
    main()
