"""What a mask is learned for: functions loss(mask, key) -> scalar, small where the mask does what it should.

`key` chooses the prompts of the step. Any function of this form will do; these are pytrees, so that a compiled program
takes them as arguments:

    Recover     the host with the mask's weights of the donor should score as the donor does. With the expert as host,
                the base as donor and a metric of the base's behaviour, this is the knock-out. With a metric of
                divergence from the host, it is the harm that a patch does
    Sampled     answers that were sampled from the patched model, with the advantage of each: the slope of the reward
    Weighted    a sum of objectives

A checker judges text, so the reward is no part of a compiled program. `Reward` samples and judges before each step,
and makes the `Sampled` of that step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from wpjax.behaviours import Tokens
from wpjax.errors import WpjaxError
from wpjax.metrics.answers import answer_metric
from wpjax.metrics.metric import Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.models.generate import Generation, generate
from wpjax.patching import PatchMask, patch


@runtime_checkable
class Objective(Protocol):
    """A loss. Subclasses that are pytrees keep their arrays out of the compiled program's constants."""

    def __call__(self, mask: Any, key: PRNGKeyArray) -> Float[Array, ""]:
        """The loss of a relaxed mask, on prompts that `key` chooses."""
        ...


@runtime_checkable
class OnHost(Protocol):
    """Something that makes an objective on the host before each step, such as `Reward`."""

    def prepared(self, mask: PatchMask, key: PRNGKeyArray) -> Objective:
        """The objective of one step.

        It must be the same pytree every time, shapes included, so that one compiled program serves all steps.

        Args:
            mask: the relaxed mask of the step.
            key: what the objective will be called with.
        """
        ...


AnyObjective: TypeAlias = "Objective | OnHost"


def is_on_host(objective: AnyObjective) -> bool:
    """Whether an objective, or a part of a sum, has to be prepared before each step."""
    if isinstance(objective, Weighted):
        return any(is_on_host(part) for part in objective.parts)
    return isinstance(objective, OnHost)


def prepared(objective: AnyObjective, mask: Any, key: PRNGKeyArray) -> Objective:
    """The objective of one step: with `OnHost`s prepared, in a sum too."""
    if isinstance(objective, Weighted):
        keys = jax.random.split(key, len(objective.parts))  # as the sum calls its parts
        parts = tuple(prepared(part, mask, one) for part, one in zip(objective.parts, keys, strict=True))
        return Weighted(parts, objective.weights)
    return objective.prepared(mask, key) if isinstance(objective, OnHost) else objective


def choose(n: int, n_prompts: int | None, key: PRNGKeyArray) -> Int[Array, " n"]:
    """Numbers of some of n prompts, without repetition; of all if `n_prompts` is None or larger."""
    return jax.random.choice(key, n, (n if n_prompts is None else min(n_prompts, n),), replace=False)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "expert", "metric", "reached"],
    meta_fields=["cfg", "n_prompts"],
)
@dataclasses.dataclass(frozen=True)
class Recover:
    """The patched base should reach the expert's score: loss = mean over prompts of F(expert) - F(patched).

    A metric that grows where nothing is left to win, such as log-odds, is to be given in the form that does not
    (`Metric.to_learn`).

    Attributes:
        cfg: architecture of both models (static).
        base: parameters that receive the patches; the host.
        expert: parameters that the patches come from; the donor.
        metric: F, the larger the better: `kl_metric`, `response_metric`, `decision_metric(...).to_learn`, an anchor's.
        reached: [B], F(expert) of each prompt.
        n_prompts: prompts of a step; None for all (static).
    """

    cfg: ModelConfig
    base: Params
    expert: Params
    metric: Metric
    reached: Float[Array, " B"]
    n_prompts: int | None = None

    def __call__(self, mask: PatchMask, key: PRNGKeyArray) -> Float[Array, ""]:
        """The loss of a relaxed mask."""
        rows = choose(len(self.metric), self.n_prompts, key)
        score = self.metric.take(rows)(self.cfg, patch(self.base, self.expert, mask))
        return (self.reached[rows] - score).mean()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "expert", "metric", "n_tokens", "reward", "advantage"],
    meta_fields=["cfg"],
)
@dataclasses.dataclass(frozen=True)
class Sampled:
    """Answers sampled from the patched model: the loss is what their mean reward lacks to 1; its slope, REINFORCE.

        loss = 1 - mean_i reward_i        slope = -mean_i advantage_i d log p(answer_i) / dm        (Williams 1992)

    Attributes:
        cfg: architecture of both models (static).
        base: parameters that receive the patches.
        expert: parameters that the patches come from.
        metric: mean log-probability of the tokens of each answer (`metrics.answers.answer_metric`).
        n_tokens: [N], tokens of each answer.
        reward: [N], from 0 to 1.
        advantage: [N], reward minus baseline.
    """

    cfg: ModelConfig
    base: Params
    expert: Params
    metric: Metric
    n_tokens: Float[Array, " N"]
    reward: Float[Array, " N"]
    advantage: Float[Array, " N"]

    def __call__(self, mask: PatchMask, key: PRNGKeyArray) -> Float[Array, ""]:
        """The loss of the relaxed mask that the answers were sampled with."""
        log_p = self.metric(self.cfg, patch(self.base, self.expert, mask)) * self.n_tokens
        gain = (self.advantage * log_p).mean()
        return 1 - self.reward.mean() - (gain - jax.lax.stop_gradient(gain))


