"""The comparisons of all pairs, side by side: `python -m experiments.sets.summary` prints the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from jaxtyping import Float

from experiments.records import table
from experiments.sets.compare import digits, figures

PAIRS = {
    "lora_english_capital": "LoRA, capitals",
    "lora_quotation": "LoRA, quotes",
    "lora_number_highlighted_sections": "LoRA, highlights",
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


def runs(folder: Path) -> str:
    """The set score on several training runs of one LoRA each, and all runs of one behaviour together.

    The intervals of single runs are over queries, those of all runs over runs and queries.
    """
    rows = []
    for name, called in PAIRS.items():
        reports = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob(f"{name}*.json"))]
        if len(reports) < 2:
            continue
        columns = []
        for share in RUN_SHARES:
            at = [report["shares"].index(share) for report in reports]
            passes = [digits(r["rankings"]["set score"]["passes"][i]) for r, i in zip(reports, at, strict=True)]
            columns.append(pooled(np.array(passes), np.array([digits(r["expert"]) for r in reports])))
        experts = [digits(report["expert"]).mean() for report in reports]
        rows.append([f"{called}, all runs", f"{np.mean(experts):.2f}", *columns])
        for i, report in enumerate(reports):
            found = figures(report, report["rankings"]["set score"])
            cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*found[f"at {share:g}"]) for share in RUN_SHARES]
            rows.append([f"run {i}", f"{experts[i]:.2f}", *cells])
    return table(["set score", "expert passes", *(f"{share:.1%}" for share in RUN_SHARES)], rows)


RUN_SHARES = (0.005, 0.01, 0.02, 0.05)


def pooled(passes: Float[np.ndarray, "R P"], expert: Float[np.ndarray, "R P"], n_draws: int = 4000) -> str:
    """What passes of what the experts pass, R runs together, with a 95 % interval over runs and queries."""
    rng, (n_runs, n_queries) = np.random.default_rng(0), passes.shape
    runs_, queries = (rng.multinomial(n, np.full(n, 1 / n), n_draws) for n in (n_runs, n_queries))
    theirs = np.einsum("nr,rp,np->n", runs_, expert, queries)
    drawn = np.einsum("nr,rp,np->n", runs_, passes, queries)[theirs > 0] / theirs[theirs > 0]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return f"{passes.sum() / expert.sum():.2f} [{low:.2f}, {high:.2f}]"


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
    print(runs(Path(__file__).parent))
    print(areas(Path(__file__).parent))
