"""The figure of several results by layer: where something appears to live, and where changing it works."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wpjax.report.figures import GREY, STYLE
from wpjax.results.layers import EDITS, LayerCurve
from wpjax.runtime.files import atomic_output


def make_layers(curves: Sequence[LayerCurve]) -> Figure:
    """One row a kind of measurement, over the same layers; edits come last."""
    sources = sorted(dict.fromkeys(curve.source for curve in curves), key=lambda source: source == EDITS)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.6 + 1.5 * len(sources)), layout="constrained")
        rows = figure.subplots(len(sources), 1, squeeze=False, sharex=True)[:, 0]
        for axes, source in zip(rows, sources, strict=True):
            axes.axhline(0, color=GREY, lw=0.6)
            for curve in curves:
                if curve.source == source:
                    axes.plot(curve.layers, curve.values, marker="o", ms=3, lw=1, label=curve.label)
            what = "changing it works" if source == EDITS else "appears to live"
            axes.set_title(f"{source}: where it {what}", loc="left", fontsize=9)
            axes.set_ylabel("share")
            axes.legend(frameon=False, fontsize=7)
        rows[-1].set_xlabel("layer")
        rows[-1].set_xlim(-0.5, max(int(np.max(curve.layers)) for curve in curves) + 0.5)
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def write_layers(curves: Sequence[LayerCurve], path: Path, overwrite: bool = False) -> None:
    """Write the figure as a PNG file.

    Args:
        curves: the curves, at least one.
        path: the file.
        overwrite: whether a file that exists may be replaced.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    figure = make_layers(curves)
    with atomic_output(path, overwrite) as file, mpl.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=150)
