"""The whole pipeline of the paper (arXiv 2604.13694) on one pair, for every task of a config.

    python -m experiments.paper.replicate experiments/paper/tiny.json --work work/paper/tiny \
        --out experiments/paper/tiny.results.json

For each task: the expert, if its folder is not there (fine-tuned on the base's own rewritten answers); the anchor with
its causal tests; the sweep of heads, KV groups and neurons up to it (screen, then exact, with a random stratum; with
"method": "factorial" in the config, of activations and knock-outs too) and the flow; the sweep of what executes the
behaviour once the anchor's state is given; restoration and knock-out curves against their controls, judged by the
checker. Finished steps are kept in the work folder, and finished tasks in the results, and are not repeated. The
summary says of each of the paper's findings what was seen.

A config names a base and an expert ("{task}" in its path stands for the task's name) and the tasks; a task may be an
object with a name and settings of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.paper.tasks import measured, over_tasks, pair_of, place_of
from experiments.records import made, table, write
from wpjax.behaviours import Behaviour
from wpjax.circuits.hierarchy import hierarchy
from wpjax.cli.console import progress_bars, without_nan
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.evaluation.judge import Judge, check_behaviour_differs
from wpjax.evaluation.validation import activation_values, validate
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.answers import kl_metric
from wpjax.pairs import Pair
from wpjax.report import write_report
from wpjax.report.curves import write_curves
from wpjax.results.curves import CHECKS, Curves
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.shards import Shards

FINE = ("head", "kv_group", "neuron")
N_TOP = 64
"""Highest components by weights and by activations that are compared."""


def run_task(config: dict[str, Any], task: Behaviour, folder: Path) -> dict[str, Any]:
    """All steps of one task, and what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "settings.json"
    if known.exists() and json.loads(known.read_text()) != config:
        raise SystemExit(f"error: {folder} holds steps made with other settings; delete it, or name another --work")
    write(known, config)
    pair = pair_of(config, task)
    places = {name: folder / name for name in ("anchor.safetensors", "sweep.nc", "execution.nc", "curves.nc")}
    new_tokens, n_prompts = int(config["max_new_tokens"]), int(config["n_prompts"])
    steered, validated = int(config["n_steered"]), int(config["n_validated"])

    def parts(step: str) -> Shards:
        return Shards(places[f"{step}.nc"], "parts", {"task": task.name, **config}, resume=True)

    if not places["curves.nc"].exists():  # before anything long: is there a behaviour to find?
        judge = Judge(pair, task, task.encode(pair.tokenizer, "test", validated), new_tokens)
        check_behaviour_differs(judge, judge.answers(pair.base), judge.answers(pair.expert))
    with progress_bars() as progress:
        if not places["anchor.safetensors"].exists():
            fitted = fit_anchor(
                pair, task, causal="report", n_steered=steered, max_new_tokens=new_tokens, progress=progress
            )
            fitted.save(places["anchor.safetensors"])
        anchor = Anchor.load(places["anchor.safetensors"])
        batch = task.encode(pair.tokenizer, "sweep", n_prompts)
        options: dict[str, Any] = {"top": int(config["top"]), "progress": progress}
        if not places["sweep.nc"].exists():
            method = config.get("method", "screen+exact")
            found = sweep(pair, batch, anchor, method=method, done=parts("sweep"), **options)
            found.to_netcdf(places["sweep.nc"])
        if not places["execution.nc"].exists():
            metric = kl_metric(pair, batch, new_tokens)
            found = sweep(
                pair, batch, metric, given=anchor, method="screen+exact", done=parts("execution"), **options
            )  # fmt: skip
            found.to_netcdf(places["execution.nc"])
        swept, executed = (SweepResult.from_netcdf(places[name]) for name in ("sweep.nc", "execution.nc"))
        if not places["curves.nc"].exists():
            drawn = validate(
                pair, task, swept, by="effect", n_prompts=validated, n_points=int(config["points"]),
                max_new_tokens=new_tokens,
                done=parts("curves"), progress=progress,
            )  # fmt: skip
            drawn.to_netcdf(places["curves.nc"])
        curves = Curves.from_netcdf(places["curves.nc"])
    write_report(swept, folder / "report.html", execution=executed, overwrite=True)
    write_curves(curves, places["curves.nc"], overwrite=True)
    activation = activation_values(pair, task, swept, anchor, new_tokens)
    return without_nan(summary(pair, anchor, swept, activation, executed, curves))


