"""Answers to read: base, patched base and expert, side by side on a few held-out prompts.

A ranking and a share of the gap are numbers. Whether the best components bring the behaviour back can also be read.
"""

from __future__ import annotations

import itertools

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

    How many components are patched is found by trying: `sizes_to_try` and at last all of them, up to the first number
    with which the checker accepts at least half as many of these answers as of the expert's. Without a checker it is
    the last of the sizes.

    Args:
        pair: the models that were swept.
        behaviour: the behaviour that was swept.
        result: the sweep. Its `set_ranking` says which components are best.
        top: number of components to patch; None to find it.
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
    batch = behaviour.encode(pair.tokenizer, "test", max(n_prompts, MIN_PROMPTS))
    batch.check_fits(pair.cfg.n_ctx, pair.cfg.d_vocab)
    judge = Judge(pair, behaviour, batch, max_new_tokens)
    base, expert = judge.answers(pair.base), judge.answers(pair.expert)
    passes = _passes(judge, expert)
    sizes = sizes_to_try(result) if top is None else [top]
    ranked = [row.name for row in result.top(result.dataset.sizes["component"], by=result.set_ranking)]
    if top is None:  # without a checker, none can be said to be too few
        sizes = sizes[-1:] if np.isnan(passes).any() else list(dict.fromkeys([*sizes, len(ranked)]))
    tried: list[int] = []
    for size in sizes:
        names = ranked[:size]
        patched = judge.answers(materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, names)))
        if size == sizes[-1] or _passes(judge, patched).sum() >= max(passes.sum() / 2, 1):
            break
        tried.append(size)
    answers = side_by_side(judge, base, patched, expert, len(names), result.set_ranking, n_prompts)
    return answers._replace(tried=tuple(tried))


def sizes_to_try(result: SweepResult) -> list[int]:
    """How many of the best components to patch for answers to read, the fewest first.

    They grow by a factor of four. The first have scores that add up to half of the coverage, the last to 90 % of it; if
    they do not add up to that, the last are all with a positive score. At least one component is patched.

    >>> import xarray as xr
    >>> data = {"effect": ("component", [0.4, 0.2, 0.2, 0.1, 0.0]), "kind": ("component", ["head"] * 5),
    ...         "layer": ("component", [0] * 5)}
    >>> sizes_to_try(SweepResult(xr.Dataset(data, attrs={"coverage": 0.9})))
    [2, 4]
    """
    values = result.values(result.set_ranking)
    values = values[result.finest]
    coverage, n_positive = float(result.dataset.attrs["coverage"]), max(1, int((values > 0).sum()))
    first, last = (n_reaching(values, share * coverage) or n_positive for share in (0.5, 0.9))
    return [*itertools.takewhile(lambda n: n < last, (first * 4**i for i in itertools.count())), last]


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
