"""What single components do to the anchor along a model's own answer, beside what they do at the last prompt token.

    python -m experiments.paper.on_policy experiments/paper/tiny.json --work work/paper/tiny \
        --out experiments/paper/tiny.on_policy.json

Heads, KV groups and neurons of all layers are screened, and the highest replaced for real: read along the base's own
answer where every word of it stays, along the patched model's own answer elsewhere. Run `experiments.paper.replicate`
first: its anchors are taken, and its sweeps at the last prompt token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from experiments.paper.replicate import FINE
from experiments.paper.tasks import measured, over_tasks, pair_of, place_of
from experiments.records import made, table
from wpjax.behaviours import Behaviour
from wpjax.circuits.hierarchy import hierarchy
from wpjax.cli.console import progress_bars
from wpjax.engines.on_policy import OnPolicy
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.judge import Judge, check_behaviour_differs
from wpjax.metrics.anchor import Anchor
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.shards import Shards

N_HIGHEST = 32
"""Components that are compared with those at the last prompt token."""


def run_task(config: dict[str, Any], task: Behaviour, folder: Path, size: dict[str, int]) -> dict[str, Any]:
    """One sweep, and how it compares."""
    pair, new_tokens = pair_of(config, task), int(config["max_new_tokens"])
    batch = task.encode(pair.tokenizer, "sweep", int(config["n_prompts"]))
    judge = Judge(pair, task, batch, new_tokens)
    check_behaviour_differs(judge, judge.answers(pair.base), judge.answers(pair.expert))
    anchor = Anchor.load(folder / "anchor.safetensors")
    settings = {name: config[name] for name in ("n_prompts", "max_new_tokens", "dtype")} | {"size": size, "kinds": FINE}
    settings |= {"pair": pair.fingerprints, "anchor": anchor.metric(pair, batch).digest}
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
    place = folder / f"on_policy-{digest}.nc"
    if not place.exists():
        with Shards(place, "parts", settings, resume=True) as done, progress_bars() as progress:
            swept = sweep(
                pair, batch, OnPolicy(anchor, new_tokens), kinds=FINE, method="screen+exact",
                top=size["top"], stratum=size["stratum"], done=done, progress=progress,
            )  # fmt: skip
            swept.to_netcdf(place)
            done.discard()
    data = SweepResult.from_netcdf(place).dataset
    told = SweepResult.from_netcdf(folder / "sweep.nc").dataset
    replaced, late = data["exact"].values, data["layer"].values > anchor.layer
    effect, changed = data["effect"].values[replaced], data["words_changed"].values[replaced]
    there = dict(zip(told["name"].values.tolist(), told["effect"].values.tolist(), strict=True))
    names = data["name"].values[replaced].tolist()
    both = np.array([[e, there[n]] for n, e in zip(names, effect, strict=True) if np.isfinite(there.get(n, np.nan))])
    highest = {names[i] for i in np.argsort(-effect)[:N_HIGHEST]}
    others = sorted((n for n, e in there.items() if np.isfinite(e)), key=lambda n: -there[n])[:N_HIGHEST]
    flow = data["flow"].values[replaced]
    return {
        **made(),
        "size": size,
        "acceptance": anchor.acceptance,
        "anchor_layer": anchor.layer,
        "gap": [float(data.attrs[f"gap_{end}"]) for end in ("mean", "low", "high")],
        "coverage": float(data.attrs["coverage"]),
        "replaced": int(replaced.sum()),
        "late": int((replaced & late).sum()),
        "words_changed": float(changed.mean()),
        "never_changed": float((changed == 0).mean()),
        "by_words": float(np.abs(flow[:, -1]).sum() / np.abs(effect).sum()),
        "largest_late": float(np.abs(effect[late[replaced]]).max(initial=0.0)),
        "significant_late": int((data["q_value"].values[replaced & late] < 0.05).sum()),
        "screen_spearman": float(spearmanr(*(data[n].values[replaced & ~late] for n in ("screen", "effect")))[0]),
        "last_token_spearman": float(spearmanr(both[:, 0], both[:, 1])[0]),
        "shared_highest": len(highest & set(others)) / N_HIGHEST,
        "aggregators": [node.name for node in hierarchy(SweepResult(data)).aggregators],
    }


def markdown(report: dict[str, Any]) -> str:
    """One line a task."""
    rows = [
        [
            name.removeprefix("tiny:"),
            f"{task['gap'][0]:.3g} [{task['gap'][1]:.3g}, {task['gap'][2]:.3g}]",
            f"{task['coverage']:.0%}",
            f"{task['replaced']} ({task['late']})",
            f"{task['words_changed']:.0%}",
            f"{task['never_changed']:.0%}",
            f"{task['by_words']:.0%}",
            f"{task['screen_spearman']:.2f}",
            f"{task['last_token_spearman']:.2f}",
            f"{task['shared_highest']:.0%}",
        ]
        for name, task in measured(report).items()
    ]
    head = ["task", "gap", "recovered jointly", "replaced (after the anchor)", "answers changed",
            "patches that change none", "of the effects by words", "rank correlation with the screen",
            "with the last prompt token",
            f"of the {N_HIGHEST} highest shared"]  # fmt: skip
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="that of the replication")
    parser.add_argument("--top", type=int, default=48, help="of each kind, replaced by rank")
    parser.add_argument("--stratum", type=int, default=16, help="of each kind, replaced at random")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    size = {"top": args.top, "stratum": args.stratum}

    def run(config: dict[str, Any], task: Behaviour) -> dict[str, Any]:
        return run_task(config, task, place_of(args.work, task), size)

    report = over_tasks(args.config, args.out, run, lambda result: result["size"] == size)
    print(markdown(report))


if __name__ == "__main__":
    main()
