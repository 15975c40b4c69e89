"""What more random sets buy, on one expert of the benchmark: AUROC of beta by the number of sets.

    python -m experiments.planted.masks work/planted/neurons-middle-redundant-8+8 --out experiments/planted/masks.json

The same anchor, prompts and components as in `experiments.planted.score`; fewer sets are the first of the more.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from experiments.planted.make import BEHAVIOUR, TRUTH
from experiments.records import made, table, write
from wpjax.behaviours import behaviour
from wpjax.cli.console import progress_bars
from wpjax.components import enumerate_components
from wpjax.estimators.masks import PROBABILITIES, random_masks
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.pairs import load_pair

SIZES = (192, 768, 3072)


def markdown(report: dict[str, Any]) -> str:
    """One line a share of the others, one column a number of sets."""
    rows = [[f"{p:.0%} of the others", *(f"{found[str(n)]:.3f}" for n in SIZES)]
            for p, found in ((PROBABILITIES[name], found) for name, found in report["auroc"].items())]  # fmt: skip
    return table([f"AUROC, {report['expert']}", *(f"{n:,} sets" for n in SIZES)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expert", type=Path, help="folder of a planted expert")
    parser.add_argument("--n-prompts", type=int, default=16)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not (args.expert / TRUTH).exists():
        parser.error(f"{args.expert} holds no {TRUTH}; make planted experts with `python -m experiments.planted.make`")
    truth = json.loads((args.expert / TRUTH).read_text())
    pair, task = load_pair("tiny:base", args.expert), behaviour(f"tiny:{BEHAVIOUR}")
    anchor = fit_anchor(pair, task, n_prompts=32, causal="skip")
    metric = anchor.metric_along(task.encode(pair.tokenizer, "sweep", args.n_prompts))
    components = enumerate_components(pair.cfg, ["head", "kv_group", "neuron"], range(metric.layer + 1))
    planted = np.isin([c.name for c in components], truth["components"])
    report: dict[str, Any] = {"expert": args.expert.name, "planted": int(planted.sum()), "components": len(components)}
    report["auroc"] = {name: {} for name in ("banzhaf", "beta_high")}
    done: dict[str, np.ndarray] = {}
    with progress_bars() as progress:
        for name, found in report["auroc"].items():
            for n in SIZES:
                made_of = random_masks(
                    pair.cfg, pair.base, pair.expert, components, metric, PROBABILITIES[name],
                    n_masks=n, done=done, progress=progress,
                )  # fmt: skip
                found[str(n)] = float(roc_auc_score(planted, np.abs(made_of.beta.mean(1))))
    report |= {"prompts": args.n_prompts, "dtype": "float32", **made()}
    print(markdown(report))
    write(args.out, report)


if __name__ == "__main__":
    main()
