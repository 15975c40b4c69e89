"""Answers to read: base, patched base and expert, side by side on a few held-out prompts.

A ranking and a share of the gap are numbers. Whether the best components bring the behaviour back can also be read.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from wpjax.behaviours import Behaviour
from wpjax.behaviours.prompts import MIN_PROMPTS
from wpjax.errors import BehaviourError
from wpjax.evaluation.judge import Judge
from wpjax.models.generate import Generation
from wpjax.pairs import Pair
from wpjax.patching import PatchMask, materialize
from wpjax.results.answers import Answers
from wpjax.results.sweep_result import SweepResult
from wpjax.results.verdict import n_reaching


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

    Args:
        pair: the models that were swept.
        behaviour: the behaviour that was swept.
        result: the sweep. Its `set_ranking` says which components are best.
        top: number of components to patch; None for as many as have scores that add up to 90 % of the coverage.
        n_prompts: number of "test" prompts to show.
        max_new_tokens: length of an answer, at most.

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
    n = n_to_read(result) if top is None else top
    names = [row.name for row in result.top(n, by=result.set_ranking, kinds=tuple(result.finest_kinds))]
    batch = behaviour.encode(pair.tokenizer, "test", max(n_prompts, MIN_PROMPTS))
    batch.check_fits(pair.cfg.n_ctx, pair.cfg.d_vocab)
    judge = Judge(pair, behaviour, batch, max_new_tokens)
    patched = materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, names))
    said = [judge.answers(params) for params in (pair.base, patched, pair.expert)]
    return side_by_side(judge, *said, n_components=len(names), by=result.set_ranking, n_prompts=n_prompts)


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


def n_to_read(result: SweepResult) -> int:
    """How many components of a result's set ranking to patch for answers to read.

    As many of the finest kinds as have scores that add up to 90 % of the coverage; if they do not add up to it, all
    whose scores are positive, and at least one.
    """
    values = result.values(result.set_ranking)
    values = values[np.isin(result.dataset["kind"].values.astype(str), result.finest_kinds)]
    reached = n_reaching(values, 0.9 * float(result.dataset.attrs["coverage"]))
    return max(1, int((values > 0).sum())) if reached is None else reached
