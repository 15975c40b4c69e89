"""Supervised fine-tuning with optax, of the whole model or of named components only."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from wpjax.behaviours import encode_texts
from wpjax.checkpoints.checkpoint import fingerprint
from wpjax.errors import OutputError, WpjaxError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, forward
from wpjax.patching import PatchMask, materialize
from wpjax.runtime import interrupts
from wpjax.runtime.files import LOCK, discard, recover, release, try_lock
from wpjax.runtime.shards import what_differs
from wpjax.runtime.states import States, open_states, saved_states


class Example(NamedTuple):
    """What to learn from one prompt.

    Attributes:
        prompt: text exactly as the model gets it, chat template included.
        response: text to learn.
        finished: whether the response is complete, so that the end token is learnt after it; False: it was cut off.
    """

    prompt: str
    response: str
    finished: bool = True


class Dataset(NamedTuple):
    """Examples as tokens: N rows, padded to T tokens.

    Attributes:
        ids: [N, T], token ids.
        weights: [N, T], weight of each token in the loss; 0 on padding and, as a rule, on prompts.
    """

    ids: Int[np.ndarray, "N T"]
    weights: Float[np.ndarray, "N T"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train, with AdamW.

    Attributes:
        steps: optimiser steps, at least 2.
        lr: peak learning rate. It rises from 0 over the first tenth of the steps, then falls to a tenth of the peak
            along a cosine.
        batch_size: examples in a step.
        weight_decay: weight decay towards zero.
        clip: largest global norm of a gradient; larger ones are scaled down to it.
        seed: seed of the order of examples.
        save_every: steps between checkpoints.

    >>> TrainConfig(steps=10, lr=3e-4).batch_size
    8
    """

    steps: int = 90
    lr: float = 3e-5
    batch_size: int = 8
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    save_every: int = 50


def encode_examples(tokenizer: Any, examples: Sequence[Example], train_on_prompt: bool = False) -> Dataset:
    """Examples as tokens: the prompt, the response and, if the response is finished, the end token.

    Args:
        tokenizer: tokenizer of transformers; must have an end token.
        examples: what to learn.
        train_on_prompt: whether the prompt's tokens are learnt too, as in training from scratch.
    """
    prompts = encode_texts(tokenizer, [e.prompt for e in examples])
    rows, starts = [], []
    for i, example in enumerate(examples):
        prompt = prompts.ids[i, : prompts.lengths[i]].tolist()
        response = tokenizer(example.response, add_special_tokens=False)["input_ids"]
        rows.append(prompt + response + [tokenizer.eos_token_id] * example.finished)
        starts.append(1 if train_on_prompt else len(prompt))
    width = max(map(len, rows))
    ids, weights = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.float32)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)] = row
        weights[i, start : len(row)] = 1.0
    return Dataset(ids, weights)


def loss_fn(cfg: ModelConfig, params: Params, ids: Int[Array, "B T"], weights: Float[Array, "B T"]) -> Float[Array, ""]:
    """Mean cross-entropy in nats over the weighted tokens, each predicted from the tokens before it."""
    logits = forward(cfg, params, ids[:, :-1]).logits
    assert logits is not None
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])  # [B, T - 1]
    return (losses * weights[:, 1:]).sum() / jnp.maximum(weights[:, 1:].sum(), 1.0)


Objective: TypeAlias = Callable[[ModelConfig, Params, Int[Array, "B T"], Float[Array, "B T"]], Float[Array, ""]]
"""A loss, as a function of configuration, parameters, token ids [B, T] and their weights [B, T]."""


def confine(mask: Params | None) -> optax.GradientTransformation:
    """Multiply every update by a mask, so that only the parameters where it is 1 ever move.

    Args:
        mask: tree like the parameters, of ones and zeros (see `component_mask`); None to let everything move.
    """
    if mask is None:
        return optax.identity()
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, mask))


def component_mask(cfg: ModelConfig, params: Params, components: Sequence[str]) -> Params:
    """A tree like `params` that is 1 on the slices that some components own, and 0 elsewhere.

    Raises:
        ComponentError: an unknown component.
    """
    # a patch of ones into zeros is the mask, so which slices a component owns is said in one place
    zeros = jax.tree.map(jnp.zeros_like, params)
    return materialize(zeros, jax.tree.map(jnp.ones_like, params), PatchMask.of(cfg, components))


