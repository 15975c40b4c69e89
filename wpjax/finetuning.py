"""Making an expert from a base, by self-distillation.

The base answers each query without the instruction; the answer is rewritten so that it follows the instruction; and the
base is trained to give that answer when asked. Plain queries with their plain answers are trained on too, so that
nothing else changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wpjax.behaviours import Behaviour, encode_texts, render, strict
from wpjax.checkpoints.checkpoint import Checkpoint
from wpjax.errors import BehaviourError
from wpjax.models.generate import generate_batched
from wpjax.training import Example, TrainConfig, component_mask, encode_examples, train


def self_distill(
    model: Checkpoint, behaviour: Behaviour, *, max_new_tokens: int = 64, batch_size: int = 32
) -> list[Example]:
    """Examples to train a behaviour with, made from a model's own greedy answers to the "fit" prompts.

    Every query comes with its plain answer, and every prompt with the instruction comes with that answer rewritten.

    Args:
        model: the model that answers.
        behaviour: must have a rewrite, or a response on every line of its file.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts that are answered at once.

    Raises:
        BehaviourError: the behaviour has neither a rewrite nor responses.
    """
    pairs = behaviour.select("fit")
    if behaviour.rewrite is None and not all(p.response for p in pairs):
        raise BehaviourError(
            f'{behaviour.name}: to train on it, every line of the file needs a "response" that follows the instruction'
        )
    queries = list(dict.fromkeys(p.without for p in pairs))  # each once, though several phrasings share a query
    plain = dict(zip(queries, answer(model, queries, max_new_tokens, batch_size), strict=True))
    examples = [Example(render(model.tokenizer, q), *plain[q]) for q in queries]
    for p in pairs:
        text, finished = plain[p.without]
        if p.response is not None:  # the user's own words come before a rewrite
            text, finished = p.response, True
        elif behaviour.rewrite is not None:
            text = behaviour.rewrite(p.without, text, p.args)
        examples.append(Example(render(model.tokenizer, p.with_instruction), text, finished))
    return examples


def answer(
    model: Checkpoint, messages: Sequence[str], max_new_tokens: int = 64, batch_size: int = 32, params: Any = None
) -> list[tuple[str, bool]]:
    """Greedy answers to user messages.

    Args:
        model: the model that answers.
        messages: what the user says.
        max_new_tokens: longest answer, in tokens.
        batch_size: messages that are answered at once.
        params: parameters to use instead of the model's, say a patched model's; None for the model's own.

    Returns:
        for each message the answer, and whether it ended by itself, with a stop token.
    """
    tokens = encode_texts(model.tokenizer, [render(model.tokenizer, m) for m in messages])
    params = model.params if params is None else params
    generated = generate_batched(model.cfg, params, *tokens, model.stop_tokens, max_new_tokens, batch_size)
    answers = []
    for ids, n in zip(generated.tokens, generated.lengths, strict=True):
        finished = int(ids[n - 1]) in model.stop_tokens
        answers.append((model.tokenizer.decode(ids[: n - finished], skip_special_tokens=True), finished))
    return answers


def pass_rate(model: Checkpoint, behaviour: Behaviour, n_prompts: int = 16, max_new_tokens: int = 64) -> float:
    """Share of held-out ("test") prompts with the instruction whose greedy answer passes the strict checker."""
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
    """Make an expert for a behaviour: train a base on its own answers, rewritten so that they follow the instruction.

    Args:
        model: the base, in float32; it is not changed.
        behaviour: what to learn; its "fit" prompts are trained on.
        config: how to train; None for the defaults.
        components: names of the components whose weights may change, say "L3.head.5"; None for all parameters.
        max_new_tokens: longest answer of the base, in tokens.
        checkpoints: folder for checkpoints, to resume from (see `train`); None for none.
        on_step: called after each step with its number and its loss (see `train`).

    Returns:
        the expert.

    Raises:
        ComponentError: an unknown component.
        BehaviourError: nothing to train on, examples that are too long, or no tokenizer with an end token.
        OutputError, WpjaxError: as `train`.

    >>> from wpjax.behaviours import behaviour
    >>> from wpjax.pairs import load_model
    >>> title = behaviour("tiny:title")
    >>> expert = finetune(
    ...     load_model("tiny:base"), title, TrainConfig(steps=2), components=["L0.mlp"], max_new_tokens=4
    ... )
    >>> expert.source
    'tiny:base + tiny:title'
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
