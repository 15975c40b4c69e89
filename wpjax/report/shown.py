"""The figures of the page as they are without a script: titles, how to read them, and what they show in words."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from wpjax.report.alt import alt_text
from wpjax.report.curves import make_calibration, make_curves
from wpjax.report.figures import STYLE
from wpjax.report.interference import make_interference
from wpjax.report.layers import make_layers
from wpjax.report.live import no_flow, no_graph
from wpjax.results.curves import Curves
from wpjax.results.interference import Interference
from wpjax.results.layers import LayerCurve
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime import interrupts

TITLES = {
    "top": ("Highest effects", "With 95 % intervals, among the components that the table shows."),
    "heads": ("Heads", "Red brings the behaviour back, blue takes it away."),
    "kv_groups": ("KV groups", "Keys and values that several heads share."),
    "neurons": ("Neurons", "Each dot is a neuron, beside the others of its layer."),
    "depth": ("Depth", "Single effects of each layer added up: positive above zero, negative below."),
    "plane": ("Sources and relays", "What a component's weights do, against what it passes on."),
    "flow": (
        "Flow by layer",
        "Which later attention and MLPs the effects arrive by way of. A row adds up to its effects.",
    ),
    "hierarchy": (
        "Flow graph",
        "Sources, and the heads and MLPs that their effects arrive by way of.",
    ),
    "coverage": ("Coverage by kind", "Less than the sum: parts stand in for each other. More: they need each other."),
    "anchor": (
        "Anchor",
        "How far base and expert stand apart at each layer. The dotted line is the layer taken.",
    ),
}
"""Name of a figure -> its title, and how to read it."""

WIDE = ("depth", "flow", "hierarchy", "plane", "curves", "calibration", "interference", "layers")
"""Figures that take the whole width of the page."""

ORDER = ("depth", "top", "neurons", "heads", "kv_groups", "coverage", "anchor", "hierarchy", "flow", "plane")
"""The order of the figures on the page."""


class Shown(NamedTuple):
    """A figure of the page.

    Attributes:
        name: its name.
        title: its title.
        note: how to read it.
        alt: what it shows, for those who do not see it.
        svg: the figure as it is without a script; None if there is nothing to draw.
        reason: why there is nothing to draw, in words; empty if there is.
    """

    name: str
    title: str
    note: str
    alt: str
    svg: Markup | None
    reason: str = ""

    @property
    def wide(self) -> bool:
        """Whether it takes the whole width of the page."""
        return self.name in WIDE


def sweep_figures(result: SweepResult, figures: dict[str, Figure]) -> list[Shown]:
    """The figures of a sweep in the order of the page; of the flow also why there is none.

    Args:
        result: the sweep.
        figures: figures by name, names of `TITLES`.
    """
    shown = []
    reasons = {"flow": no_flow(result.swept), "hierarchy": no_graph(result.swept)}
    for name in ORDER:
        title, note = TITLES[name]
        nothing = reasons.get(name, "")
        if name in figures and not nothing:
            shown.append(Shown(name, title, note, alt_text(result, name), _svg(figures[name])))
        elif nothing and name == "hierarchy":  # said once, not of both figures
            shown.append(Shown(name, title, note, nothing, None, nothing))
    return shown


def validation_figures(curves: Curves) -> list[Shown]:
    """The figures of a validation."""
    note = "Of each ranking, as more and more of its best components are patched. The dotted line is the expert."
    how = "Each dot is a patched model: the share by the score, and upwards the share that passes."
    return [
        Shown("curves", "Restoration and knock-out", note, curves.summary, _svg(make_curves(curves))),
        Shown("calibration", "Does the score foretell the checker?", how, how, _svg(make_calibration(curves))),
    ]


def interference_figure(found: Interference) -> Shown:
    """The figure of an interference map."""
    note = "Rows are sets, columns behaviours. The framed diagonal is the ceiling: one behaviour beside itself."
    return Shown("interference", "Interference", note, found.summary, _svg(make_interference(found)))


def layers_figure(layers: Sequence[LayerCurve]) -> Shown:
    """The figure of results by layer."""
    alt = "Lines over layers of each result; the table below says where each is largest."
    return Shown("layers", "By layer", "Several results of one model, over its layers.", alt, _svg(make_layers(layers)))


def _svg(figure: Figure) -> Markup:
    """A figure as inline SVG; matplotlib escapes the text it draws."""
    interrupts.check()
    out = io.StringIO()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # The text is drawn by the browser, which has fonts of its own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    return Markup(text[text.index("<svg") :])
