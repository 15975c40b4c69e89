"""First-order screens: estimates of the effects of all components at once, by one forward and one backward pass.

    output-linearised   <grad_o F at base, o_c(theta_E, h_B) - o_c(theta_B, h_B)>
                        (ours: docs/method.md, "First-order screens")
    weight gradient     dF/dm_c at m = 0 for theta_B + sum_c m_c (theta_E - theta_B)_c  (first order, arXiv 2604.13694)
    attribution         <grad_o F at base, o_c(theta_E, h_E) - o_c(theta_B, h_B)>       (AtP, arXiv 2403.00745)

o_c is what component c writes, and h its input. What a norm writes is what its module reads.

- Output-linearised runs the component with the expert's weights, and linearises only what comes after it.
- The weight gradient linearises in the component's weights as well.
- Attribution takes the output that the component has in the expert. It is the screen of activation patching.

What a direction of a matrix's change writes, s (x u) v, is linear in its weights. So there the first two are one, and
the weight gradient is taken for both.

A screen only chooses. The components that matter are then replaced for real.

In bfloat16 and in bfloat16x2, a gradient is rounded to bfloat16 on its way back through each matrix. In bfloat16x2, on
the small models of the tests, output-linearised effects of a kind are within 0.5 % of those in float32 with the same
rounded weights. Weight gradients are within 3 %, as each is the difference of two numbers.

    integrated          int_0^1 dF/dm_c at m = alpha (1, ..., 1) d alpha               (arXiv 1703.01365)

Integrated gradients answer another question: the average slope on the way from base to expert, where everything else
moves, too. Over all units of the model they sum to F(expert) - F(base).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from jaxtyping import Float

from wpjax.components import Component, indices, units_of
from wpjax.engines.contributions import Side
from wpjax.engines.packing import shared_tokens
from wpjax.estimators.kind_slopes import linearised_by_kind
from wpjax.estimators.unit_slopes import by_component, unit_slopes
from wpjax.metrics.metric import Metric, over_prompts
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.patching import PatchMask

Screen = TypeVar("Screen", bound=Callable[..., np.ndarray])


def zero_beyond_reach(screen: Screen) -> Screen:
    """Make a screen give 0 to components that cannot change the metric; it is called on the others alone."""

    @functools.wraps(screen)
    def screen_of_any(
        cfg: ModelConfig,
        host: Params,
        donor: Params,
        components: Sequence[Component],
        metric: Metric,
        **options: Any,
    ) -> Float[np.ndarray, "C B"]:
        reached = [i for i, c in enumerate(components) if metric.reaches(c)]
        changes = np.zeros((len(components), len(metric)))
        if reached:
            changes[reached] = screen(cfg, host, donor, [components[i] for i in reached], metric, **options)
        return changes

    return cast(Screen, screen_of_any)


# One rule for each kind follows: the first-order change of the metric by every component of the kind in one layer.


@zero_beyond_reach
def output_linearised(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    components: Sequence[Component],
    metric: Metric,
    *,
    weights: Side = "donor",
    inputs: Side = "host",
) -> Float[np.ndarray, "C B"]:
    """First-order change of the metric by each component; the component itself is exact, what comes after is linear.

    Args:
        cfg: architecture of both models.
        host: parameters of the model that receives the patches.
        donor: parameters of the model that the components come from.
        components: components to score; those that cannot change the metric get 0.
        metric: the metric F.
        weights: whose weights a component has.
        inputs: whose input it sees; "donor" for attribution patching.

    Returns:
        [C, B], change of F in its own units.

    >>> import wpjax as wp
    >>> from wpjax.estimators.screens import output_linearised
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> metric = wp.decision_metric(pair, task.encode(pair.tokenizer, n_prompts=4), max_new_tokens=8)
    >>> heads = wp.enumerate_components(pair.cfg, ["head"])
    >>> output_linearised(pair.cfg, pair.base, pair.expert, heads, metric).shape  # 64 heads, 4 prompts
    (64, 4)
    """
    by_weights = [i for i, c in enumerate(components) if c.kind == "delta_direction"]
    if by_weights and (weights, inputs) == ("donor", "host"):
        changes = np.empty((len(components), len(metric)))
        others = [i for i in range(len(components)) if i not in set(by_weights)]
        for screen, at in ((weight_gradient, by_weights), (output_linearised, others)):
            if at:
                changes[at] = screen(cfg, host, donor, [components[i] for i in at], metric)
        return changes
    kinds = tuple(dict.fromkeys(c.kind for c in components))
    options = {"kinds": kinds, "weights": weights, "inputs": inputs, "n_shared": shared_tokens(metric)}
    by_kind = over_prompts(metric, linearised_by_kind, cfg, host, donor, axis=2, **options)
    # For each kind: position in `components`, layer (0 for kinds outside the layers), index.
    places: dict[str, list[tuple[int, int, int]]] = {kind: [] for kind in kinds}
    for i, c in enumerate(components):
        places[c.kind].append((i, max(c.layer, 0), c.index))
    changes = np.empty((len(components), len(metric)))
    for kind, triples in places.items():
        i, layer, index = np.array(triples).T
        column = np.searchsorted(indices(cfg, kind), index)  # a model may lack the first norms of a layer
        changes[i] = by_kind[kind][layer, column]
    return changes


@zero_beyond_reach
def weight_gradient(
    cfg: ModelConfig, host: Params, donor: Params, components: Sequence[Component], metric: Metric
) -> Float[np.ndarray, "C B"]:
    """First-order change of the metric by each component, linear in its weights.

    Args:
        cfg: architecture of both models.
        host: parameters of the model that receives the patches.
        donor: parameters of the model that the components come from.
        components: components to score; those that cannot change the metric get 0.
        metric: the metric F.

    Returns:
        [C, B], change of F in its own units.
    """
    # Units that no component opens stay the host's own arrays, which is cheaper than a mask of zeros.
    opened, closed = {unit for c in components for unit in units_of(c)}, PatchMask.empty(cfg, np.float32)
    at = PatchMask({unit: mask for unit, mask in closed.units.items() if unit in opened})
    return by_component(cfg, unit_slopes(cfg, host, donor, metric, at), components)


@zero_beyond_reach
def integrated_gradients(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    components: Sequence[Component],
    metric: Metric,
    steps: int = 8,
) -> Float[np.ndarray, "C B"]:
    """Slope of the metric in each component, averaged over the straight way from host to donor.

    All weights move along the way, not only those of the component.

    Args:
        cfg: architecture of both models.
        host: parameters at the beginning of the way.
        donor: parameters at its end.
        components: components to score; those that cannot change the metric get 0.
        metric: the metric F.
        steps: number of points of the midpoint rule.

    Returns:
        [C, B], change of F in its own units.
    """
    totals = np.zeros((len(components), len(metric)))
    for i in range(steps):
        totals += by_component(cfg, unit_slopes(cfg, host, donor, metric, (i + 0.5) / steps), components)
    return totals / steps
