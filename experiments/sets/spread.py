"""How far is a change spread: what part of the metrics' gaps do the best few per cent of the parameters hold?

    python -m experiments.sets.spread --base work/smollm2/base --expert work/smollm2/lora_quotation \
        --behaviour quotation --name lora_quotation --out experiments/sets/spread.json

The set score of a component is its part of the gap, for its share of the parameters. So the best 2 % by it hold the
largest part that any 2 % hold, on the prompts that they were ranked on. Where that part is small, the fault is hardly
in the order: the change is spread over more parameters. Beside it stands what the same sets bring back when they are
patched, on prompts of other queries, and on how many of these prompts the expert's token is then the likelier one.

One call measures one pair and adds it to the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.records import made, table, write
from experiments.sets.compare import SET_METRICS, Rankings, digits
from wpjax.behaviours import behaviour
from wpjax.estimators.secant import secant_adjoint
from wpjax.estimators.sets import set_metrics
from wpjax.metrics.metric import scores
from wpjax.pairs import Pair, load_pair

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Parts of the parameters of all heads, KV groups and neurons."""

N_PROMPTS, MAX_NEW_TOKENS = 32, 32
"""As in the comparison of rankings."""


def measure(pair: Pair, name: str) -> dict[str, Any]:
    """The parts of both gaps that the best components hold, and bring back."""
    task = behaviour(name)
    swept, tested = (task.encode(pair.tokenizer, split, N_PROMPTS) for split in ("sweep", "test"))
    rankings = Rankings(pair, task, swept, MAX_NEW_TOKENS, SHARES)
    chosen = [rankings.best(rankings.set_score().mean(1) / rankings.share, share) for share in SHARES]
    report: dict[str, Any] = {"behaviour": name, "shares": list(SHARES)}
    for metric in set_metrics(pair, tested, MAX_NEW_TOKENS):
        held = rankings.shares(metric.name, secant_adjoint).mean(1)
        base, expert = (scores(pair.cfg, params, metric) for params in (pair.base, pair.expert))
        patched = np.stack([scores(pair.cfg, rankings.patched(one), metric) for one in chosen])
        report[metric.name] = {
            "held": [round(float(held[one].sum()), 4) for one in chosen],
            "recovered": ((patched - base).mean(1) / (expert - base).mean()).round(4).tolist(),
            "likelier": (patched > 0).mean(1).round(4).tolist(),
            "gap": round(float((expert - base).mean()), 3),
        }
    return report


def markdown(report: dict[str, Any], share: float = 0.02) -> str:
    """One row a pair, those that pass most first: parts of the gaps at one share, and what passes the checker."""
    rows = []
    for name, found in report["pairs"].items():
        compared = json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
        at, judged = found["shares"].index(share), compared["shares"].index(share)
        instructed, partings = (found[metric] for metric in SET_METRICS)
        cells = [instructed[key][at] for key in ("held", "recovered", "likelier")]
        cells += [partings[key][at] for key in ("held", "recovered")]
        passes = [digits(p).mean() for p in (compared["rankings"]["set score"]["passes"][judged], compared["expert"])]
        behaviour, _, run = name.removeprefix("lora_").partition(".seed")
        label = f"{behaviour}, {f'LoRA, run {run or 0}' if name.startswith('lora_') else 'full fine-tune'}"
        values = (*cells, *passes, passes[0] / passes[1])
        rows.append((passes[0], [label, *(f"{value:.2f}" for value in values)]))
    columns = [
        f"the best {share:.0%}", "instructed: held", "brought back", "expert's token likelier", "partings: held",
        "brought back", "set passes", "expert passes", "part",
    ]  # fmt: skip
    return table(columns, [cells for _, cells in sorted(rows, key=lambda row: -row[0])])


def curve(report: dict[str, Any], name: str) -> str:
    """One pair at every share."""
    found = report["pairs"][name]
    rows = [
        [f"{metric}, {key}", *(f"{value:.2f}" for value in found[metric][key])]
        for metric in SET_METRICS
        for key in ("held", "recovered", "likelier")
    ]
    return table([name, *(f"{share:.1%}" for share in found["shares"])], rows)


def main() -> None:
    """Measure one pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--base", "--expert", "--behaviour", "--name"):
        parser.add_argument(option, required=True)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    found = measure(load_pair(a.base, a.expert), a.behaviour)
    report: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {
        "what": "parts of the gaps of both metrics of the set score that its best components hold and bring back",
        "n_prompts": N_PROMPTS, "max_new_tokens": MAX_NEW_TOKENS, "dtype": "float32", "pairs": {},
    }  # fmt: skip
    report["pairs"][a.name] = found
    write(a.out, report | made())
    print(curve(report, a.name), flush=True)


if __name__ == "__main__":
    main()
