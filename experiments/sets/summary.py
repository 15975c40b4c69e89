"""The comparisons of all pairs, side by side: `python -m experiments.sets.summary` prints the table."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.records import table
from experiments.sets.compare import digits, figures

PAIRS = {
    "lora_english_capital": "LoRA, capitals",
    "lora_quotation": "LoRA, quotes",
    "english_capital": "full fine-tune, capitals",
}
"""Name of a result -> what the table calls the pair."""

COLUMNS = (("set score", 0.01), ("set score", 0.02), ("set score", 0.05), ("set score, not for each parameter", 0.02),
           ("norm of the change", 0.02), ("random 1", 0.02))  # fmt: skip
"""Rankings and shares of the parameters."""


def markdown(folder: Path) -> str:
    """Parts of the expert's pass rate that small sets bring into the base, with 95 % intervals over queries."""
    rows = []
    for name, called in PAIRS.items():
        report = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        cells = []
        for ranking, share in COLUMNS:
            mean, low, high = figures(report, report["rankings"][ranking])[f"at {share:g}"]
            cells.append(f"{mean:.2f} [{low:.2f}, {high:.2f}]")
        rows.append([called, f"{digits(report['expert']).mean():.2f}", *cells])
    columns = ["SmolLM2 135M", "expert passes", *(f"{ranking}, {share:.0%}" for ranking, share in COLUMNS)]
    return table(columns, rows)


if __name__ == "__main__":
    print(markdown(Path(__file__).parent))
