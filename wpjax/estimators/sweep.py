"""The sweep: from a pair, prompts and a metric to a ranked result with its controls."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, MutableMapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from wpjax.behaviours import PromptBatch
from wpjax.columns import EFFECT
from wpjax.components import KINDS, Component, check_kind, enumerate_components, parse_component
from wpjax.engines.engine import Engine
from wpjax.errors import ComponentError, WpjaxError
from wpjax.estimators.dataset import Controls, make_dataset
from wpjax.estimators.job import Found, Job
from wpjax.methods import check_method
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.metric import Measure, Metric, expect_positive_gap, scores
from wpjax.pairs import Pair
from wpjax.patching import PatchMask
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.placement import Placement
from wpjax.runtime.progress import Progress, silent

DEFAULT_KINDS = ("head", "kv_group", "neuron")


def sweep(
    pair: Pair,
    batch: PromptBatch,
    metric: Measure,
    *,
    given: Anchor | None = None,
    kinds: Sequence[str] = DEFAULT_KINDS,
    components: Iterable[Component | str] | None = None,
    method: str = "exact",
    top: int = 512,
    stratum: int = 64,
    confidence: float = 0.95,
    n_masks: int = 256,
    seed: int = 0,
    n_resamples: int = 1000,
    budget: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    done: MutableMapping[str, np.ndarray] | None = None,
    progress: Progress = silent,
) -> SweepResult:
    """Measure how much of the gap between base and expert each component's weights recover.

        effect(c) = sum over prompts of F(base with c of the expert) - F(base)  /  sum of F(expert) - F(base)

    Args:
        pair: base and expert.
        batch: prompts; only those with the instruction are used.
        metric: what is measured: an anchor, or a metric made on this batch (`response_metric`, `decision_metric`,
            `kl_metric`), or an anchor along each model's own answer (`OnPolicy`, see `engines.on_policy`).
        given: both models are held at the expert's mean state on this anchor, and what comes after it is swept: which
            components execute the behaviour (see `Anchor.clamp_to`)?
        kinds: kinds of components to sweep, in all layers that the metric depends on.
        components: sweep these instead of whole kinds, by name or as `Component`s.
        method: how, by the name of an entry of `wpjax.methods`. "exact" replaces every component for real; "screen"
            scores all of them by the output-linearised first-order effect; "screen+exact" screens, then replaces the
            `top` ones of each kind; "gradient" is the weight-gradient screen, "gradient+exact" replaces its `top` ones,
            "ig" is its average on the way from base to expert, "secant" the secant adjoint, whose scores sum to the
            gap; "race" replaces every component on a few prompts and only those that can still be among the `top` of
            their kind on more (see `estimators.race`); "masks" replaces random sets (see `estimators.masks`): what a
            component does among few, half or most of the others; "activation" patches the expert's activations instead
            of its weights, after attribution patching as the screen; "factorial" measures all cells of the 2x2 (source,
            relay, interaction, see `estimators.factorial`) and the knock-out in the expert, for the `top` ones of both
            screens.
        top: how many of each kind are replaced after a screen, chosen by its magnitude (on-policy, as many again by
            that of the decision score's, where words may change); k of a race.
        stratum: how many of the others of each kind are replaced too, at random, to estimate what the screen missed.
        confidence: of a race, that none of the true `top` is lost.
        n_masks: random sets at each share of components, with method "masks".
        seed: of resampling, sign flips, shams, nulls and random sets.
        n_resamples: bootstrap samples of the intervals.
        budget: bytes for a chunk's activations; None to choose from the device.
        devices: that share every chunk of patches; None for all of this process.
        done: finished parts of an earlier attempt, extended as the sweep goes on (see `results.Shards`).
        progress: called as work gets done.

    Returns:
        the result; components in the order of the table of kinds, of layers and of indices.

    Raises:
        WpjaxError: a method that does not exist, or that needs fixed words; or two arguments that do not fit.
        ComponentError: a kind or component that does not exist, or that comes after what the metric reads.
        AnchorRejected: the anchor belongs to another expert.
        MetricRejected: the gap on these prompts may be zero.
        BehaviourError: prompts that the model cannot take.
    """
    started = time.perf_counter()
    chosen_method = check_method(method, metric.has_fixed_words)
    batch.check_fits(pair.cfg.n_ctx, pair.cfg.d_vocab)
    if given is not None and not metric.has_fixed_words:
        raise WpjaxError("the on-policy score reads the anchor, so its state cannot be given; drop one of them")
    prepared = metric.prepare(pair, batch)
    if len(prepared.metric) != len(batch):
        raise WpjaxError(
            f"the metric has {len(prepared.metric)} prompts, the batch {len(batch)}; make it on this batch"
        )
    if given is not None:
        given.check_belongs(pair)
        held = given.clamp_to(pair, batch, prepared.metric)
        attributes = {**prepared.attributes, "anchor_acceptance": given.acceptance}
        prepared = dataclasses.replace(prepared, metric=held, attributes=attributes)
    swept = _swept_components(pair, prepared.reached_by or prepared.metric, kinds, components)
    read = prepared.score or functools.partial(scores, pair.cfg, metric=prepared.metric)
    base_score, expert_score = (read(params) for params in (pair.base, pair.expert))
    gap = (expert_score - base_score).astype(np.float64)
    expect_positive_gap(gap, batch.queries, f"the {prepared.metric.name} metric of {batch.behaviour}", seed)
    job = Job(
        chosen_method, pair, prepared, swept, batch.queries, gap,
        top=top, stratum=stratum, confidence=confidence, n_masks=n_masks, seed=seed, budget=budget,
        done={} if done is None else done, progress=progress, placement=Placement.on(devices),
    )  # fmt: skip
    found: Found = chosen_method.run(job)
    dataset = make_dataset(job, batch, found, _controls(job, found), n_resamples)
    dataset.attrs["wall_time_s"] = round(time.perf_counter() - started, 3)
    return SweepResult(dataset)


def _controls(job: Job, found: Found) -> Controls:
    """Shams and nulls of the patches that were made, and what all components recover together."""
    floor: dict[str, float] = {}
    nulls: dict[str, dict[str, float]] = {}
    if found.plan is not None:
        floor = job.engine.noise_floor(found.plan, job.gap, job.seed)
        if EFFECT in found.changes:
            nulls = job.engine.nulls(found.plan, job.gap, job.seed)
    return Controls(_coverage(job.engine, job.components, job.gap, job.budget, job.progress), floor, nulls)


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
        named = enumerate_components(pair.cfg, dict.fromkeys(kinds), range(metric.first_layer, metric.layer + 1))
    beside = [c for c in named if not metric.reaches(c)]
    if beside:
        names = ", ".join(c.name for c in beside[:4])
        if metric.held is not None and beside[0].layer < metric.first_layer:
            raise ComponentError(
                f"{names}: not after layer {metric.first_layer - 1}, where a state is given; sweep later layers"
            )
        raise ComponentError(
            f"{names}: after layer {metric.layer}, which the {metric.name} metric reads, so no patch of it can change "
            "the metric; take one that reads the answer (response, decision, kl)"
        )
    if not named:
        raise ComponentError(f"nothing to sweep: this model has no {', '.join(kinds)}")
    return sorted(dict.fromkeys(named), key=lambda c: (list(KINDS).index(c.kind), c.layer, c.index))


def _coverage(
    engine: Engine,
    chosen: Sequence[Component],
    gap: Float[np.ndarray, " B"],
    budget: int | None,
    progress: Progress,
) -> dict[str, float]:
    """Share of the gap recovered by all swept components of each kind together, and by all of them ("all")."""
    sets = {kind: [c for c in chosen if c.kind == kind] for kind in dict.fromkeys(c.kind for c in chosen)}
    sets["all"] = list(chosen)
    progress("joint patches", 0, len(sets))
    masks = [PatchMask.of(engine.pair.cfg, members) for members in (*sets.values(), [])]
    *joint, nothing = engine.joint(masks, budget)
    progress("joint patches", len(sets), len(sets))
    share = (np.stack(joint) - nothing).mean(1, dtype=np.float64) / gap.mean()  # of one program, as rounding is
    return dict(zip(sets, share.tolist(), strict=True))
