"""Cheap scores against answers: can the decision log-odds of a steered model choose its layer and its strength?

    python -m experiments.smollm2.steering --base work/smollm2/base --expert work/smollm2/lora_english_capital \
        --behaviour english_capital --out experiments/smollm2/steering.json

The base is held at several strengths along the direction of several layers, as the causal tests of anchors do
(`wpjax/evaluation/steering.py`). For each it is noted how much of the decision log-odds comes in, for which nothing is
generated, and how many of its answers pass the checker. A figure is drawn beside the JSON file.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from experiments.records import made, table, write
from wpjax.behaviours import PromptBatch, behaviour
from wpjax.evaluation.continued import Continued, steer
from wpjax.evaluation.fit_anchor import mean_states
from wpjax.evaluation.judge import Judge
from wpjax.evaluation.steering import Directions
from wpjax.metrics.answers import ExpertAnswers, decision_metric
from wpjax.metrics.reading import read_at
from wpjax.models.generate import Generation
from wpjax.pairs import Pair, load_pair

STRENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0)
LAYERS = (7, 12, 16, 19, 21, 22, 24, 26)


def directions_of(pair: Pair, batch: PromptBatch) -> Directions:
    """The direction of every layer, and where base and expert stand on it, from the last prompt tokens."""
    instructed, plain = (read_at(tokens, None) for tokens in (batch.with_instruction, batch.without))
    expert, base = (mean_states(pair.cfg, params, instructed) for params in (pair.expert, pair.base))
    direction = (expert - mean_states(pair.cfg, pair.expert, plain)).mean(1)
    unit = direction / np.linalg.norm(direction, axis=-1, keepdims=True)
    return Directions(unit, *(np.einsum("lbd,ld->l", states, unit) / len(batch) for states in (base, expert)))


def measure(pair: Pair, name: str, n_prompts: int, max_new_tokens: int) -> dict[str, Any]:
    """Log-odds and answers of the base at every layer and strength."""
    task = behaviour(name)
    directions = directions_of(pair, task.encode(pair.tokenizer, "fit", 64))
    few = task.encode(pair.tokenizer, "sweep", n_prompts)
    judge, prompts = Judge(pair, task, few, max_new_tokens), few.with_instruction
    ways = list(itertools.product(LAYERS, STRENGTHS))
    still_first = steer([directions.still, *(directions.way(layer, strength) for layer, strength in ways)])

    experts = judge.answers(pair.expert)
    metric = decision_metric(pair, few, max_new_tokens, ExpertAnswers(pair, prompts, max_new_tokens, experts))
    step = np.maximum(np.asarray(metric.at) - np.asarray(prompts.last)[:, None], 0)
    words = np.asarray(experts.tokens)[:, : int(step.max()) + 1]
    base = Continued(pair.cfg, pair.base, prompts, max_new_tokens)
    log_odds = base.scores(still_first, words, step, metric).mean(1)
    still = steer([directions.still])
    expert = Continued(pair.cfg, pair.expert, prompts, max_new_tokens).scores(still, words, step, metric).mean()

    answers = base.answers(still_first, pair.stop_tokens)
    nll = base.nll(answers).mean(1)
    passes = [float(judge.passes(Generation(*one)).mean()) for one in zip(answers.tokens, answers.lengths, strict=True)]
    return {
        "what": "the base held along the direction of a layer: share of the decision log-odds of the expert, share of "
        "greedy answers that pass the checker, nats a token of these answers under the base",
        "behaviour": name,
        "n_prompts": n_prompts,
        "max_new_tokens": max_new_tokens,
        "dtype": "float32",
        "expert_passes": float(judge.passes(experts).mean()),
        "base_passes": passes[0],
        "expert_nll": float(base.nll(Generation(experts.tokens[None], experts.lengths[None])).mean()),
        "rows": [
            {
                "layer": layer,
                "strength": strength,
                "log_odds": float((log_odds[i] - log_odds[0]) / (expert - log_odds[0])),
                "passes": passes[i],
                "nll": float(nll[i]),
            }
            for i, (layer, strength) in enumerate(ways, 1)
        ],
        **made(),
    }


def cells(report: dict[str, Any], field: str) -> np.ndarray:
    """One figure of all rows, [layers, strengths]."""
    return np.array([row[field] for row in report["rows"]]).reshape(-1, len(_strengths(report)))


def _layers(report: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(row["layer"] for row in report["rows"]))


def _strengths(report: dict[str, Any]) -> list[float]:
    return list(dict.fromkeys(row["strength"] for row in report["rows"]))


def markdown(report: dict[str, Any]) -> str:
    """One line a layer: share of the log-odds, and answers that pass, at every strength."""
    rows = [
        [str(layer), *(f"{share:.2f}, {passes:.0%}" for share, passes in zip(shares, rates, strict=True))]
        for layer, shares, rates in zip(
            _layers(report), cells(report, "log_odds"), cells(report, "passes"), strict=True
        )
    ]
    return table(["layer", *(f"strength {s:g}" for s in _strengths(report))], rows)


def agreement(report: dict[str, Any]) -> str:
    """In words: does the cheap score rank layers, and does it rank strengths, as the answers do?"""
    log_odds, passes = cells(report, "log_odds"), cells(report, "passes")
    first = spearmanr(log_odds[:, 0], passes.max(1)).statistic
    best = [_strengths(report)[i] for i in passes.argmax(1)]
    highest = [_strengths(report)[i] for i in log_odds.argmax(1)]
    return (
        f"Over layers, the log-odds at strength {_strengths(report)[0]:g} and the pass rate at the best strength have "
        f"a rank correlation of {first:.2f}. The log-odds are highest at strengths "
        f"{', '.join(f'{s:g}' for s in highest)} of the {len(best)} layers, the pass rate at "
        f"{', '.join(f'{s:g}' for s in best)}."
    )


def draw(report: dict[str, Any], out: Path) -> None:
    """Both figures by strength, one line a layer."""
    fig = Figure(figsize=(11, 3.2), layout="constrained")
    axes = fig.subplots(1, 3)
    names = ("share of the decision log-odds", "answers that pass", "nats a token under the base")
    for axis, field, name in zip(axes, ("log_odds", "passes", "nll"), names, strict=True):
        for i, (layer, values) in enumerate(zip(_layers(report), cells(report, field), strict=True)):
            shade = mpl.colormaps["viridis"](i / len(_layers(report)))
            axis.plot(_strengths(report), values, marker="o", markersize=3, color=shade, label=f"layer {layer}")
        axis.set(xlabel="strength", title=name)
    axes[0].legend(fontsize=7)
    fig.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--expert", required=True)
    parser.add_argument("--behaviour", default="english_capital")
    parser.add_argument("--n-prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    report = measure(load_pair(args.base, args.expert), args.behaviour, args.n_prompts, args.max_new_tokens)
    write(args.out, report)
    draw(report, args.out.with_suffix(".png"))
    print(markdown(report), agreement(report), sep="\n\n")


if __name__ == "__main__":
    main()
