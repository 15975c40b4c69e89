"""Turns what a sweep measured into its result: effects, intervals, tests, and where all of it comes from."""

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

import wpjax
from wpjax.behaviours import PromptBatch
from wpjax.columns import EFFECT, Column, effect_estimates, find_column, rankings
from wpjax.estimators.job import MethodOutput, SweepJob
from wpjax.results.sweep_result import SCHEMA, effect_or_estimate
from wpjax.stats import (
    Resamples,
    benjamini_hochberg,
    mean_interval,
    missed_interval,
    ratio_of_means,
    resample,
    sign_flip_p,
    split_half_reliability,
)


class Controls(NamedTuple):
    """Figures that tell how far a sweep's effects can be trusted (docs/method.md, "Controls and statistics").

    Attributes:
        coverage: kind -> share of the gap that all its components recover as one joint patch; "all" -> the same for all
            kinds together.
        floor: kind -> noise floor, the largest effect that rounding alone made; only kinds that were replaced.
        nulls: name of the null -> kind -> 95th percentile of the magnitude of effects where there is nothing to find.
    """

    coverage: Mapping[str, float]
    floor: Mapping[str, float]
    nulls: Mapping[str, Mapping[str, float]] = MappingProxyType({})


def make_dataset(
    job: SweepJob, batch: PromptBatch, output: MethodOutput, controls: Controls, n_resamples: int
) -> xr.Dataset:
    """The dataset of the result; `SweepResult` says what it holds.

    Args:
        job: the sweep.
        batch: prompts of the sweep.
        output: what the method returned.
        controls: the controls that were measured, too.
        n_resamples: number of bootstrap samples behind the intervals.

    Raises:
        ValueError: the method returned values for a column that is not registered.
    """
    resamples, gap, n = resample(batch.queries, n_resamples, job.seed), job.gap, len(job.components)
    kinds = np.array([c.kind for c in job.components])
    swept = list(dict.fromkeys(kinds.tolist()))
    # NaN stands for components that were not replaced; a component counts as replaced if all its prompts are finite.
    changes = {EFFECT: np.full((n, len(batch)), np.nan), **output.changes}
    delta = changes[EFFECT]
    exact = np.isfinite(delta).all(1)

    values: dict[str, Any] = {}
    for name, change in changes.items():
        values |= _shares(_column(name), change, gap, resamples)
    for name, share in output.shares.items():
        values |= dict(zip((name, *_column(name).bounds), share, strict=True))
    values |= job.engine.columns
    # The paper's figure: the mean over prompts of each prompt's ratio, where the effect is the ratio of means.
    with np.errstate(divide="ignore", invalid="ignore"):  # a prompt without a gap has no ratio, nor has their mean
        ratio = (delta / gap).mean(1)
    values["effect_paper"] = np.where(np.isfinite(ratio), ratio, np.nan)
    # Tests are of the most trustworthy column that was measured: weight patches or, without them, activation patches.
    measured = [column.name for column in rankings() if column.is_tested and column.name in output.changes]
    tested = changes[measured[0]] if measured else delta
    replaced = np.isfinite(tested).all(1)
    values |= {name: np.full(n, np.nan) for name in ("p_value", "q_value")}
    if replaced.any():
        values["p_value"][replaced] = sign_flip_p(tested[replaced], batch.queries, seed=job.seed)
        # The family of tests is all swept components. The screen chose on the same prompts, so the false discovery
        # rate would not hold among the chosen alone. Components that were not replaced count with p = 1.
        values["q_value"][replaced] = benjamini_hochberg(np.where(replaced, values["p_value"], 1.0))[replaced]
        values |= _kind_statistics(output.sampled, controls, tested, replaced, kinds, swept, batch.queries, job.seed)
    screens = [name for name in effect_estimates() if name in output.chosen_by]
    if screens and exact.any():
        values["screen_error"] = values[screens[0]] - values[EFFECT]
    best = effect_or_estimate(values)  # for the sum of single effects: exact where it was measured, else estimated
    floor = np.array([controls.floor.get(kind, np.nan) for kind in kinds])
    values |= {
        "exact": exact,
        "below_noise_floor": np.abs(values[EFFECT]) <= floor,
        "delta_norm": job.pair.delta_norms(job.components),
        "delta": delta.astype(np.float32),
        "gap": gap,
        "query": batch.queries,
        "coverage_joint": [controls.coverage[kind] for kind in swept],
        "coverage_sum": [float(best[kinds == kind].sum()) for kind in swept],
        "n_components": [int((kinds == kind).sum()) for kind in swept],
        "name": np.array([c.name for c in job.components], dtype=object),
        "kind": kinds.astype(object),
        "layer": np.array([c.layer for c in job.components]),
        "index": np.array([c.index for c in job.components]),
        "prompt": np.array(batch.texts, dtype=object),
        "swept_kind": np.array(swept, dtype=object),
    }
    if output.flow is not None:
        values["flow"] = (output.flow / gap.mean()).astype(np.float32)
        values["target"] = np.array(job.engine.targets, dtype=object)
    # Keyed by `is_coordinate`: xarray takes variables and coordinates apart.
    variables: dict[bool, dict[str, Any]] = {False: dict(job.prepared.columns), True: {}}
    for name, value in values.items():
        column = _column(name)
        variables[column.is_coordinate][name] = (column.dims, value)
    return xr.Dataset(variables[False], variables[True], _attributes(job, batch, output, controls, resamples))


