"""The sweep: from a pair of models, prompts and a metric to a result that ranks components, with its controls."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from wpjax.behaviours import PromptBatch
from wpjax.columns import EFFECT
from wpjax.components import (
    KINDS,
    Component,
    check_kind,
    check_with_directions,
    enumerate_components,
    none_of,
    parse_component,
)
from wpjax.engines.engine import CELLS, Engine
from wpjax.errors import ComponentError, WpjaxError
from wpjax.estimators.dataset import Controls, make_dataset
from wpjax.estimators.job import MethodOutput, SweepJob
from wpjax.methods import DEFAULT_METHOD, Method, check_method, find_method
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.metric import Measure, Metric, agreed_metric, expect_finite, expect_positive_gap, scores
from wpjax.pairs import Pair
from wpjax.patching import PatchMask
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.farm import conclude, is_shared
from wpjax.runtime.progress import Progress, silent

DEFAULT_KINDS = ("head", "kv_group", "neuron")
"""The finest kinds. Together they own every weight of a layer but its norms and the output biases of its modules."""


def sweep(
    pair: Pair,
    batch: PromptBatch,
    metric: Measure | Callable[[Pair, PromptBatch], Measure],
    *,
    given: Anchor | None = None,
    kinds: Sequence[str] = DEFAULT_KINDS,
    components: Iterable[Component | str] | None = None,
    method: str = DEFAULT_METHOD,
    top: int = 128,
    stratum: int = 64,
    confidence: float = 0.95,
    n_masks: int = 256,
    seed: int = 0,
    n_resamples: int = 1000,
    gap: Float[np.ndarray, " B"] | None = None,
    like: SweepResult | None = None,
    budget: int | None = None,
    done: MutableMapping[str, np.ndarray] | None = None,
    progress: Progress = silent,
) -> SweepResult:
    """Measure how much of the gap between base and expert each component's weights recover.

        effect(c) = sum over prompts of F(base with c of the expert) - F(base)  /  sum of F(expert) - F(base)

    (docs/method.md, "Weight patching")

    The methods are entries of `wpjax.methods`:

        exact           replaces every component for real
        screen          scores every component by its output-linearised first-order effect (`estimators.screens`)
        screen+exact    makes the same screen, then replaces the `top` components of each kind
        gradient        scores every component by the gradient of its weights
        gradient+exact  makes the same screen, then replaces the `top` components of each kind
        ig              integrated gradients: that gradient, averaged on the way from base to expert
        secant          the secant adjoint, whose scores sum to the gap (`estimators.secant`)
        race            replaces every component on a few prompts, and on more prompts only those that can still be
                        among the `top` of their kind (`estimators.race`)
        masks           replaces random sets: what does a component do beside few, half or most of the others
                        (`estimators.masks`)
        activation      patches the expert's activations instead of its weights; attribution patching is the screen
        factorial       all cells of the 2x2 of weights and input (source, relay, interaction; `estimators.factorial`)
                        and the knock-out in the expert, for the `top` components of both screens

    Args:
        pair: base and expert. Patches are divided among the devices that they stand on (`load_pair`, `Pair.on`).
        batch: prompts; those with the instruction are used.
        metric: what is measured. An `Anchor`; a metric made on this batch (`response_metric`, `decision_metric`,
            `kl_metric`); or an `OnPolicy`, which reads an anchor along each model's own answer. Or a function of
            (pair, batch) that returns one of these, such as `decision_metric` itself.
        given: anchor whose state is given to both models: they are held at the expert's mean score on it, and only
            components after it are swept. Their effects tell which of them execute the behaviour (see
            `Anchor.clamp_to`). None to hold nothing.
        kinds: kinds of components to sweep, in all layers that the metric depends on.
        components: components to sweep instead of whole kinds, as names or `Component`s.
        method: name of the method.
        top: number of components of each kind to replace after a screen: those of largest magnitude. In a race it is k.
            On-policy, as many again are chosen by a screen of the decision score, as words may change there.
        stratum: number of other components of each kind to replace, too. They are drawn at random and show what the
            screen missed.
        confidence: probability that a race loses none of the true `top`.
        n_masks: number of random sets at each share of components, with method "masks".
        seed: seed of resampling, sign flips, shams, nulls and random sets.
        n_resamples: number of bootstrap samples behind the intervals.
        gap: what effects are shares of, prompt by prompt, so that sweeps of several experts can be compared; None for
            the gap of this pair.
        like: a sweep of another expert. The components that it replaced are replaced here, its random sample included,
            whatever a screen says of this expert. None to choose them here.
        budget: bytes for the activations of patches that run at once; None to choose from the device.
        done: finished parts of an earlier attempt (see `runtime.shards.Shards`), or those of a farm
            (`runtime.farm.Farm`). New parts are added as they finish.
        progress: function that is called as work gets done.

    Returns:
        the result. Components are in the order of the table of kinds, then of layers, then of indices.

    Raises:
        WpjaxError: the method does not exist, or needs fixed words and the metric has none; or two arguments that do
            not fit each other.
        ComponentError: a kind or component does not exist, or comes after what the metric reads.
        AnchorRejected: the anchor belongs to another expert.
        MetricRejected: the gap on these prompts may be zero.
        BehaviourError: the model cannot take the prompts.
        Unfinished: this process is one part of a farm, and its own pieces are done; or it collects, and some are not.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> batch = task.encode(pair.tokenizer, n_prompts=4)
    >>> anchor = wp.fit_anchor(pair, task, causal="skip", n_prompts=16)
    >>> result = wp.sweep(pair, batch, anchor, kinds=("head",), method="screen")
    >>> result.ranking, len(result.values("screen"))  # 8 heads in each of the layers up to the anchor
    ('screen', 56)
    """
    started = time.perf_counter()
    metric = _measure(metric, pair, batch)
    chosen_method = check_method(method, metric.has_fixed_words)
    pair.check_prompts(batch)
    components = None if components is None else _named(pair, components)
    check_directions(pair, kinds if components is None else {c.kind for c in components}, method)
    if given is not None and not metric.has_fixed_words:
        raise WpjaxError("the on-policy score reads the anchor, so its state cannot be given; drop one of them")
    prepared = metric.prepare(pair, batch)
    if len(prepared.metric) != len(batch):
        raise WpjaxError(
            f"the metric has {len(prepared.metric)} prompts, the batch {len(batch)}; make it on this batch"
        )
    if given is not None:  # the same metric, with both models held at the given anchor's state
        given.check_belongs(pair)
        held = given.clamp_to(pair, batch, prepared.metric)
        attributes = {**prepared.attributes, **given.attributes(batch.behaviour)}
        prepared = dataclasses.replace(prepared, metric=held, attributes=attributes)
    swept = _swept_components(pair, prepared.reach_metric or prepared.metric, kinds, components)
    followed = None if like is None else _followed(like, chosen_method, swept)
    if done is not None and is_shared(done):
        prepared = dataclasses.replace(prepared, metric=agreed_metric(prepared.metric, done))
    read = prepared.score or functools.partial(scores, pair.cfg, metric=prepared.metric)
    base_score, expert_score = (read(params) for params in (pair.base, pair.expert))
    for params, score, name in ((pair.base, base_score, "the base"), (pair.expert, expert_score, "the expert")):
        expect_finite(pair.cfg, params, prepared.metric, score, name)
    if gap is None:
        gap = (expert_score - base_score).astype(np.float64)
    # Effects are shares of the gap, so a sweep of a gap that may be zero is refused before any work is done.
    expect_positive_gap(gap, batch.queries, f"the {prepared.metric.name} metric of {batch.behaviour}", seed)
    job = SweepJob(
        chosen_method, pair, prepared, swept, batch.queries, gap,
        top=top, stratum=stratum, confidence=confidence, n_masks=n_masks, seed=seed, like=followed, budget=budget,
        done={} if done is None else done, progress=progress,
    )  # fmt: skip
    output: MethodOutput = chosen_method.run(job)
    dataset = make_dataset(job, batch, output, _controls(job, output), n_resamples)
    dataset.attrs["wall_time_s"] = round(time.perf_counter() - started, 3)
    return SweepResult(dataset)


def _followed(like: SweepResult, method: Method, swept: Sequence[Component]) -> dict[str, bool]:
    """The names of the components that a sweep replaced, and whether each was of its random sample.

    Raises:
        WpjaxError: the method finds its components on the way, or the sweep was of other components.
    """
    if not method.can_follow:
        raise WpjaxError(f"method {method.name} finds its components on the way, so it cannot take those of `like`")
    data = like.swept.dataset
    names = data["name"].values.astype(str).tolist()
    if names != [c.name for c in swept]:
        raise WpjaxError("`like` is a sweep of other components than these; sweep the same kinds or names in both")
    sampled = data["sampled"].values.tolist() if "sampled" in data else [False] * len(names)
    replaced = np.isfinite(data["p_value"].values).tolist()
    return {name: bool(s) for name, s, r in zip(names, sampled, replaced, strict=True) if r}


def check_directions(pair: Pair, kinds: Iterable[str], method: str) -> None:
    """Refuse directions where they cannot be swept, and what would be misread beside them.

    Args:
        pair: base and expert.
        kinds: kinds of the components to sweep.
        method: name of the method.

    Raises:
        ComponentError: the pair is not divided into directions, or is and other kinds own the same matrices; or the
            method asks for what a component puts out with the expert's input.
    """
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in kinds:
        check_kind(kind)
    check_with_directions(kinds, pair.division is not None)
    if "delta_direction" not in kinds:
        return
    if pair.division is None:
        raise ComponentError("this pair is not divided into directions; divide it first: pair = wp.by_directions(pair)")
    entry = find_method(method)
    by_input = [] if entry is None else [cell for cell in entry.cells if CELLS[cell].inputs == "donor"]
    if by_input:
        raise ComponentError(
            f"method {method} patches what a component puts out, and of a direction only the weights are patched; take "
            "another method, such as exact, screen+exact, secant or masks"
        )


def _named(pair: Pair, components: Iterable[Component | str]) -> list[Component]:
    """Components of a pair that were named; one name alone will do.

    Raises:
        ComponentError: there is none, or one does not exist.
    """
    listed = [components] if isinstance(components, str) else list(components)
    if not listed:
        raise ComponentError("the list of components to sweep is empty; name at least one, e.g. L3.head.5")
    return [parse_component(pair.cfg, c if isinstance(c, str) else c.name) for c in listed]


def _measure(metric: Any, pair: Pair, batch: PromptBatch) -> Measure:
    """The metric as a `Measure`; a function that makes one is called.

    Raises:
        WpjaxError: it is neither.
    """
    what = (
        "an Anchor (wp.fit_anchor), a metric made on this batch (such as wp.decision_metric(pair, batch)), an "
        "OnPolicy, or a function of (pair, batch) that returns one of these"
    )
    if isinstance(metric, Measure):
        return metric
    if not callable(metric):
        raise WpjaxError(f"the metric is {type(metric).__name__}; pass {what}")
    try:
        inspect.signature(metric).bind(pair, batch)
    except (TypeError, ValueError) as error:
        raise WpjaxError(f"the metric is a function that does not take (pair, batch): {error}; pass {what}") from error
    made = metric(pair, batch)
    if not isinstance(made, Measure):
        raise WpjaxError(f"the metric is a function that returns {type(made).__name__}; pass {what}")
    return made


def _controls(job: SweepJob, output: MethodOutput) -> Controls:
    """Noise floor and nulls for the patches that were made, and the share that all components recover together."""
    floor: dict[str, float] = {}
    nulls: dict[str, dict[str, float]] = {}
    if output.plan is not None:
        floor = job.engine.noise_floor(output.plan, job.gap, job.seed)
        if EFFECT in output.changes:  # nulls are of weight patches
            nulls = job.engine.nulls(output.plan, job.gap, job.seed)
    conclude(job.done)
    return Controls(_coverage(job.engine, job.components, job.gap, job.budget, job.progress), floor, nulls)


def _swept_components(
    pair: Pair, metric: Metric, kinds: Sequence[str], components: Sequence[Component] | None
) -> list[Component]:
    """The components to sweep, each once and in order; all of them must be able to change the metric."""
    if components is not None:
        named = list(components)
    else:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        for kind in kinds:
            check_kind(kind)
        named = enumerate_components(pair.cfg, dict.fromkeys(kinds), range(metric.first_layer, metric.layer + 1))
    unreachable = [c for c in named if not metric.reaches(c)]
    if unreachable:
        names = ", ".join(c.name for c in unreachable[:4])
        if metric.held is not None and unreachable[0].layer < metric.first_layer:
            raise ComponentError(
                f"{names}: not after layer {metric.first_layer - 1}, where a state is given; sweep later layers"
            )
        raise ComponentError(
            f"{names}: after layer {metric.layer}, which the {metric.name} metric reads, so no patch of it can change "
            "the metric; take one that reads the answer (response, decision, kl)"
        )
    if not named:
        raise none_of(kinds)
    return sorted(dict.fromkeys(named), key=lambda c: (list(KINDS).index(c.kind), c.layer, c.index))


def _coverage(
    engine: Engine,
    chosen: Sequence[Component],
    gap: Float[np.ndarray, " B"],
    budget: int | None,
    progress: Progress,
) -> dict[str, float]:
    """Share of the gap that the swept components of each kind recover together, and that all of them do ("all")."""
    sets = {kind: [c for c in chosen if c.kind == kind] for kind in dict.fromkeys(c.kind for c in chosen)}
    sets["all"] = list(chosen)
    progress("joint patches", 0, len(sets))
    # The empty set is the base. It runs in the same program as the others, so it has the same rounding.
    masks = [PatchMask.of(engine.pair.cfg, members) for members in (*sets.values(), [])]
    *joint, nothing = engine.joint(masks, budget)
    progress("joint patches", len(sets), len(sets))
    share = (np.stack(joint) - nothing).mean(1, dtype=np.float64) / gap.mean()
    return dict(zip(sets, share.tolist(), strict=True))
