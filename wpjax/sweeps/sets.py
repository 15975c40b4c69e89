"""A ranking for sets: which components, patched together, carry the behaviour with the fewest parameters?

The effect of a component alone answers which of them is a source. A set moves the model far, and there the slope on
the way counts for more than the slope at the base: the secant adjoint (METHOD 6) of the decision score (METHOD 8),

    set score(c) = share of F_d(expert) - F_d(base) that the secant adjoint gives to c

was the best or among the best rankings of every task and pair it was tried on (`experiments/paper`; ours).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from wpjax.components import parse_component
from wpjax.metrics import Metric, scores
from wpjax.pairs import Pair
from wpjax.results import SweepResult
from wpjax.sweeps.secant import secant_adjoint


def add_set_score(pair: Pair, result: SweepResult, metric: Metric) -> SweepResult:
    """The result with one more ranking, `set_score`: shares of a metric's gap by the secant adjoint.

    Args:
        pair: the models that were swept.
        result: of a sweep.
        metric: what sets are to recover, `decision_metric` say.

    Returns:
        a new result; components that the metric cannot feel have 0.
    """
    components = [parse_component(pair.cfg, str(name)) for name in result.dataset["name"].values]
    felt = [i for i, c in enumerate(components) if metric.reaches(c)]
    base, expert = (scores(pair.cfg, params, metric).mean(dtype=np.float64) for params in (pair.base, pair.expert))
    found: Float[np.ndarray, " C"] = np.zeros(len(components))
    share = secant_adjoint(pair.cfg, pair.base, pair.expert, [components[i] for i in felt], metric)
    found[felt] = share.mean(1) / (expert - base)
    return SweepResult(result.dataset.assign(set_score=("component", found)))