def _column(name: str) -> Column:
    column = find_column(name)
    if column is None:
        raise ValueError(f"no column {name!r} is registered; add it to the columns of the method that makes it")
    return column


def _shares(
    column: Column, change: Float[np.ndarray, "C _"], gap: Float[np.ndarray, " B"], resamples: Resamples
) -> dict[str, Float[np.ndarray, " C"]]:
    """Changes as shares of the gap, with their interval if the column has one; NaN where nothing was measured."""
    if not column.has_interval:
        return {column.name: change.mean(1) / gap.mean()}
    known = np.isfinite(change).all(1)
    shares = {name: np.full(len(change), np.nan) for name in (column.name, *column.bounds)}
    if known.any():
        for values, figures in zip(shares.values(), ratio_of_means(change[known], gap, resamples), strict=True):
            values[known] = figures
    return shares


def _kind_statistics(
    sampled: Bool[np.ndarray, " C"] | None,
    controls: Controls,
    delta: Float[np.ndarray, "C B"],
    replaced: Bool[np.ndarray, " C"],
    kinds: np.ndarray,
    swept: Sequence[str],
    queries: Int[np.ndarray, " B"],
    seed: int,
) -> dict[str, Any]:
    """How far the ranking of each kind can be trusted: reliability, nulls, and what a screen missed."""
    halves = [split_half_reliability(delta[replaced & (kinds == kind)], queries, seed=seed) for kind in swept]
    statistics: dict[str, Any] = {"split_half": halves}
    for name in ("permuted", "direction"):
        by_kind = controls.nulls.get(name, {})
        statistics[f"null_{name}"] = [by_kind.get(kind, np.nan) for kind in swept]
    if sampled is None or not sampled.any():
        return statistics
    # A component of the random sample is a hit if its effect is as large as the median of those that were chosen.
    rows = []
    for kind in swept:
        of_kind, size = kinds == kind, np.abs(delta.mean(1))
        chosen, drawn = of_kind & replaced & ~sampled, of_kind & sampled
        hits = int((size[drawn] >= np.median(size[chosen])).sum()) if chosen.any() else 0
        rows.append(missed_interval(hits, int(drawn.sum()), int((of_kind & ~chosen).sum())))
    column = _column("missed")
    values = zip((column.name, *column.bounds), zip(*rows, strict=True), strict=True)
    return statistics | {"sampled": sampled} | {name: np.array(figures, float) for name, figures in values}


def _attributes(
    job: SweepJob, batch: PromptBatch, output: MethodOutput, controls: Controls, resamples: Resamples
) -> dict[str, Any]:
    pair, metric, device = job.pair, job.metric, jax.local_devices()[0]
    interval = mean_interval(job.gap, resamples)
    rows = {} if output.plan is None else output.plan.rows
    attributes = {
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
        "coverage": controls.coverage["all"],
        "noise_floor": max(controls.floor.values(), default=float("nan")),
        "noise_floor_by_kind": controls.floor,
        "rows_per_program": rows,
        "dtype": pair.dtype,
        "device": f"{device.platform} {device.device_kind}",
        "machine": platform.machine(),
        "seed": job.seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "method": job.method.name,
        **job.prepared.attributes,
        **output.attributes,
    }
    named = {"template_date": batch.template_date, "pair_notes": "; ".join(pair.notes)}
    attributes |= {name: value for name, value in named.items() if value}
    if pair.division is not None:
        attributes["directions"] = pair.division.record
    return {  # netCDF has no mappings
        name: json.dumps(dict(value)) if isinstance(value, Mapping) else value for name, value in attributes.items()
    }
