"""What a mask is learned for: functions loss(mask, key) -> scalar, small where the mask does what it should.

`key` chooses the prompts of the step. Any function of this form will do; these are pytrees, so that a compiled program
takes them as arguments:

    Recover     the base with the mask's weights of the expert should score as the expert does. With base and expert
                exchanged, and a metric of the base's behaviour, this is the knock-out
    Weighted    a sum of objectives
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from wpjax.metrics.metric import Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.patching import PatchMask, patch


@runtime_checkable
class Objective(Protocol):
    """A loss. Subclasses that are pytrees keep their arrays out of the compiled program's constants."""

    def __call__(self, mask: PatchMask, key: PRNGKeyArray) -> Float[Array, ""]:
        """The loss of a relaxed mask, on prompts that `key` chooses."""
        ...


def _on_some_prompts(metric: Metric, n_prompts: int | None, key: PRNGKeyArray) -> tuple[Metric, Array]:
    """The metric on some prompts, and which they are."""
    n = len(metric) if n_prompts is None else min(n_prompts, len(metric))
    rows = jax.random.choice(key, len(metric), (n,), replace=False)
    return metric.take(rows), rows


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "expert", "metric", "reached"],
    meta_fields=["cfg", "n_prompts", "is_log_odds"],
)
@dataclasses.dataclass(frozen=True)
class Recover:
    """The patched base should reach the expert's score: loss = mean over prompts of F(expert) - F(patched).

    With a metric of log-odds (`is_log_odds`) the loss is -log sigmoid(F(patched)) instead: what is won is won, and more
    of it gains nothing.

    Attributes:
        cfg: architecture of both models (static).
        base: parameters that receive the patches.
        expert: parameters that the patches come from.
        metric: F, the larger the better: `kl_metric`, `response_metric`, `decision_metric`, an anchor's.
        reached: [B], F(expert) of each prompt.
        n_prompts: prompts of a step; None for all (static).
        is_log_odds: whether F is a log-odds (static).
    """

    cfg: ModelConfig
    base: Params
    expert: Params
    metric: Metric
    reached: Float[Array, " B"]
    n_prompts: int | None = None
    is_log_odds: bool = False

    def __call__(self, mask: PatchMask, key: PRNGKeyArray) -> Float[Array, ""]:
        """The loss of a relaxed mask."""
        part, rows = _on_some_prompts(self.metric, self.n_prompts, key)
        score = part(self.cfg, patch(self.base, self.expert, mask))
        loss = -jax.nn.log_sigmoid(score) if self.is_log_odds else self.reached[rows] - score
        return loss.mean()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts", "weights"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Weighted:
    """A weighted sum of objectives; each chooses prompts of its own.

    Attributes:
        parts: the objectives.
        weights: [n], their weights.
    """

    parts: tuple[Objective, ...]
    weights: Float[Array, " n"]

    def __call__(self, mask: PatchMask, key: PRNGKeyArray) -> Float[Array, ""]:
        """The sum for a relaxed mask."""
        keys = jax.random.split(key, len(self.parts))
        losses = [part(mask, one) for part, one in zip(self.parts, keys, strict=True)]
        return jnp.stack(losses) @ self.weights
