"""Where should an anchor be read: at the last prompt token, or over the first tokens of the expert's own answer?

    python -m experiments.paper.positions experiments/paper/tiny.json --out experiments/paper/tiny.positions.json

Each task's anchor is fitted for both, with its causal tests: answers of the base held along it and of the expert
without it, against random directions, by the checker.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from experiments.paper.tasks import measured, over_tasks, pair_of
from experiments.records import made, table
from wpjax.behaviours import Behaviour
from wpjax.cli.console import progress_bars
from wpjax.errors import AnchorRejected
from wpjax.evaluation.fit_anchor import fit_anchor

N_RESPONSE = (0, 4, 16)


def run_task(config: dict[str, Any], task: Behaviour) -> dict[str, Any]:
    """What the chosen layer's causal tests say for each place of reading."""
    pair, found = pair_of(config, task), dict[str, Any]()
    options: dict[str, Any] = {name: int(config[name]) for name in ("n_steered", "max_new_tokens")}
    for n in N_RESPONSE:
        try:
            with progress_bars() as progress:
                anchor = fit_anchor(pair, task, n_response=n, causal="report", progress=progress, **options)
        except AnchorRejected as error:
            found[str(n)] = {"acceptance": str(error)}
            continue
        chosen = anchor.diagnostics[anchor.layer]
        assert chosen.steering is not None
        found[str(n)] = {
            "layer": anchor.layer,
            "acceptance": anchor.acceptance,
            "stability": chosen.stability,
            "steered": chosen.steered - chosen.steered_random,
            "removed": chosen.removed_random - chosen.removed,
        }
    return {**made(), "n_layers": pair.cfg.n_layers, "readings": found}


def markdown(report: dict[str, Any]) -> str:
    """One line a task: for each place of reading the layer, what steering gains and removal loses."""

    def cell(found: dict[str, Any]) -> str:
        if "layer" not in found:
            return "no layer"
        mark = "" if found["acceptance"] == "accepted" else ", rejected"
        return f"{found['layer']}: {found['steered']:+.0%}, {-found['removed']:+.0%}{mark}"

    places = ["last prompt token", *(f"{n} response tokens" for n in N_RESPONSE[1:])]
    rows = [
        [name.removeprefix("tiny:"), *(cell(task["readings"][str(n)]) for n in N_RESPONSE)]
        for name, task in measured(report).items()
    ]
    return table(["task", *places], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = over_tasks(args.config, args.out, run_task)
    print(markdown(report))


if __name__ == "__main__":
    main()
