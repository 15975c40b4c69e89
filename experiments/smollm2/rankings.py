"""Which ranking's top neurons carry the behaviour? Joint patches of the best k by each, judged by the checker.

    python -m experiments.smollm2.rankings --base work/smollm2/base --expert work/smollm2/caps \
        --anchor work/smollm2/caps.anchor.safetensors --out experiments/smollm2/rankings.json

Neurons of all layers are ranked on "sweep" prompts; their joint patches answer "test" prompts. Rankings of the anchor
metric end at the anchor's layer. Random sets have the same number of neurons.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.records import made, table, write
from wpjax.anchors import Anchor
from wpjax.behaviours import behaviour
from wpjax.cli.console import progress_bars
from wpjax.components import Component, enumerate_components
from wpjax.metrics import Metric, decision_metric, response_metric, scores
from wpjax.models.decoder import Params
from wpjax.pairs import Pair, load_pair
from wpjax.patching import PatchMask, materialize
from wpjax.steering import Judge
from wpjax.sweeps.screens import integrated_gradients, output_linearised


def rank(
    pair: Pair, metrics: dict[str, Metric], neurons: list[Component], steps: int
) -> dict[str, Float[np.ndarray, " C"]]:
    """Figures of every neuron by each ranking; those a metric cannot feel have 0."""

    def figures(run: Callable[..., np.ndarray], metric: Metric, **options: Any) -> Float[np.ndarray, " C"]:
        felt = [c for c in neurons if metric.reaches(c)]
        values = run(pair.cfg, pair.base, pair.expert, felt, metric, **options).mean(1)
        return np.concatenate([values, np.zeros(len(neurons) - len(felt))])

    found = {
        "anchor, output-linearised": figures(output_linearised, metrics["anchor"]),
        "response, output-linearised": figures(output_linearised, metrics["response"]),
        "decision, output-linearised": figures(output_linearised, metrics["decision"]),
        "decision, integrated gradients": figures(integrated_gradients, metrics["decision"], steps=steps),
    }
    first, last = "anchor, output-linearised", "decision, integrated gradients"
    found["anchor + decision IG"] = found[first] / found[first].sum() + found[last] / found[last].sum()
    found["norm of the change"] = pair.delta_norms(neurons)
    found["random"] = np.random.default_rng(0).standard_normal(len(neurons))
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Pass rates and recoveries of the best k neurons by each ranking."""
    pair, task = load_pair(args.base, args.expert), behaviour(args.behaviour)
    anchor = Anchor.load(args.anchor)
    anchor.check_belongs(pair)
    batch, held_out = (task.encode(pair.tokenizer, split, args.n_prompts) for split in ("sweep", "test"))
    neurons = enumerate_components(pair.cfg, ["neuron"])
    metrics = {
        "anchor": anchor.on(batch),
        "response": response_metric(pair, batch, args.max_new_tokens),
        "decision": decision_metric(pair, batch, args.max_new_tokens),
    }
    rankings = rank(pair, metrics, neurons, args.steps)
    judge = Judge(pair, task, held_out, args.max_new_tokens)
    ends = {
        name: [float(scores(pair.cfg, p, m).mean()) for p in (pair.base, pair.expert)] for name, m in metrics.items()
    }

    def spoken(params: Params) -> dict[str, float]:
        answers = judge.answers(params)
        letters = [c for text in judge.texts(answers) for c in text if c.isalpha()]
        recovered = {
            name: (float(scores(pair.cfg, params, m).mean()) - ends[name][0]) / (ends[name][1] - ends[name][0])
            for name, m in metrics.items()
        }
        capitals = float(np.mean([c.isupper() for c in letters]))
        return {"strict": float(judge.passes(answers).mean()), "capitals": capitals, **recovered}

    rows: dict[str, Any] = {"base": spoken(pair.base), "expert": spoken(pair.expert)}
    with progress_bars() as progress:
        for i, (name, values) in enumerate(rankings.items()):
            order = [neurons[j] for j in np.argsort(-values, kind="stable")]
            for k in args.sizes:
                mask = PatchMask.of(pair.cfg, order[:k])
                rows[f"{name}: {k}"] = spoken(materialize(pair.base, pair.expert, mask))
            progress("rankings", i + 1, len(rankings))
    return {
        "what": f"joint patches of neurons, {len(held_out)} held-out prompts, greedy, {args.max_new_tokens} tokens",
        "neurons": len(neurons),
        "sizes": args.sizes,
        "rankings": list(rankings),
        "steps": args.steps,
        "prompts": len(batch),
        "anchor_layer": anchor.layer,
        "rows": rows,
        "dtype": "float32",
    } | made()


def markdown(report: dict[str, Any]) -> str:
    """Strict pass rate and, in brackets, share of capital letters; one line a ranking, one column a size."""
    rows = report["rows"]

    def cell(name: str) -> str:
        return f"{rows[name]['strict']:.0%} ({rows[name]['capitals']:.0%})"

    lines = [[name, *(cell(f"{name}: {k}") for k in report["sizes"])] for name in report["rankings"]]
    return table(["neurons ranked by", *(f"{k:,}" for k in report["sizes"])], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--expert", required=True)
    parser.add_argument("--behaviour", default="english_capital")
    parser.add_argument("--anchor", type=Path, required=True)
    parser.add_argument("--n-prompts", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = measure(args)
    print(markdown(report))
    write(args.out, report)


if __name__ == "__main__":
    main()
