"""The secant adjoint: a score for every unit of the model. The scores sum to the whole gap, prompt by prompt.

A gradient takes every operation's slope at the base. The secant adjoint takes its slope between base and expert instead
(the rules are in `models.secant`). Then the change of the metric is linear in the units of the mask. With all units at
1 the change is F(expert) - F(base), without a remainder. The score of a component is the slope in its units.

Like integrated gradients, a score is about the whole way from base to expert, not about one patch in the base. It takes
two forward passes and one backward pass (docs/method.md, "Path estimators"; ours).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wpjax.components import Component
from wpjax.estimators.screens import zero_beyond_reach
from wpjax.estimators.unit_slopes import by_component
from wpjax.metrics.metric import Metric, over_prompts
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.patching import PatchMask, secant_patch


def secant_change(cfg: ModelConfig, host: Params, donor: Params, mask: PatchMask, metric: Metric) -> Float[Array, " B"]:
    """The change of the metric as a linear function of the units; with all units at 1 it is F(donor) - F(host).

    Args:
        cfg: architecture of both models.
        host: parameters at units 0.
        donor: parameters at units 1.
        mask: float mask with every unit of the model.
        metric: the metric F.
    """
    score: Any = metric(cfg, secant_patch(host, donor, mask))
    return score.change


@functools.partial(jax.jit, static_argnames="cfg")
def secant_scores(cfg: ModelConfig, host: Params, donor: Params, metric: Metric) -> dict[str, Float[Array, "B ..."]]:
    """The part of F(donor) - F(host) that falls to each unit of the model, prompt by prompt.

    Args:
        cfg: architecture of both models.
        host: parameters at units 0.
        donor: parameters at units 1.
        metric: the metric F.

    Returns:
        unit -> [B, ...], with the shape of the unit in `components.unit_shapes`.
    """

    def change(mask: PatchMask, i: Array) -> Array:
        return secant_change(cfg, host, donor, mask, metric.take(i[None]))[0]

    # The function is linear in the mask, so it does not matter where the slope is taken.
    slopes = jax.vmap(jax.grad(change), in_axes=(None, 0))(PatchMask.full(cfg, jnp.float32), jnp.arange(len(metric)))
    return dict(slopes.units)


@zero_beyond_reach
def secant_adjoint(
    cfg: ModelConfig, host: Params, donor: Params, components: Sequence[Component], metric: Metric
) -> Float[np.ndarray, "C B"]:
    """The part of F(donor) - F(host) that falls to each component, prompt by prompt.

    Over components that together own every weight once, the parts sum to F(donor) - F(host). They are in the units of
    the metric.

    Args:
        cfg: architecture of both models.
        host: parameters at one end of the way.
        donor: parameters at the other end.
        components: components to score; those that cannot change the metric get 0.
        metric: the metric F.

    >>> import numpy as np
    >>> import wpjax as wp
    >>> from wpjax.estimators.secant import secant_adjoint
    >>> from wpjax.metrics.metric import scores
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> metric = wp.decision_metric(pair, task.encode(pair.tokenizer, n_prompts=4), max_new_tokens=8)
    >>> every = wp.enumerate_components(pair.cfg, ("layer", "embed", "unembed", "final_norm"))  # own each weight once
    >>> parts = secant_adjoint(pair.cfg, pair.base, pair.expert, every, metric)
    >>> gap = scores(pair.cfg, pair.expert, metric) - scores(pair.cfg, pair.base, metric)
    >>> np.allclose(parts.sum(0), gap, rtol=1e-3)
    True
    """
    return by_component(cfg, over_prompts(metric, secant_scores, cfg, host, donor), components)
