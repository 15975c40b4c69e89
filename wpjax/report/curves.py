"""Figures of behavioural curves: restoration and knock-out, and what each score promises."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from wpjax.columns import title_of
from wpjax.methods.metrics import metric_entries
from wpjax.report.figures import COLOURS, GREY, STYLE
from wpjax.results.curves import CHECKS, DIRECTIONS, Curves
from wpjax.runtime.files import atomic_output

LABELS = {
    "strict": "answers that pass (strict)",
    "loose": "answers that pass (loose)",
    **{entry.name: entry.label for entry in metric_entries()},
}
CONTROLS = {**dict.fromkeys(("activation", "attribution"), COLOURS["neuron"]), "delta_norm": COLOURS["norm"]}
SINGLE = COLOURS["kv_group"]
"""The result's own ranking, where another is tested."""


def _colour(ranking: str, first: bool) -> str:
    return COLOURS["head"] if first else GREY if ranking.startswith("random") else CONTROLS.get(ranking, SINGLE)


def draw_curve(curves: Curves, axes: Axes, measure: str, direction: str) -> None:
    """One measure along the curves of every ranking, as a share of the way from base to expert."""
    shares, side = curves.share(measure)[0], DIRECTIONS.index(direction)
    n = curves.dataset["n_parameters"].values
    for r, name in enumerate(curves.rankings):
        value, low, high = shares[:, side, r]
        order, colour = np.argsort(n[r], kind="stable"), _colour(name, r == 0)
        random = name.startswith("random")
        label = "random" if name == "random 1" else None if random else title_of(name)
        axes.fill_between(n[r][order], low[order], high[order], color=colour, alpha=0.12, lw=0)
        axes.plot(n[r][order], value[order], color=colour, lw=1 if random else 1.6, marker=".", ms=4, label=label)
    axes.axhline(0, color="#222", lw=0.6)
    axes.axhline(1, color="#222", lw=0.6, ls=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    sure = curves.gap(measure).low > 0
    axes.set_title(LABELS.get(measure, measure) + ("" if sure else "\n(no gap between base and expert)"))


def make_curves(curves: Curves) -> Figure:
    """Restoration above, knock-out below; the checker first, strict and loose, then two scores and the divergence."""
    scored = [m for m in curves.measures if m not in CHECKS]
    shown = [*CHECKS, *(m for m in ("anchor", "decision", "kl") if m in scored)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.3 * len(shown), 5.6), layout="constrained")
        grid = figure.subplots(2, len(shown), squeeze=False, sharex=True)
        for row, direction in zip(grid, DIRECTIONS, strict=True):
            for axes, measure in zip(row, shown, strict=True):
                draw_curve(curves, axes, measure, direction)
            row[0].set_ylabel("share brought back" if direction == "restore" else "share taken away")
        for axes in grid[1]:
            axes.set_xlabel("parameters patched")
        grid[0, 0].legend(frameon=False, fontsize=7, loc="upper left")
        attrs = curves.dataset.attrs
        title = f"{attrs['behaviour']}: the best components of {attrs['expert']} in {attrs['base']}, and the reverse"
        if attrs.get("anchor_acceptance", "accepted") != "accepted":
            title += f"\nthe anchor is unproven: {attrs['anchor_acceptance']}"
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def make_calibration(curves: Curves) -> Figure:
    """The share that each score gives a patched model against the share of its answers that pass; one dot a model."""
    found = curves.calibration()
    passing = curves.standing("strict")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.9 * len(found), 3.1), layout="constrained")
        grid = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
        for axes, one in zip(grid, found, strict=True):
            claimed = curves.standing(one.measure)
            for r, name in enumerate(curves.rankings):
                axes.scatter(claimed[:, r], passing[:, r], s=14, color=_colour(name, r == 0), alpha=0.8, lw=0)
            axes.plot([0, 1], [0, 1], color="#222", lw=0.6, ls=":")
            axes.set(xlabel="share by the score")
            sure, known = curves.gap(one.measure).low > 0, not np.isnan(one.rho)
            says = f"rank correlation {one.rho:.2f}" if known else "all alike" if sure else "no gap"
            axes.set_title(f"{one.measure}: {says}")
        grid[0].set_ylabel("share that passes")
    return figure


def write_curves(curves: Curves, path: Path, overwrite: bool = False) -> list[Path]:
    """Write both figures as PNG files, named after a path's stem.

    Raises:
        OutputError: a place exists or cannot be written.
    """
    written = []
    for name, figure in (("curves", make_curves(curves)), ("calibration", make_calibration(curves))):
        target = path.with_name(f"{path.stem}-{name}.png")
        with atomic_output(target, overwrite) as temporary, mpl.rc_context(STYLE):
            figure.savefig(temporary, format="png", dpi=150)
        written.append(target)
    return written
