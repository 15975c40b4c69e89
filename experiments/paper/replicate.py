"""The whole pipeline of the paper (arXiv 2604.13694) on one pair, for every task of a config.

    python -m experiments.paper.replicate experiments/paper/tiny.json --work work/paper/tiny \
        --out experiments/paper/tiny.results.json

For each task: the expert, if its folder is not there (fine-tuned on the base's own rewritten answers); the anchor with
its causal tests; the sweep of heads, KV groups and neurons up to it (screen, then exact, with a random stratum) and the
flow; the sweep of what executes the behaviour once the anchor's state is given; restoration and knock-out curves
against their controls, judged by the checker. Finished steps are kept in the work folder, and finished tasks in the
results, and are not repeated. The summary says of each of the paper's findings what was seen.

A config names a base and an expert ("{task}" in its path stands for the task's name) and the tasks; a task may be an
object with a name and settings of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.paper.tasks import measured, over_tasks, pair_of, place_of
from experiments.records import made, table, write
from wpjax.anchors import Anchor, fit_anchor
from wpjax.behaviours import Behaviour
from wpjax.cli.console import progress_bars
from wpjax.curves import Curves
from wpjax.metrics import kl_metric
from wpjax.pairs import Pair
from wpjax.report import write_report
from wpjax.report.curves import write_curves
from wpjax.results import Shards, SweepResult
from wpjax.steering import Judge, check_behaviour_differs
from wpjax.sweeps import sweep
from wpjax.tracing import hierarchy
from wpjax.validation import validate

FINE = ("head", "kv_group", "neuron")


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
        return Shards(folder / f".{step}", {"task": task.name, **config}, resume=True)

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
        options: dict[str, Any] = {"method": "screen+exact", "top": int(config["top"]), "progress": progress}
        if not places["sweep.nc"].exists():
            found = sweep(pair, batch, anchor, done=parts("sweep"), **options)
            found.to_netcdf(places["sweep.nc"])
        if not places["execution.nc"].exists():
            given = anchor.give(pair, batch, kl_metric(pair, batch, new_tokens))
            found = sweep(pair, batch, given, done=parts("execution"), **options)
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
    return summary(pair, anchor, swept, executed, curves)


def summary(pair: Pair, anchor: Anchor, swept: SweepResult, executed: SweepResult, curves: Curves) -> dict[str, Any]:
    """Figures of one task."""
    found, data = hierarchy(swept, executed), swept.dataset
    n_layers = pair.cfg.n_layers
    positive = np.clip(np.nan_to_num(swept.best()), 0, None)
    kinds = data["kind"].values.astype(str)
    inflow = np.array([a.value for a in found.aggregators])
    heads = np.array([".head." in a.name for a in found.aggregators])
    strict = curves.share("strict")[1][0]
    ends = curves.dataset["end_strict"].values.mean(1)
    areas = {
        side: {name: [round(x, 3) for x in curves.area("strict", side, r)] for r, name in enumerate(curves.rankings)}
        for side in ("restore", "knockout")
    }
    return {
        **made(),
        "anchor_layer": anchor.layer,
        "acceptance": anchor.acceptance,
        "n_layers": n_layers,
        "coverage": round(float(data.attrs["coverage"]), 3),
        "sources": [n._asdict() for n in found.sources[:8]],
        "source_depth": _mean(data["layer"].values, positive) / n_layers,
        "anchor_depth": anchor.layer / n_layers,
        "source_kinds": {k: float(positive[kinds == k].sum() / positive.sum()) for k in FINE},
        "aggregators": [n._asdict() for n in found.aggregators],
        "aggregator_depth": _mean(np.array([a.layer for a in found.aggregators]), inflow) / n_layers,
        "aggregated_by_heads": float(inflow[heads].sum() / inflow.sum()) if inflow.size else float("nan"),
        "executors": [n._asdict() for n in found.executors[:8]],
        "execution_coverage": round(float(executed.dataset.attrs["coverage"]), 3),
        "passes": {"base": float(ends[0]), "expert": float(ends[1]), "best_set": float(strict[0, 0].max())},
        "n_components": curves.dataset["n_components"].values[0].tolist(),
        "passes_by_size": [round(float(x), 3) for x in strict[0, 0]],
        "areas": areas,
        "calibration": [c._asdict() for c in curves.calibration()],
    }


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float((values * weights).sum() / weights.sum()) if weights.sum() > 0 else float("nan")


def markdown(report: dict[str, Any]) -> str:
    """One line a task: anchor, depth of sources and aggregators, and the areas under the restoration curves."""
    columns = ["task", "anchor", "accepted", "sources: depth", "in neurons", "by way of: depth", "by heads",
               "passes, best set (expert)", "area: weights", "area: activation", "area: random"]  # fmt: skip
    rows = []
    for name, r in measured(report).items():
        areas = r["areas"]["restore"]
        first = next(iter(areas))
        by_way = (f"{r['aggregator_depth']:.2f}", f"{r['aggregated_by_heads']:.0%}") if r["aggregators"] else ("", "")
        random = np.mean([a[0] for ranking, a in areas.items() if ranking.startswith("random")])
        rows.append(
            [
                name.removeprefix("tiny:"),
                f"{r['anchor_layer']} of {r['n_layers']}",
                "yes" if r["acceptance"] == "accepted" else "no",
                f"{r['source_depth']:.2f}",
                f"{r['source_kinds']['neuron']:.0%}",
                *by_way,
                f"{r['passes']['best_set']:.0%} ({r['passes']['expert']:.0%})",
                *(f"{a[0]:.2f} [{a[1]:.2f}, {a[2]:.2f}]" for a in (areas[first], areas["activation"])),
                f"{random:.2f}",
            ]
        )
    return table(columns, rows)


def calibrations(report: dict[str, Any]) -> str:
    """How far each score's share is from the share that passes (root mean square), and their rank correlation."""
    tasks = measured(report)
    measures = [c["measure"] for c in next(iter(tasks.values()))["calibration"]] if tasks else []

    def cell(task: dict[str, Any], measure: str) -> str:
        found = next(c for c in task["calibration"] if c["measure"] == measure)
        return f"{found['error']:.2f} ({found['rho']:.2f})"

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
