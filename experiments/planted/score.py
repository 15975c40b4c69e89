"""How well every ranking finds what was planted, over all planted experts.

    python -m experiments.planted.score --experts work/planted --out experiments/planted/results.json

Of each expert that took (it follows the instruction on half of the held-out questions or more, and still knows nine
tenths of its facts) all heads, KV groups and neurons up to the anchor are ranked by the size of each figure: AUROC of
planted against not planted, and precision among as many as were planted. Scores of finished experts are kept beside
them. Intervals resample experts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from experiments.planted.make import BEHAVIOUR, TRUTH
from experiments.records import made, table, write
from wpjax.behaviours import behaviour
from wpjax.cli.console import progress_bars
from wpjax.components import parse_component
from wpjax.estimators.screens import integrated_gradients, weight_gradient
from wpjax.estimators.secant import secant_adjoint
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.metrics.metric import scores
from wpjax.pairs import load_pair
from wpjax.patching import PatchMask, patch
from wpjax.report.figures import COLOURS, GREY, STYLE

RANKINGS = {
    "effect": "exact weight patch",
    "screen": "output-linearised screen",
    "gradient": "weight gradient",
    "secant": "secant adjoint",
    "ig": "integrated gradients",
    "banzhaf": "random masks, half of the others",
    "beta_high": "random masks, most of the others",
    "knockout": "knock-out in the expert",
    "activation": "activation patching",
    "attribution": "attribution patching",
    "relay": "relay",
    "delta_norm": "norm of the change",
    "random": "random",
}
SCORES = "scores.json"


def score(folder: Path, n_prompts: int, n_masks: int, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """AUROC and precision of every ranking on one expert."""
    truth = json.loads((folder / TRUTH).read_text())
    pair, task = load_pair("tiny:base", folder), behaviour(f"tiny:{BEHAVIOUR}")
    anchor = fit_anchor(pair, task, n_prompts=32, causal="skip")
    batch = task.encode(pair.tokenizer, "sweep", n_prompts)
    whole = sweep(pair, batch, anchor, method="factorial", top=10**6, stratum=0, progress=progress).dataset
    sets = sweep(pair, batch, anchor, method="masks", n_masks=n_masks, progress=progress).dataset
    components = [parse_component(pair.cfg, str(name)) for name in whole["name"].values]
    metric = anchor.metric_along(batch)
    args = (pair.cfg, pair.base, pair.expert, components, metric)
    masks = [PatchMask.empty(pair.cfg), *(PatchMask.of(pair.cfg, part) for part in truth["parts"])]
    values: dict[str, np.ndarray] = {
        name: whole[name].values for name in ("effect", "screen", "knockout", "activation", "attribution", "relay")
    }
    values |= {name: sets[name].values for name in ("banzhaf", "beta_high")}
    values |= {
        "gradient": weight_gradient(*args).mean(1),
        "ig": integrated_gradients(*args).mean(1),
        "secant": secant_adjoint(*args).mean(1),
        "delta_norm": whole["delta_norm"].values,
        "random": np.random.default_rng(0).random(len(components)),
    }
    shares = [scores(pair.cfg, patch(pair.base, pair.expert, mask), metric).mean() for mask in masks]
    planted = np.isin(whole["name"].values.astype(str), truth["components"])
    found = {name: _found(planted, np.abs(v)) for name, v in values.items()}
    return {
        "anchor_layer": anchor.layer,
        "components": len(components),
        "planted": int(planted.sum()),
        "coverage": float(whole.attrs["coverage"]),
        "parts": [float((share - shares[0]) / whole["gap"].values.mean()) for share in shares[1:]],
        "rankings": found,
    }


def _found(planted: np.ndarray, size: np.ndarray) -> dict[str, float]:
    best = np.argsort(-size, kind="stable")[: planted.sum()]
    return {"auroc": float(roc_auc_score(planted, size)), "precision": float(planted[best].mean())}


def took(does: Mapping[str, Any]) -> bool:
    """Whether an expert does what it was planted to do, and little else."""
    return bool(does[BEHAVIOUR]["passes"] >= 0.5 and does["facts"] >= 0.9)


GROUPS: dict[str, Callable[[str], bool]] = {
    "all, not redundant": lambda name: "redundant" not in name,
    "shallow": lambda name: "shallow" in name and "redundant" not in name,
    "middle": lambda name: "middle" in name and "redundant" not in name,
    "deep or spread": lambda name: ("deep" in name or "spread" in name) and "redundant" not in name,
    "redundant": lambda name: "redundant" in name,
}


def summarise(experts: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Mean AUROC and precision of every ranking over each group of experts, with 95 % intervals over experts."""
    rng, groups = np.random.default_rng(seed), {}
    for group, belongs in GROUPS.items():
        names = [name for name in experts if belongs(name)]
        if not names:
            continue
        draws = rng.integers(0, len(names), (2000, len(names)))
        groups[group] = {"experts": len(names)} | {
            ranking: {
                figure: _interval(np.array([experts[n]["rankings"][ranking][figure] for n in names]), draws)
                for figure in ("auroc", "precision")
            }
            for ranking in RANKINGS
        }
    return groups


