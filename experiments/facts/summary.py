"""Tables of what tracing and editing found, from their JSON files."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.records import table
from wpjax.results.layers import COLUMNS, curves_of_json, layer_rows
from wpjax.results.tracing import MAPS


def effects(report: dict[str, Any]) -> str:
    """Of a trace.json: the largest average indirect effect of each kind of token, with its layer, for each map."""
    roles = next(iter(report["aie"].values()))["roles"]
    rows = []
    for j, role in enumerate(roles):
        cells = [role]
        for of in report["aie"].values():
            layer = int(np.array(of["mean"])[:, j].argmax())
            mean, low, high = (100 * of[end][layer][j] for end in ("mean", "low", "high"))
            cells.append(f"{mean:.1f} [{low:.1f}, {high:.1f}], layer {layer}")
        rows.append(cells)
    return table(("token", *(MAPS[name] for name in report["aie"])), rows)


def totals(report: dict[str, Any]) -> str:
    """Of a trace.json: each fact, with the probability of its answer in the clean and in the corrupted runs."""
    rows = [(f"{f['text']} **{f['answer'].strip()}**", f"{f['clean']:.2f}", f"{f['corrupted']:.2f}")
            for f in report["facts"]]  # fmt: skip
    return table(("fact", "clean", "corrupted"), rows)


def scores(report: dict[str, Any]) -> str:
    """Of a file of scores: each score before and after the edits, in per cent and points of probability."""

    def said(of: Any) -> str:
        if isinstance(of, float):
            return f"{100 * of:.1f}"
        mean, low, high = (100 * of[end] for end in ("mean", "low", "high"))
        return f"{mean:.1f} [{low:.1f}, {high:.1f}]"

    rows = [(name, said(report["before"][name]), said(report["after"][name])) for name in report["after"]]
    return table((f"{report['n_facts']} facts, layer {report['layer']}", "before", "after"), rows)


def by_layer(report: dict[str, Any]) -> str:
    """Of by_layer.json: where each curve is largest, and how its order of layers agrees with that of the edits."""
    rows = [(f"{source}: {what}", *cells) for source, what, *cells in layer_rows(curves_of_json(report))]
    return table(("largest at", *COLUMNS[2:]), rows)
