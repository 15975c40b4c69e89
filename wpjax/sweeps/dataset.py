"""From the changes that a sweep measured to its result: effects, intervals, tests and provenance."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int
from scipy.stats import norm

import wpjax
from wpjax.anchors import Anchor, LayerDiagnostics
from wpjax.behaviours import PromptBatch
from wpjax.components import Component
from wpjax.metrics import Metric
from wpjax.pairs import Pair
from wpjax.results import FIRST_ORDER, SCHEMA
from wpjax.stats import (
    Resamples,
    benjamini_hochberg,
    mean_interval,
    missed,
    ratio_of_means,
    resample,
    sign_flip_p,
    split_half_reliability,
)
from wpjax.sweeps.masks import MaskEstimate


class Measured(NamedTuple):
    """What a sweep measured; changes are components x prompts, NaN where nothing was replaced.

    Attributes:
        cells: changes of the metric by cell of the 2x2: "exact" (weights), "activation", "relay", "knockout".
        first_order: estimates of such changes by name: those of `FIRST_ORDER`, and "attribution".
        gap: expert minus base of each prompt.
        coverage: share of the gap recovered by each kind as one joint patch, and by all of them ("all").
        floor: noise floor of each kind that was replaced.
        rows: components that a program of each kind took at once.
        flow: changes of the metric by way of each target, mean over prompts; None where it was not followed.
        targets: names of the columns of `flow`.
        nulls: by name and kind, what 95 % of effects are smaller than where there is nothing to find.
        sampled: which components were replaced as a random sample of those that a screen left out.
        masks: what each component does in random sets, by name of `masks.SHARES`.
    """

    cells: Mapping[str, Float[np.ndarray, "C B"]]
    first_order: Mapping[str, Float[np.ndarray, "C B"]]
    gap: Float[np.ndarray, " B"]
    coverage: Mapping[str, float]
    floor: Mapping[str, float]
    rows: Mapping[str, int]
    flow: Float[np.ndarray, "C U"] | None = None
    targets: Sequence[str] = ()
    nulls: Mapping[str, Mapping[str, float]] = MappingProxyType({})
    sampled: Bool[np.ndarray, " C"] | None = None
    masks: Mapping[str, MaskEstimate] = MappingProxyType({})


def two_by_two(cells: Mapping[str, Float[np.ndarray, "C B"]]) -> dict[str, Float[np.ndarray, "C B"]]:
    """Source, relay and interaction from the cells of the 2x2, prompt by prompt.

    With y_ab the metric when the component has weights a on the input that b sees
    (docs/method.md, "Source or relay"; ours):

        S = ((y_EB - y_BB) + (y_EE - y_BE)) / 2     R = ((y_BE - y_BB) + (y_EE - y_EB)) / 2
        I = y_EE - y_EB - y_BE + y_BB               y_EE - y_BB = S + R

    So the effect of activation patching is that of the weights, plus what is only relayed, plus their interaction.
    """
    weights, both, inputs = cells["exact"], cells["activation"], cells["relay"]
    return {
        "source": (weights + both - inputs) / 2,
        "relay": (inputs + both - weights) / 2,
        "interaction": both - weights - inputs,
    }


def make_dataset(
    pair: Pair,
    batch: PromptBatch,
    metric: Metric,
    anchor: Anchor | None,
    chosen: Sequence[Component],
    measured: Measured,
    seed: int,
    n_resamples: int,
) -> xr.Dataset:
    """The result's dataset; see `SweepResult` for what it holds."""
    resamples, gap = resample(batch.queries, n_resamples, seed), measured.gap
    n = len(chosen)
    delta = measured.cells.get("exact", np.full((n, len(batch)), np.nan))
    exact = np.isfinite(delta).all(1)
    kinds = np.array([c.kind for c in chosen])
    columns = {
        name: np.full(n, np.nan) for name in ("effect", "ci_low", "ci_high", "effect_paper", "p_value", "q_value")
    }
    if exact.any():
        columns["effect"][exact], columns["ci_low"][exact], columns["ci_high"][exact] = ratio_of_means(
            delta[exact], gap, resamples
        )
        columns["effect_paper"][exact] = (delta[exact] / gap).mean(1)
    tested = delta if exact.any() else measured.cells.get("activation", delta)
    replaced = np.isfinite(tested).all(1)
    if replaced.any():
        columns["p_value"][replaced] = sign_flip_p(tested[replaced], batch.queries, seed=seed)
        # All swept components are the family, those that a screen on the same prompts left out at p = 1: the rates
        # would not hold among the chosen alone.
        columns["q_value"][replaced] = benjamini_hochberg(np.where(replaced, columns["p_value"], 1.0))[replaced]
    columns |= _cell_columns(measured, resamples) | _mask_columns(measured)
    floor = np.array([measured.floor.get(kind, np.nan) for kind in kinds])
    variables: dict[str, Any] = {name: ("component", values) for name, values in columns.items()}
    variables |= {name: ("component", values.mean(1) / gap.mean()) for name, values in measured.first_order.items()}
    best = columns["effect"].copy()  # first order where nothing was replaced
    for name in FIRST_ORDER:
        if name in measured.first_order:
            best[~exact] = measured.first_order[name].mean(1)[~exact] / gap.mean()
    swept = list(dict.fromkeys(kinds.tolist()))
    variables |= {
        "exact": ("component", exact),
        "below_noise_floor": ("component", np.abs(columns["effect"]) <= floor),
        "delta_norm": ("component", pair.delta_norms(chosen)),
        "delta": (("component", "prompt"), delta.astype(np.float32)),
        "gap": ("prompt", gap),
        "query": ("prompt", batch.queries),
        "coverage_joint": ("swept_kind", [measured.coverage[kind] for kind in swept]),
        "coverage_sum": ("swept_kind", [float(best[kinds == kind].sum()) for kind in swept]),
        "n_components": ("swept_kind", [int((kinds == kind).sum()) for kind in swept]),
    }
    if replaced.any():
        variables |= _kind_statistics(measured, tested, replaced, kinds, swept, batch.queries, seed)
    screens = [name for name in ("screen", "gradient") if name in measured.first_order]
    if screens and exact.any():
        variables["screen_error"] = ("component", variables[screens[0]][1] - columns["effect"])
    for field in LayerDiagnostics.__dataclass_fields__:
        if field != "layer" and anchor is not None and anchor.diagnostics:
            variables[f"anchor_{field}"] = ("model_layer", [getattr(d, field) for d in anchor.diagnostics])
    coords: dict[str, Any] = {
        "name": ("component", np.array([c.name for c in chosen], dtype=object)),
        "kind": ("component", kinds.astype(object)),
        "layer": ("component", np.array([c.layer for c in chosen])),
        "index": ("component", np.array([c.index for c in chosen])),
        "prompt": ("prompt", np.array(batch.texts, dtype=object)),
        "swept_kind": ("swept_kind", np.array(swept, dtype=object)),
    }
    if measured.flow is not None:
        variables["flow"] = (("component", "target"), (measured.flow / gap.mean()).astype(np.float32))
        coords["target"] = ("target", np.array(measured.targets, dtype=object))
    attributes = _attributes(pair, batch, metric, measured, resamples, seed)
    if anchor is not None:
        attributes |= {"anchor_acceptance": anchor.acceptance, "anchor_n_response": anchor.n_response}
        variables["anchor_vector"] = ("d_model", np.asarray(anchor.vector))
    return xr.Dataset(variables, coords, attributes)


