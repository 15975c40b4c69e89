"""A ranking for sets: which components, patched together, carry the behaviour with the fewest parameters?

The effect of a component alone answers which of them is a source. A set moves the model far, and there the slope on
the way counts for more than the slope at the base:

    set score(c) = mean over metrics of the share of F(expert) - F(base) that the secant adjoint gives to c

(docs/method.md, "Set score"; ours). With the anchor and the decision score as metrics it rests on neither
alone: the first carries more
where an anchor is good, the second still finds the behaviour where it is not (`experiments/paper`).
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
    """The result with one more ranking, `set_score`: shares of the metrics' gaps by the secant adjoint, their mean.

    Args:
        pair: the models that were swept.
        result: of a sweep.
        metrics: what sets are to recover, say the anchor and `decision_metric`.

    Returns:
        a new result; components that a metric cannot feel have no share of it.

    Raises:
        MetricRejected: the gap of a metric may be zero.
    """
    components = [parse_component(pair.cfg, str(name)) for name in result.dataset["name"].values]
    queries = result.dataset["query"].values
    found = np.mean([_shares(pair, components, metric, queries) for metric in metrics], axis=0)
    return SweepResult(result.dataset.assign(set_score=("component", found)))


def _shares(
    pair: Pair, components: Sequence[Component], metric: Metric, queries: Int[np.ndarray, " B"]
) -> Float[np.ndarray, " C"]:
    base, expert = (scores(pair.cfg, params, metric).astype(np.float64) for params in (pair.base, pair.expert))
    expect_positive_gap(expert - base, queries, f"the {metric.name} metric")
    change = secant_adjoint(pair.cfg, pair.base, pair.expert, components, metric)
    return change.mean(1) / (expert - base).mean()
