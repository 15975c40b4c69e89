"""Learn a mask: optax moves the numbers of a parametrisation down the slope of an objective.

One compiled program takes many steps (`lax.scan`), so a step costs what the model costs. Of a mask of both models that
is a forward pass with two products a weight, and the backward pass of it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from wpjax.errors import WpjaxError
from wpjax.relax.gates import Gates
from wpjax.relax.objectives import Objective
from wpjax.relax.parametrisations import Nested, Parametrisation
from wpjax.runtime.progress import Progress, silent


@dataclasses.dataclass(frozen=True)
class RelaxConfig:
    """How to learn a mask, with Adam.

    Attributes:
        steps: optimiser steps.
        lr: learning rate, in units of the parametrisation's numbers.
        eps: epsilon of Adam. With a small one every number moves by about the learning rate at each step, however small
            its slope is; with a large one numbers move as far as their slopes say (docs/method.md, "Learned masks").
        clip: largest global norm of the slopes; longer ones are scaled down to it.
        seed: seed of budgets, gates and the choice of prompts.
        steps_at_once: steps of one run of the compiled program.
    """

    steps: int = 200
    lr: float = 0.05
    eps: float = 1e-8
    clip: float = 1e9
    seed: int = 0
    steps_at_once: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1 or self.steps_at_once < 1 or not self.lr > 0 or not self.eps > 0 or not self.clip > 0:
            raise WpjaxError(
                f"steps={self.steps}, steps_at_once={self.steps_at_once}, lr={self.lr:g}, eps={self.eps:g}, "
                f"clip={self.clip:g}: steps must be at least 1, and the others above 0"
            )


class State(NamedTuple):
    """Where the learning stands; a pytree.

    Attributes:
        numbers: [C], the numbers of the parametrisation.
        optimiser: state of the optimiser.
        step: number of steps taken.
    """

    numbers: Float[Array, " C"]
    optimiser: Any
    step: Int[Array, ""]


class Learned(NamedTuple):
    """A learned mask.

    Attributes:
        scores: [C], the learned number of each gate: a ranking of the components, the larger the better.
        losses: [steps], the loss of each step, its price included.
    """

    scores: Float[np.ndarray, " C"]
    losses: Float[np.ndarray, " steps"]


def adam(config: RelaxConfig) -> optax.GradientTransformation:
    """The optimiser of a config."""
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(config.lr, eps=config.eps))


@functools.partial(jax.jit, static_argnames=("parametrisation", "optimiser", "n_steps"), donate_argnums=0)
def take_steps(
    state: State,
    objective: Objective,
    gates: Gates,
    key: PRNGKeyArray,
    *,
    parametrisation: Parametrisation,
    optimiser: optax.GradientTransformation,
    n_steps: int,
) -> tuple[State, Float[Array, " steps"]]:
    """Some steps of the optimiser, in one compiled program.

    Args:
        state: where it stands; its memory is used for the result.
        objective: a pytree that is called with (mask, key).
        gates: the gates.
        key: of the whole run; each step folds its number into it, so that a run that goes on draws the same.
        parametrisation: how numbers become gates (static).
        optimiser: of optax (static).
        n_steps: number of steps (static).

    Returns:
        the state after them, and the loss of each step.
    """

    def one(state: State, _: None) -> tuple[State, Array]:
        draws, chooses = jax.random.split(jax.random.fold_in(key, state.step))

        def loss(numbers: Array) -> Array:
            drawn = parametrisation.draw(numbers, gates, draws)
            return objective(gates.mask(drawn), chooses) + parametrisation.price(numbers, gates)

        value, slope = jax.value_and_grad(loss)(state.numbers)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, moved = optimiser.update(slope, state.optimiser, state.numbers)
        return State(optax.apply_updates(state.numbers, updates), moved, state.step + 1), value

    return jax.lax.scan(one, state, length=n_steps)


def learn(
    objective: Objective,
    gates: Gates,
    parametrisation: Parametrisation | None = None,
    config: RelaxConfig | None = None,
    *,
    start: Float[np.ndarray, " C"] | None = None,
    optimiser: optax.GradientTransformation | None = None,
    progress: Progress = silent,
) -> Learned:
    """Learn the gates of some components.

    Args:
        objective: what they are learned for: a pytree that is called with (mask, key) and returns a scalar. A plain
            function of the mask is one: `jax.tree_util.Partial(lambda mask, key: ...)`.
        gates: the gates.
        parametrisation: how numbers become gates; None for `Nested()`.
        config: number of steps, learning rate and so on; None for the defaults.
        start: [C], a ranking to begin with, the larger the better; None to begin with all gates alike.
        optimiser: of optax; None for Adam as the config says.
        progress: called as work gets done.

    Raises:
        WpjaxError: the loss is not finite, or `start` does not fit the gates.

    A made-up objective that wants two of five gates open, and no other:

    >>> import wpjax as wp
    >>> cfg = wp.ModelConfig("llama", 1, 16, 5, 5, 4, 32, 50, 64)  # 1 layer, 5 heads
    >>> gates = Gates.of(cfg, wp.enumerate_components(cfg, ["head"]))
    >>> wanted = jnp.array([0.0, 1.0, 0.0, 1.0, 0.0])
    >>> objective = jax.tree_util.Partial(lambda mask, key: ((mask.units["head"][0] - wanted) ** 2).sum())
    >>> scores = learn(objective, gates, Nested(0.1, 0.2, 0.6), RelaxConfig(steps=60, lr=0.05)).scores
    >>> sorted(np.argsort(-scores)[:2].tolist())
    [1, 3]
    """
    parametrisation, config = parametrisation or Nested(), config or RelaxConfig()
    optimiser = adam(config) if optimiser is None else optimiser
    if start is not None and (np.shape(start) != (len(gates),) or not np.isfinite(start).all()):
        raise WpjaxError(f"start: shape {np.shape(start)}; give a finite number for each of the {len(gates)} gates")
    ranking = jnp.zeros(len(gates)) if start is None else jnp.asarray(start, jnp.float32)
    numbers = parametrisation.start(gates, ranking)
    state, losses = State(numbers, optimiser.init(numbers), jnp.zeros((), jnp.int32)), []
    key, taken = jax.random.key(config.seed), 0
    progress("learned mask", 0, config.steps)
    while taken < config.steps:
        n = min(config.steps_at_once, config.steps - taken)
        state, some = take_steps(
            state, objective, gates, key, parametrisation=parametrisation, optimiser=optimiser, n_steps=n
        )
        taken += n
        losses.append(np.asarray(some))
        if not np.isfinite(losses[-1]).all():
            raise WpjaxError(f"the loss is {losses[-1][-1]:g} at step {taken}; take a smaller learning rate")
        progress("learned mask", taken, config.steps)
    return Learned(np.asarray(state.numbers), np.concatenate(losses))
