"""Behavioural curves: does patching the best components bring the behaviour back, and does taking them out remove it?

    restore    the base with the k best components of the expert        is the set sufficient?
    knockout   the expert with the k best components of the base        is it necessary?

for k on a logarithmic grid. Beside the ranking under test stand that of single effects, and controls with as many
parameters: random components, those that changed most, and those that activation patching ranks first. Every patched
model answers held-out prompts freely and is judged by the checker; beside it stand the scores that need no generation,
each as a share of the way from base to expert, so that one can see what they promise
(docs/method.md, "Restoration and knock-out curves"; ours).
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
from wpjax.components import Component, n_parameters, parse_component
from wpjax.engines.on_policy import along
from wpjax.errors import WpjaxError
from wpjax.estimators.screens import output_linearised
from wpjax.evaluation.judge import Judge, check_behaviour_differs
from wpjax.methods.metrics import answer_metrics
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.answers import answer_of
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
        components: the set.
        n_parameters: how many weights it owns.
    """

    components: tuple[Component, ...]
    n_parameters: int


def log_grid(n: int, points: int) -> list[int]:
    """At most `points` sizes from 1 to n, evenly spaced on a logarithmic scale."""
    return np.unique(np.geomspace(1, n, points).round().astype(int)).tolist()


def steps_of(order: Sequence[Component], sizes: Int[np.ndarray, " C"], budgets: Sequence[int]) -> list[Step]:
    """For each budget of parameters the first components of an order that come nearest to it, at least one.

    Args:
        order: components, the best first.
        sizes: parameters of each.
        budgets: parameters a set may have.
    """
    total = np.cumsum(sizes)
    found = []
    for budget in budgets:
        k = 1 + int(np.abs(total - budget).argmin())
        found.append(Step(tuple(order[:k]), int(total[k - 1])))
    return found


