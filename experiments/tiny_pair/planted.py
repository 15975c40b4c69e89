"""How well each ranking finds the planted components of the embedded pair.

    python -m experiments.tiny_pair.planted --out experiments/tiny_pair/planted.json

AUROC of planted against not planted, over all components up to the anchor and within each kind. Intervals resample
prompts' queries (how sure the effect is), with the planted set fixed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from experiments.records import made, table, write
from wpjax.behaviours import behaviour
from wpjax.cli.console import progress_bars
from wpjax.components import parse_component
from wpjax.estimators.screens import output_linearised, weight_gradient
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.pairs import load_pair, planted_components
from wpjax.stats import resample


def measure(n_prompts: int) -> dict[str, Any]:
    """Sweep the planted pair exactly and by both screens; score every ranking against the truth."""
    pair, task = load_pair("tiny:base", "tiny:planted"), behaviour("tiny:english_capital")
    anchor = fit_anchor(pair, task)
    batch = task.encode(pair.tokenizer, n_prompts=n_prompts)
    with progress_bars() as progress:
        result = sweep(pair, batch, anchor, method="exact", progress=progress)
    data = result.dataset
    names, kinds = data["name"].values.astype(str), data["kind"].values.astype(str)
    truth = np.isin(names, planted_components())
    weights = resample(batch.queries, 500).weights
    delta = data["delta"].values.astype(np.float64)
    components = [parse_component(pair.cfg, name) for name in names]
    screens = (pair.cfg, pair.base, pair.expert, components, anchor.metric_along(batch))
    per_prompt = {
        "exact effect": delta,
        "output-linearised screen": output_linearised(*screens),
        "weight gradient": weight_gradient(*screens),
    }
    norm = data["delta_norm"].values
    groups = {"all": np.ones(len(names), bool), **{k: kinds == k for k in dict.fromkeys(kinds.tolist())}}
    table: dict[str, Any] = {}
    for group, mine in groups.items():
        rows: dict[str, Any] = {
            ranking: with_interval(truth[mine], values[mine], weights) for ranking, values in per_prompt.items()
        }
        rows["norm of the change"] = {"auroc": round(float(roc_auc_score(truth[mine], norm[mine])), 4)}
        table[group] = {"components": int(mine.sum()), "planted": int(truth[mine].sum()), **rows}
    return {
        "what": "AUROC of each ranking against the planted components of tiny:planted",
        "anchor_layer": anchor.layer,
        "prompts": len(batch),
        "noise_floor": data.attrs["noise_floor"],
        "coverage": data.attrs["coverage"],
        "table": table,
        "dtype": data.attrs["dtype"],
    } | made()


def with_interval(truth: np.ndarray, values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """AUROC of |mean over prompts|, and its 95 % bootstrap interval."""
    resampled = [roc_auc_score(truth, np.abs(values @ w)) for w in weights]
    low, high = np.quantile(resampled, [0.025, 0.975])
    auroc = roc_auc_score(truth, np.abs(values.mean(1)))
    return {"auroc": round(float(auroc), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def markdown(report: dict[str, Any]) -> str:
    """The report as a table: AUROC with its interval, one line a ranking, one column a kind."""
    groups = report["table"]
    rankings = [name for name in groups["all"] if name not in ("components", "planted")]

    def cell(found: dict[str, float]) -> str:
        interval = f" [{found['low']:.3f}, {found['high']:.3f}]" if "low" in found else ""
        return f"{found['auroc']:.3f}{interval}"

    columns = ["ranking", *(f"{name} ({g['planted']} of {g['components']})" for name, g in groups.items())]
    return table(columns, [[ranking, *(cell(group[ranking]) for group in groups.values())] for ranking in rankings])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-prompts", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = measure(args.n_prompts)
    print(markdown(report))
    write(args.out, report)


if __name__ == "__main__":
    main()
