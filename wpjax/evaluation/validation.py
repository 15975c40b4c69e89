"""Behavioural curves: does patching the best components bring the behaviour back? Does taking them out remove it?

    restore    the base with the k best components of the expert        is the set sufficient?
    knockout   the expert with the k best components of the base        is it necessary?

k is on a logarithmic grid. The ranking under test is compared with the ranking of single effects and with controls:
random components, the components that changed most, and the order of activation patching. Their sets stay within as
many parameters.

Every patched model answers held-out prompts freely, and the checker judges the answers. The scores that need no
generation are measured, too, each as a share of the way from base to expert. So one can see whether they promise what
the checker finds (docs/method.md, "Restoration and knock-out curves"; ours).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from wpjax.behaviours import Behaviour, loose, strict
from wpjax.components import Component, n_parameters, n_within, parse_component
from wpjax.engines.on_policy import along_answers
from wpjax.errors import BehaviourError, WpjaxError
from wpjax.estimators.screens import output_linearised
from wpjax.evaluation.judge import Judge, check_behaviour_differs
from wpjax.evaluation.reading import side_by_side
from wpjax.methods.metrics import answer_metrics
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.answers import ExpertAnswers, answer_of
from wpjax.metrics.metric import joint_scores, scores
from wpjax.models.decoder import Params
from wpjax.models.generate import Generation
from wpjax.pairs import Pair
from wpjax.patching import PatchMask, materialize
from wpjax.results.curves import CHECKS, DIMS, DIRECTIONS, SCHEMA, Curves
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.progress import Progress, silent
from wpjax.runtime.shards import finished_part


class Step(NamedTuple):
    """One set of components on a curve.

    Attributes:
        components: components of the set, the best first.
        n_parameters: number of weights that they own.
    """

    components: tuple[Component, ...]
    n_parameters: int


def log_grid(n: int, points: int) -> list[int]:
    """At most `points` sizes from 1 to n, evenly spaced on a logarithmic scale.

    >>> from wpjax.evaluation.validation import log_grid
    >>> log_grid(100, 5)
    [1, 3, 10, 32, 100]
    """
    return np.unique(np.geomspace(1, n, points).round().astype(int)).tolist()


def curve_steps(order: Sequence[Component], sizes: Int[np.ndarray, " C"], budgets: Sequence[int]) -> list[Step]:
    """For each budget, the first components of an order that stay within it (`components.n_within`).

    Args:
        order: components, the best first.
        sizes: [C], number of parameters of each component.
        budgets: numbers of parameters. A set has at least one component, even if it is too large.
    """
    steps = []
    for budget in budgets:
        k = max(n_within(sizes, budget), 1)
        steps.append(Step(tuple(order[:k]), int(sizes[:k].sum())))
    return steps


def control_orders(
    pair: Pair,
    behaviour: Behaviour,
    result: SweepResult,
    anchor: Anchor | None,
    *,
    by: str | None = None,
    n_random: int = 2,
    max_new_tokens: int = 32,
    seed: int = 0,
) -> dict[str, list[Component]]:
    """The ranking under test and its controls: orders of a sweep's components, the best first.

    Args:
        pair: the models that were swept.
        behaviour: the behaviour that was swept.
        result: result of the sweep.
        anchor: anchor of a sweep of the anchor metric, or None.
        by: name of the ranking under test; None for the result's `set_ranking`.
        n_random: number of random orders.
        max_new_tokens: length of the answers that a metric reads, at most.
        seed: seed of the random orders.

    Returns:
        name -> order; a ranking that appears twice is listed once:

        1. the ranking under test;
        2. the result's `ranking`;
        3. "activation" if the result has patched activations, otherwise "attribution" (see `activation_values`); left
           out for directions, of which only the weights are patched;
        4. "delta_norm", the size of the change;
        5. "random 1" and so on.

    Raises:
        WpjaxError: the result has no such ranking, or lacks its anchor.
    """
    data, rng = result.dataset, np.random.default_rng(seed)
    by = by or result.set_ranking
    components = [parse_component(pair.cfg, str(name)) for name in data["name"].values]
    patched = "activation" if "activation" in result.dataset else "attribution"
    # These two rankings fall back on first-order ones for components that were not replaced.
    with_fallback: dict[str, Callable[[], np.ndarray]] = {
        "effect": result.best,
        patched: lambda: activation_values(pair, behaviour, result, anchor, max_new_tokens),
    }
    controls = [patched, "delta_norm"] if pair.division is None else ["delta_norm"]
    names = dict.fromkeys((by, result.ranking, *controls))
    values = {name: with_fallback[name]() if name in with_fallback else result.values(name) for name in names}
    values |= {f"random {i + 1}": rng.standard_normal(len(components)) for i in range(n_random)}
    # Components without a value come last; of equal ones the first in the result comes first.
    return {
        name: [components[i] for i in np.argsort(-np.nan_to_num(v, nan=-np.inf), kind="stable")]
        for name, v in values.items()
    }


def activation_values(
    pair: Pair, behaviour: Behaviour, result: SweepResult, anchor: Anchor | None, max_new_tokens: int = 32
) -> Float[np.ndarray, " C"]:
    """The value by which activation patching ranks each component of a sweep.

    It is the effect of the patched activation, if the result has that. It is the first-order effect (attribution)
    elsewhere. A result without either gets attribution made here, on the prompts of the sweep. That does not hold the
    models at a given anchor's state, even if the sweep did.

    Args:
        pair: the models that were swept.
        behaviour: the behaviour that was swept.
        result: result of the sweep.
        anchor: anchor of a sweep of the anchor metric, or None.
        max_new_tokens: length of the answers that a metric reads, at most.

    Returns:
        [C], shares of the gap.

    Raises:
        WpjaxError: attribution has to be made, and the result lacks its anchor.
    """
    data, attrs = result.dataset, result.dataset.attrs
    known = [data[name].values.astype(float) for name in ("activation", "attribution") if name in data]
    if known:  # the first is the more trustworthy one, and the last fills its gaps
        return np.where(np.isfinite(known[0]), known[0], known[-1])
    components = [parse_component(pair.cfg, str(name)) for name in data["name"].values]
    batch = behaviour.encode(pair.tokenizer, attrs["split"], int(attrs["n_prompts"]))
    if attrs["metric"] in answer_metrics():
        metric = answer_metrics()[attrs["metric"]](pair, batch, max_new_tokens)
    elif anchor is not None and attrs["metric"] == "on_policy":
        metric = along_answers(anchor, batch, answer_of(pair, pair.base, batch.with_instruction, max_new_tokens))
    elif anchor is not None:
        metric = anchor.metric(pair, batch)
    else:
        raise WpjaxError("the result lacks the anchor that was swept on: sweep again")
    change = output_linearised(pair.cfg, pair.base, pair.expert, components, metric, inputs="donor").mean(1)
    # A component that cannot change the metric ranks below one that makes it worse.
    return np.where([metric.reaches(c) for c in components], change / float(attrs["gap_mean"]), -np.inf)


def validate(
    pair: Pair,
    behaviour: Behaviour,
    result: SweepResult,
    *,
    other_behaviour: bool = False,
    anchor: Anchor | None = None,
    by: str | None = None,
    n_prompts: int = 32,
    n_points: int = 8,
    n_random: int = 2,
    max_new_tokens: int = 32,
    seed: int = 0,
    done: MutableMapping[str, np.ndarray] | None = None,
    progress: Progress = silent,
) -> Curves:
    """Restoration and knock-out curves of a sweep's ranking and its controls.

    Sets grow along a ranking. For each set, the base gets the expert's components (restore), and the expert gets the
    base's (knockout). Each patched model answers the "test" prompts, and the checker judges.

    Args:
        pair: the models that were swept.
        behaviour: the behaviour that was swept; another one only with `other_behaviour`.
        result: result of the sweep.
        other_behaviour: whether `behaviour` may be another than the one that was swept. The curves then name both.
        anchor: anchor whose score is measured, too; None for the anchor that was swept on, if any.
        by: name of the ranking under test; None for the result's `set_ranking`.
        n_prompts: number of held-out prompts, at most.
        n_points: number of sets of a ranking, at most; from one component to all, on a logarithmic grid.
        n_random: number of random orders.
        max_new_tokens: length of an answer, at most.
        seed: seed of random orders and resampling.
        done: finished parts of an earlier attempt (see `runtime.shards.Shards`). New parts are added as they finish.
        progress: function that is called after every patched model.

    Returns:
        the curves; `Curves` says what they hold.

    Raises:
        AnchorRejected: base and expert do not differ in the behaviour on these prompts.
        WpjaxError: the result is of another pair, or has no such ranking.
        BehaviourError: the result is of another behaviour, the model cannot take the prompts, or the checker fails.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> decision = wp.decision_metric(pair, task.encode(pair.tokenizer, n_prompts=4), max_new_tokens=8)
    >>> result = wp.sweep(pair, task.encode(pair.tokenizer, n_prompts=4), decision, kinds=("mlp",), method="screen")
    >>> curves = wp.validate(pair, task, result, n_prompts=4, n_points=2, n_random=0, max_new_tokens=8)
    >>> curves.dataset["n_components"].values[0].tolist()  # one MLP, then all eight
    [1, 8]
    """
    check_same_pair(pair, result)
    if not other_behaviour:
        check_same_behaviour(behaviour, result)
    behaviour.check_checker()
    acceptance = result.dataset.attrs.get("anchor_acceptance")
    if anchor is not None:
        acceptance = anchor.acceptance_for(behaviour.name)
    elif acceptance is not None and behaviour.name != result.dataset.attrs["behaviour"]:
        acceptance = f"not tested: it is an anchor of {result.dataset.attrs['behaviour']}"
    anchor = anchor_of(result) if anchor is None else anchor
    if anchor is not None:
        anchor.check_belongs(pair)
    done = {} if done is None else done
    ranked = control_orders(
        pair, behaviour, result, anchor, by=by, n_random=n_random, max_new_tokens=max_new_tokens, seed=seed
    )
    under_test = next(iter(ranked))
    sizes = {name: np.array([n_parameters(pair.cfg, c) for c in order]) for name, order in ranked.items()}
    # The ranking under test sets the budgets of parameters. The controls stay within them.
    totals = np.cumsum(sizes[under_test])
    budgets = [int(totals[k - 1]) for k in log_grid(len(totals), n_points)]
    steps = {name: curve_steps(order, sizes[name], budgets) for name, order in ranked.items()}

    batch = behaviour.encode(pair.tokenizer, "test", n_prompts)
    pair.check_prompts(batch)
    judge = Judge(pair, behaviour, batch, max_new_tokens)
    by_base, by_expert = judge.answers(pair.base), judge.answers(pair.expert)
    check_behaviour_differs(judge, by_base, by_expert)
    answers = ExpertAnswers(pair, batch.with_instruction, max_new_tokens, by_expert)
    metrics = {name: make(pair, batch, max_new_tokens, answers) for name, make in answer_metrics().items()}
    if anchor is not None:
        metrics = {"anchor": anchor.metric(pair, batch), **metrics}
    names = (*CHECKS, *metrics, *(() if anchor is None else ("on_policy",)))

    def measure(params: Params, answers: Generation) -> Float[np.ndarray, "M B"]:
        """Every measure of one model, in the order of `names`."""
        checked = [judge.passes(answers, check).astype(np.float64) for check in (strict, loose)]
        scored = [joint_scores(pair.cfg, params, list(metrics.values()))]
        if anchor is not None:
            scored.append(scores(pair.cfg, params, along_answers(anchor, batch, answers))[None])
        return np.concatenate([checked, *scored]).astype(np.float64)

    ends = np.stack([measure(pair.base, by_base), measure(pair.expert, by_expert)])
    models = {"restore": (pair.base, pair.expert), "knockout": (pair.expert, pair.base)}
    total = len(DIRECTIONS) * sum(map(len, steps.values()))
    # Direction, ranking, set, measure, prompt.
    values = np.full((len(DIRECTIONS), len(steps), len(budgets), len(names), len(batch)), np.nan)
    n_done = 0
    for d, direction in enumerate(DIRECTIONS):
        host, donor = models[direction]
        # Rankings share sets, at least the set of all components. Each set is measured once.
        known: dict[frozenset[Component], np.ndarray] = {}
        for r, (name, steps_of_ranking) in enumerate(steps.items()):
            for k, step in enumerate(steps_of_ranking):
                key, members = f"{direction}-{name.replace(' ', '-')}-{k}", frozenset(step.components)
                if key not in done and members in known:
                    done[key] = known[members]
                elif key not in done:
                    patched = materialize(host, donor, PatchMask.of(pair.cfg, step.components))
                    done[key] = measure(patched, judge.answers(patched))
                known[members] = values[d, r, k] = finished_part(done, key, values.shape[-2:])
                n_done += 1
                progress("patched models", n_done, total)
    if not (np.isfinite(values).all() and np.isfinite(ends).all()):
        raise WpjaxError("a patched model gives scores that are not finite; check the checkpoints for NaN")
    dataset = _dataset(pair, result, batch.queries, steps, names, values, ends, seed, n_prompts, max_new_tokens)
    dataset.attrs["behaviour"] = behaviour.name
    if other_behaviour and not _is_swept_behaviour(behaviour, result):
        dataset.attrs["swept_behaviour"] = result.dataset.attrs["behaviour"]
    curves = Curves(dataset.assign_attrs({} if acceptance is None else {"anchor_acceptance": acceptance}))
    step = steps[under_test][_point_to_read(curves)]
    by_patched = judge.answers(materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, step.components)))
    to_read = side_by_side(judge, by_base, by_patched, by_expert, len(step.components), under_test, N_SHOWN)
    return Curves(to_read.added_to(curves.dataset))


N_SHOWN = 4
"""Prompts whose answers are kept to be read."""


def _point_to_read(curves: Curves) -> int:
    """The point of the first curve whose answers are shown: the first that brings back half, else the best."""
    back = curves.position("strict")[0, 0]
    return int(np.argmax(back >= 0.5)) if (back >= 0.5).any() else int(np.argmax(back))


def anchor_of(result: SweepResult) -> Anchor | None:
    """The anchor that was swept on, without its diagnostics; None if the sweep was of another metric."""
    data, attrs = result.dataset, result.dataset.attrs
    if "anchor_vector" not in data:
        return None
    vector = jnp.asarray(data["anchor_vector"].values)
    labels = (attrs.get("anchor_behaviour", attrs["behaviour"]), attrs["expert_fingerprint"])
    return Anchor(vector, int(attrs["metric_layer"]), *labels, n_response=int(attrs["anchor_n_response"]))


def check_same_pair(pair: Pair, result: SweepResult) -> None:
    """Refuse a result of other models.

    Args:
        pair: the models at hand.
        result: result of a sweep.

    Raises:
        WpjaxError: the fingerprints of base or expert differ.
    """
    theirs = tuple(result.dataset.attrs.get(f"{end}_fingerprint") for end in ("base", "expert"))
    if theirs != pair.fingerprints:
        raise WpjaxError(
            f"the result is of the pair {theirs[0]}, {theirs[1]}, these models are {pair.fingerprints[0]}, "
            f"{pair.fingerprints[1]}; name the models (and the dtype) that were swept"
        )


def check_same_behaviour(behaviour: Behaviour, result: SweepResult) -> None:
    """Refuse a result of another behaviour.

    Args:
        behaviour: the behaviour at hand.
        result: result of a sweep.

    Raises:
        BehaviourError: the names differ, or the prompts that were swept are not this behaviour's.
    """
    if not _is_swept_behaviour(behaviour, result):
        swept = str(result.dataset.attrs["behaviour"])
        what = f"this one is {behaviour.name}" if behaviour.name != swept else "with other prompts than this one has"
        raise BehaviourError(
            f"the result is of the behaviour {swept}, {what}; name the one that was swept, or say that another is "
            "meant (other_behaviour=True, `--other-behaviour`): the curves then name both"
        )


def _is_swept_behaviour(behaviour: Behaviour, result: SweepResult) -> bool:
    """Whether a result is of a behaviour: its name, and the prompts as the models got them, within the template."""
    data, attrs = result.dataset, result.dataset.attrs
    prompts = [str(text) for text in data["prompt"].values]
    ours = behaviour.select(attrs["split"], int(attrs["n_prompts"]))
    return (
        behaviour.name == attrs["behaviour"]
        and len(ours) == len(prompts)
        and all(pair.with_instruction.strip() in text for pair, text in zip(ours, prompts, strict=True))
    )


def _dataset(
    pair: Pair,
    result: SweepResult,
    queries: Int[np.ndarray, " B"],
    steps: Mapping[str, Sequence[Step]],
    names: Sequence[str],
    values: Float[np.ndarray, "2 R K M B"],
    ends: Float[np.ndarray, "2 M B"],
    seed: int,
    n_prompts: int,
    max_new_tokens: int,
) -> xr.Dataset:
    """The dataset of the curves; `Curves` says what it holds."""
    variables: dict[str, Any] = {
        "n_components": (("ranking", "point"), [[len(s.components) for s in row] for row in steps.values()]),
        "n_parameters": (("ranking", "point"), [[s.n_parameters for s in row] for row in steps.values()]),
        "query": ("prompt", queries),
    }
    for i, name in enumerate(names):
        dtype = np.float32 if name not in CHECKS else bool
        variables[name if name in CHECKS else f"score_{name}"] = (DIMS, values[:, :, :, i].astype(dtype))
        variables[f"end_{name}"] = (("end", "prompt"), ends[:, i].astype(dtype))
    coords = {
        "direction": ("direction", np.array(DIRECTIONS, dtype=object)),
        "ranking": ("ranking", np.array(list(steps), dtype=object)),
        "end": ("end", np.array(["base", "expert"], dtype=object)),
    }
    copied = (
        "base",
        "expert",
        "base_fingerprint",
        "expert_fingerprint",
        "metric",
        "metric_layer",
        "dtype",
    )
    attributes = {name: result.dataset.attrs[name] for name in copied}
    attributes |= {
        "what": "curves",
        "schema": SCHEMA,
        "n_prompts": n_prompts,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "largest_sets": json.dumps({name: [c.name for c in row[-1].components[:64]] for name, row in steps.items()}),
        "device": jax.devices()[0].platform,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return xr.Dataset(variables, coords, attributes)
