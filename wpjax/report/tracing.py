"""The figures of causal tracing: the heat maps of a fact, and the average over facts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wpjax.report.figures import GREY, STYLE
from wpjax.report.glyphs import save_figure
from wpjax.results.tracing import TRACE, FactTrace, Tracing
from wpjax.runtime.files import atomic_output

COLOURS = {
    "stream": "Purples",
    "mlp": "Greens",
    "attn": "Reds",
    "severed_mlp": "Purples",
    "severed_attn": "Purples",
}
"""Name of a map -> the colours in which the paper draws it."""

TITLES = {
    "stream": "One state restored",
    "mlp": "MLPs restored",
    "attn": "Attention restored",
    "severed_mlp": "One state, MLPs severed",
    "severed_attn": "One state, attention severed",
}

LONGEST = 24
"""Characters of a label beside a map, at most."""


def make_fact(fact: FactTrace, window: int) -> Figure:
    """Figure of one fact: the probability of its answer with each token restored at each layer, one panel a map.

    Args:
        fact: the fact.
        window: the layers that modules were restored in together.
    """
    labels = [_label(token) + ("*" if fact.start <= i < fact.stop else "") for i, token in enumerate(fact.tokens)]
    tables = {name: of.T for name, of in fact.maps.items()}
    title = (
        f"p({fact.answer.strip()}) after {shorten(fact.text, 80)!r}: {fact.clean:.2f}, corrupted {fact.corrupted:.2f}"
    )
    return _figure(tables, labels, window, fact.corrupted, title, f"p({fact.answer.strip()})")


def make_average(found: Tracing) -> Figure:
    """Figure of the average indirect effect over facts, by what tokens are, one panel a map."""
    averages = {name: found.average(name) for name in found.maps}
    labels = list(next(iter(averages.values())).roles)
    n = len(found.facts)
    title = f"Average indirect effect over {n} fact{'s' * (n != 1)} of {found.model}; total effect {found.ate.mean:.2f}"
    window = int(found.settings.get("window", 0))
    return _figure({name: of.mean.T for name, of in averages.items()}, labels, window, 0.0, title, "AIE")


def _figure(
    tables: dict[str, np.ndarray], labels: Sequence[str], window: int, low: float, title: str, bar: str
) -> Figure:
    """Maps side by side, tokens as rows and layers as columns; colours begin at `low`, and what is below has none."""
    n, high = len(tables), max(max(float(of.max()) for of in tables.values()), low + 1e-9)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 2.9 * n, 1.5 + 0.2 * len(labels)), layout="constrained")
        for axes, (name, table) in zip(figure.subplots(1, n, squeeze=False)[0], tables.items(), strict=True):
            _draw(axes, name, table, labels if axes.get_subplotspec().is_first_col() else [], window, low, high, bar)
        figure.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return figure


def _draw(
    axes: Axes, name: str, table: np.ndarray, labels: Sequence[str], window: int, low: float, high: float, bar: str
) -> None:
    """Draw one map."""
    image = axes.imshow(table, aspect="auto", cmap=COLOURS[name], vmin=low, vmax=high, interpolation="nearest")
    axes.set_title(TITLES[name])
    in_window = name in ("mlp", "attn")
    axes.set_xlabel(f"centre of {window} restored layers" if in_window else "restored layer")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    if not labels:
        axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    colours = axes.figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    colours.ax.set_title(bar if len(bar) <= 12 else "p", fontsize=7, color=GREY)
    colours.outline.set_visible(False)


def _label(token: str) -> str:
    """What a token stands for, as a label that shows blanks at its end and line breaks, and leaves room for the map."""
    text = token.strip() or repr(token)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def write_tracing(found: Tracing, folder: Path, overwrite: bool = False, pictures: int = 8) -> list[str]:
    """Write a trace as a folder: trace.json, average.png, and fact-1.png and so on; all of it or nothing.

    Args:
        found: the trace.
        folder: where it goes.
        overwrite: whether a folder of an earlier trace may be replaced.
        pictures: facts that are drawn one by one, at most.

    Returns:
        names of the files.

    Raises:
        OutputError: the folder exists or cannot be written.
    """
    figures = {"average.png": make_average(found)} if len(found.facts) > 1 else {}
    window = int(found.settings.get("window", 0))
    figures |= {f"fact-{i + 1}.png": make_fact(fact, window) for i, fact in enumerate(found.facts[:pictures])}
    with atomic_output(folder, overwrite, TRACE) as temporary:
        temporary.mkdir()
        text = json.dumps(found.as_json, indent=1, ensure_ascii=False, allow_nan=False)
        (temporary / TRACE).write_text(text + "\n", encoding="utf-8")
        for name, figure in figures.items():
            save_figure(figure, temporary / name, dpi=130)
    return [TRACE, *figures]
