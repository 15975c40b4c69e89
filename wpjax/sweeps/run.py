"""The sweep: from a pair, prompts and a metric to a ranked result with its controls."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from wpjax.anchors import Anchor
from wpjax.behaviours import PromptBatch
from wpjax.components import KINDS, Component, check_kind, enumerate_components, parse_component
from wpjax.errors import ComponentError, MetricRejected, WpjaxError
from wpjax.metrics import Metric, decision_metric, expect_positive_gap, scores
from wpjax.pairs import Pair
from wpjax.patching import PatchMask
from wpjax.results import SweepResult, finished_part
from wpjax.sweeps.dataset import Measured, make_dataset
from wpjax.sweeps.engine import Engine, Progress
from wpjax.sweeps.exact import make_plan
from wpjax.sweeps.masks import SHARES, random_masks
from wpjax.sweeps.on_policy import OnPolicy, OnPolicyEngine, Speech
from wpjax.sweeps.race import race
from wpjax.sweeps.screens import integrated_gradients, output_linearised, weight_gradient
from wpjax.sweeps.secant import secant_adjoint

Method = Literal[
    "exact",
    "screen",
    "screen+exact",
    "gradient",
    "gradient+exact",
    "ig",
    "secant",
    "race",
    "masks",
    "activation",
    "factorial",
]


class Recipe(NamedTuple):
    """What a method does: which first-order estimates, which of them choose what is replaced, and how it is replaced.

    With cells but nothing that chooses, everything is replaced. With `race`, a race chooses; with `masks`, sets of
    components are replaced.
    """

    screens: tuple[str, ...] = ()
    choose: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    race: bool = False
    masks: bool = False


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "exact": Recipe(cells=("exact",)),
        "screen": Recipe(("screen",)),
        "screen+exact": Recipe(("screen",), ("screen",), ("exact",)),
        "gradient": Recipe(("gradient",)),
        "gradient+exact": Recipe(("gradient",), ("gradient",), ("exact",)),
        "ig": Recipe(("ig",)),
        "secant": Recipe(("secant",)),
        "race": Recipe(cells=("exact",), race=True),
        "masks": Recipe(masks=True),
        "activation": Recipe(("attribution",), ("attribution",), ("activation",)),
        "factorial": Recipe(
            ("screen", "attribution"), ("screen", "attribution"), ("exact", "activation", "relay", "knockout")
        ),
    }
)
METHODS: tuple[str, ...] = tuple(RECIPES)
ON_POLICY_METHODS = ("exact", "screen", "screen+exact", "gradient", "gradient+exact")
"""Methods for a score that depends on what is said: those that take one component at a time, or the slope."""
DEFAULT_KINDS = ("head", "kv_group", "neuron")


SCREENS: Mapping[str, Callable[..., np.ndarray]] = MappingProxyType(
    {
        "screen": output_linearised,
        "gradient": weight_gradient,
        "ig": integrated_gradients,
        "secant": secant_adjoint,
        "attribution": functools.partial(output_linearised, inputs="donor"),
    }
)
"""First-order estimates by name."""


def check_method(method: str, on_policy: bool = False) -> None:
    """Refuse a method that there is not, or not for the on-policy score.

    Raises:
        WpjaxError: with the methods that there are.
    """
    if method not in METHODS:
        raise WpjaxError(f"unknown method {method!r}; methods: {', '.join(METHODS)}")
    if on_policy and method not in ON_POLICY_METHODS:
        raise WpjaxError(
            f"method {method} needs fixed words, and on-policy they change with every patch; take one of "
            f"{', '.join(ON_POLICY_METHODS)}"
        )


def sweep(
    pair: Pair,
    batch: PromptBatch,
    metric: Anchor | Metric | OnPolicy,
    *,
    given: Anchor | None = None,
    kinds: Sequence[str] = DEFAULT_KINDS,
    components: Iterable[Component | str] | None = None,
    method: Method = "exact",
    top: int = 512,
    stratum: int = 64,
    confidence: float = 0.95,
    n_masks: int = 256,
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
        metric: what is measured: an anchor, or a metric made on this batch (`response_metric`, `decision_metric`,
            `kl_metric`), or an anchor along each model's own answer (`OnPolicy`, see `sweeps.on_policy`).
        given: both models are held at the expert's mean state on this anchor, and what comes after it is swept: which
            components execute the behaviour (see `Anchor.give`)?
        kinds: kinds of components to sweep, in all layers that the metric depends on.
        components: sweep these instead of whole kinds, by name or as `Component`s.
        method: "exact" replaces every component for real; "screen" scores all of them by the output-linearised
            first-order effect; "screen+exact" screens, then replaces the `top` ones of each kind; "gradient" is the
            weight-gradient screen, "gradient+exact" replaces its `top` ones, "ig" is its average on the way from base
            to expert, "secant" the secant adjoint, whose scores sum to the gap; "race" replaces every component on a
            few prompts and only those that can still be among the `top` of their kind on more (see `sweeps.race`);
            "masks" replaces random sets (see `sweeps.masks`): what a component does among few, half or most of the
            others; "activation" patches the expert's activations instead of its weights, after attribution patching as
            the screen; "factorial" measures all cells of the 2x2 (source, relay, interaction, see
            `dataset.two_by_two`) and the knock-out in the expert, for the `top` ones of both screens.
        top: how many of each kind are replaced after a screen, chosen by its magnitude (on-policy, as many again by
            that of the decision score's, where words may change); k of a race.
        stratum: how many of the others of each kind are replaced too, at random, to estimate what the screen missed.
        confidence: of a race, that none of the true `top` is lost.
        n_masks: random sets at each share of components, with method "masks".
        seed: of resampling, sign flips, shams, nulls and random sets.
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
    check_method(method, isinstance(metric, OnPolicy))
    batch.check_fits(pair.cfg.n_ctx, pair.cfg.d_vocab)
    anchor = metric.anchor if isinstance(metric, OnPolicy) else metric if isinstance(metric, Anchor) else None
    if anchor is not None:
        anchor.check_belongs(pair)
    speech: Speech | None = None
    if isinstance(metric, OnPolicy):
        if given is not None:
            raise WpjaxError("the on-policy score reads the anchor, so its state cannot be given; drop one of them")
        speech = metric.speech(pair, batch)
        metric = speech.metric
    elif isinstance(metric, Anchor):
        metric = metric.metric(pair, batch)
    if len(metric) != len(batch):
        raise WpjaxError(f"the metric has {len(metric)} prompts, the batch {len(batch)}; make it on this batch")
    if given is not None:
        given.check_belongs(pair)
        metric = given.give(pair, batch, metric)
    chosen = _swept_components(pair, metric if speech is None else speech.kept, kinds, components)
    done = {} if done is None else done
    read = functools.partial(scores, pair.cfg, metric=metric) if speech is None else speech.score
    base_score, expert_score = (read(params) for params in (pair.base, pair.expert))
    gap = (expert_score - base_score).astype(np.float64)
    name = f"the {metric.name} metric of {batch.behaviour}"
    expect_positive_gap(gap, batch.queries, name, seed)

    recipe = RECIPES[method]
    first_order: dict[str, Float[np.ndarray, "C B"]] = {}
    for name in recipe.screens:
        progress(f"{name} of {len(chosen)} components", 0, 1)
        if name not in done:
            done[name] = SCREENS[name](pair.cfg, pair.base, pair.expert, chosen, metric)
        first_order[name] = finished_part(done, name, (len(chosen), len(batch)))
        progress(f"{name} of {len(chosen)} components", 1, 1)
    replaced, sampled = list(range(len(chosen))) if recipe.cells else [], np.zeros(len(chosen), bool)
    if recipe.choose:
        choosing = [first_order[name] for name in recipe.choose]
        if speech is not None:  # words have no slope; where base and expert part ways, one may tip
            with contextlib.suppress(MetricRejected):  # they hardly part
                where = decision_metric(pair, batch, speech.max_new_tokens)
                choosing.append(output_linearised(pair.cfg, pair.base, pair.expert, chosen, where))
        best = {i for values in choosing for i in _highest(chosen, values.mean(1), top)}
        sampled[_stratum(chosen, best, stratum, seed)] = True
        replaced = sorted({*best, *np.flatnonzero(sampled).tolist()})
    attributes: dict[str, Any] = {}
    if recipe.race:
        found_first = race(
            pair, metric, chosen, batch.queries,
            top=top, confidence=confidence, seed=seed, budget=budget, done=done, progress=progress,
        )  # fmt: skip
        first_order["race"], replaced = found_first.mean[:, None], found_first.chosen
        undecided = json.dumps(found_first.undecided)
        attributes = {"race_share": found_first.share, "race_confidence": confidence, "race_undecided": undecided}
    engine = (
        Engine(pair, metric, chosen, done, progress)
        if speech is None
        else OnPolicyEngine(speech, chosen, done, progress)
    )
    plan = make_plan(pair.cfg, [chosen[i] for i in replaced], engine.packing, budget)
    found = {name: engine.changes(name, plan) for name in recipe.cells}
    cells, flow = {name: delta for name, (delta, _) in found.items()}, found.get("exact", (None, None))[1]
    floor = engine.noise_floor(plan, gap, seed)
    nulls = engine.nulls(plan, gap, seed) if "exact" in cells else {}
    masks = {
        name: random_masks(
            pair.cfg, pair.base, pair.expert, chosen, metric, p,
            n_masks=n_masks, seed=seed, budget=budget, done=done, progress=progress,
        )
        for name, p in (SHARES.items() if recipe.masks else ())
    }  # fmt: skip
    coverage = _coverage(engine, chosen, gap, budget, progress)
    measured = Measured(
        cells, first_order, gap, coverage, floor, plan.rows, flow, engine.targets, nulls, sampled, masks
    )
    dataset = make_dataset(pair, batch, metric, anchor, chosen, measured, seed, n_resamples)
    if isinstance(engine, OnPolicyEngine) and cells:
        dataset["words_changed"] = ("component", engine.changed)
    if given is not None:
        dataset.attrs["anchor_acceptance"] = given.acceptance
    dataset.attrs |= attributes | {"method": method, "wall_time_s": round(time.perf_counter() - started, 3)}
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


def _highest(components: Sequence[Component], values: Float[np.ndarray, " C"], top: int) -> list[int]:
    """Positions of the `top` largest magnitudes of each kind, in order of position."""
    found: list[int] = []
    for kind in dict.fromkeys(c.kind for c in components):
        mine = [i for i, c in enumerate(components) if c.kind == kind]
        found += sorted(mine, key=lambda i: -abs(values[i]))[:top]
    return sorted(found)


def _stratum(components: Sequence[Component], best: set[int], n: int, seed: int) -> list[int]:
    """Positions of up to n random components of each kind that were not chosen."""
    rng = np.random.default_rng(seed)
    found: list[int] = []
    for kind in dict.fromkeys(c.kind for c in components):
        rest = [i for i, c in enumerate(components) if c.kind == kind and i not in best]
        found += sorted(rng.permutation(rest)[:n].tolist()) if rest else []
    return found


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