def summary(
    pair: Pair,
    anchor: Anchor,
    swept: SweepResult,
    activation: Float[np.ndarray, " C"],
    executed: SweepResult,
    curves: Curves,
) -> dict[str, Any]:
    """Figures of one task."""
    found, data = hierarchy(swept, executed), swept.dataset
    n_layers = pair.cfg.n_layers
    positive = np.clip(np.nan_to_num(swept.best()), 0, None)
    kinds = data["kind"].values.astype(str)
    inflow = np.array([a.value for a in found.aggregators])
    heads = np.array([".head." in a.name for a in found.aggregators])
    layers = np.array([a.layer for a in found.aggregators])
    areas = {
        check: {
            side: {name: [round(x, 3) for x in curves.area(check, side, r)] for r, name in enumerate(curves.rankings)}
            for side in ("restore", "knockout")
        }
        for check in CHECKS
    }
    return {
        **made(),
        "anchor_layer": anchor.layer,
        "acceptance": anchor.acceptance,
        "n_layers": n_layers,
        "coverage": round(float(data.attrs["coverage"]), 3),
        "sources": [n._asdict() for n in found.sources[:8]],
        "source_depth": _mean(data["layer"].values, positive) / n_layers,
        "activation_depth": _mean(data["layer"].values, np.clip(activation, 0, None)) / n_layers,
        "two_by_two": _two_by_two(swept),
        "anchor_depth": anchor.layer / n_layers,
        "source_kinds": {k: float(positive[kinds == k].sum() / positive.sum()) for k in FINE},
        "aggregators": [n._asdict() for n in found.aggregators],
        "aggregator_depth": _mean(layers, inflow) / n_layers,
        "aggregated_by_heads": _mean(heads, inflow),
        "executors": [n._asdict() for n in found.executors[:8]],
        "execution_coverage": round(float(executed.dataset.attrs["coverage"]), 3),
        "passes": {check: _passes(curves, check) for check in CHECKS},
        "n_components": curves.dataset["n_components"].values[0].tolist(),
        "passes_by_size": [round(float(x), 3) for x in curves.share("strict")[1][0, 0, 0]],
        "areas": areas,
        "calibration": [c._asdict() for c in curves.calibration()],
    }


def _passes(curves: Curves, check: str) -> dict[str, float]:
    base, expert = (float(x) for x in curves.dataset[f"end_{check}"].values.mean(1))
    return {"base": base, "expert": expert, "best_set": float(curves.share(check)[1][0, 0, 0].max())}


def _two_by_two(swept: SweepResult) -> dict[str, Any] | None:
    """Where sources and relays lie, of the components that were measured in all cells; None if none were."""
    data = swept.dataset
    if "source" not in data:
        return None
    known = np.isfinite(data["source"].values)
    source, relay = (np.clip(data[name].values[known], 0, None) for name in ("source", "relay"))
    layers, n_layers = data["layer"].values[known], int(data.attrs["n_layers"])
    effect, patched = (data[name].values[known] for name in ("effect", "activation"))
    best = [set(np.argsort(-values)[:N_TOP].tolist()) for values in (effect, patched)]
    return {
        "components": int(known.sum()),
        "source_depth": _mean(layers, source) / n_layers,
        "relay_depth": _mean(layers, relay) / n_layers,
        "relay_of_activation_top": float(relay[list(best[1])].sum() / (source + relay)[list(best[1])].sum()),
        "shared_of_top": len(best[0] & best[1]) / N_TOP,
    }


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    known = np.isfinite(weights)
    values, weights = values[known], weights[known]
    return float((values * weights).sum() / weights.sum()) if weights.sum() > 0 else float("nan")


def markdown(report: dict[str, Any]) -> str:
    """One line a task: anchor, depth of sources and aggregators, and the areas under the restoration curves."""
    columns = ["task", "anchor", "accepted", "sources: depth", "in neurons", "activation: depth", "by way of: depth",
               "by heads", "passes, best set (expert)", "loose", "area: weights", "area: activation",
               "area: random"]  # fmt: skip
    rows = []
    for name, r in measured(report).items():
        areas = r["areas"]["strict"]["restore"]
        first = next(iter(areas))
        random = np.mean([a[0] for ranking, a in areas.items() if ranking.startswith("random")])
        patched = next(a for ranking, a in areas.items() if ranking in ("activation", "attribution"))
        passes = (f"{r['passes'][c]['best_set']:.0%} ({r['passes'][c]['expert']:.0%})" for c in CHECKS)
        rows.append(
            [
                name.removeprefix("tiny:"),
                f"{r['anchor_layer']} of {r['n_layers']}",
                "yes" if r["acceptance"] == "accepted" else "no",
                _figure(r["source_depth"], ".2f"),
                _figure(r["source_kinds"]["neuron"], ".0%"),
                _figure(r["activation_depth"], ".2f"),
                _figure(r["aggregator_depth"], ".2f"),
                _figure(r["aggregated_by_heads"], ".0%"),
                *passes,
                *(f"{a[0]:.2f} [{_figure(a[1], '.2f')}, {_figure(a[2], '.2f')}]" for a in (areas[first], patched)),
                f"{random:.2f}",
            ]
        )
    return table(columns, rows)


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def calibrations(report: dict[str, Any]) -> str:
    """How far each score's share is from the share that passes (root mean square), and their rank correlation."""
    tasks = measured(report)
    measures = [c["measure"] for c in next(iter(tasks.values()))["calibration"]] if tasks else []

    def cell(task: dict[str, Any], measure: str) -> str:
        found = next(c for c in task["calibration"] if c["measure"] == measure)
        if found["error"] is None:
            return "no gap"
        return f"{found['error']:.2f}" + ("" if found["rho"] is None else f" ({found['rho']:.2f})")

    rows = [[name.removeprefix("tiny:"), *(cell(task, m) for m in measures)] for name, task in tasks.items()]
    return table(["task", *measures], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where steps are kept")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = over_tasks(args.config, args.out, lambda config, task: run_task(config, task, place_of(args.work, task)))
    print(markdown(report))
    print(calibrations(report))


if __name__ == "__main__":
    main()