def _kind_statistics(
    measured: Measured,
    delta: Float[np.ndarray, "C B"],
    replaced: Bool[np.ndarray, " C"],
    kinds: np.ndarray,
    swept: Sequence[str],
    queries: Int[np.ndarray, " B"],
    seed: int,
) -> dict[str, Any]:
    """How far the ranking of each kind can be trusted: reliability, nulls, and what a screen missed."""
    found: dict[str, Any] = {}
    halves = [split_half_reliability(delta[replaced & (kinds == kind)], queries, seed=seed) for kind in swept]
    found["split_half"] = ("swept_kind", halves)
    for name in ("permuted", "direction"):
        by_kind = measured.nulls.get(name, {})
        found[f"null_{name}"] = ("swept_kind", [by_kind.get(kind, np.nan) for kind in swept])
    sampled = measured.sampled
    if sampled is None or not sampled.any():
        return found
    rows = []
    for kind in swept:
        mine, size = kinds == kind, np.abs(delta.mean(1))
        chosen, drawn = mine & replaced & ~sampled, mine & sampled
        hits = int((size[drawn] >= np.median(size[chosen])).sum()) if chosen.any() else 0
        rows.append(missed(hits, int(drawn.sum()), int((mine & ~chosen).sum())))
    found["sampled"] = ("component", sampled)
    for column, values in zip(("missed", "missed_low", "missed_high"), zip(*rows, strict=True), strict=True):
        found[column] = ("swept_kind", np.array(values))
    return found