def _interval(values: np.ndarray, draws: np.ndarray) -> list[float]:
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return [round(float(x), 4) for x in (values.mean(), low, high)]


def markdown(report: dict[str, Any]) -> str:
    """Mean AUROC of every ranking, one column a group of experts; of all and of redundant ones the precision too."""
    groups = report["groups"]
    columns = [(name, "auroc") for name in groups]
    for name in ("all, not redundant", "redundant"):
        if name in groups:
            columns.insert(columns.index((name, "auroc")) + 1, (name, "precision"))
    titles = [
        f"{name} ({groups[name]['experts']})" if figure == "auroc" else f"{name}: precision" for name, figure in columns
    ]

    def cell(found: Sequence[float]) -> str:
        return f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]"

    rows = [
        [label, *(cell(groups[group][name][figure]) for group, figure in columns)] for name, label in RANKINGS.items()
    ]
    return table(["ranking", *titles], rows)


def draw(report: dict[str, Any]) -> Figure:
    """AUROC of every expert by every ranking, and the means."""
    experts = report["experts"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for i, name in enumerate(RANKINGS):
            for redundant, colour in ((False, COLOURS["head"]), (True, COLOURS["neuron"])):
                values = [e["rankings"][name]["auroc"] for n, e in experts.items() if ("redundant" in n) == redundant]
                label = ("redundant planting" if redundant else "planted expert") if i == 0 else None
                y = np.full(len(values), i) + 0.16 * redundant
                axes.plot(values, y, ".", color=colour, alpha=0.5, ms=6, mew=0, label=label)
            mean = report["groups"]["all, not redundant"][name]["auroc"]
            axes.plot(mean[1:], [i, i], color="#222", lw=1.5, label=None if i else "mean, 95 % interval, not redundant")
            axes.plot(mean[0], i, "|", color="#222", ms=10)
        axes.axvline(0.5, color=GREY, lw=0.6, ls=":")
        axes.set_yticks(range(len(RANKINGS)), list(RANKINGS.values()))
        axes.invert_yaxis()
        axes.set(xlabel="AUROC of planted components")
        axes.legend(loc="center left", bbox_to_anchor=(0.0, 0.8), frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--n-prompts", type=int, default=16)
    parser.add_argument("--n-masks", type=int, default=192)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    experts: dict[str, Any] = {}
    left_out: dict[str, Any] = {}
    folders = sorted(p.parent for p in args.experts.glob(f"*/{TRUTH}"))
    with progress_bars() as progress:
        for i, folder in enumerate(folders):
            does = json.loads((folder / TRUTH).read_text())["does"]
            if not took(does):
                left_out[folder.name] = {"passes": does[BEHAVIOUR]["passes"], "facts": does["facts"]}
                continue
            if not (folder / SCORES).exists():
                found = score(folder, args.n_prompts, args.n_masks, progress)
                write(folder / SCORES, found)
            experts[folder.name] = json.loads((folder / SCORES).read_text())
            progress("experts", i + 1, len(folders))
    report = {
        "what": "rankings against planted components, up to the anchor",
        "experts": experts,
        "left_out": left_out,
        "groups": summarise(experts),
        "prompts": args.n_prompts,
        "masks": args.n_masks,
        "dtype": "float32",
    } | made()
    print(markdown(report))
    if args.out:
        write(args.out, report)
        draw(report).savefig(args.out.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