def train(
    cfg: ModelConfig,
    params: Params,
    data: Dataset,
    config: TrainConfig,
    *,
    mask: Params | None = None,
    objective: Objective = loss_fn,
    checkpoints: Path | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Params:
    """Train parameters. The same seed gives the same result, also if the training was interrupted and resumed.

    Args:
        cfg: architecture.
        params: parameters to start from, in float32; they are not changed.
        data: examples to learn.
        config: how to train.
        mask: which parameters may move (see `confine`); None for all.
        objective: the loss to minimise. Checkpoints do not record it: resume with the same one.
        checkpoints: folder for orbax checkpoints; None for none. Training resumes from the newest checkpoint in it,
            which must be of this training: same start, data, mask and configuration.
        on_step: called after each step with its number (from 1) and its loss in nats.

    Returns:
        the trained parameters.

    Raises:
        OutputError: the folder holds checkpoints of another training, or damaged ones, or cannot be written.
        WpjaxError: parameters that are not float32, where most updates would round to nothing; or a loss that is not
            finite.
    """
    if any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params)):
        raise WpjaxError("training needs float32 parameters; load the model with dtype='float32'")
    warm_up = max(1, config.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.lr, warm_up, max(config.steps, warm_up + 1), config.lr / 10
    )
    # `confine` comes last, after weight decay, so that nothing moves what the mask holds
    optimiser = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule, weight_decay=config.weight_decay),
        confine(mask),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @jax.numpy_dtype_promotion("standard")  # optax's schedules rely on it
    def step(params: Params, state: Any, ids: Array, weights: Array) -> tuple[Params, Any, Array]:
        loss, gradients = jax.value_and_grad(functools.partial(objective, cfg))(params, ids, weights)
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.copy, params)  # the caller's arrays are not donated
    state, start = optimiser.init(params), 0
    with _checkpoints(checkpoints, lambda: _identity(cfg, params, data, config, mask)) as kept:
        if kept and kept.newest:
            start = kept.newest
            params, state = kept.restore((params, state))
        for i in range(start, config.steps):
            rows = batch_rows(len(data.ids), config, i)
            params, state, loss = step(params, state, jnp.asarray(data.ids[rows]), jnp.asarray(data.weights[rows]))
            if not np.isfinite(loss):
                raise WpjaxError(
                    f"the loss of step {i + 1} is {float(loss)}: training diverged; lower the learning rate"
                )
            if kept and (i + 1) % config.save_every == 0:
                kept.save(i + 1, (params, state))
            on_step(i + 1, float(loss))
    return params


def check_checkpoints(folder: Path, resume: bool, out: Path) -> None:
    """Refuse checkpoints that an earlier training has left, unless it is to be resumed; before any work is done.

    A folder that holds no checkpoint is in nobody's way, nor is one whose expert was written after its checkpoints:
    they go.

    Args:
        folder: the folder of the checkpoints.
        resume: whether training goes on with them.
        out: the folder of the expert.

    Raises:
        OutputError: there are checkpoints, and `resume` is off.
    """
    steps = saved_states(folder)
    expert = out / "config.json"
    if not steps or (expert.exists() and expert.stat().st_mtime_ns > max(p.stat().st_mtime_ns for p in steps)):
        discard_checkpoints(folder, out)
    elif not resume:
        raise OutputError(f"{folder} is left from an interrupted training; pass --resume, or delete it")


def discard_checkpoints(folder: Path, out: Path) -> None:
    """Delete the checkpoints of a training, if there are any, once its expert is written to the folder `out`."""
    if folder.is_dir():
        discard(folder, out.name)
    interrupts.forget(folder)


@contextlib.contextmanager
def _checkpoints(folder: Path | None, identity: Callable[[], dict[str, Any]]) -> Iterator[States | None]:
    """The checkpoints in a folder, for the time of a training; None without a folder."""
    if folder is None:
        yield None
        return
    recover(folder)
    _check_training(folder, identity())
    lock = try_lock(folder / LOCK)
    try:
        with open_states(folder, "the training so far is kept: go on with --resume") as kept:
            yield kept
    finally:
        if lock is not None:
            release(lock)
        if not saved_states(folder):
            discard(folder, folder.name)


def _identity(
    cfg: ModelConfig, params: Params, data: Dataset, config: TrainConfig, mask: Params | None
) -> dict[str, Any]:
    """Everything that the result of a training depends on, but the objective; of arrays a hash."""

    def hashed(arrays: Iterable[Any]) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    model = {"model": fingerprint(cfg, params), "trained parameters": hashed(jax.tree.leaves(mask)) if mask else "all"}
    return {**model, "prompts and answers": hashed(data), **dataclasses.asdict(config)}


def _check_training(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder of another training's checkpoints; write our identity into a new folder."""
    signature = folder / "training.json"
    try:
        if saved_states(folder) and signature.exists():
            try:
                differs = what_differs(json.loads(signature.read_text(encoding="utf-8")), identity)
            except (ValueError, AttributeError, RecursionError):
                differs = "settings that cannot be read"
            if differs:
                raise OutputError(
                    f"{folder} holds another training's checkpoints, with {differs}; delete it, or repeat its settings"
                )
        folder.mkdir(parents=True, exist_ok=True)
        signature.write_text(json.dumps(identity, default=str), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); delete it, or choose another") from error


def batch_rows(n: int, config: TrainConfig, step: int) -> Int[np.ndarray, " B"]:
    """Numbers of the examples that a step uses, out of n: one shuffled epoch after another.

    They depend on the seed and the step alone, so a resumed training goes on with the right examples.

    >>> rows = [batch_rows(4, TrainConfig(batch_size=2), step).tolist() for step in (0, 1)]
    >>> sorted(rows[0] + rows[1])  # two steps of 2 are one epoch of 4
    [0, 1, 2, 3]
    """
    # A row is a position in the endless sequence of epochs: row // n is its epoch, row % n its place in that epoch.
    first = step * config.batch_size
    rows = np.arange(first, first + config.batch_size)
    orders = {e: np.random.default_rng((config.seed, e)).permutation(n) for e in set((rows // n).tolist())}
    return np.array([orders[row // n][row % n] for row in rows.tolist()])
