"""Keep the causal tests of a fitted anchor.

    wpjax anchor --base work/smollm2/base --expert work/smollm2/caps --behaviour english_capital \
        --n-steered 32 --max-new-tokens 24 --out work/smollm2/caps.anchor.safetensors
    python -m experiments.smollm2.anchor work/smollm2/caps.anchor.safetensors --out experiments/smollm2/anchor.json
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from pathlib import Path
from typing import Any

import jax

from experiments.records import table, write
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.diagnostics import SteeringTest


def keep(path: Path) -> dict[str, Any]:
    """The chosen layer, and the tests of every layer that was tried."""
    anchor = Anchor.load(path)
    return {
        "what": "prompts whose greedy answer passes the checker, with the residual stream held along the anchor",
        "behaviour": anchor.behaviour,
        "layer": anchor.layer,
        "acceptance": anchor.acceptance,
        "tests": [dataclasses.asdict(d.steering) for d in anchor.diagnostics if d.steering],
        "device": jax.devices()[0].platform,
        "dtype": "float32",
        "date": datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).date().isoformat(),
    }


def markdown(report: dict[str, Any]) -> str:
    """One line a layer that was tried."""
    tests = [SteeringTest(**test) for test in report["tests"]]
    rows = [
        [
            f"{t.layer}{' (chosen)' if t.layer == report['layer'] else ''}",
            f"{t.steered:.0%}",
            f"{t.steered_random:.0%}",
            f"{t.strength:g}",
            f"{t.removed:.0%}",
            f"{t.removed_random:.0%}",
            f"{t.nll:.2f}",
            "rejected" if t.verdict() else "accepted",
        ]
        for t in tests
    ]
    columns = ["layer", "base, steered", "at random", "strength", "expert, without", "at random", "nats a token", ""]
    return table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("anchor", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    report = keep(args.anchor)
    print(markdown(report))
    write(args.out, report)


if __name__ == "__main__":
    main()
