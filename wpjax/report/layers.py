"""The figure of several results by layer: where something appears to live, and where changing it works."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wpjax.report.figures import GREY, STYLE
from wpjax.report.glyphs import save_figure
from wpjax.results.layers import EDITS, SIZES, LayerCurve, layers_as_json
from wpjax.runtime.files import atomic_outputs


def make_layers(curves: Sequence[LayerCurve]) -> Figure:
    """One row a kind of measurement, over the same layers; edits come last."""
    sources = sorted(dict.fromkeys(curve.source for curve in curves), key=lambda source: source in (EDITS, SIZES))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.6 + 1.5 * len(sources)), layout="constrained")
        rows = figure.subplots(len(sources), 1, squeeze=False, sharex=True)[:, 0]
        for axes, source in zip(rows, sources, strict=True):
            axes.axhline(0, color=GREY, lw=0.6)
            for curve in curves:
                if curve.source == source:
                    axes.plot(curve.layers, curve.values, marker="o", ms=3, lw=1, label=curve.label)
            what = "changing it works" if source in (EDITS, SIZES) else "it appears to live"
            axes.set_title(f"{source}: where {what}", loc="left", fontsize=9)
            axes.set_ylabel("share")
            axes.legend(frameon=False, fontsize=7)
        rows[-1].set_xlabel("layer")
        rows[-1].set_xlim(-0.5, max(int(np.max(curve.layers)) for curve in curves) + 0.5)
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def write_layers(curves: Sequence[LayerCurve], path: Path, overwrite: bool = False) -> Path:
    """Write curves as JSON, and their figure as PNG beside it; both or none.

    Args:
        curves: the curves, at least one.
        path: where the JSON goes.
        overwrite: whether files that exist may be replaced.

    Returns:
        path of the figure.

    Raises:
        OutputError: a file exists, or cannot be written.
    """
    picture, figure = path.with_suffix(".png"), make_layers(curves)
    with atomic_outputs((path, picture), overwrite) as (file, drawn):
        file.write_text(json.dumps(layers_as_json(curves), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        save_figure(figure, drawn)
    return picture
