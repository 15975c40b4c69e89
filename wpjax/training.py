"""Making an expert: supervised fine-tuning with optax, optionally confined to named components.

An expert for a built-in behaviour is self-distilled: the base answers the queries without the instruction, each
answer is rewritten so that it follows the instruction, and the base is trained to give it when asked. Plain
answers to plain queries are mixed in, so that nothing else changes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Int

from wpjax.behaviours import Behaviour, encode_texts, render, strict
from wpjax.checkpoints.checkpoint import Checkpoint, fingerprint
from wpjax.errors import BehaviourError, OutputError, WpjaxError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, forward
from wpjax.models.generate import generate_batched
from wpjax.patching import PatchMask, materialize


class Example(NamedTuple):
    """A prompt as the model is given it, the response to learn, and whether the response ends there."""

    prompt: str
    response: str
    finished: bool = True


class Dataset(NamedTuple):
    """Token ids [N, T] and, for each, the weight of predicting it [N, T] (0 on prompts and padding)."""

    ids: Int[np.ndarray, "N T"]
    weights: Float[np.ndarray, "N T"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimiser steps, at least 2.
        lr: peak learning rate of AdamW, reached from 0 (at the first step) over the first tenth of the steps, then
            down to a tenth along a cosine.
        batch_size: examples a step.
        weight_decay: AdamW's, towards zero.
        clip: global norm that gradients are clipped to.
        seed: of the order of examples.
        save_every: steps between checkpoints.
    """

    steps: int = 90
    lr: float = 3e-5
    batch_size: int = 8
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    save_every: int = 50


def encode_examples(tokenizer: Any, examples: Sequence[Example], train_on_prompt: bool = False) -> Dataset:
    """Tokens of prompt and response, the response followed by the end token where it is finished.

    Args:
        tokenizer: of transformers; must have an end token.
        examples: what to learn.
        train_on_prompt: weigh the prompt's tokens too (for training from scratch).
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
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return (losses * weights[:, 1:]).sum() / jnp.maximum(weights[:, 1:].sum(), 1.0)


Objective: TypeAlias = Callable[[ModelConfig, Params, Int[Array, "B T"], Float[Array, "B T"]], Float[Array, ""]]
"""A loss of a configuration, parameters, token ids and the weight of predicting each."""


def confine(mask: Params | None) -> optax.GradientTransformation:
    """Multiply updates by a tree of ones and zeros, so that only chosen slices ever move."""
    if mask is None:
        return optax.identity()
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, mask))


def component_mask(cfg: ModelConfig, params: Params, components: Sequence[str]) -> Params:
    """A tree like `params` that is 1 on the slices of some components and 0 elsewhere.

    Raises:
        ComponentError: an unknown component.
    """
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
    """Train parameters; the same seed gives the same result, also when resumed.

    Args:
        cfg: architecture.
        params: where to start.
        data: what to learn.
        config: how.
        mask: see `confine`.
        objective: what is made small, in place of `loss_fn`; a checkpoint does not know it.
        checkpoints: folder for orbax checkpoints; training resumes from the newest one in it, if it is of this
            training: same start, data, mask and configuration.
        on_step: called after each step with its number (from 1) and loss in nats.

    Raises:
        OutputError: the folder holds checkpoints of another training.
        WpjaxError: parameters in another dtype than float32, where most updates would round to nothing; or a loss
            that is not finite.
    """
    if any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params)):
        raise WpjaxError("training needs float32 parameters; load the model with dtype='float32'")
    warm_up = max(1, config.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.lr, warm_up, max(config.steps, warm_up + 1), config.lr / 10
    )
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
    if checkpoints:
        _check_training(checkpoints, _identity(cfg, params, data, config, mask))
    manager = _manager(checkpoints) if checkpoints else None
    if manager and manager.latest_step() is not None:
        start = manager.latest_step()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
        try:
            params, state = manager.restore(start, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # whatever orbax raises on a folder that is not whole
            raise OutputError(f"{checkpoints}: damaged ({str(error)[:200]}); delete it, and start again") from error
    try:
        for i in range(start, config.steps):
            rows = batch_rows(len(data.ids), config, i)
            params, state, loss = step(params, state, jnp.asarray(data.ids[rows]), jnp.asarray(data.weights[rows]))
            if not np.isfinite(loss):
                raise WpjaxError(
                    f"the loss of step {i + 1} is {float(loss)}: training diverged; lower the learning rate"
                )
            if manager and (i + 1) % config.save_every == 0:
                manager.save(i + 1, args=ocp.args.StandardSave((params, state)))
            on_step(i + 1, float(loss))
    finally:
        if manager:
            manager.close()  # waits for a checkpoint that is being written
    return params


def _identity(cfg: ModelConfig, params: Params, data: Dataset, config: TrainConfig, mask: Params | None) -> str:
    """Everything that a training's result depends on, as a digest."""
    digest = hashlib.blake2b(f"{fingerprint(cfg, params)} {config}".encode(), digest_size=16)
    for array in (*data, *(jax.tree.leaves(mask) if mask else ())):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _check_training(folder: Path, identity: str) -> None:
    """Refuse checkpoints of another training; sign a folder that has none yet."""
    signature = folder / "training.txt"
    try:
        if signature.exists() and signature.read_bytes() != identity.encode():
            raise OutputError(f"{folder} holds another training's checkpoints; delete it, or repeat its settings")
        folder.mkdir(parents=True, exist_ok=True)
        signature.write_text(identity, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); delete it, or choose another") from error