def orders(
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
        behaviour: its prompts.
        result: the sweep.
        anchor: for a sweep of the anchor metric.
        by: the ranking under test; None for the result's `set_ranking`. A control that is the same ranking is left out.
        n_random: random orders.
        max_new_tokens: length of the answers that a metric reads.
        seed: of random orders.

    Returns:
        the order under test first, then, if it is another, the result's `ranking`; "activation" where the result has
        patched activations (what it has not, by their first order), otherwise "attribution", their first order
        everywhere, made on the sweep's prompts if the result lacks it (without the state that an execution sweep was
        given); then "delta_norm" and "random i".

    Raises:
        WpjaxError: the result has no such ranking, or lacks its anchor.
    """
    data, rng = result.dataset, np.random.default_rng(seed)
    by = by or result.set_ranking
    components = [parse_component(pair.cfg, str(name)) for name in data["name"].values]
    patched = "activation" if "activation" in result.dataset else "attribution"
    made: dict[str, Callable[[], np.ndarray]] = {  # rankings that fall back on another where nothing was replaced
        "effect": result.best,
        patched: lambda: activation_values(pair, behaviour, result, anchor, max_new_tokens),
    }
    names = dict.fromkeys((by, result.ranking, patched, "delta_norm"))
    values = {name: made[name]() if name in made else result.values(name) for name in names}
    values |= {f"random {i + 1}": rng.standard_normal(len(components)) for i in range(n_random)}
    return {
        name: [components[i] for i in np.argsort(-np.nan_to_num(v, nan=-np.inf), kind="stable")]
        for name, v in values.items()
    }


def activation_values(
    pair: Pair, behaviour: Behaviour, result: SweepResult, anchor: Anchor | None, max_new_tokens: int = 32
) -> Float[np.ndarray, " C"]:
    """What activation patching ranks a sweep's components by: patched ones by their effect, others by first order.

    Args:
        pair: the models that were swept.
        behaviour: its prompts.
        result: the sweep; what it lacks is made on its prompts.
        anchor: for a sweep of the anchor metric.
        max_new_tokens: length of the answers that a metric reads.

    Raises:
        WpjaxError: the result lacks its anchor.
    """
    data, attrs = result.dataset, result.dataset.attrs
    found = [data[name].values.astype(float) for name in ("activation", "attribution") if name in data]
    if found:
        return np.where(np.isfinite(found[0]), found[0], found[-1])
    components = [parse_component(pair.cfg, str(name)) for name in data["name"].values]
    batch = behaviour.encode(pair.tokenizer, attrs["split"], int(attrs["n_prompts"]))
    if attrs["metric"] in answer_metrics():
        metric = answer_metrics()[attrs["metric"]](pair, batch, max_new_tokens)
    elif anchor is not None and attrs["metric"] == "on_policy":
        metric = along(anchor, batch, answer_of(pair, pair.base, batch.with_instruction, max_new_tokens))
    elif anchor is not None:
        metric = anchor.metric(pair, batch)
    else:
        raise WpjaxError("the result lacks the anchor that was swept on: sweep again")
    change = output_linearised(pair.cfg, pair.base, pair.expert, components, metric, inputs="donor").mean(1)
    return np.where([metric.reaches(c) for c in components], change / float(attrs["gap_mean"]), -np.inf)


def validate(
    pair: Pair,
    behaviour: Behaviour,
    result: SweepResult,
    *,
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
    """Restoration and knock-out curves of a sweep's ranking, with three controls at equal numbers of parameters.

    Args:
        pair: the models that were swept.
        behaviour: its "test" prompts and its checker judge.
        result: the sweep.
        anchor: whose recovery is measured too; None for the one that was swept on, if any.
        by: the ranking under test; None for the result's `set_ranking`.
        n_prompts: held-out prompts, at most.
        n_points: sizes of sets, from one component to all of them on a logarithmic grid.
        n_random: random orders.
        max_new_tokens: length of the answers.
        seed: of random orders and resampling.
        done: finished parts of an earlier attempt (see `results.Shards`).
        progress: called after every patched model.

    Raises:
        AnchorRejected: base and expert do not differ in the behaviour on these prompts.
        WpjaxError: the result is of another pair, or has no such ranking.
        BehaviourError: prompts that the model cannot take, or a checker that fails.
    """
    check_same_pair(pair, result)
    behaviour.check_checker()
    acceptance = result.dataset.attrs.get("anchor_acceptance") if anchor is None else anchor.acceptance
    anchor = anchor_of(result) if anchor is None else anchor
    if anchor is not None:
        anchor.check_belongs(pair)
    done = {} if done is None else done
    found = orders(pair, behaviour, result, anchor, by=by, n_random=n_random, max_new_tokens=max_new_tokens, seed=seed)
    test = next(iter(found))
    sizes = {name: np.array([n_parameters(pair.cfg, c) for c in order]) for name, order in found.items()}
    totals = np.cumsum(sizes[test])
    budgets = [int(totals[k - 1]) for k in log_grid(len(totals), n_points)]
    steps = {name: steps_of(order, sizes[name], budgets) for name, order in found.items()}

    batch = behaviour.encode(pair.tokenizer, "test", n_prompts)
    batch.check_fits(pair.cfg.n_ctx, pair.cfg.d_vocab)
    judge = Judge(pair, behaviour, batch, max_new_tokens)
    said, own = judge.answers(pair.base), judge.answers(pair.expert)
    check_behaviour_differs(judge, said, own)
    metrics = {name: make(pair, batch, max_new_tokens, own) for name, make in answer_metrics().items()}
    if anchor is not None:
        metrics = {"anchor": anchor.metric(pair, batch), **metrics}
    names = (*CHECKS, *metrics, *(() if anchor is None else ("on_policy",)))

    def measure(params: Params, answers: Generation) -> Float[np.ndarray, "M B"]:
        checked = [judge.passes(answers, check).astype(np.float64) for check in (strict, loose)]
        read = [joint_scores(pair.cfg, params, list(metrics.values()))]
        if anchor is not None:
            read.append(scores(pair.cfg, params, along(anchor, batch, answers))[None])
        return np.concatenate([checked, *read]).astype(np.float64)

    ends = np.stack([measure(pair.base, said), measure(pair.expert, own)])
    models = {"restore": (pair.base, pair.expert), "knockout": (pair.expert, pair.base)}
    total = len(DIRECTIONS) * sum(map(len, steps.values()))
    values = np.full((len(DIRECTIONS), len(steps), len(budgets), len(names), len(batch)), np.nan)
    made = 0
    for d, direction in enumerate(DIRECTIONS):
        host, donor = models[direction]
        known: dict[frozenset[Component], np.ndarray] = {}  # rankings share sets, that of everything at least
        for r, (name, some) in enumerate(steps.items()):
            for k, step in enumerate(some):
                key, members = f"{direction}-{name.replace(' ', '-')}-{k}", frozenset(step.components)
                if key not in done and members in known:
                    done[key] = known[members]
                elif key not in done:
                    patched = materialize(host, donor, PatchMask.of(pair.cfg, step.components))
                    done[key] = measure(patched, judge.answers(patched))
                known[members] = values[d, r, k] = finished_part(done, key, values.shape[-2:])
                made += 1
                progress("patched models", made, total)
    if not (np.isfinite(values).all() and np.isfinite(ends).all()):
        raise WpjaxError("a patched model gives scores that are not finite; check the checkpoints for NaN")
    made_of = _dataset(pair, result, batch.queries, steps, names, values, ends, seed, n_prompts, max_new_tokens)
    return Curves(made_of.assign_attrs({} if acceptance is None else {"anchor_acceptance": acceptance}))


def anchor_of(result: SweepResult) -> Anchor | None:
    """The anchor that was swept on, without its diagnostics; None if it was another metric."""
    data, attrs = result.dataset, result.dataset.attrs
    if "anchor_vector" not in data:
        return None
    vector = jnp.asarray(data["anchor_vector"].values)
    labels = (attrs["behaviour"], attrs["expert_fingerprint"])
    return Anchor(vector, int(attrs["metric_layer"]), *labels, n_response=int(attrs["anchor_n_response"]))


def check_same_pair(pair: Pair, result: SweepResult) -> None:
    """Refuse a result of other models.

    Raises:
        WpjaxError: the fingerprints differ.
    """
    theirs = tuple(result.dataset.attrs.get(f"{end}_fingerprint") for end in ("base", "expert"))
    if theirs != pair.fingerprints:
        raise WpjaxError(
            f"the result is of the pair {theirs[0]}, {theirs[1]}, these models are {pair.fingerprints[0]}, "
            f"{pair.fingerprints[1]}; name the models (and the dtype) that were swept"
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
    variables: dict[str, Any] = {
        "n_components": (("ranking", "point"), [[len(s.components) for s in some] for some in steps.values()]),
        "n_parameters": (("ranking", "point"), [[s.n_parameters for s in some] for some in steps.values()]),
        "query": ("prompt", queries),
    }
    for i, name in enumerate(names):
        kind = np.float32 if name not in CHECKS else bool
        variables[name if name in CHECKS else f"score_{name}"] = (DIMS, values[:, :, :, i].astype(kind))
        variables[f"end_{name}"] = (("end", "prompt"), ends[:, i].astype(kind))
    coords = {
        "direction": ("direction", np.array(DIRECTIONS, dtype=object)),
        "ranking": ("ranking", np.array(list(steps), dtype=object)),
        "end": ("end", np.array(["base", "expert"], dtype=object)),
    }
    kept = ("base", "expert", "base_fingerprint", "expert_fingerprint", "behaviour", "metric", "metric_layer", "dtype")
    attributes = {name: result.dataset.attrs[name] for name in kept}
    attributes |= {
        "what": "curves",
        "schema": SCHEMA,
        "n_prompts": n_prompts,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "largest_sets": json.dumps({name: [c.name for c in some[-1].components[:64]] for name, some in steps.items()}),
        "device": jax.devices()[0].platform,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return xr.Dataset(variables, coords, attributes)
