"""Learn a mask: optax moves the numbers of a parametrisation down the slope of an objective.

One compiled program takes many steps (`lax.scan`) of several restarts (`vmap`), so a step costs what the model costs.
Of a mask of both models that is a forward pass with two products a weight, and the backward pass of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray
from scipy.stats import rankdata

from wpjax.errors import WpjaxError
from wpjax.relax.gates import AnyGates
from wpjax.relax.objectives import AnyObjective, Objective, is_on_host, prepared
from wpjax.relax.parametrisations import Nested, Parametrisation
from wpjax.runtime.progress import Progress, silent
from wpjax.runtime.states import States


@dataclasses.dataclass(frozen=True)
class RelaxConfig:
    """How to learn a mask, with Adam.

    Attributes:
        steps: optimiser steps.
        lr: learning rate, in units of the parametrisation's numbers.
        eps: epsilon of Adam. With a small one every number moves by about the learning rate at each step, however small
            its slope is; with a large one numbers move as far as their slopes say (docs/method.md, "Learned masks").
        clip: largest global norm of the slopes; longer ones are scaled down to it.
        seed: seed of budgets, gates and the choice of prompts. Restart r is the run of seed + r.
        restarts: independent runs, whose scores are put together (`together`).
        at_once: restarts that one program takes at once; None for all. Its memory grows with them.
        steps_at_once: steps of one run of the compiled program. An objective that is prepared on the host before each
            step is taken one step and one restart at a time.
        save_every: steps between states that are saved, where they are (`states` of `learn`); a multiple of
            `steps_at_once`, or rounded up to one.
    """

    steps: int = 200
    lr: float = 0.05
    eps: float = 1e-8
    clip: float = 1e9
    seed: int = 0
    restarts: int = 1
    at_once: int | None = None
    steps_at_once: int = 5
    save_every: int = 20

    def __post_init__(self) -> None:
        counts = {"steps": self.steps, "restarts": self.restarts, "steps_at_once": self.steps_at_once}
        counts |= {"save_every": self.save_every, "at_once": self.restarts if self.at_once is None else self.at_once}
        for name, count in counts.items():
            if count < 1:
                raise WpjaxError(f"{name}={count}: {name} must be at least 1")
        for name, size in {"lr": self.lr, "eps": self.eps, "clip": self.clip}.items():
            if not size > 0:
                raise WpjaxError(f"{name}={size:g}: {name} must be above 0")


class State(NamedTuple):
    """Where the learning stands; a pytree. With R restarts each array has a leading axis of them.

    Attributes:
        numbers: [C], the numbers of the parametrisation.
        optimiser: state of the optimiser.
        step: number of steps taken.
    """

    numbers: Float[Array, "*R C"]
    optimiser: Any
    step: Int[Array, "*R"]


class Learned(NamedTuple):
    """A learned mask, or one that is being learned.

    Attributes:
        scores: [C], a ranking of the components, the larger the better: the numbers of the one restart, or the scores
            of all restarts `together`.
        losses: [R, steps], the loss of each step that was taken, its price included.
        runs: [R, C], the learned numbers of each restart.
    """

    scores: Float[np.ndarray, " C"]
    losses: Float[np.ndarray, "R steps"]
    runs: Float[np.ndarray, "R C"]


Watch = Callable[[Learned], None]
"""A function that is called with what was learned so far, after every run of the compiled program."""


def unwatched(learned: Learned) -> None:
    """Look at nothing."""


def adam(config: RelaxConfig) -> optax.GradientTransformation:
    """The optimiser of a config."""
    return _adam(config.lr, config.eps, config.clip)


@functools.cache  # the same object for the same numbers, so that programs are compiled once
def _adam(lr: float, eps: float, clip: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(lr, eps=eps))


def together(runs: Float[np.ndarray, "R C"]) -> Float[np.ndarray, " C"]:
    """One ranking from those of several restarts: the mean of their ranks, from 0 to 1. One restart keeps its numbers.

    >>> together(np.array([[0.1, 0.5, 9.0], [0.2, 0.1, 0.3]])).round(2).tolist()
    [0.25, 0.25, 1.0]
    """
    if len(runs) == 1:
        return runs[0]
    return (rankdata(runs, axis=1) - 1).mean(0) / max(runs.shape[1] - 1, 1)


@functools.partial(jax.jit, static_argnames=("parametrisation", "optimiser", "n_steps"), donate_argnums=0)
def take_steps(
    states: State,
    objective: Objective,
    gates: AnyGates,
    keys: Key[Array, " R"],
    *,
    parametrisation: Parametrisation,
    optimiser: optax.GradientTransformation,
    n_steps: int,
) -> tuple[State, Float[Array, "R steps"]]:
    """Some steps of the optimiser for R restarts, in one compiled program.

    Args:
        states: where the restarts stand; their memory is used for the result.
        objective: a pytree that is called with (mask, key).
        gates: the gates.
        keys: [R], of each whole run; each step folds its number into it, so that a run that goes on draws the same.
        parametrisation: how numbers become gates (static).
        optimiser: of optax (static).
        n_steps: number of steps (static).

    Returns:
        the states after them, and the loss of each step.
    """

    def one(key: PRNGKeyArray, state: State) -> tuple[State, Array]:
        draws, chooses = _keys(key, state.step)

        def loss(numbers: Array) -> Array:
            drawn = parametrisation.draw(numbers, gates, draws)
            return objective(gates.mask(drawn), chooses) + parametrisation.price(numbers, gates)

        value, slope = jax.value_and_grad(loss)(state.numbers)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, moved = optimiser.update(slope, state.optimiser, state.numbers)
        return State(optax.apply_updates(state.numbers, updates), moved, state.step + 1), value

    def run(state: State, key: PRNGKeyArray) -> tuple[State, Array]:
        return jax.lax.scan(lambda state, _: one(key, state), state, length=n_steps)

    return jax.vmap(run)(states, keys)


def _keys(key: PRNGKeyArray, step: Int[Array, ""]) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """The random keys of a step: that of its gates, and that of its prompts."""
    draws, chooses = jax.random.split(jax.random.fold_in(key, step))
    return draws, chooses


@functools.partial(jax.jit, static_argnames="parametrisation")
def _mask_of_step(
    numbers: Array, gates: AnyGates, key: PRNGKeyArray, step: Array, *, parametrisation: Parametrisation
) -> tuple[Any, PRNGKeyArray]:
    """The mask that a step will draw, and the key that chooses its prompts."""
    draws, chooses = _keys(key, step)
    return gates.mask(parametrisation.draw(numbers, gates, draws)), chooses


def learn(
    objective: AnyObjective,
    gates: AnyGates,
    parametrisation: Parametrisation | None = None,
    config: RelaxConfig | None = None,
    *,
    start: Float[np.ndarray, " C"] | None = None,
    optimiser: optax.GradientTransformation | None = None,
    states: States | None = None,
    watch: Watch = unwatched,
    progress: Progress = silent,
) -> Learned:
    """Learn the gates of some components.

    Args:
        objective: what they are learned for: a pytree that is called with (mask, key) and returns a scalar. A plain
            function of the mask is one: `jax.tree_util.Partial(lambda mask, key: ...)`. Or an `OnHost` that makes such
            a pytree before each step, or a `Weighted` sum of them.
        gates: the gates.
        parametrisation: how numbers become gates; None for `Nested()`.
        config: number of steps, learning rate and so on; None for the defaults.
        start: [C], a ranking to begin with, the larger the better; None to begin with all gates alike.
        optimiser: of optax; None for Adam as the config says.
        states: where states are saved, so that a run that was killed goes on and learns the same, bit for bit; the
            caller checks that they are of the same arguments. None: nothing is saved.
        watch: called with what was learned so far, every `steps_at_once` steps.
        progress: called as work gets done.

    Raises:
        WpjaxError: the loss is not finite, or `start` does not fit the gates.
        OutputError: a state cannot be written, or is damaged.

    A made-up objective that wants two of five gates open, and no other:

    >>> import wpjax as wp
    >>> from wpjax.relax.gates import Gates
    >>> cfg = wp.ModelConfig("llama", 1, 16, 5, 5, 4, 32, 50, 64)  # 1 layer, 5 heads
    >>> gates = Gates.of(cfg, wp.enumerate_components(cfg, ["head"]))
    >>> wanted = jnp.array([0.0, 1.0, 0.0, 1.0, 0.0])
    >>> objective = jax.tree_util.Partial(lambda mask, key: ((mask.units["head"][0] - wanted) ** 2).sum())
    >>> learned = learn(objective, gates, Nested(0.1, 0.2, 0.6), RelaxConfig(steps=60, lr=0.05, restarts=2))
    >>> sorted(np.argsort(-learned.scores)[:2].tolist()), learned.losses.shape
    ([1, 3], (2, 60))
    """
    parametrisation, config = parametrisation or Nested(), config or RelaxConfig()
    optimiser = adam(config) if optimiser is None else optimiser
    if start is not None and (np.shape(start) != (len(gates),) or not np.isfinite(start).all()):
        raise WpjaxError(f"start: shape {np.shape(start)}; give a finite number for each of the {len(gates)} gates")
    ranking = jnp.zeros(len(gates)) if start is None else jnp.asarray(start, jnp.float32)
    numbers = parametrisation.start(gates, ranking)
    first = State(numbers, optimiser.init(numbers), jnp.zeros((), jnp.int32))
    n = config.restarts
    state = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], n, axis=0), first)
    keys = jnp.stack([jax.random.key(config.seed + r) for r in range(n)])
    losses, taken = np.full((n, config.steps), np.nan, np.float32), 0
    if states is not None and states.newest:
        kept = states.restore({"state": state, "losses": losses})
        state, losses, taken = kept["state"], np.array(kept["losses"]), states.newest
    on_host = is_on_host(objective)
    size = 1 if on_host else config.at_once or n
    groups = [slice(i, i + size) for i in range(0, n, size)]
    progress("learned mask", taken, config.steps)
    while taken < config.steps:
        n_steps = 1 if on_host else min(config.steps_at_once, config.steps - taken)
        parts = []
        for group in groups:
            part, its_keys = jax.tree.map(lambda leaf, g=group: leaf[g], state), keys[group]
            of_step = objective
            if on_host:
                mask, chooses = _mask_of_step(
                    part.numbers[0], gates, its_keys[0], part.step[0], parametrisation=parametrisation
                )
                of_step = prepared(objective, mask, chooses)
            assert isinstance(of_step, Objective)
            part, losses[group, taken : taken + n_steps] = take_steps(
                part, of_step, gates, its_keys, parametrisation=parametrisation, optimiser=optimiser, n_steps=n_steps
            )
            parts.append(part)
        state = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        taken += n_steps
        if not np.isfinite(losses[:, :taken]).all():
            raise WpjaxError(
                f"the loss is {losses[:, taken - 1].max():g} at step {taken}; take a smaller learning rate"
            )
        runs = np.asarray(state.numbers)
        watch(Learned(together(runs), losses[:, :taken], runs))
        if states is not None and (taken % config.save_every < n_steps or taken == config.steps):
            states.save(taken, {"state": state, "losses": losses})
        progress("learned mask", taken, config.steps)
    runs = np.asarray(state.numbers)
    return Learned(together(runs), losses, runs)
