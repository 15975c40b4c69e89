"""The secant adjoint: scores of every weight that sum to the whole gap, prompt by prompt.

A gradient is the slope at the base. Here every operation has its slope between base and expert instead (the rules are
in `models.secant`), so that the change of the metric is linear in the units and, with all of them at 1, it is
F(expert) - F(base) without any remainder. A component's score is the slope by its units. Like integrated gradients it
answers for a path, not for one patch in the base, but with two forward passes and one backward
(docs/method.md, "Path estimators"; ours).
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
from wpjax.estimators.screens import by_component, zero_beyond_reach
from wpjax.metrics.metric import Metric, over_prompts
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.patching import PatchMask, secant_patch


def secant_change(cfg: ModelConfig, host: Params, donor: Params, mask: PatchMask, metric: Metric) -> Float[Array, " B"]:
    """The linear function of the units that equals F(donor) - F(host) where all of them are 1.

    Args:
        cfg: the model.
        host: parameters at one end.
        donor: parameters at the other.
        mask: every unit of the model, float.
        metric: what is measured.
    """
    score: Any = metric(cfg, secant_patch(host, donor, mask))
    return score.change


@functools.partial(jax.jit, static_argnames="cfg")
def secant_scores(cfg: ModelConfig, host: Params, donor: Params, metric: Metric) -> dict[str, Float[Array, "B ..."]]:
    """The share of F(donor) - F(host) of every unit of the model, prompt by prompt, by the unit's name."""

    def change(mask: PatchMask, i: Array) -> Array:
        return secant_change(cfg, host, donor, mask, metric.take(i[None]))[0]

    slopes = jax.vmap(jax.grad(change), in_axes=(None, 0))(PatchMask.full(cfg, jnp.float32), jnp.arange(len(metric)))
    return dict(slopes.units)


@zero_beyond_reach
def secant_adjoint(
    cfg: ModelConfig, host: Params, donor: Params, components: Sequence[Component], metric: Metric
) -> Float[np.ndarray, "C B"]:
    """Each component's share of F(donor) - F(host), prompt by prompt; over all units of the model the shares add up.

    Args:
        cfg: the model.
        host: parameters at one end.
        donor: parameters at the other.
        components: whose shares are returned.
        metric: what is measured.
    """
    return by_component(over_prompts(metric, lambda part: secant_scores(cfg, host, donor, part), axis=0), components)