def leave_one_out(reward: Float[np.ndarray, "B K"]) -> Float[np.ndarray, "B K"]:
    """Reward minus the mean reward of the other answers to the same prompt: an unbiased baseline.

    Args:
        reward: of K answers to each of B prompts.

    >>> leave_one_out(np.array([[1.0, 0.0, 0.0]])).tolist()
    [[1.0, -0.5, -0.5]]
    """
    n = reward.shape[1]
    return (reward - reward.mean(1, keepdims=True)) * n / (n - 1)


@dataclasses.dataclass(frozen=True)
class Reward:
    """The checker's reward: answers are sampled from the patched model before each step, and judged.

    Attributes:
        cfg: architecture of both models.
        base: parameters that receive the patches.
        expert: parameters that the patches come from.
        prompts: [B, T], prompts.
        stop_tokens: tokens that end an answer.
        judge: function of answers and, for each, the number of its prompt; it returns rewards from 0 to 1.
        n_prompts: prompts of a step; None for all.
        n_answers: answers to each of them, at least 2: the others are the baseline of each.
        max_new_tokens: length of an answer, at most.
    """

    cfg: ModelConfig
    base: Params
    expert: Params
    prompts: Tokens
    stop_tokens: tuple[int, ...]
    judge: Callable[[Generation, Int[np.ndarray, " N"]], Float[np.ndarray, " N"]]
    n_prompts: int | None = None
    n_answers: int = 4
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.n_answers < 2:
            raise WpjaxError(f"n_answers={self.n_answers}: at least 2, as each is compared with the others")

    def prepared(self, mask: PatchMask, key: PRNGKeyArray) -> Sampled:
        """Sample answers of the patched model at temperature 1, and judge them.

        Args:
            mask: the relaxed mask of the step.
            key: chooses prompts and answers.
        """
        chooses, samples = jax.random.split(key)
        chosen = np.sort(np.asarray(choose(len(self.prompts.ids), self.n_prompts, chooses)))
        rows = np.repeat(chosen, self.n_answers)
        tokens = Tokens(np.asarray(self.prompts.ids)[rows], np.asarray(self.prompts.lengths)[rows])
        answers: Generation = jax.device_get(
            generate(
                self.cfg,
                patch(self.base, self.expert, mask),
                jnp.asarray(tokens.ids),
                jnp.asarray(tokens.lengths),
                max_new_tokens=self.max_new_tokens,
                stop_tokens=jnp.asarray(self.stop_tokens, jnp.int32),
                temperature=1.0,
                key=samples,
            )
        )
        reward = np.asarray(self.judge(answers, rows), np.float32)
        advantage = leave_one_out(reward.reshape(len(chosen), self.n_answers)).reshape(-1)
        metric = answer_metric(self.cfg, tokens, answers)
        n_tokens = jnp.asarray(answers.lengths, jnp.float32)
        arrays = n_tokens, jnp.asarray(reward), jnp.asarray(advantage, jnp.float32)
        return Sampled(self.cfg, self.base, self.expert, metric, *arrays)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts", "weights"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Weighted:
    """A weighted sum of objectives; each chooses prompts of its own.

    Attributes:
        parts: the objectives. With an `OnHost` among them the sum has to be `prepared` first.
        weights: [n], their weights.
    """

    parts: tuple[AnyObjective, ...]
    weights: Float[Array, " n"]

    def __call__(self, mask: PatchMask, key: PRNGKeyArray) -> Float[Array, ""]:
        """The sum for a relaxed mask."""
        keys = jax.random.split(key, len(self.parts))
        losses = []
        for part, one in zip(self.parts, keys, strict=True):
            assert isinstance(part, Objective)
            losses.append(part(mask, one))
        return jnp.stack(losses) @ self.weights
