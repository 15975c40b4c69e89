"""The comparisons of all pairs, side by side: `python -m experiments.sets.summary` prints the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

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


TASKS = ("english_capital", "title", "quotation", "no_comma", "multiple_sections", "number_highlighted_sections")
"""Behaviours of the embedded expert."""


def areas(folder: Path) -> str:
    """The area of every ranking on each behaviour of the embedded expert, and the mean over them."""
    reports = [json.loads((folder / f"tiny_{task}.json").read_text(encoding="utf-8")) for task in TASKS]
    rows = []
    for ranking in reports[0]["rankings"]:
        found = [figures(report, report["rankings"][ranking])["area"] for report in reports]
        cells = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in found]
        rows.append((float(np.mean([mean for mean, _, _ in found])), [ranking, *cells]))
    rows.sort(key=lambda row: -row[0])
    return table(["ranking", *TASKS, "mean"], [[*cells, f"{mean:.3f}"] for mean, cells in rows])


if __name__ == "__main__":
    print(markdown(Path(__file__).parent))
    print(areas(Path(__file__).parent))
