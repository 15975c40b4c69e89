"""Which ranking's best components carry the behaviour with the fewest parameters?

    python -m experiments.paper.rankings experiments/paper/tiny.json --work work/paper/tiny \
        --out experiments/paper/tiny.rankings.json

Heads, KV groups and neurons of all layers are ranked on "sweep" prompts by every metric and estimator, as shares of the
metric's gap; sums of two rankings are sums of shares. The best ones together are put into the base, for budgets of
parameters on a logarithmic grid, and the checker judges answers to "test" prompts. Run `experiments.paper.replicate`
first: its anchors are taken. Finished tasks are kept in the results, and rankings that they lack are added.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from experiments.paper.replicate import FINE
from experiments.paper.tasks import measured, over_tasks, pair_of, place_of, settings_of
from experiments.records import made, table
from wpjax.behaviours import Behaviour
from wpjax.cli.console import progress_bars
from wpjax.components import Component, enumerate_components, n_parameters
from wpjax.estimators.screens import integrated_gradients, output_linearised
from wpjax.estimators.secant import secant_adjoint
from wpjax.evaluation.judge import Judge, check_behaviour_differs
from wpjax.evaluation.validation import curve_steps
from wpjax.methods.metrics import answer_metrics
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.metric import Metric, expect_positive_gap, scores
from wpjax.pairs import Pair
from wpjax.patching import PatchMask, materialize
from wpjax.stats import resample

METRICS = ("response", "decision", "kl")
"""Metrics that read an answer, and that are compared here."""

PAIRED = (
    ("anchor, linearised", "decision, integrated"),
    ("anchor, linearised", "decision, linearised"),
    ("decision, linearised", "decision, integrated"),
    ("anchor, secant", "decision, secant"),
)
"""Rankings whose shares are added."""

ESTIMATORS = ("linearised", "integrated", "secant")
N_RANDOM = 2
SETTINGS = ("base", "expert", "n_prompts", "n_validated", "max_new_tokens", "dtype")
"""Of a config, what rankings depend on."""
NAMES = (
    *(f"{name}, linearised" for name in ("anchor", *METRICS)),
    *(f"{name}, {estimator}" for name in ("anchor", "decision") for estimator in ESTIMATORS[1:]),
    *(" + ".join(names) for names in PAIRED),
    "norm of the change",
    *(f"random {i + 1}" for i in range(N_RANDOM)),
)
"""Of all rankings, in the order of the table."""


def rankings(
    pair: Pair, metrics: dict[str, Metric], components: list[Component], queries: Int[np.ndarray, " B"], steps: int
) -> dict[str, Float[np.ndarray, " C"]]:
    """Share of the gap that each component has, by each ranking; 0 where a metric cannot feel it."""

    def shares(run: Callable[..., np.ndarray], metric: Metric, **options: Any) -> Float[np.ndarray, " C"]:
        gaps = (scores(pair.cfg, pair.expert, metric) - scores(pair.cfg, pair.base, metric)).astype(np.float64)
        expect_positive_gap(gaps, queries, f"the {metric.name} metric")
        return run(pair.cfg, pair.base, pair.expert, components, metric, **options).mean(1) / gaps.mean()

    found = {f"{name}, linearised": shares(output_linearised, metric) for name, metric in metrics.items()}
    for name in ("anchor", "decision"):
        found[f"{name}, integrated"] = shares(integrated_gradients, metrics[name], steps=steps)
        found[f"{name}, secant"] = shares(secant_adjoint, metrics[name])
    found |= {" + ".join(names): found[names[0]] + found[names[1]] for names in PAIRED}
    found["norm of the change"] = pair.delta_norms(components)
    rng = np.random.default_rng(0)
    return found | {f"random {i + 1}": rng.standard_normal(len(components)) for i in range(N_RANDOM)}


def run_task(
    config: dict[str, Any], task: Behaviour, folder: Path, points: int, steps: int, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Pass rates along the curve of every ranking, and the area under it; only of those an earlier result lacks."""
    pair, new_tokens = pair_of(config, task), int(config["max_new_tokens"])
    judge = Judge(pair, task, task.encode(pair.tokenizer, "test", int(config["n_validated"])), new_tokens)
    said = [judge.answers(params) for params in (pair.base, pair.expert)]
    check_behaviour_differs(judge, *said)
    anchor = Anchor.load(folder / "anchor.safetensors")
    anchor.check_belongs(pair)
    batch = task.encode(pair.tokenizer, "sweep", int(config["n_prompts"]))
    metrics = {"anchor": anchor.metric(pair, batch)}
    metrics |= {name: make(pair, batch, new_tokens) for name, make in answer_metrics().items() if name in METRICS}
    components = enumerate_components(pair.cfg, FINE)
    sizes = np.array([n_parameters(pair.cfg, c) for c in components])
    budgets = np.geomspace(0.003, 0.6, points) * sizes.sum()
    ends = np.stack([judge.passes(answers) for answers in said])
    passes: dict[str, Bool[np.ndarray, "K B"]] = {}
    ranked = rankings(pair, metrics, components, batch.queries, steps)
    assert set(ranked) == set(NAMES)
    earlier: dict[str, Any] = {"passes": {}, "areas": {}}
    if known is not None and (known["budgets"], known["steps"]) == ([round(b) for b in budgets], steps):
        earlier = known
    ranked = {name: values for name, values in ranked.items() if name not in earlier["areas"]}
    with progress_bars() as progress:
        for i, (name, values) in enumerate(ranked.items()):
            order = np.argsort(-values, kind="stable")
            some = curve_steps([components[j] for j in order], sizes[order], budgets.astype(int).tolist())
            masks = (PatchMask.of(pair.cfg, step.components) for step in some)
            patched = (materialize(pair.base, pair.expert, mask) for mask in masks)
            passes[name] = np.stack([judge.passes(judge.answers(params)) for params in patched])
            progress("rankings", i + 1, len(ranked))
    weights = resample(judge.batch.queries).weights
    gap = (ends[1].astype(float) - ends[0]) @ np.vstack([np.ones(ends.shape[1]), weights]).T

    some = gap > 0  # a resample of few prompts may hold none on which the models differ

    def area(values: Bool[np.ndarray, "K B"]) -> list[float]:
        moved = (values.astype(float) - ends[0]).mean(0)  # budgets are evenly spaced on the logarithmic scale
        share = (moved @ np.vstack([np.ones(len(moved)), weights]).T)[some] / gap[some]
        return [round(float(x), 4) for x in (share[0], *np.quantile(share[1:], [0.025, 0.975]))]

    return {
        **made(),
        "anchor_layer": anchor.layer,
        "components": len(components),
        "budgets": [round(b) for b in budgets],
        "steps": steps,
        "passes": {"base": float(ends[0].mean()), "expert": float(ends[1].mean())}
        | {name: [round(float(x), 4) for x in values.mean(1)] for name, values in passes.items()}
        | {name: rates for name, rates in earlier["passes"].items() if name in earlier["areas"]},
        "areas": {name: area(values) for name, values in passes.items()} | earlier["areas"],
    }


