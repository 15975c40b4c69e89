"""Slopes of the metric in the mask: one number for each unit, and their sums over the units of a component.

dF/dm_u at a mask m, for theta_B + m (theta_E - theta_B)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wpjax.components import Component, unit_positions
from wpjax.metrics.metric import Metric, over_prompts
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.patching import PatchMask, patch


@jax.numpy_dtype_promotion("standard")  # as above
@functools.partial(jax.jit, static_argnames="cfg")
def unit_gradient(
    cfg: ModelConfig, host: Params, donor: Params, at: PatchMask, metric: Metric
) -> dict[str, Float[Array, "B ..."]]:
    """dF/dm of every unit, prompt by prompt, at a float mask.

    Args:
        cfg: architecture of both models (static).
        host: parameters at m = 0.
        donor: parameters at m = 1.
        at: the mask at which the gradient is taken.
        metric: the metric F.

    Returns:
        unit -> [B, *shape of the unit].
    """

    def score(mask: PatchMask, i: Array) -> Array:
        return metric.take(i[None])(cfg, patch(host, donor, mask))[0]

    slopes = jax.vmap(jax.grad(score), in_axes=(None, 0))(at, jnp.arange(len(metric)))
    return dict(slopes.units)


def unit_slopes(
    cfg: ModelConfig, host: Params, donor: Params, metric: Metric, at: float | PatchMask
) -> dict[str, Float[np.ndarray, "B ..."]]:
    """dF/dm of every unit of the model, prompt by prompt, computed for a few prompts at a time.

    Args:
        cfg: architecture of both models.
        host: parameters at m = 0.
        donor: parameters at m = 1.
        metric: the metric F.
        at: where the slope is taken: a float mask, or one number for all units.

    Returns:
        unit -> [B, *shape of the unit].
    """
    if not isinstance(at, PatchMask):
        value = jnp.asarray(at, jnp.float32)
        at = jax.tree.map(lambda unit: unit + value, PatchMask.empty(cfg, jnp.float32))
    return over_prompts(metric, unit_gradient, cfg, host, donor, at)


def by_component(
    cfg: ModelConfig, by_unit: Mapping[str, Float[np.ndarray, "B ..."]], components: Sequence[Component]
) -> Float[np.ndarray, "C B"]:
    """Sum figures of units over the units that each component opens, prompt by prompt.

    Args:
        cfg: the model.
        by_unit: unit -> [B, *shape of the unit].
        components: the C components.
    """
    flat = {unit: figures.reshape(len(figures), -1) for unit, figures in by_unit.items()}

    def total(c: Component) -> Float[np.ndarray, " B"]:
        opened = [flat[unit][:, at] for unit, at in unit_positions(cfg, c).items() if unit in flat]
        return np.sum([part.sum(1, dtype=np.float64) for part in opened], axis=0)

    return np.stack([total(c) for c in components])
