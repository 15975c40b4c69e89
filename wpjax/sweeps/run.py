"""The sweep: from a pair, prompts and an anchor to a ranked result with its controls."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import xarray as xr
from jaxtyping import Float

import wpjax
from wpjax.anchors import Anchor, LayerDiagnostics
from wpjax.behaviours import PromptBatch
from wpjax.components import KINDS, Component, check_kind, enumerate_components, parse_component
from wpjax.errors import ComponentError, WpjaxError
from wpjax.metrics import Metric, expect_positive_gap
from wpjax.models.decoder import Params
from wpjax.pairs import Pair
from wpjax.patching import PatchMask
from wpjax.results import SCHEMA, SweepResult
from wpjax.stats import Resamples, benjamini_hochberg, mean_interval, ratio_of_means, resample, sign_flip_p
from wpjax.sweeps.exact import Chunk, Plan, exact_changes, make_plan, sham_plan
from wpjax.sweeps.reference import patched_score
from wpjax.sweeps.replay import run_model
from wpjax.sweeps.screens import output_linearised, weight_gradient

Method = Literal["exact", "screen", "screen+exact", "gradient"]
METHODS: tuple[Method, ...] = ("exact", "screen", "screen+exact", "gradient")
DEFAULT_KINDS = ("head", "kv_group", "neuron")
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class Effects(NamedTuple):
    """Changes of the metric, in components x prompts; NaN where not measured."""

    delta: Float[np.ndarray, "C B"]
    floor: dict[str, float]
    plan: Plan


def sweep(
    pair: Pair,
    batch: PromptBatch,
    metric: Anchor | Metric,
    *,
    kinds: Sequence[str] = DEFAULT_KINDS,
    components: Iterable[Component | str] | None = None,
    method: Method = "exact",
    top: int = 512,
    seed: int = 0,
    n_resamples: int = 1000,
    budget: int | None = None,
    done: MutableMapping[str, np.ndarray] | None = None,
    progress: Progress = lambda what, i, n: None,
) -> SweepResult:
    """Measure how much of the gap between base and expert each component's weights recover.

        effect(c) = sum over prompts of F(base with c of the expert) - F(base)  /  sum of F(expert) - F(base)

    Args:
        pair: base and expert.
        batch: prompts; only those with the instruction are used.
        metric: what is measured: an anchor, or a metric made on this batch (`response_metric`, `decision_metric`).
        kinds: kinds of components to sweep, in all layers that the metric depends on.
        components: sweep these instead of whole kinds, by name or as `Component`s.
        method: "exact" replaces every component for real; "screen" scores all of them by the output-linearised
            first-order effect; "screen+exact" screens, then replaces the `top` ones of each kind; "gradient" is the
            weight-gradient screen.
        top: how many of each kind "screen+exact" replaces, chosen by the screen's magnitude.
        seed: of resampling, sign flips and shams.
        n_resamples: bootstrap samples of the intervals.
        budget: bytes for a chunk's activations; None to choose from the device.
        done: finished parts of an earlier attempt, extended as the sweep goes on (see `results.Shards`).
        progress: called as work gets done.

    Returns:
        the result; components in the order of the table of kinds, of layers and of indices.

    Raises:
        ComponentError: a kind or component that does not exist, or that comes after what the metric reads.
        AnchorRejected: the anchor belongs to another expert.
        MetricRejected: the gap on these prompts may be zero.
        BehaviourError: prompts that the model cannot take.
    """
    started = time.perf_counter()
    if method not in METHODS:
        raise WpjaxError(f"unknown method {method!r}; methods: {', '.join(METHODS)}")
    anchor = metric if isinstance(metric, Anchor) else None
    if isinstance(metric, Anchor):
        metric.check_belongs(pair)
        metric = metric.on(batch)
    if len(metric) != len(batch):
        raise WpjaxError(f"the metric has {len(metric)} prompts, the batch {len(batch)}; make it on this batch")
    batch.check_fits(pair.cfg.n_ctx, pair.cfg.d_vocab)
    chosen = _swept_components(pair, metric, kinds, components)
    done = {} if done is None else done
    ends = (mask(pair.cfg) for mask in (PatchMask.empty, PatchMask.full))
    base_score, expert_score = (patched_score(pair.cfg, pair.base, pair.expert, mask, metric) for mask in ends)
    gap = (expert_score - base_score).astype(np.float64)
    name = f"the {metric.name} metric of {batch.behaviour}"
    expect_positive_gap(gap, batch.queries, name, seed)

    first_order: dict[str, Float[np.ndarray, "C B"]] = {}
    if method != "exact":
        name, run_screen = ("gradient", weight_gradient) if method == "gradient" else ("screen", output_linearised)
        progress(f"{name} of {len(chosen)} components", 0, 1)
        if name not in done:
            done[name] = run_screen(pair.cfg, pair.base, pair.expert, chosen, metric)
        first_order[name] = done[name]
        progress(f"{name} of {len(chosen)} components", 1, 1)
    if method == "exact":
        replaced = list(range(len(chosen)))
    else:
        replaced = _highest(chosen, first_order["screen"].mean(1), top) if method == "screen+exact" else []
    effects = _replace(pair, metric, chosen, replaced, gap, seed, budget, done, progress)
    coverage = _coverage(pair, metric, chosen, gap, base_score, progress)
    dataset = _dataset(pair, batch, metric, anchor, chosen, gap, effects, first_order, coverage, seed, n_resamples)
    dataset.attrs |= {"method": method, "wall_time_s": round(time.perf_counter() - started, 3)}
    return SweepResult(dataset)


def _swept_components(
    pair: Pair, metric: Metric, kinds: Sequence[str], components: Iterable[Component | str] | None
) -> list[Component]:
    if components is not None:
        components = [components] if isinstance(components, str) else list(components)
        if not components:
            raise ComponentError("the list of components to sweep is empty; name at least one, e.g. L3.head.5")
        named = [parse_component(pair.cfg, c if isinstance(c, str) else c.name) for c in components]
    else:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        for kind in kinds:
            check_kind(kind)
        named = enumerate_components(pair.cfg, dict.fromkeys(kinds), range(metric.layer + 1))
    late = [c.name for c in named if not metric.reaches(c)]
    if late:
        raise ComponentError(
            f"{', '.join(late[:4])}: after layer {metric.layer}, which the {metric.name} metric reads, so no patch of "
            "it can change the metric; take one that reads the answer (response, decision)"
        )
    if not named:
        raise ComponentError(f"nothing to sweep: this model has no {', '.join(kinds)}")
    return sorted(dict.fromkeys(named), key=lambda c: (list(KINDS).index(c.kind), c.layer, c.index))


def _highest(components: Sequence[Component], values: Float[np.ndarray, " C"], top: int) -> list[int]:
    """Positions of the `top` largest magnitudes of each kind, in order of position."""
    found: list[int] = []
    for kind in dict.fromkeys(c.kind for c in components):
        mine = [i for i, c in enumerate(components) if c.kind == kind]
        found += sorted(mine, key=lambda i: -abs(values[i]))[:top]
    return sorted(found)


def _replace(
    pair: Pair,
    metric: Metric,
    chosen: Sequence[Component],
    replaced: Sequence[int],
    gap: Float[np.ndarray, " B"],
    seed: int,
    budget: int | None,
    done: MutableMapping[str, np.ndarray],
    progress: Progress,
) -> Effects:
    """Exact changes of the replaced components, and the noise floor of each kind from shams."""
    n_prompts, n_tokens = metric.tokens.ids.shape
    plan = make_plan(pair.cfg, [chosen[i] for i in replaced], n_prompts, n_tokens, budget)
    position = {c: i for i, c in enumerate(chosen)}
    delta = np.full((len(chosen), len(metric)), np.nan)
    run = run_model(pair.cfg, pair.base, metric)

    def perform(prefix: str, plan: Plan, donor: Params, jitter_seed: int | None) -> list[tuple[Chunk, np.ndarray]]:
        keys = {_key(prefix, chunk): chunk for chunk in plan.chunks}
        waiting = Plan(plan.rows, tuple(chunk for key, chunk in keys.items() if key not in done))
        n_done = len(keys) - len(waiting.chunks)
        args = (pair.cfg, pair.base, donor, (run, None), metric, waiting)
        for chunk, changes in exact_changes(*args, jitter_seed=jitter_seed):
            done[_key(prefix, chunk)] = changes
            n_done += 1
            progress(f"{prefix} patches", n_done, len(keys))
        return [(chunk, done[key]) for key, chunk in keys.items()]

    for chunk, changes in perform("exact", plan, pair.expert, None):
        if not np.isfinite(changes).all():
            names = ", ".join(c.name for c in chunk.components[:4])
            raise WpjaxError(f"a patch of {names} gives scores that are not finite; check the checkpoints for NaN")
        delta[[position[c] for c in chunk.components]] = changes
    floor = dict.fromkeys(plan.rows, 0.0)
    for chunk, changes in perform("sham", sham_plan(plan), pair.base, seed):
        floor[chunk.kind] = max(floor[chunk.kind], float(np.abs(changes.mean(1)).max() / gap.mean()))
    return Effects(delta, floor, plan)


def _key(prefix: str, chunk: Chunk) -> str:
    names = " ".join(c.name for c in chunk.components)
    return f"{prefix}-{chunk.kind}-{chunk.layer}-{hashlib.blake2b(names.encode(), digest_size=8).hexdigest()}"


def _coverage(
    pair: Pair,
    metric: Metric,
    chosen: Sequence[Component],
    gap: Float[np.ndarray, " B"],
    base_score: Float[np.ndarray, " B"],
    progress: Progress,
) -> dict[str, float]:
    """Share of the gap recovered by all swept components of each kind together, and by all of them ("all")."""
    sets = {kind: [c for c in chosen if c.kind == kind] for kind in dict.fromkeys(c.kind for c in chosen)}
    sets["all"] = list(chosen)
    joint: dict[str, float] = {}
    for i, (kind, members) in enumerate(sets.items()):
        mask = PatchMask.of(pair.cfg, members)
        score = patched_score(pair.cfg, pair.base, pair.expert, mask, metric)
        joint[kind] = float((score - base_score).mean(dtype=np.float64) / gap.mean())
        progress("joint patches", i + 1, len(sets))
    return joint


def _dataset(
    pair: Pair,
    batch: PromptBatch,
    metric: Metric,
    anchor: Anchor | None,
    chosen: Sequence[Component],
    gap: Float[np.ndarray, " B"],
    effects: Effects,
    first_order: dict[str, Float[np.ndarray, "C B"]],
    coverage: dict[str, float],
    seed: int,
    n_resamples: int,
) -> xr.Dataset:
    resamples = resample(batch.queries, n_resamples, seed)
    delta, n = effects.delta, len(chosen)
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
        columns["p_value"][exact] = sign_flip_p(delta[exact], batch.queries, seed=seed)
        # All swept components are the family, those that a screen on the same prompts left out at p = 1: the rates
        # would not hold among the chosen alone.
        columns["q_value"][exact] = benjamini_hochberg(np.where(exact, columns["p_value"], 1.0))[exact]
    floor = np.array([effects.floor.get(kind, np.nan) for kind in kinds])
    variables: dict[str, Any] = {name: ("component", values) for name, values in columns.items()}
    variables |= {name: ("component", values.mean(1) / gap.mean()) for name, values in first_order.items()}
    best = columns["effect"].copy()  # first order where nothing was replaced
    for values in first_order.values():
        best[~exact] = values.mean(1)[~exact] / gap.mean()
    swept = list(dict.fromkeys(kinds.tolist()))
    variables |= {
        "exact": ("component", exact),
        "below_noise_floor": ("component", np.abs(columns["effect"]) <= floor),
        "delta_norm": ("component", pair.delta_norms(chosen)),
        "delta": (("component", "prompt"), delta.astype(np.float32)),
        "gap": ("prompt", gap),
        "query": ("prompt", batch.queries),
        "coverage_joint": ("swept_kind", [coverage[kind] for kind in swept]),
        "coverage_sum": ("swept_kind", [float(best[kinds == kind].sum()) for kind in swept]),
        "n_components": ("swept_kind", [int((kinds == kind).sum()) for kind in swept]),
    }
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
    return xr.Dataset(variables, coords, _attributes(pair, batch, metric, gap, resamples, effects, coverage, seed))


def _attributes(
    pair: Pair,
    batch: PromptBatch,
    metric: Metric,
    gap: Float[np.ndarray, " B"],
    resamples: Resamples,
    effects: Effects,
    coverage: dict[str, float],
    seed: int,
) -> dict[str, Any]:
    device = jax.local_devices()[0]
    interval = mean_interval(gap, resamples)
    return {
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
        "gap_mean": interval.mean,
        "gap_low": interval.low,
        "gap_high": interval.high,
        "coverage": coverage["all"],
        "noise_floor": max(effects.floor.values(), default=float("nan")),
        "noise_floor_by_kind": json.dumps(effects.floor),
        "rows_per_program": json.dumps(effects.plan.rows),
        "dtype": str(pair.base["embed"]["W_E"].dtype),
        "device": f"{device.platform} {device.device_kind}",
        "machine": platform.machine(),
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
