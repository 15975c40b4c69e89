"""The tables of this folder's README, from its JSON files."""

from __future__ import annotations

from typing import Any

from experiments.records import table

N_HEADS = 10
"""Heads in the table."""


def heads(report: dict[str, Any]) -> str:
    """The heads with the strongest direct path to the logits, of `wpjax circuit ioi`."""
    shown = sorted(report["heads"], key=lambda h: -abs(h["direct"]))[:N_HEADS]
    return table(
        ("head", "direct", "by all paths", "attends to IO", "to S", "copies", "suppresses", "name mover"),
        [
            (
                h["name"],
                f"{h['direct']:+.3f}",
                f"{h['patched']:+.3f}",
                f"{h['to_io']:.2f}",
                f"{h['to_s']:.2f}",
                f"{h['copies']:.2f}",
                f"{h['suppresses']:.2f}",
                "yes" if h["name"] in report["name_movers"] else "",
            )
            for h in shown
        ],
    )


def circuits(report: dict[str, Any]) -> str:
    """Faithfulness by share of edges, and the two areas."""
    return _curves(report, "edges")


def nodes(report: dict[str, Any]) -> str:
    """Faithfulness by share of nodes, and the two areas."""
    return _curves(report, "nodes")


def _curves(report: dict[str, Any], level: str) -> str:
    signed, absolute = (curve for curve in report["curves"] if curve["level"] == level)
    rows = [
        (f"{k:.1%}", f"{n:,}", f"{a:.3f}", f"{b:.3f}")
        for k, n, a, b in zip(signed["shares"], signed["counts"], signed["f"], absolute["f"], strict=True)
    ]
    areas = [(name.upper(), "", f"{signed[name]:.3f}", f"{absolute[name]:.3f}") for name in ("cpr", "cmd")]
    return table((level, "number", "f, signed top k", "f, absolute top k"), [*rows, *areas])


def sizes(report: dict[str, Any]) -> str:
    """What so many of the best heads do of what all heads do."""
    counts = list(report["sizes"])
    return table(("heads", *counts), [("share", *(f"{report['sizes'][n]:.2f}" for n in counts))])


def agreement(report: dict[str, Any]) -> str:
    """Largest difference to TransformerLens in every sweep."""
    found = report["largest_difference"]
    return table(
        ("sweep", *found), [(sweep, *(f"{found[m][sweep]:.0e}" for m in found)) for sweep in next(iter(found.values()))]
    )


def speed(report: dict[str, Any]) -> str:
    """A whole map beside TransformerLens's loop, and what all edges cost."""
    of, edges = report["map"], report["edges"]
    hours = of["seconds_of_a_cell_there"] * of["cells"] / 3600
    return table(
        ("on the same two cores, in one run", ""),
        [
            ("cells of the map (layers x heads x positions)", f"{of['cells']:,}"),
            ("all of it here, compilation included", f"{of['seconds_here_with_compilation']:,.0f} s"),
            ("one cell of TransformerLens's loop", f"{of['seconds_of_a_cell_there']:.2f} s"),
            ("all of its loop, from that", f"{hours:.1f} h"),
            ("times faster", f"{of['times_faster']:.1f}"),
            ("largest difference in the cells that both ran", f"{of['largest_difference']:.0e}"),
            (f"EAP-IG of all {edges['edges']:,} edges, {edges['steps']} steps", f"{edges['seconds']:.1f} s"),
            ("the same in plain passes forward and backward", f"{edges['plain_passes']:.1f}"),
        ],
    )