def markdown(report: dict[str, Any]) -> str:
    """Area of every ranking, one column a task, and the mean over tasks."""
    tasks = measured(report)
    shared = set.intersection(*(set(task["areas"]) for task in tasks.values()))
    names = [name for name in NAMES if name in shared and not name.startswith("random")]

    def areas(name: str) -> list[list[float]]:
        if name != "random":
            return [task["areas"][name] for task in tasks.values()]
        drawn = [[task["areas"][f"random {i + 1}"] for i in range(N_RANDOM)] for task in tasks.values()]
        return [np.mean(some, axis=0).tolist() for some in drawn]

    rows = []
    for name in (*names, "random"):
        found = areas(name)
        mean = np.mean([a[0] for a in found])
        rows.append([name, *(f"{a[0]:.2f} [{a[1]:.2f}, {a[2]:.2f}]" for a in found), f"{mean:.3f}"])
    return table(["ranked by", *(name.removeprefix("tiny:") for name in tasks), "mean"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="that of the replication")
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8, help="of integrated gradients")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    earlier = (
        {"config": {"tasks": []}} if args.out is None or not args.out.exists() else json.loads(args.out.read_text())
    )
    before = settings_of(earlier["config"])

    def run(config: dict[str, Any], task: Behaviour) -> dict[str, Any]:
        same = task.name in before and all(before[task.name].get(key) == config.get(key) for key in SETTINGS)
        known = earlier["tasks"].get(task.name) if same else None
        return run_task(config, task, place_of(args.work, task), args.points, args.steps, known)

    report = over_tasks(args.config, args.out, run, lambda result: set(NAMES) <= set(result["areas"]))
    print(markdown(report))


if __name__ == "__main__":
    main()
