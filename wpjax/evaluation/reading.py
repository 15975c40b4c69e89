"""Answers to read: base, patched base and expert, side by side on a few held-out prompts.

A ranking and a share of the gap are numbers. Whether the best components bring the behaviour back can also be read.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from wpjax.behaviours import Behaviour
from wpjax.behaviours.prompts import MIN_PROMPTS
from wpjax.components import n_parameters, n_within, parse_component
from wpjax.errors import BehaviourError
from wpjax.evaluation.judge import Judge
from wpjax.models.generate import Generation
from wpjax.pairs import Pair
from wpjax.patching import PatchMask, materialize
from wpjax.results.answers import Answers
from wpjax.results.sweep_result import SweepResult

SHARES = (0.01, 0.05, 0.2, 1.0)
"""Sets that are tried for answers to read, as shares of the parameters of all components that are ranked."""


def answers_to_read(
    pair: Pair,
    behaviour: Behaviour,
    result: SweepResult,
    *,
    top: int | None = None,
    n_prompts: int = 4,
    max_new_tokens: int = 32,
) -> Answers:
    """What the base, the base with the best components of the expert, and the expert say to held-out prompts.

    How many components are patched is found by trying: the best that own `SHARES` of the parameters, the fewest first,
    up to the first with which the checker accepts at least half as many of these answers as of the expert's. Without a
    checker it is the second of them.

    Args:
        pair: the models that were swept.
        behaviour: the behaviour that was swept.
        result: the sweep. Its `set_ranking` says which components are best.
        top: number of components to patch; None to find it.
        n_prompts: number of "test" prompts to show.
        max_new_tokens: length of an answer, at most; longer where the expert's answers are cut off before the checker
            can accept them (`Judge.with_room`). `Answers.max_new_tokens` says how long they were.

    Raises:
        BehaviourError: the prompts do not fit the model.
        WpjaxError: prompts and answers exceed the model's context.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> anchor, batch = wp.fit_anchor(pair, task, n_prompts=8, causal="skip"), task.encode(pair.tokenizer, n_prompts=4)
    >>> result = wp.sweep(pair, batch, anchor, kinds=("attn", "mlp"), method="exact")
    >>> answers = answers_to_read(pair, task, result, top=14, max_new_tokens=4)
    >>> answers.texts[2][0].isupper(), answers.texts[0][0].isupper()  # the expert, the base
    (True, False)
    """
    batch = behaviour.encode(pair.tokenizer, "test", max(n_prompts, MIN_PROMPTS))
    batch.check_fits(pair.cfg.n_ctx, pair.cfg.d_vocab, pair.cfg.longer_context)
    judge = Judge(pair, behaviour, batch, max_new_tokens)
    try:
        judge, expert = judge.with_room(pair.expert)
    except BehaviourError:  # nobody judges
        expert = judge.answers(pair.expert)
    base = judge.answers(pair.base)
    passes = _passes(judge, expert)
    ranked = [row.name for row in result.top(result.dataset.sizes["component"], by=result.set_ranking)]
    owned = np.array([n_parameters(pair.cfg, parse_component(pair.cfg, name)) for name in ranked])
    sizes = [top] if top is not None else [max(1, n_within(owned, share * owned.sum())) for share in SHARES]
    if top is None:  # without a checker, none can be said to be too few
        sizes = sizes[1:2] if np.isnan(passes).any() else list(dict.fromkeys(sizes))
    tried: list[int] = []
    for size in sizes:
        names = ranked[:size]
        patched = judge.answers(materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, names)))
        if size == sizes[-1] or _passes(judge, patched).sum() >= max(passes.sum() / 2, 1):
            break
        tried.append(size)
    answers = side_by_side(judge, base, patched, expert, len(names), result.set_ranking, n_prompts)
    share = float(owned[: len(names)].sum() / owned.sum())
    return answers._replace(tried=tuple(tried), share=share, max_new_tokens=judge.max_new_tokens)


def side_by_side(
    judge: Judge, base: Generation, patched: Generation, expert: Generation, n_components: int, by: str, n_prompts: int
) -> Answers:
    """The first answers of three models, with the checker's verdict on each if there is a checker.

    Args:
        judge: prompts and checker.
        base: answers of the base.
        patched: answers of the base with the best components of the expert.
        expert: answers of the expert.
        n_components: number of these components.
        by: ranking that they lead.
        n_prompts: number of prompts to show, at most.
    """
    said = (base, patched, expert)
    texts = tuple(tuple(judge.texts(one)[:n_prompts]) for one in said)
    prompts = tuple(p.with_instruction for p in judge.batch.pairs[:n_prompts])
    return Answers(prompts, texts, np.stack([_passes(judge, one)[:n_prompts] for one in said]), n_components, by)


def _passes(judge: Judge, answers: Generation) -> Float[np.ndarray, " B"]:
    """The checker's verdicts as 0 and 1; NaN without a checker."""
    try:
        return judge.passes(answers).astype(np.float64)
    except BehaviourError:
        return np.full(len(judge.batch), np.nan)
