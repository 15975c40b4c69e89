"""Lets models answer prompts, and asks a behaviour's checker about the answers."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from wpjax.behaviours import Behaviour, PromptBatch, strict
from wpjax.errors import AnchorRejected, BehaviourError
from wpjax.metrics.answers import answer_metric
from wpjax.metrics.metric import scores
from wpjax.models.decoder import Params
from wpjax.models.edits import ClampTo, Edit
from wpjax.models.generate import Generation, generate_batched
from wpjax.models.sites import Site
from wpjax.pairs import Pair
from wpjax.stats import mean_interval, resample


class Judge:
    """Generates the answers of a pair's models to some prompts, steered or not, and has the checker judge them.

    Args:
        pair: base and expert.
        behaviour: the behaviour, whose checker judges.
        batch: prompts; those with the instruction are used.
        max_new_tokens: length of an answer, at most.

    >>> import wpjax as wp
    >>> from wpjax.evaluation.judge import Judge
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> judge = Judge(pair, task, task.encode(pair.tokenizer, "test", n_prompts=4), max_new_tokens=8)
    >>> judge.passes(judge.answers(pair.expert)).tolist()
    [True, True, True, True]
    >>> judge.passes(judge.answers(pair.base)).tolist()
    [False, False, False, False]
    """

    def __init__(self, pair: Pair, behaviour: Behaviour, batch: PromptBatch, max_new_tokens: int = 32):
        self.pair, self.behaviour, self.batch, self.max_new_tokens = pair, behaviour, batch, max_new_tokens

    def answers(self, params: Params, clamp: ClampTo | None = None, layer: int = 0) -> Generation:
        """Greedy answers to the prompts.

        Args:
            params: parameters of the model that answers.
            clamp: operation that holds the residual stream after `layer`, at the last prompt token and at every new
                token; None for no operation.
            layer: 0-based layer.
        """
        prompts, stop = self.batch.with_instruction, self.pair.stop_tokens
        start = jnp.asarray(prompts.last)  # the edit holds from this position of each prompt on
        edits = () if clamp is None else (Edit(Site.RESID_POST, clamp, jnp.asarray(layer), start),)
        return generate_batched(self.pair.cfg, params, *prompts, stop, self.max_new_tokens, edits=edits)

    def texts(self, answers: Generation) -> list[str]:
        """The answers as texts, without special tokens."""
        decode = self.pair.tokenizer.decode
        return [
            decode(ids[:n], skip_special_tokens=True)
            for ids, n in zip(answers.tokens, np.asarray(answers.lengths).tolist(), strict=True)
        ]

    def passes(self, answers: Generation, how: Callable[..., bool] = strict) -> Bool[np.ndarray, " B"]:
        """Which answers the checker accepts.

        Args:
            answers: an answer to each prompt.
            how: `behaviours.strict` or `behaviours.loose`.

        Raises:
            BehaviourError: the checker raises an error on an answer.
        """
        accepted = []
        for text, prompt in zip(self.texts(answers), self.batch.pairs, strict=True):
            try:
                accepted.append(bool(how(self.behaviour.checker, text, prompt.args)))
            except BehaviourError:
                raise
            except Exception as error:  # whatever a user's function raises
                raise BehaviourError(
                    f"{self.behaviour.name}: the checker fails on the answer {text[:40]!r} ({type(error).__name__}: "
                    f"{error}); make it return True or False for any text"
                ) from error
        return np.array(accepted)

    def nll(self, answers: Generation) -> float:
        """Mean negative log-likelihood of answers under the base, in nats per token."""
        metric = answer_metric(self.pair.cfg, self.batch.with_instruction, answers)
        return -float(scores(self.pair.cfg, self.pair.base, metric).mean())


def check_behaviour_differs(judge: Judge, base: Generation, expert: Generation) -> None:
    """Refuse a behaviour in which base and expert do not differ, and models that say nothing.

    Args:
        judge: prompts and checker.
        base: answers of the base.
        expert: answers of the expert.

    Raises:
        AnchorRejected: the expert does not surely pass the checker more often than the base (the 95 % interval of the
            difference reaches 0), or all answers of a model are empty.
    """
    name = judge.behaviour.name
    for which, answers in (("base", base), ("expert", expert)):
        if not any(text.strip() for text in judge.texts(answers)):
            raise AnchorRejected(
                f"{name}: the {which}'s answers are all empty; check its chat template and stop tokens"
            )
    by_base, by_expert = judge.passes(base), judge.passes(expert)
    difference = by_expert.astype(float) - by_base
    _, low, _ = mean_interval(difference, resample(judge.batch.queries))
    if not low > 0:
        raise AnchorRejected(
            f"{name}: the base passes the checker on {by_base.mean():.0%} of {len(by_base)} prompts, the expert on "
            f"{by_expert.mean():.0%}: not surely more, so there is no behaviour to find; check the pair and the checker"
        )
