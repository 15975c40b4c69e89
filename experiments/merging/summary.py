"""The tables of several seeds of `experiments.merging.compare`; `python -m experiments.merging.summary` prints them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from experiments.merging.compare import SHARES, SOURCES
from experiments.records import table

DRAWS = 4000


class Rates(NamedTuple):
    """What passes, of the merged models of S seeds, on T behaviours with P prompts each.

    Attributes:
        passes: row -> [S, T, P], 1 where an answer passes.
        expert: [S, T, P], the same of each behaviour's own expert.
        behaviours: the T behaviours.
        reports: the S results.
    """

    passes: dict[str, Float[np.ndarray, "S T P"]]
    expert: Float[np.ndarray, "S T P"]
    behaviours: list[str]
    reports: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, pair: str) -> Rates:
        """The results of all seeds, say tiny.0.json to tiny.2.json."""
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{pair}.*.json"))]
        names = list(reports[0]["expert"])
        assert all(q == reports[0]["queries"][names[0]] for r in reports for q in r["queries"].values())

        def digits(of: dict[str, str]) -> list[list[float]]:
            return [[float(digit) for digit in of[name]] for name in names]

        rows = [row for row in reports[0]["rows"] if all(row in r["rows"] for r in reports)]
        passes = {row: np.array([digits(r["rows"][row]["passes"]) for r in reports]) for row in rows}
        passes["base"] = np.array([digits(r["base"]["passes"]) for r in reports])
        expert = np.array([digits({n: r["expert"][n]["test"] for n in names}) for r in reports])
        return cls(passes, expert, names, reports)

    def draws(self) -> tuple[Float[np.ndarray, "N S"], Float[np.ndarray, "N P"]]:
        """Weights of seeds and of queries: first all alike, then draws of both with replacement."""
        rng, (n_seeds, _, n_queries) = np.random.default_rng(0), self.expert.shape
        seeds, queries = (rng.multinomial(n, np.full(n, 1 / n), DRAWS).astype(float) for n in (n_seeds, n_queries))
        return np.vstack([np.ones((1, n_seeds)), seeds]), np.vstack([np.ones((1, n_queries)), queries])

    def share(self, row: str) -> Float[np.ndarray, " N"]:
        """The mean over behaviours of what passes, as a share of what each one's expert passes; in every draw."""
        weights = self.draws()
        ours, experts = (np.einsum("ns,stp,np->nt", weights[0], x, weights[1]) for x in (self.passes[row], self.expert))
        return (ours / np.maximum(experts, 1e-9)).mean(1)

    def figure(self, row: str, name: str) -> float:
        """The mean over seeds of another figure of a row: "divergence", "facts" (a rate) or "factor"."""
        found = [r["base"].get(name, 0.0) if row == "base" else r["rows"][row][name] for r in self.reports]
        return float(np.mean([f.count("1") / len(f) if isinstance(f, str) else f for f in found]))


def ends(values: Float[np.ndarray, " N"]) -> str:
    """The figure with its 95 % interval."""
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return f"{values[0]:.2f} [{low:.2f}, {high:.2f}]"


def best_gates(rates: Rates, source: str, sums: bool = False) -> str:
    """The row of `score_gated` whose share of open parameters does best on validation, over all seeds."""
    rows = [f"score_gated, {'sums, ' if sums else ''}{source}, {share:.0%}" for share in SHARES]
    rows = [row for row in rows if row in rates.passes]

    def validated(row: str) -> float:  # a run that took the factors of another has validated nothing
        tried = [r["rows"][row]["validation"] for r in rates.reports]
        return float(np.mean([max(of_run.values()) for of_run in tried if of_run]))

    return max(rows, key=validated)


def markdown(folder: Path, pair: str) -> str:
    """Every method, the best first: shares of the experts' pass rates, and what else the merged model does."""
    rates = Rates.read(folder, pair)
    plain = [row for row in rates.passes if not row.startswith("score_gated")]
    gated = [best_gates(rates, source) for source in SOURCES if any(source in row for row in rates.passes)]
    has_facts = "facts" in rates.reports[0]["base"]
    rows = []
    for row in [*plain, *gated, best_gates(rates, SOURCES[0], sums=True)]:
        share = rates.share(row)
        each = rates.passes[row].sum((0, 2)) / np.maximum(rates.expert.sum((0, 2)), 1e-9)
        cells = [
            row, ends(share), *(f"{x:.2f}" for x in each), f"{rates.figure(row, 'divergence'):.3f}",
            *([f"{rates.figure(row, 'facts'):.2f}"] if has_facts else []),
            "" if row == "base" else f"{rates.figure(row, 'factor'):.2g}",
        ]  # fmt: skip
        rows.append((float(share[0]), cells))
    rows.sort(key=lambda row: -row[0])
    names = [name.removeprefix("tiny:") for name in rates.behaviours]
    columns = ["merge", "mean", *names, "KL unasked", *(["facts right"] if has_facts else []), "factor"]
    return table(columns, [cells for _, cells in rows])


def shares_of(rates: Rates) -> list[float]:
    """The shares that were tried."""
    return [share for share in SHARES if f"score_gated, {SOURCES[0]}, {share:.0%}" in rates.passes]


def gates(folder: Path, pair: str) -> str:
    """`score_gated` by what orders the components, at equal budgets: shares of the experts' pass rates."""
    rates = Rates.read(folder, pair)
    shares, rows = shares_of(rates), []
    for source in SOURCES:
        named = [f"score_gated, {source}, {share:.0%}" for share in shares]
        if all(row in rates.passes for row in named):
            rows.append([source, *(ends(rates.share(row)) for row in named)])
    return table(["gates by", *(f"{share:.0%}" for share in shares)], rows)


def ahead(folder: Path, pair: str) -> str:
    """How much more gates by the set score bring than gates by something else, at equal budgets; paired."""
    rates = Rates.read(folder, pair)
    shares, rows = shares_of(rates), []
    for source in SOURCES[1:]:
        both = [[f"score_gated, {which}, {share:.0%}" for which in (SOURCES[0], source)] for share in shares]
        if all(row in rates.passes for pair_ in both for row in pair_):
            rows.append([source, *(ends(rates.share(ours) - rates.share(other)) for ours, other in both)])
    return table(["set score minus", *(f"{share:.0%}" for share in shares)], rows)


if __name__ == "__main__":
    for pair in ("tiny", "smollm2"):
        for make in (markdown, gates, ahead):
            print(make(Path(__file__).parent, pair), end="\n\n")
