"""What the page's script draws from: the columns of the table, and the numbers of figures that are not of components.

Also what stands in words where there is nothing to draw, and what each figure shows for those who do not see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from wpjax.circuits.hierarchy import FINEST, flow_by_layer, hierarchy, significant
from wpjax.columns import EFFECT, Column, columns, effect_estimates, title_of
from wpjax.errors import WpjaxError
from wpjax.report.curves import LABELS
from wpjax.report.figures import in_layers
from wpjax.results.curves import Curves
from wpjax.results.interference import Interference
from wpjax.results.layers import EDITS, SIZES, LayerCurve
from wpjax.results.sweep_result import SweepResult

N_SOURCES = 24
"""Sources that the flow graph can show, at most."""

ABOUT = {
    EFFECT: "share of the gap that comes back when its weights alone are the expert's",
    "effect_paper": "mean of each prompt's own ratio, as in the paper",
    "p_value": "sign-flip test over queries",
    "q_value": "false discovery rate at which the effect counts as found",
    "screen": "first-order estimate of the effect, by which components were chosen",
    "gradient": "first-order estimate of the effect",
    "screen_error": "the estimate minus the effect",
    "set_score": "how much it carries together with others, for its number of parameters: the ranking for sets",
    "learned": "a learned ranking for sets",
    "delta_norm": "size of the change of its weights, expert minus base (Frobenius norm)",
    "exact": "whether its weights were replaced, or only estimated",
}
"""What the columns of the table are, in a few words; a column that is not here is described by its label."""


def table_columns(result: SweepResult) -> list[Column]:
    """The number columns of the table in the order in which they stand, without the effect's p and q values.

    Estimates of the effect come first; the rankings for sets and the norm of the change last.
    """
    data = result.dataset
    mine = [c for c in columns() if c.name in data and c.dims == ("component",)]
    shown = sorted((c for c in mine if not c.group and c.shown), key=lambda c: not c.estimates_effect)
    sets = [c for c in mine if c.trust is not None and not c.shown]
    return [c for c in (*shown, *sets) if np.isfinite(data[c.name].values.astype(float)).any()]


def live_columns(result: SweepResult, by: str) -> dict[str, np.ndarray]:
    """Every number of every component that the page's table shows, by name of the column.

    Args:
        result: the sweep.
        by: the ranking; the column `rank` counts from 1 along it, and is 0 where the ranking has no number.
    """
    data = result.dataset
    values = result.values(by)
    order = np.argsort(-values, kind="stable")
    rank = np.zeros(len(values), np.int64)
    rank[order] = np.where(np.isfinite(values[order]), np.arange(1, len(values) + 1), 0)
    names = [EFFECT, "ci_low", "ci_high", "p_value", "q_value", "effect_paper", "delta_norm"]
    names += [part.name for column in table_columns(result) for part in column.with_bounds()]
    marks = [name for name in ("exact", "below_noise_floor", "swept") if name in data]
    number = {kind: i for i, kind in enumerate(_kinds(data))}
    kind = np.array([number[kind] for kind in data["kind"].values.astype(str).tolist()])
    whole = {name: data[name].values for name in dict.fromkeys(("layer", "index", *names, *marks))}
    return {"rank": rank, "kind": kind, **whole}


def _kinds(data: xr.Dataset) -> list[str]:
    """The kinds of the components, in the order in which they come."""
    return list(dict.fromkeys(data["kind"].values.astype(str).tolist()))


def live_about(
    result: SweepResult,
    by: str,
    execution: SweepResult | None = None,
    curves: Curves | None = None,
    interference: Interference | None = None,
    layers: Sequence[LayerCurve] = (),
) -> dict[str, Any]:
    """What the page's script is told beside the columns, as `payload.packed` takes it.

    Args:
        result: the sweep.
        by: the ranking of the table.
        execution: a sweep with the anchor's state given, or None.
        curves: a validation of the sweep, or None.
        interference: a map that the behaviour is on, or None.
        layers: results by layer.
    """
    data, swept = result.dataset, result.swept
    estimates = [name for name in (EFFECT, *effect_estimates()) if name in data]
    known = any(name in data for name in effect_estimates()) or bool(data["exact"].values.any())
    return {
        "n": data.sizes["component"],
        "names": data["name"].values.astype(str).tolist(),
        "kinds": _kinds(data),
        "behaviour": data.attrs["behaviour"],
        "by": by,
        "best": [name for name in estimates if np.isfinite(data[name].values).any()] if known else [result.ranking],
        "parts": in_layers(swept),
        "table": [_entry(name) for name in _entries(result)],
        "coverage": _coverage(swept.dataset),
        "anchor": _anchor(swept.dataset),
        "flow": _flow(swept),
        "graph": _graph(swept, execution),
        "curves": None if curves is None else _curves(curves),
        "interference": None if interference is None else _interference(interference),
        "layers": [
            {**curve._asdict(), "edits": curve.source in (EDITS, SIZES)}
            for curve in sorted(layers, key=lambda curve: curve.source in (EDITS, SIZES))
        ],
        "plane": "source" in data and bool(np.isfinite(data["source"].values).any()),
    }


def _entries(result: SweepResult) -> list[Column]:
    """The columns of the table after rank, name, kind and layer."""
    fixed = {c.name: c for c in columns()}
    first = [fixed[name] for name in (EFFECT, "p_value", "q_value")]
    last = [fixed[name] for name in ("delta_norm", "effect_paper", "exact")]
    return [*first, *table_columns(result), *last]


def _entry(column: Column) -> dict[str, Any]:
    """What the script needs to know of a column of the table."""
    short = {"p_value": "p", "q_value": "q", "delta_norm": "‖Δ‖"}
    return {
        "key": column.name,
        "title": short.get(column.name, column.name),
        "about": ABOUT.get(column.name, column.label),
        "type": "bool" if column.dtype == "b" else "p" if column.name in ("p_value", "q_value") else "number",
        "bounds": list(column.bounds),
        # What a reader wants to see first: large effects, small p.
        "up": column.name in ("p_value", "q_value"),
        "hidden": column.name in ("effect_paper", "exact", "p_value"),
    }


def _coverage(data: xr.Dataset) -> dict[str, Any]:
    return {
        "kinds": data["swept_kind"].values.astype(str).tolist(),
        "n": data["n_components"].values,
        "joint": data["coverage_joint"].values,
        "sum": data["coverage_sum"].values,
        "all": float(data.attrs["coverage"]),
    }


def _anchor(data: xr.Dataset) -> dict[str, Any] | None:
    """The anchor's diagnostics in standard deviations, so that layers compare."""
    if "anchor_gap" not in data:
        return None
    lines = {}
    for name in ("gap", "specific"):
        scale = 1 / np.maximum(data[f"anchor_{name}_sd"].values, 1e-30)
        lines[name] = [data[f"anchor_{name}{end}"].values * scale for end in ("", "_low", "_high")]
    return {**lines, "stability": data["anchor_stability"].values, "layer": int(data.attrs["metric_layer"])}


