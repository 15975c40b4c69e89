"""A ranking for sets: which components, patched together, carry the behaviour with the fewest parameters?

The effect of a single component tells whether it is a source. A set of components moves the model far from the base.
Then the slope on the way from base to expert counts for more than the slope at the base:

    set score(c) = mean over metrics of the share of F(expert) - F(base) that the secant adjoint gives to c

(docs/method.md, "Set score"; ours). The metrics are the anchor and the decision score. The anchor tells more where it
is a good one; the decision score still finds the behaviour where it is not (`experiments/paper`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from wpjax.components import Component, parse_component
from wpjax.estimators.secant import secant_adjoint
from wpjax.metrics.metric import Metric, expect_positive_gap, scores
from wpjax.pairs import Pair
from wpjax.results.sweep_result import SweepResult


def add_set_score(pair: Pair, result: SweepResult, metrics: Sequence[Metric]) -> SweepResult:
    """Add the ranking `set_score` to a result: each component's share of the metrics' gaps, by the secant adjoint.

    Args:
        pair: the models that were swept.
        result: result of the sweep.
        metrics: metrics that a set of components should recover, such as the anchor's and `decision_metric`.

    Returns:
        a new result. The score is the mean over metrics; a component that cannot change a metric has share 0 of it.

    Raises:
        MetricRejected: the gap of a metric may be zero.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> batch = task.encode(pair.tokenizer, n_prompts=4)
    >>> decision = wp.decision_metric(pair, batch, max_new_tokens=8)
    >>> result = wp.sweep(pair, batch, decision, kinds=("head",), method="screen")
    >>> wp.add_set_score(pair, result, [decision]).set_ranking
    'set_score'
    """
    components = [parse_component(pair.cfg, str(name)) for name in result.dataset["name"].values]
    queries = result.dataset["query"].values
    score = np.mean([_shares(pair, components, metric, queries) for metric in metrics], axis=0)
    return SweepResult(result.dataset.assign(set_score=("component", score)))


def _shares(
    pair: Pair, components: Sequence[Component], metric: Metric, queries: Int[np.ndarray, " B"]
) -> Float[np.ndarray, " C"]:
    base, expert = (scores(pair.cfg, params, metric).astype(np.float64) for params in (pair.base, pair.expert))
    expect_positive_gap(expert - base, queries, f"the {metric.name} metric")
    change = secant_adjoint(pair.cfg, pair.base, pair.expert, components, metric)
    return change.mean(1) / (expert - base).mean()
