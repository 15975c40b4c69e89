"""A history drawn: which weights acquired the behaviour when, as a figure and as a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from wpjax.report.figures import COLOURS, GREY, STYLE
from wpjax.report.glyphs import save_figure
from wpjax.report.pages import page_style, page_template
from wpjax.results.files import netcdf_bytes
from wpjax.results.history import Course, History
from wpjax.runtime.files import atomic_outputs

N_SHOWN = 30
"""Components in the map, at most."""


def write_history(history: History, path: Path, overwrite: bool = False) -> Path:
    """Write a history, and its figure as PNG beside it; both or none.

    Args:
        history: the history.
        path: where the result goes.
        overwrite: whether files that exist may be replaced.

    Returns:
        path of the figure.

    Raises:
        OutputError: a file exists, or cannot be written.
    """
    picture, figure = path.with_suffix(".png"), make_history(history)
    with atomic_outputs((path, picture), overwrite) as (file, drawn):
        file.write_bytes(netcdf_bytes(history.dataset))
        save_figure(figure, drawn)
    return picture


def write_history_report(history: History, path: Path, n_rows: int = 100, overwrite: bool = False) -> list[Path]:
    """Write a page about a history, and its figure as PNG beside it; both or none.

    Args:
        history: the history.
        path: path of the page, say "line.html"; the figure is named after it ("line-history.png").
        n_rows: number of components in the table.
        overwrite: whether files that exist may be replaced.

    Returns:
        paths of the files, the page first.

    Raises:
        OutputError: a file exists, or cannot be written.
    """
    figure, image = make_history(history), path.with_name(f"{path.stem}-history.png")
    template = page_template("history.html.jinja")
    figures = history.figures(n_rows)
    with atomic_outputs((path, image), overwrite) as (text, drawn):
        save_figure(figure, drawn)
        page = template.render(
            attrs=history.dataset.attrs,
            what="stage" if history.are_stages else "step",
            points=history.points,
            css=page_style(),
            picture=base64.b64encode(drawn.read_bytes()).decode(),
            steps=figures["steps"],
            courses=figures["top"],
            by=figures["ranked_by"],
        )
        text.write_text(page, encoding="utf-8")
    return [path, image]


def make_history(history: History, n: int = N_SHOWN) -> Figure:
    """The line of the gap, and below it, over the same steps, a map of the components of largest effect.

    Components stand in the order in which they acquire their effect; those of one step, the largest first.

    Args:
        history: the history.
        n: number of components, at most.
    """
    courses = sorted(history.courses(n), key=lambda c: (c.since, -c.effects[c.peak]))
    width = min(12.0, max(5.5, 2.6 + 0.45 * len(history)))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, 2.9 + 0.17 * len(courses)), layout="constrained")
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 0.6 + 0.17 * len(courses)])
        draw_share(history, top)
        draw_courses(history, below, courses)
        attrs = history.dataset.attrs
        title = f"{attrs['behaviour']}: which weights acquire it when"
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def draw_share(history: History, axes: Axes) -> None:
    """Draw how much of the final gap each checkpoint has, or each stage adds, with its interval."""
    data, x = history.dataset, np.arange(len(history))
    low, high = data["share_low"].values, data["share_high"].values
    axes.axhline(0, color=GREY, lw=0.6)
    if history.are_stages:
        axes.bar(x, history.share, width=0.6, color=COLOURS["head"], alpha=0.85, label="the whole stage adds")
        bars = np.clip([history.share - low, high - history.share], 0, None)
        axes.errorbar(x, history.share, yerr=bars, fmt="none", ecolor="#222", elinewidth=0.8)
        axes.plot(x, data["coverage"].values, ls="none", marker="D", ms=4, color=COLOURS["neuron"],
                  label="its components together")  # fmt: skip
    else:
        axes.axhline(1, color=GREY, lw=0.6, ls=":")
        axes.fill_between(x, low, high, color=COLOURS["head"], alpha=0.2, lw=0)
        axes.plot(x, history.share, marker="o", ms=3.5, color=COLOURS["head"], label="the whole checkpoint")
        axes.plot(x, data["coverage"].values, marker=".", ms=4, lw=1, ls="--", color=COLOURS["neuron"],
                  label="its components together, in the base")  # fmt: skip
    axes.set_ylabel("share of the final gap")
    axes.set_title("How much of the behaviour is there")
    axes.legend(frameon=False, fontsize=7, loc="best")


def draw_courses(history: History, axes: Axes, courses: Sequence[Course]) -> None:
    """Draw the effect of each component at each step as a map, white at zero.

    What was only estimated has a tilde, and what is not known at all is grey.
    """
    grid = np.array([c.known for c in courses])
    scale = max(float(np.nanmax(np.abs(grid))), 1e-9)
    axes.set_facecolor("#e5e7eb")
    image = axes.imshow(
        np.ma.masked_invalid(grid),
        aspect="auto",
        cmap="RdBu_r",
        norm=TwoSlopeNorm(0, -scale, scale),
        interpolation="none",
    )
    for row, c in enumerate(courses):
        for column in np.flatnonzero(np.isfinite(c.known) & ~np.isfinite(c.effects)):
            axes.text(float(column), row, "~", ha="center", va="center", fontsize=7, color="#333")
    if not history.are_stages:  # a dot where each has half of its largest effect
        rows = np.arange(len(courses))
        axes.plot([c.since for c in courses], rows, ls="none", marker=".", ms=3, color="#222")
    axes.set_yticks(range(len(courses)), [c.name for c in courses], fontsize=7)
    every = max(1, -(-len(history) // 16))
    ticks = [i for i in range(len(history)) if i % every == 0]
    axes.set_xticks(ticks, [history.labels[i] for i in ticks], fontsize=7, rotation=0 if every == 1 else 45)
    axes.set_xlabel(
        "stage" if history.are_stages else "step of the training; a dot: half of its largest effect is there"
    )
    axes.set_title("Components of largest effect" + ("" if history.are_stages else ", the earliest above"))
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    bar.set_label("share of the final gap, alone")
    bar.outline.set_visible(False)