def _flow(result: SweepResult) -> dict[str, Any] | None:
    """The flow by layer of each kind; None if there is none (`no_flow` says why)."""
    if "flow" not in result.dataset or not in_layers(result):
        return None
    return {kind: np.round(flow_by_layer(result, kind), 7) for kind in in_layers(result)}


def no_flow(result: SweepResult) -> str:
    """Why a result has no flow by layer to draw, in words; empty if it has.

    Args:
        result: the sweep.
    """
    if "flow" in result.dataset and not (np.nan_to_num(np.abs(result.dataset["flow"].values)) > 0).any():
        return "There is no flow to draw: no component that was replaced moves the metric."
    return "" if "flow" in result.dataset else no_graph(result)


def no_graph(result: SweepResult) -> str:
    """Why a result has no flow graph, in words; empty if it has.

    Args:
        result: the sweep.
    """
    try:
        hierarchy(result)
    except WpjaxError as error:
        said = str(error)
        return f"{said[0].upper()}{said[1:]}."
    return no_flow(result)


def _sources(result: SweepResult) -> tuple[list[int], bool]:
    """Positions of the components that the flow graph starts from, and whether they are surely above zero.

    Where none is, they are the largest positive effects.
    """
    sure = significant(result, N_SOURCES)
    if sure:
        return sure, True
    data = result.dataset
    fine = np.isin(data["kind"].values.astype(str), FINEST)
    usable = np.isfinite(data["flow"].values[:, 0]) & (fine if fine.any() else True)
    effect = np.where(usable, data[EFFECT].values, np.nan)
    return [int(i) for i in np.argsort(-effect, kind="stable") if effect[i] > 0][:N_SOURCES], False


def _graph(result: SweepResult, execution: SweepResult | None) -> dict[str, Any] | None:
    """The sources of the flow graph with their flow to every head and MLP; None if there is none."""
    data = result.dataset
    if no_graph(result):
        return None
    chosen, sure = _sources(result)
    executors = hierarchy(result, execution).executors if execution is not None else ()
    targets = [str(t) for t in data["target"].values]
    layer, metric = data.attrs["metric_layer"], str(data.attrs["metric"])
    return {
        "targets": targets,
        "sources": data["name"].values[chosen].astype(str).tolist(),
        "flow": np.round(data["flow"].values[chosen].astype(np.float64), 7),
        "sure": sure,
        "end": f"anchor, layer {layer}" if metric == "anchor" else metric,
        "executors": [[node.name, node.value] for node in executors],
    }


def _curves(curves: Curves) -> dict[str, Any]:
    """Shares along the curves of every ranking: [measure][low, mean, high][direction][ranking][point]."""
    data = curves.dataset
    return {
        "measures": [[name, LABELS.get(name, name)] for name in curves.measures],
        "rankings": [title_of(name) for name in curves.rankings],
        "n_parameters": data["n_parameters"].values,
        "n_components": data["n_components"].values,
        "shares": {name: np.round(curves.share(name)[0], 5) for name in curves.measures},
        # Where each patched model stands by each score, and by the checker: [direction][ranking][point].
        "position": {name: np.round(curves.position(name), 5) for name in curves.measures},
        "foretells": [[found.measure, found.rho] for found in curves.calibration()],
    }


def _interference(found: Interference) -> dict[str, Any]:
    """The three maps of each level: what sets bring back, how they overlap, how ranks agree."""
    maps = {
        name: [
            ["brings back", [[cell.mean for cell in row] for row in level.brings_back]],
            ["sets overlap", level.overlap],
            ["ranks agree", level.agreement],
        ]
        for name, level in found.levels.items()
    }
    return {"behaviours": found.behaviours, "levels": maps}
