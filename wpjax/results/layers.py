"""Where something stands, layer by layer, by several results side by side.

    weights             sums of the single effects of a layer's components, as shares of the gap (`wpjax sweep`)
    activations         the same of activation patching, if the sweep measured it
    causal tracing      average indirect effect over average total effect, at the subject's last token (`wpjax trace`)
    paths               sums of a layer's heads: patched, and by the direct path to the logits (`wpjax circuit`)
    edits               S, ES, PS and NS after rank-one edits in that layer, as far as they were scored, and by how much
                        they hold: EM, PM and NM (`wpjax edit --facts`)

The first four say where something appears to live, the last one where changing it works. That these differ is a
finding, not a fault (arXiv 2301.04213).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import spearmanr

from wpjax.errors import WpjaxError
from wpjax.results.edit_scores import EditScores
from wpjax.results.files import read_json
from wpjax.results.sweep_result import SweepResult
from wpjax.results.tracing import ROLES, TRACE, Tracing

EDITS = "edits"
"""The source whose curves say where changing works."""

SCORES = {"S": "all three", "ES": "the fact itself", "PS": "paraphrases follow", "NS": "neighbours stay"}
"""Scores of edits that are drawn (`facts.scores`), each in words. Facts without paraphrases have no PS, and so no S."""

SIZES = "magnitudes"
"""The source whose curves say by how much changing works; with few facts, shares of them are coarse."""

MAGNITUDES = {"PM": "paraphrases follow", "NM": "neighbours stay", "EM": "the fact itself"}
"""Magnitudes of edits that are drawn, each in words: differences of two probabilities."""


class LayerCurve(NamedTuple):
    """A number for each of some layers.

    Attributes:
        source: what kind of measurement it is, say "weights".
        label: what it is, in words.
        layers: [N], numbers of the layers.
        values: [N], a share: of the gap, of the total effect, or of edits.
    """

    source: str
    label: str
    layers: Int[np.ndarray, " N"]
    values: Float[np.ndarray, " N"]

    @property
    def peak(self) -> tuple[int, float]:
        """The layer where it is largest, and how large.

        >>> LayerCurve("weights", "heads", np.arange(3), np.array([0.1, 0.6, 0.2])).peak
        (1, 0.6)
        """
        best = int(self.values.argmax())
        return int(self.layers[best]), float(self.values[best])


def in_words(curves: Sequence[LayerCurve]) -> str:
    """Where each curve is largest, a sentence a line.

    >>> print(in_words([LayerCurve("weights", "heads", np.arange(3), np.array([0.1, 0.6, 0.2]))]))
    heads (weights): largest in layer 1, at 0.6.
    """
    lines = []
    for curve in curves:
        layer, value = curve.peak
        lines.append(f"{curve.label} ({curve.source}): largest in layer {layer}, at {value:.3g}.")
    return "\n".join(lines)


def agreement(one: LayerCurve, other: LayerCurve) -> float:
    """Spearman's rank correlation of two curves over the layers that both have; NaN for fewer than four.

    >>> up, down = (LayerCurve("", "", np.arange(4), np.array(v)) for v in ([0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]))
    >>> float(agreement(up, down))
    -1.0
    """
    shared, at, there = np.intersect1d(one.layers, other.layers, return_indices=True)
    values = one.values[at], other.values[there]
    if len(shared) < 4 or any(np.ptp(v) == 0 for v in values):
        return float("nan")
    return float(spearmanr(*values).statistic)


def layer_curves(paths: Sequence[str | Path]) -> list[LayerCurve]:
    """The curves of some results of one model, or of a pair with that base.

    Args:
        paths: results of `sweep`, `trace` (the file or its folder), `circuit` and `edit --facts`, in any order. Several
            scores of edits, in other layers, make one curve.

    Raises:
        WpjaxError: a file holds none of these, or is damaged; two scores are of edits in one layer; or the results are
            of models of different depth.
    """
    curves: list[LayerCurve] = []
    scores: dict[int, dict[str, float]] = {}
    depths: dict[Path, int] = {}  # of results that have all layers
    for path in map(Path, paths):
        found: list[LayerCurve] | EditScores
        if path.suffix == ".nc":
            found = _of_sweep(SweepResult.from_netcdf(path))
        else:
            file = path / TRACE if path.is_dir() else path
            found = read_json(file, _READERS, "result that has layers", "wpjax trace, circuit or edit --facts")
        if isinstance(found, EditScores):
            if found.layer in scores:
                raise WpjaxError(f"{path}: another file has scores of edits in layer {found.layer}, too; name one")
            scores[found.layer] = {name: of.mean for name, of in found.table().items()}
            continue
        depths[path] = len(found[0].layers)
        curves += found
    deepest = max(scores, default=0) + 1
    if len({*depths.values()}) > 1 or (depths and min(depths.values()) < deepest):
        said = [f"{path} has {n} layers" for path, n in depths.items()] + [f"edits are in layer {deepest - 1}"]
        raise WpjaxError(f"results of different models: {', '.join(said)}; name those of one model")
    for source, names in ((EDITS, SCORES), (SIZES, MAGNITUDES)):
        for name, says in names.items():
            layers = np.array(sorted(layer for layer, values in scores.items() if name in values), int)
            if len(layers):
                values = np.array([scores[layer][name] for layer in layers])
                curves.append(LayerCurve(source, f"{name}: {says}", layers, values))
    return curves


def with_edits(curves: Sequence[LayerCurve]) -> list[tuple[float, float]]:
    """The agreement of each curve with the edits, by their first score and by their first magnitude.

    NaN for edits themselves, and where it is not known.
    """
    firsts = [next((curve for curve in curves if curve.source == source), None) for source in (EDITS, SIZES)]

    def with_first(curve: LayerCurve, edits: LayerCurve | None) -> float:
        return math.nan if edits is None or curve.source in (EDITS, SIZES) else agreement(curve, edits)

    return [(with_first(curve, firsts[0]), with_first(curve, firsts[1])) for curve in curves]


def layer_rows(curves: Sequence[LayerCurve]) -> list[tuple[str, ...]]:
    """The table of curves: what each is, where it is largest and how large, and its agreement with the edits."""
    rows: list[tuple[str, ...]] = []
    for curve, both in zip(curves, with_edits(curves), strict=True):
        layer, value = curve.peak
        where = (str(layer), f"{value:.2f}") if value > 0 else ("none above 0", "")
        rows.append((curve.source, curve.label, *where, *("" if math.isnan(rho) else f"{rho:+.2f}" for rho in both)))
    return rows


COLUMNS = ("", "what", "layer", "share", "ρ, scores", "ρ, magnitudes")
"""Titles of `layer_rows`."""

TITLE = "By layer: where each is largest, and its rank correlation (ρ) with edits"
"""Title of the table."""


def layers_as_json(curves: Sequence[LayerCurve]) -> dict[str, Any]:
    """Curves as values that JSON can hold."""
    return {
        "what": "layers",
        "curves": [
            {
                **curve._asdict(),
                "layers": curve.layers.tolist(),
                "values": curve.values.tolist(),
                "agreement_with_edits": [None if math.isnan(rho) else rho for rho in both],
            }
            for curve, both in zip(curves, with_edits(curves), strict=True)
        ],
    }


def read_layers(path: str | Path) -> list[LayerCurve]:
    """Read a file that `wpjax layers` wrote.

    Raises:
        WpjaxError: there is no such file, it holds something else, or it is damaged.
    """
    return read_json(path, {"layers": curves_of_json}, "results by layer", "wpjax layers")


def curves_of_json(content: Mapping[str, Any]) -> list[LayerCurve]:
    """The curves that JSON holds; an error of Python where it does not hold any."""
    curves = []
    for of in content["curves"]:
        layers, values = np.array(of["layers"]), np.array(of["values"], float)
        if layers.dtype.kind != "i" or layers.ndim != 1 or not len(layers) or layers.min() < 0:
            raise ValueError("no layers")
        if values.shape != layers.shape or not np.isfinite(values).all():
            raise ValueError("not one number for each layer")
        curves.append(LayerCurve(str(of["source"]), str(of["label"]), layers, values))
    if not curves:
        raise ValueError("no curves")
    return curves


def _of_sweep(result: SweepResult) -> list[LayerCurve]:
    data = result.dataset
    layers = np.arange(int(data.attrs["n_layers"]))
    mine = np.isin(data["kind"].values, result.finest_kinds) & (data["layer"].values >= 0)
    relay = next((name for name in ("activation", "attribution") if name in data), None)
    columns = {"weights": result.best()} | ({} if relay is None else {"activations": data[relay].values})
    found = []
    for source, values in columns.items():
        known = mine & np.isfinite(values)
        sums = np.bincount(data["layer"].values[known], values[known], len(layers))
        found.append(LayerCurve(source, f"{data.attrs['behaviour']}: sum of single effects", layers, sums))
    return found


def _of_trace(content: Mapping[str, Any]) -> list[LayerCurve]:
    trace = Tracing.of_json(content)
    if not trace.ate.mean > 0:
        raise WpjaxError(f"{trace.cost}, so nothing is a share of it; trace other facts")
    found = []
    for name, called in (("mlp", "MLPs, subject's last token"), ("stream", "stream, subject's last token")):
        if name in trace.maps:
            average = trace.average(name)
            effects = average.mean[:, average.roles.index(ROLES[2])] / trace.ate.mean
            found.append(LayerCurve("causal tracing", called, np.arange(len(effects)), effects))
    if "attn" in trace.maps:
        average = trace.average("attn")
        effects = average.mean[:, average.roles.index(ROLES[5])] / trace.ate.mean
        found.append(LayerCurve("causal tracing", "attention, last token", np.arange(len(effects)), effects))
    return found


def _of_circuit(content: Mapping[str, Any]) -> list[LayerCurve]:
    heads = content["heads"]
    at = np.array([int(head["name"].split(".")[0].removeprefix("L")) for head in heads])
    layers = np.arange(at.max() + 1)
    return [
        LayerCurve("paths", called, layers, np.bincount(at, np.array([float(head[name]) for head in heads])))
        for name, called in (("patched", "heads, patched"), ("direct", "heads, straight to the logits"))
    ]


_READERS: Mapping[str, Callable[[Mapping[str, Any]], list[LayerCurve] | EditScores]] = MappingProxyType(
    {"tracing": _of_trace, "ioi": _of_circuit, "edit scores": EditScores.of_json}
)