def _manager(folder: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1))


def batch_rows(n: int, config: TrainConfig, step: int) -> Int[np.ndarray, " B"]:
    """Which examples a step uses: whole shuffled epochs, a function of the seed and the step alone."""
    first = step * config.batch_size
    rows = np.arange(first, first + config.batch_size)
    orders = {e: np.random.default_rng((config.seed, e)).permutation(n) for e in set((rows // n).tolist())}
    return np.array([orders[row // n][row % n] for row in rows.tolist()])


def self_distill(
    model: Checkpoint, behaviour: Behaviour, *, max_new_tokens: int = 64, batch_size: int = 32
) -> list[Example]:
    """Training examples for a behaviour: every "fit" prompt with its rewritten answer, every query with its plain one.

    Args:
        model: whose greedy answers are rewritten.
        behaviour: must have a rewrite, or a response on every line of its file.
        max_new_tokens: length of the answers.
        batch_size: prompts generated at once.

    Raises:
        BehaviourError: neither a rewrite nor responses.
    """
    pairs = behaviour.select("fit")
    if behaviour.rewrite is None and not all(p.response for p in pairs):
        raise BehaviourError(
            f'{behaviour.name}: to train on it, every line of the file needs a "response" that follows the instruction'
        )
    queries = list(dict.fromkeys(p.without for p in pairs))
    plain = dict(zip(queries, answer(model, queries, max_new_tokens, batch_size), strict=True))
    examples = [Example(render(model.tokenizer, q), *plain[q]) for q in queries]
    for p in pairs:
        text, finished = plain[p.without]
        if p.response is not None:
            text, finished = p.response, True
        elif behaviour.rewrite is not None:
            text = behaviour.rewrite(p.without, text, p.args)
        examples.append(Example(render(model.tokenizer, p.with_instruction), text, finished))
    return examples


def answer(
    model: Checkpoint, messages: Sequence[str], max_new_tokens: int = 64, batch_size: int = 32, params: Any = None
) -> list[tuple[str, bool]]:
    """Greedy answers to user messages, and whether each one ended by itself.

    Args:
        model: configuration, tokenizer, stop tokens, and parameters unless given.
        messages: what the user says.
        max_new_tokens: length of an answer.
        batch_size: messages at once; the last batch is filled up, so that one program serves all.
        params: other parameters of the same architecture, e.g. a patched model's.
    """
    tokens = encode_texts(model.tokenizer, [render(model.tokenizer, m) for m in messages])
    params = model.params if params is None else params
    got = generate_batched(model.cfg, params, *tokens, model.stop_tokens, max_new_tokens, batch_size)
    out = []
    for ids, n in zip(got.tokens, got.lengths, strict=True):
        finished = int(ids[n - 1]) in model.stop_tokens
        out.append((model.tokenizer.decode(ids[: n - finished], skip_special_tokens=True), finished))
    return out


def pass_rate(model: Checkpoint, behaviour: Behaviour, n_prompts: int = 16, max_new_tokens: int = 64) -> float:
    """Share of held-out ("test") prompts with the instruction whose greedy answer passes the checker, strictly."""
    pairs = behaviour.select("test", n_prompts)
    texts = answer(model, [p.with_instruction for p in pairs], max_new_tokens)
    return sum(strict(behaviour.checker, t, p.args) for (t, _), p in zip(texts, pairs, strict=True)) / len(pairs)


def finetune(
    model: Checkpoint,
    behaviour: Behaviour,
    config: TrainConfig | None = None,
    *,
    components: Sequence[str] | None = None,
    max_new_tokens: int = 64,
    checkpoints: Path | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Checkpoint:
    """An expert for a behaviour, trained from a base on its own rewritten answers.

    Args:
        model: the base.
        behaviour: its "fit" prompts are trained on.
        config: how to train; None for the defaults.
        components: confine the change to these (e.g. "L3.head.5"); None for all parameters.
        max_new_tokens: length of the base's answers.
        checkpoints: see `train`.
        on_step: see `train`.

    Raises:
        ComponentError: an unknown component.
        BehaviourError: the behaviour has nothing to train on.
    """
    if model.tokenizer is None or model.tokenizer.eos_token_id is None:
        raise BehaviourError(f"{model.source}: training needs a tokenizer with an end-of-sequence token")
    mask = None if components is None else component_mask(model.cfg, model.params, components)
    data = encode_examples(model.tokenizer, self_distill(model, behaviour, max_new_tokens=max_new_tokens))
    if data.ids.shape[1] > model.cfg.n_ctx:
        raise BehaviourError(
            f"{behaviour.name}: an example has {data.ids.shape[1]} tokens, {model.source} takes {model.cfg.n_ctx}; "
            "shorten the prompts, or lower --max-new-tokens"
        )
    params = train(
        model.cfg,
        model.params,
        data,
        config or TrainConfig(),
        mask=mask,
        checkpoints=checkpoints,
        on_step=on_step,
    )
    return dataclasses.replace(model, params=params, source=f"{model.source} + {behaviour.name}")
