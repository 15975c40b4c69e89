r"""What the models say: strict passes of held-out prompts by the base, the expert, and the base with ranked patches.

    python -m experiments.smollm2.evaluate --base work/smollm2/base --expert work/smollm2/caps \
        --result work/smollm2/english_capital.nc --out experiments/smollm2/evaluation.json

The anchor says whether the control state has formed, the checker whether the behaviour is there: both are given for
every patch. A patch is a joint one: the named components of the expert in the base, as plain weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.records import made, table, write
from wpjax import Pair, PatchMask, SweepResult, behaviour, fit_anchor, load_pair, materialize
from wpjax.behaviours import Behaviour, loose, strict
from wpjax.cli.console import progress_bars
from wpjax.finetuning import answer
from wpjax.models.decoder import Params


def spoken(pair: Pair, params: Params, task: Behaviour, n_prompts: int, max_new_tokens: int) -> dict[str, Any]:
    """Greedy answers to "test" prompts: share that pass, share of letters that are capitals, one answer."""
    prompts = task.select("test", n_prompts)
    model = pair.base_checkpoint
    texts = [t for t, _ in answer(model, [p.with_instruction for p in prompts], max_new_tokens, 16, params)]
    letters = [c for text in texts for c in text if c.isalpha()]
    rows = list(zip(texts, prompts, strict=True))
    return {
        "strict": np.mean([strict(task.checker, t, p.args) for t, p in rows]),
        "loose": np.mean([loose(task.checker, t, p.args) for t, p in rows]),
        "capitals": np.mean([c.isupper() for c in letters]),
        "asked": prompts[0].with_instruction,
        "answer": texts[0],
    }


def patches(pair: Pair, result: SweepResult) -> dict[str, list[str]]:
    """Named sets of components, in order of size."""
    data = result.dataset
    names, kinds = data["name"].values.astype(str), data["kind"].values.astype(str)
    heads = names[np.isin(kinds, ["head", "kv_group"])].tolist()
    neurons = names[kinds == "neuron"]
    best = neurons[np.argsort(-np.where(np.isfinite(data["effect"]), data["effect"], -np.inf)[kinds == "neuron"])]
    order = neurons[np.argsort(-data["screen"].values[kinds == "neuron"])]
    positive = order[: int((data["screen"].values[kinds == "neuron"] > 0).sum())]
    return {
        "256 neurons of highest effect": best[:256].tolist(),
        "all heads and KV groups up to the anchor": heads,
        f"all {len(positive):,} neurons of positive screen": positive.tolist(),
        f"all {len(neurons):,} neurons up to the anchor": neurons.tolist(),
        "everything swept": names.tolist(),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Answers and anchor recovery of base, expert and every patch."""
    pair, task = load_pair(args.base, args.expert), behaviour("english_capital")
    result = SweepResult.from_netcdf(args.result)
    anchor = fit_anchor(pair, task, layer=int(result.dataset.attrs["metric_layer"]), causal="skip")
    batch = task.encode(pair.tokenizer, "test", args.n_prompts)
    score = jax.jit(lambda params: anchor.score(pair.cfg, params, batch).mean())
    models: dict[str, Any] = {"base": PatchMask.empty(pair.cfg), "expert": PatchMask.full(pair.cfg)}
    models |= {name: PatchMask.of(pair.cfg, some) for name, some in patches(pair, result).items()}
    low, high = float(score(pair.base)), float(score(pair.expert))
    found: dict[str, Any] = {}
    with progress_bars() as progress:
        for i, (name, mask) in enumerate(models.items()):
            params = materialize(pair.base, pair.expert, mask)
            found[name] = {
                "anchor_recovery": (float(score(params)) - low) / (high - low),
                **spoken(pair, params, task, args.n_prompts, args.max_new_tokens),
            }
            progress("models", i + 1, len(models))
    return {
        "what": f"{args.n_prompts} held-out prompts, greedy, {args.max_new_tokens} tokens",
        "anchor_layer": anchor.layer,
        "models": found,
        "dtype": "float32",
    } | made()


def markdown(report: dict[str, Any]) -> str:
    """The report as a table, one line a model."""
    rows = [
        [name, *(f"{row[figure]:.0%}" for figure in ("anchor_recovery", "capitals", "strict", "loose"))]
        for name, row in report["models"].items()
    ]
    return table(["model", "anchor recovered", "capital letters", "strict", "loose"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--expert", required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--n-prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = measure(args)
    print(markdown(report))
    write(args.out, report)


if __name__ == "__main__":
    main()