def _cell_columns(measured: Measured, resamples: Resamples) -> dict[str, Float[np.ndarray, " C"]]:
    """Shares of the gap, with their intervals, of every cell but the weights' own, and of the 2x2 if it is whole."""
    cells = {name: values for name, values in measured.cells.items() if name in ("activation", "knockout")}
    if "relay" in measured.cells:
        cells |= two_by_two(measured.cells)
    columns: dict[str, np.ndarray] = {}
    for name, values in cells.items():
        known = np.isfinite(values).all(1)
        # What is lost when the base's slice stands in the expert counts as positive.
        sign = -1.0 if name == "knockout" else 1.0
        for column in (name, f"{name}_low", f"{name}_high"):
            columns[column] = np.full(len(values), np.nan)
        if known.any():
            share = ratio_of_means(sign * values[known], measured.gap, resamples)
            for column, figures in zip((name, f"{name}_low", f"{name}_high"), share, strict=True):
                columns[column][known] = figures
    return columns


def _mask_columns(measured: Measured) -> dict[str, Float[np.ndarray, " C"]]:
    """Shares of the gap by what each component does in random sets; intervals are over sets, on these prompts."""
    gap, z = measured.gap.mean(), float(norm.ppf(0.975))
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {
        name: (made.beta.mean(1) / gap, made.se / gap) for name, made in measured.masks.items()
    }
    if found:
        (low, low_se), (high, high_se) = found["beta_low"], found["beta_high"]
        found["redundancy"] = low - high, np.hypot(low_se, high_se)
    columns: dict[str, np.ndarray] = {}
    for name, (value, se) in found.items():
        columns |= {name: value, f"{name}_low": value - z * se, f"{name}_high": value + z * se}
    return columns


def _attributes(
    pair: Pair,
    batch: PromptBatch,
    metric: Metric,
    measured: Measured,
    resamples: Resamples,
    seed: int,
) -> dict[str, Any]:
    device = jax.local_devices()[0]
    interval = mean_interval(measured.gap, resamples)
    return {
        "what": "sweep",
        "schema": SCHEMA,
        "wpjax_version": wpjax.__version__,
        "jax_version": jax.__version__,
        "base": pair.base_checkpoint.source,
        "expert": pair.expert_checkpoint.source,
        "base_fingerprint": pair.fingerprints[0],
        "expert_fingerprint": pair.fingerprints[1],
        "n_layers": pair.cfg.n_layers,
        "behaviour": batch.behaviour,
        "split": batch.split,
        "n_prompts": len(batch),
        "n_queries": len(np.unique(batch.queries)),
        "metric": metric.name,
        "metric_layer": metric.layer,
        "given_layer": metric.first_layer - 1,
        "gap_mean": interval.mean,
        "gap_low": interval.low,
        "gap_high": interval.high,
        "coverage": measured.coverage["all"],
        "noise_floor": max(measured.floor.values(), default=float("nan")),
        "noise_floor_by_kind": json.dumps(dict(measured.floor)),
        "rows_per_program": json.dumps(dict(measured.rows)),
        "dtype": pair.dtype,
        "device": f"{device.platform} {device.device_kind}",
        "machine": platform.machine(),
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
