"""The figure of an interference map."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wpjax.report.figures import STYLE
from wpjax.report.glyphs import save_figure
from wpjax.results.interference import Interference
from wpjax.runtime.files import atomic_outputs

LONGEST_NAME = 28
"""Characters of a behaviour's name in the figure."""


def make_interference(found: Interference) -> Figure:
    """Figure of a map: what each set brings back, how sets overlap, how ranks agree; by units above, by modules below.

    The framed cells of the diagonal are the ceiling: one behaviour beside itself.
    """
    n = len(found.behaviours)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3 * (1.6 + 0.75 * n), 2 * (1.3 + 0.55 * n)), layout="constrained")
        grid = figure.subplots(len(found.levels), 3, squeeze=False)
        for row, (name, level) in zip(grid, found.levels.items(), strict=True):
            back = np.array([[cell.mean for cell in cells] for cells in level.brings_back])
            _draw(row[0], back, found.behaviours, f"{name}: brings back", percent=True)
            _draw(row[1], level.overlap, found.behaviours, f"{name}: sets overlap")
            _draw(row[2], level.agreement, found.behaviours, f"{name}: ranks agree")
            row[0].set_ylabel("set of")
            for axes in row[1:]:
                axes.set_yticklabels([])
        for axes in grid[-1]:
            axes.set_xlabel("behaviour")
        figure.suptitle(
            f"Sets within {found.share:.1%} of the parameters; on the diagonal, the ceiling",
            fontsize=11,
            fontweight="bold",
            x=0.01,
            ha="left",
        )
    return figure


def _draw(axes: Axes, values: np.ndarray, names: tuple[str, ...], title: str, percent: bool = False) -> None:
    """Draw a table of numbers as a map, from white at 0 to full at 1; its diagonal is framed."""
    axes.imshow(np.clip(values, -1, 1), cmap="RdBu_r", vmin=-1.3, vmax=1.3)
    for a, row in enumerate(values):
        for b, value in enumerate(row):
            axes.text(b, a, f"{value:.0%}" if percent else f"{value:.2f}", ha="center", va="center", fontsize=8)
        axes.add_patch(mpl.patches.Rectangle((a - 0.48, a - 0.48), 0.96, 0.96, fill=False, ec="#222", lw=1))
    short = [_short(name.removeprefix("tiny:")) for name in names]
    axes.set_xticks(range(len(names)), short, rotation=30, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), short, fontsize=7)
    axes.set_title(title)


def _short(name: str) -> str:
    """A name that leaves room for the map; the table beside the figure has it whole."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def write_interference(found: Interference, path: Path, overwrite: bool = False) -> Path:
    """Write the map as JSON, and its figure as PNG beside it; both or none.

    Args:
        found: the map.
        path: where the JSON goes.
        overwrite: whether files that exist may be replaced.

    Returns:
        path of the figure.

    Raises:
        OutputError: a file exists or cannot be written.
    """
    picture, figure = figure_of(path), make_interference(found)
    with atomic_outputs((path, picture), overwrite) as (file, drawn):
        file.write_text(json.dumps(found.as_json, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        save_figure(figure, drawn)
    return picture


def figure_of(path: Path) -> Path:
    """Path of the figure beside a map."""
    return path.with_suffix(".png")
