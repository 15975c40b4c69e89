"""A ranking for sets: which components, patched together, carry the behaviour with the fewest parameters?

The effect of a single component tells whether it is a source. A set of components moves the model far from the base.
Then the slope on the way from base to expert counts for more than the slope at the base. And a set is small if it has
few parameters, so a head is held against the neurons that would fit in its place:

    set score(c) = mean over F of (share of F(expert) - F(base) that the secant adjoint gives to c)
                   /  c's share of the parameters

F are the log-odds of the expert's token against the base's, where the instruction first makes the two part ways, and
wherever they do. The first is where the behaviour begins; the others tell whether it goes on and how it ends. 1 is what
a component would have if the gap were spread evenly over all parameters (docs/method.md, "Set score"; ours).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from wpjax.behaviours import PromptBatch
from wpjax.components import KINDS, Component, enumerate_components, n_parameters, parse_component
from wpjax.estimators.secant import secant_adjoint
from wpjax.metrics.answers import ExpertAnswers, instructed_metric, partings_metric
from wpjax.metrics.metric import Metric, begins, expect_positive_gap, joint_scores
from wpjax.metrics.readouts import LogOdds
from wpjax.pairs import Pair
from wpjax.results.sweep_result import SweepResult


def add_set_score(pair: Pair, result: SweepResult, metrics: Sequence[Metric]) -> SweepResult:
    """Add the ranking `set_score` to a result: a component's share of the metrics' gaps, for its share of parameters.

    The share of the gaps itself is added as `set_share`.

    It ranks every component of the kinds that were swept, those of later layers, too (see `candidates`).

    Args:
        pair: the models that were swept.
        result: result of the sweep.
        metrics: the metrics that a set of components should recover; `set_metrics` gives those that `wpjax sweep`
            takes. The score is the mean over them.

    Returns:
        a new result. A component that cannot change a metric has share 0 of its gap.

    Raises:
        MetricRejected: the gap of a metric may be zero.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> batch = task.encode(pair.tokenizer, n_prompts=4)
    >>> metrics = set_metrics(pair, batch, max_new_tokens=8)
    >>> result = wp.sweep(pair, batch, metrics[0], kinds=("head",), method="screen")
    >>> wp.add_set_score(pair, result, metrics).set_ranking
    'set_score'
    """
    components, queries = candidates(pair, result), result.dataset["query"].values
    base, expert = (joint_scores(pair.cfg, params, metrics).astype(np.float64) for params in (pair.base, pair.expert))
    for metric, gap in zip(metrics, expert - base, strict=True):
        expect_positive_gap(gap, queries, f"the {metric.name} metric")
    parts = weighted_sum(metrics, 1 / (expert - base).mean(1) / len(metrics))
    share = sum(secant_adjoint(pair.cfg, pair.base, pair.expert, components, part).mean(1) for part in parts)
    result = with_ranking(pair, result, "set_score", components, share / parameter_share(pair, components))
    return with_ranking(pair, result, "set_share", components, share)


def weighted_sum(metrics: Sequence[Metric], weights: Float[np.ndarray, " M"]) -> list[Metric]:
    """Metrics that add up to a weighted sum of M metrics: one, where all can be read from the same pass.

    Log-odds along the beginning of the same answers can. Then one program of the secant adjoint is compiled and run.

    Args:
        metrics: the metrics, on the same prompts.
        weights: [M], their weights.
    """
    weighted = [
        dataclasses.replace(metric, weight=metric.weight * float(weight))
        for metric, weight in zip(metrics, weights, strict=True)
    ]
    longest = max(metrics, key=lambda metric: metric.tokens.ids.shape[1])
    for metric in metrics:
        fits = metric.layer == longest.layer and metric.held is None and begins(metric.tokens, longest.tokens)
        if not (fits and isinstance(metric.readout, LogOdds)):
            return weighted
    at, weight = (jnp.concatenate([getattr(m, name) for m in weighted], axis=1) for name in ("at", "weight"))
    odds = LogOdds(
        *(jnp.concatenate([getattr(m.readout, name) for m in weighted], axis=1) for name in ("tokens", "foils"))
    )
    return [dataclasses.replace(longest, at=at, weight=weight, readout=odds)]


def set_metrics(
    pair: Pair, batch: PromptBatch, max_new_tokens: int = 32, answers: ExpertAnswers | None = None
) -> tuple[Metric, ...]:
    """The metrics of the set score: where the instruction parts base and expert, and all partings.

    Args:
        pair: base and expert.
        batch: prompts.
        max_new_tokens: length of an answer, at most.
        answers: the expert's answers, if other metrics share them or they are known already; None to generate them.

    Raises:
        MetricRejected: base and expert part ways on fewer than half of the prompts.
    """
    answers = answers or ExpertAnswers(pair, batch.with_instruction, max_new_tokens)
    return tuple(make(pair, batch, max_new_tokens, answers) for make in (instructed_metric, partings_metric))


def candidates(pair: Pair, result: SweepResult) -> list[Component]:
    """The components that a set may hold, after a sweep: all of the kinds that were swept.

    A sweep leaves out layers that its metric does not read. A set needs them: the behaviour is carried out there. A
    sweep of named components keeps to these.

    Args:
        pair: the models that were swept.
        result: result of the sweep.
    """
    swept = [parse_component(pair.cfg, str(name)) for name in result.dataset["name"].values]
    kinds, layers = dict.fromkeys(c.kind for c in swept), {c.layer for c in swept if KINDS[c.kind].in_layer}
    whole = enumerate_components(pair.cfg, kinds, sorted(layers))
    return enumerate_components(pair.cfg, kinds) if set(whole) <= set(swept) else swept


def parameter_share(pair: Pair, components: Sequence[Component]) -> Float[np.ndarray, " C"]:
    """The part of the parameters that each of C components owns, of what all of them own together.

    What two components own, as a head and its attention module do, counts for both; then the parts sum to 1 all the
    same, and are smaller than they would be alone.
    """
    sizes = np.array([n_parameters(pair.cfg, c) for c in components], np.float64)
    return sizes / sizes.sum()


def with_ranking(
    pair: Pair, result: SweepResult, name: str, components: Iterable[Component], values: Float[np.ndarray, " C"]
) -> SweepResult:
    """A result with one more column, of components that it may not have yet.

    Components that are new come with their name, their place and the norm of their change. `swept` is False for them,
    and what was not measured of them is NaN. The order is that of a sweep: by kind, layer and index.

    Args:
        pair: the models that were swept.
        result: result of the sweep.
        name: the column, one of `wpjax.columns`.
        components: C components that it has a number of.
        values: [C], the numbers.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> batch = task.encode(pair.tokenizer, n_prompts=4)
    >>> result = wp.sweep(pair, batch, wp.decision_metric, components=["L2.mlp", "L3.mlp"], method="screen")
    >>> more = wp.enumerate_components(pair.cfg, ["mlp"])
    >>> ranked = with_ranking(pair, result, "set_score", more, np.arange(8.0))
    >>> [row.name for row in ranked.top(2, by="set_score")], ranked.swept.dataset.sizes["component"]
    (['L7.mlp', 'L6.mlp'], 2)
    """
    score = dict(zip((c.name for c in components), np.asarray(values, np.float64).tolist(), strict=True))
    known = set(result.dataset["name"].values.astype(str).tolist())
    new = [parse_component(pair.cfg, n) for n in score if n not in known]
    if new:
        place = {
            "name": np.array([c.name for c in new], dtype=object),
            "kind": np.array([c.kind for c in new], dtype=object),
            "layer": np.array([c.layer for c in new]),
            "index": np.array([c.index for c in new]),
            "delta_norm": pair.delta_norms(new),
        }
        kind, layer, index = (
            np.concatenate([result.dataset[name].values, place[name]]) for name in ("kind", "layer", "index")
        )
        number = np.array([list(KINDS).index(str(k)) for k in kind])
        result = result.extended(place, np.lexsort((index, layer, number)))
    column = [score.get(str(n), np.nan) for n in result.dataset["name"].values]
    return SweepResult(result.dataset.assign({name: ("component", np.array(column))}))
