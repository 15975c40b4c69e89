"""What each figure of a sweep shows, in a sentence or two, for those who do not see it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from wpjax.circuits.hierarchy import hierarchy
from wpjax.report.figures import in_layers
from wpjax.report.live import no_flow, no_graph
from wpjax.results.sweep_result import SweepResult
from wpjax.results.words import enumerated


def alt_text(result: SweepResult, name: str) -> str:
    """What a figure shows, in a sentence or two, for those who do not see it.

    Args:
        result: the sweep.
        name: name of the figure, one of `figures.available`.
    """
    return _ALT[name](result.swept)


def _extremes(result: SweepResult, kind: str) -> str:
    """The largest and the smallest effect of a kind, in words."""
    data, values = result.dataset, result.best()
    mine = np.flatnonzero((data["kind"].values.astype(str) == kind) & np.isfinite(values))
    if not mine.size:
        return "No number is known."
    high, low = mine[values[mine].argmax()], mine[values[mine].argmin()]
    names = data["name"].values.astype(str)
    return f"The largest is {names[high]} ({values[high]:+.4f}), the smallest {names[low]} ({values[low]:+.4f})."


def _map_alt(kind: str, plural: str) -> Callable[[SweepResult], str]:
    return lambda result: f"Map of {plural}, layers by index, coloured by effect. {_extremes(result, kind)}"


def _depth_alt(result: SweepResult) -> str:
    data, values = result.dataset, np.nan_to_num(result.best())
    mine = np.isin(data["kind"].values.astype(str), in_layers(result))
    sums: Float[np.ndarray, " L"] = np.bincount(data["layer"].values[mine], values[mine])
    return f"Bars of summed effects by layer. Layer {sums.argmax()} has the largest sum ({sums.max():+.3f})."


def _coverage_alt(result: SweepResult) -> str:
    data = result.dataset
    found = zip(data["swept_kind"].values.astype(str), data["coverage_joint"].values, strict=True)
    shares = enumerated([f"{kind} {share:.0%}" for kind, share in found])
    return f"Bars of what each kind recovers as one patch: {shares}. All together: {data.attrs['coverage']:.0%}."


def _top_alt(result: SweepResult) -> str:
    rows = result.top(3)
    leaders = ", ".join(f"{row.name} {row.effect:+.4f} [{row.ci_low:+.4f}, {row.ci_high:+.4f}]" for row in rows)
    return f"Bars of the 20 highest single effects with 95 % intervals, led by {leaders}."


def _flow_alt(result: SweepResult) -> str:
    return no_flow(result) or (
        "Heat map: rows are the layers that effects start from, columns the attention and the MLP of each layer that "
        "they arrive by way of. The flow graph names the strongest."
    )


def _hierarchy_alt(result: SweepResult) -> str:
    if reason := no_graph(result):
        return reason
    found = hierarchy(result)
    if not found.sources:
        return "No component's effect is surely above zero (q < 0.05), so there are no sources."
    sources, by_way = (", ".join(node.name for node in nodes[:4]) for nodes in (found.sources, found.aggregators))
    told = f" Their effects arrive by way of {by_way} first." if by_way else ""
    return f"Graph of {len(found.sources)} sources, the largest {sources}.{told}"


def _anchor_alt(result: SweepResult) -> str:
    layer = result.dataset.attrs["metric_layer"]
    return f"Lines over layers: how far expert and base stand apart on the anchor of each. Layer {layer} was taken."


_ALT: dict[str, Callable[[SweepResult], str]] = {
    "top": _top_alt,
    "heads": _map_alt("head", "heads"),
    "kv_groups": _map_alt("kv_group", "KV groups"),
    "neurons": lambda r: f"Dots of neurons by layer, their effect upwards. {_extremes(r, 'neuron')}",
    "depth": _depth_alt,
    "plane": lambda _: "Dots of components: what their weights do to the right, what they pass on upwards.",
    "flow": _flow_alt,
    "hierarchy": _hierarchy_alt,
    "coverage": _coverage_alt,
    "anchor": _anchor_alt,
}
