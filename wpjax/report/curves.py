"""Figures of a validation: restoration and knock-out curves, and how well each score foretells the checker."""

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
from wpjax.report.glyphs import save_figure
from wpjax.results.curves import CHECKS, DIRECTIONS, Curves
from wpjax.results.files import netcdf_bytes
from wpjax.runtime.files import atomic_outputs

# Titles of the measures, and colours of the controls.
LABELS = {
    "strict": "answers that pass (strict)",
    "loose": "answers that pass (loose)",
    **{entry.name: entry.label for entry in metric_entries()},
}
CONTROLS = {**dict.fromkeys(("activation", "attribution"), COLOURS["neuron"]), "delta_norm": COLOURS["norm"]}
SINGLE = COLOURS["kv_group"]
"""Colour of the ranking of single effects, where it is a control."""


def _colour(ranking: str, first: bool) -> str:
    """Colour of a ranking; the first is the one under test."""
    return COLOURS["head"] if first else GREY if ranking.startswith("random") else CONTROLS.get(ranking, SINGLE)


def draw_curve(curves: Curves, axes: Axes, measure: str, direction: str) -> None:
    """Draw one measure along the curves of every ranking, as a share of the gap.

    Args:
        curves: the curves.
        axes: axes to draw into.
        measure: name of one of `curves.measures`.
        direction: "restore" or "knockout".
    """
    shares, side = curves.share(measure)[0], DIRECTIONS.index(direction)
    n = curves.dataset["n_parameters"].values  # [ranking, point]
    for r, name in enumerate(curves.rankings):
        value, low, high = shares[:, side, r]
        order, colour = np.argsort(n[r], kind="stable"), _colour(name, r == 0)
        random = name.startswith("random")
        label = "random" if name == "random 1" else None if random else title_of(name)  # one entry for all of them
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
    """Figure of the curves: restoration above, knock-out below; a column for each verdict of the checker and for the
    anchor, the decision score and the divergence.
    """
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
        if "swept_behaviour" in attrs:
            title += f"\nranked for another behaviour, {attrs['swept_behaviour']}"
        if attrs.get("anchor_acceptance", "accepted") != "accepted":
            title += f"\nthe anchor is unproven: {attrs['anchor_acceptance']}"
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def make_calibration(curves: Curves) -> Figure:
    """Figure of the calibration: for each score, how far the score and the checker say that a patched model stands.

    Each dot is a patched model. On the dotted line the score keeps what it promises.
    """
    calibrations = curves.calibration()
    passing = curves.position("strict")  # [direction, ranking, point]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.9 * len(calibrations), 3.1), layout="constrained")
        grid = figure.subplots(1, len(calibrations), squeeze=False, sharey=True)[0]
        for axes, calibration in zip(grid, calibrations, strict=True):
            claimed = curves.position(calibration.measure)
            for r, name in enumerate(curves.rankings):
                axes.scatter(claimed[:, r], passing[:, r], s=14, color=_colour(name, r == 0), alpha=0.8, lw=0)
            axes.plot([0, 1], [0, 1], color="#222", lw=0.6, ls=":")
            axes.set(xlabel="share by the score")
            sure, known = curves.gap(calibration.measure).low > 0, not np.isnan(calibration.rho)
            says = f"rank correlation {calibration.rho:.2f}" if known else "all alike" if sure else "no gap"
            axes.set_title(f"{calibration.measure}: {says}")
        grid[0].set_ylabel("share that passes")
    return figure


def write_curves(curves: Curves, path: Path, overwrite: bool = False) -> list[Path]:
    """Write the result file and both figures, as PNG files beside it; all of them or none.

    Args:
        curves: the curves.
        path: path of the result file; the figures are named after it.
        overwrite: whether files that exist may be replaced.

    Returns:
        paths of the figures.

    Raises:
        OutputError: a file exists or cannot be written.
    """
    targets = (path, *curve_figures(path))
    figures = (make_curves(curves), make_calibration(curves))
    with atomic_outputs(targets, overwrite) as (file, *pictures):
        file.write_bytes(netcdf_bytes(curves.dataset))
        for figure, picture in zip(figures, pictures, strict=True):
            save_figure(figure, picture)
    return list(targets[1:])


def curve_figures(path: Path) -> tuple[Path, ...]:
    """Paths of the figures that `write_curves` writes beside a result file."""
    return tuple(path.with_name(f"{path.stem}-{name}.png") for name in ("curves", "calibration"))
