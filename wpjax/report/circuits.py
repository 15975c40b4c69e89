"""Figures of circuits: a map of heads, and the graph of the strongest edges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from wpjax.circuits.ioi_study import Head, IOIStudy
from wpjax.report.figures import COLOURS, GREY, STYLE
from wpjax.report.glyphs import save_figure
from wpjax.runtime.files import atomic_outputs

N_NAMED = 8
"""Heads that are named in a figure, at most."""


def make_ioi(study: IOIStudy) -> Figure:
    """Figure of a study: two maps of heads, name movers, faithfulness by share of edges and nodes, and the graph."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 11.5), layout="constrained")
        upper, lower = np.ravel(np.asarray(figure.subfigures(2, 1, height_ratios=[1, 1.15])))
        axes = upper.subplots(2, 2)
        shape = max(int(h.name[1:].split(".")[0]) for h in study.heads) + 1, -1
        draw_head_map(axes[0, 0], np.array([h.patched for h in study.heads]).reshape(shape), "Patched, by all paths")
        draw_head_map(axes[0, 1], np.array([h.direct for h in study.heads]).reshape(shape), "Direct path to the logits")
        _draw_movers(axes[1, 0], study.heads)
        _draw_curves(axes[1, 1], study)
        draw_graph(lower.subplots(), study.edges)
        figure.suptitle(
            f"Indirect object identification: logit difference {study.answered[0]:.2f} "
            f"({study.answered[1]:.2f} on ABC prompts)",
            fontsize=11, fontweight="bold", x=0.01, ha="left",
        )  # fmt: skip
    return figure


def draw_head_map(axes: Axes, share: np.ndarray, title: str) -> None:
    """Draw a number of every head as a map of layers by heads, white at zero."""
    scale = max(float(np.abs(share).max()), 1e-9)
    image = axes.imshow(share, aspect="auto", origin="lower", cmap="RdBu_r", norm=TwoSlopeNorm(0, -scale, scale))
    axes.set(xlabel="head", ylabel="layer")
    axes.set_title(title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    bar.set_label("share of the gap")
    bar.outline.set_visible(False)


def _draw_movers(axes: Axes, heads: Sequence[Head]) -> None:
    """Draw every head by its attention to IO and its direct effect; filled where it copies names."""
    x, y = np.array([h.to_io for h in heads]), np.array([h.direct for h in heads])
    axes.axhline(0, color=GREY, lw=0.6)
    marks = axes.scatter(x, y, c=[h.copies for h in heads], s=16, cmap="Blues", vmin=-0.2, vmax=1, lw=0.4, ec="#333")
    for i in np.argsort(-np.abs(y))[:N_NAMED]:
        axes.annotate(heads[i].name, (x[i], y[i]), xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set(xlabel="attention from the last token to IO", ylabel="direct effect, share of the gap")
    axes.set_title("Name movers")
    bar = axes.figure.colorbar(marks, ax=axes, shrink=0.85, pad=0.02)
    bar.set_label("copy score")
    bar.outline.set_visible(False)


def _draw_curves(axes: Axes, study: IOIStudy) -> None:
    """Draw the faithfulness of growing circuits of edges, and of nodes."""
    axes.axhline(1, color=GREY, lw=0.6)
    for curve in study.curves:
        how, style = ("absolute", "--s") if curve.absolute else ("signed", "-o")
        label = f"{curve.level}, {how} top k: CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f}"
        colour = COLOURS["mlp" if curve.level == "nodes" else "head"]
        axes.plot(curve.shares, curve.f, style, color=colour, ms=3, lw=1.2, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{100 * k:g} %"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="share k of all edges, or nodes", ylabel="share of the model's metric")
    axes.set_title(f"Circuits ({study.curves[0].method}, {study.curves[0].ablation})")
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)


def draw_graph(axes: Axes, edges: Sequence[tuple[str, str, float]]) -> None:
    """Draw edges between nodes that stand by layer, from the embedding below to the logits above.

    Args:
        axes: where to draw.
        edges: names of sender and receiver, and a score; the wider the line, the larger.
    """
    names = {_node(name) for s, r, _ in edges for name in (s, r)} | {"embed", "logits"}
    nodes = sorted(sorted(names), key=_height)  # by name within a row, so that a picture is the same every time
    rows: dict[tuple[int, int], list[str]] = {}
    for node in nodes:
        rows.setdefault(_height(node), []).append(node)
    at = {}
    for y, row in enumerate(rows.values()):
        for i, node in enumerate(row):
            # Odd rows are moved aside, so that edges do not hide behind the nodes between.
            at[node] = ((i + 0.5) / len(row) + (0.04 if y % 2 else -0.04), y)
    largest = max((abs(score) for *_, score in edges), default=1.0) or 1.0
    for s, r, score in sorted(edges, key=lambda e: abs(e[2])):
        axes.annotate(
            "", at[_node(r)], at[_node(s)],
            arrowprops={
                "arrowstyle": "-|>", "lw": 0.4 + 3 * abs(score) / largest, "alpha": 0.65, "mutation_scale": 7,
                # A negative score: the answer needs the edge. Red, as in the maps of heads.
                "color": "#2b6cb0" if score > 0 else "#b04a5a", "shrinkA": 8, "shrinkB": 8,
                "connectionstyle": "arc3,rad=0.08",
            },
        )  # fmt: skip
    for node, (x, y) in at.items():
        colour = COLOURS["mlp"] if node.endswith("mlp") else COLOURS["head"] if "." in node else GREY
        box = {"boxstyle": "round,pad=0.25", "fc": "white", "ec": colour}
        axes.text(
            x, y, node.replace(".head", "").replace("kv_group", "kv"), ha="center", va="center", fontsize=7, bbox=box
        )
    axes.set(xlim=(-0.1, 1.1), ylim=(-0.7, len(rows) - 0.3))
    axes.axis("off")
    axes.set_title(f"The {len(edges)} strongest edges: red carries the answer, blue works against it")


def _node(name: str) -> str:
    """The node that an end of an edge belongs to: a head has one, and so has a KV group."""
    return name.rsplit(".", 1)[0] if name.rsplit(".", 1)[-1] in ("q", "k", "v") else name


def _height(node: str) -> tuple[int, int]:
    """Layer of a node, and whether it is its MLP."""
    if not node.startswith("L"):
        return (-1, 0) if node == "embed" else (10**6, 0)
    return int(node[1:].split(".")[0]), int(node.endswith("mlp"))


def write_ioi(study: IOIStudy, path: Path, overwrite: bool = False) -> Path:
    """Write a study as JSON, and its figure as PNG beside it; both or none.

    Args:
        study: the study.
        path: where the JSON goes.
        overwrite: whether files that exist may be replaced.

    Returns:
        path of the figure.

    Raises:
        OutputError: a file exists or cannot be written.
    """
    picture, figure = path.with_suffix(".png"), make_ioi(study)
    with atomic_outputs((path, picture), overwrite) as (file, drawn):
        file.write_text(json.dumps(study.as_json, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        save_figure(figure, drawn, dpi=130)
    return picture
