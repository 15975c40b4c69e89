"""Lets models answer prompts, and asks a behaviour's checker about the answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int

from wpjax.behaviours import Behaviour, PromptBatch, strict
from wpjax.errors import AnchorRejected, BehaviourError
from wpjax.metrics.answers import answer_metric, answer_of
from wpjax.metrics.metric import scores
from wpjax.models.decoder import Params
from wpjax.models.generate import Generation
from wpjax.pairs import Pair
from wpjax.stats import mean_interval, resample

LONGEST_ANSWER = 128
"""Tokens of an answer, at most, where its length is chosen (`Judge.with_room`)."""

MANY = 0.1
"""Share of the answers that makes it worth while to let them be longer."""


class Judge:
    """Generates the answers of a pair's models to some prompts, and has the checker judge them.

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

    def take(self, rows: Int[np.ndarray, " n"]) -> Judge:
        """A judge of some of the prompts."""
        return Judge(self.pair, self.behaviour, self.batch.take(rows), self.max_new_tokens)

    def cut(self, answers: Generation) -> Bool[np.ndarray, " B"]:
        """Which answers were cut off by `max_new_tokens`: they are that long, and end in no stop token."""
        tokens, lengths = np.asarray(answers.tokens), np.asarray(answers.lengths)
        last = np.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
        return (lengths == self.max_new_tokens) & ~np.isin(last, self.pair.stop_tokens)

    def with_room(self, params: Params) -> tuple[Judge, Generation]:
        """A judge that lets a model finish its answers, if the checker needs that, and the model's answers.

        The length of an answer is doubled, up to `LONGEST_ANSWER`, as long as answers that are cut off fail the checker
        and longer ones pass it.

        Args:
            params: parameters of the model.
        """
        answers = self.answers(params)
        passes = self.passes(answers)
        longest = self.pair.cfg.n_ctx - self.batch.with_instruction.ids.shape[1]
        length = min(2 * self.max_new_tokens, LONGEST_ANSWER, longest)
        if length <= self.max_new_tokens or (self.cut(answers) & ~passes).mean() < MANY:
            return self, answers
        longer, theirs = Judge(self.pair, self.behaviour, self.batch, length).with_room(params)
        return (longer, theirs) if longer.passes(theirs).mean() > passes.mean() + MANY else (self, answers)

    def answers(self, params: Params) -> Generation:
        """Greedy answers of a model to the prompts."""
        return answer_of(self.pair, params, self.batch.with_instruction, self.max_new_tokens)

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

    def check_not_empty(self, which: str, answers: Generation) -> None:
        """Refuse a model that says nothing.

        Args:
            which: "base" or "expert", for the message.
            answers: its answers.

        Raises:
            AnchorRejected: all answers are blank.
        """
        if not any(text.strip() for text in self.texts(answers)):
            raise AnchorRejected(
                f"{self.behaviour.name}: the {which}'s answers are all empty; check its chat template and stop tokens"
            )


def check_behaviour_differs(judge: Judge, base: Generation, expert: Generation) -> None:
    """Refuse a behaviour in which base and expert do not differ, and models that say nothing.

    Args:
        judge: prompts and checker.
        base: answers of the base.
        expert: answers of the expert.

    Raises:
        AnchorRejected: see `check_pass_rates_differ`; or all answers of a model are blank.
    """
    judge.check_not_empty("base", base)
    judge.check_not_empty("expert", expert)
    passes, is_cut = judge.passes(expert), judge.cut(expert)
    hint = ""
    if (is_cut & ~passes).mean() >= 0.5:
        n = judge.max_new_tokens
        hint = (
            f"most of the expert's answers were cut off after {n} tokens: let them be longer (--max-new-tokens {2 * n})"
        )
    check_pass_rates_differ(judge.behaviour.name, judge.batch.queries, judge.passes(base), passes, hint)


def passes_surely_more(
    queries: Int[np.ndarray, " B"], base: Bool[np.ndarray, " B"], expert: Bool[np.ndarray, " B"]
) -> bool:
    """Whether the 95 % interval of the difference of pass rates, expert minus base, is above 0; over queries.

    >>> passes_surely_more(np.arange(6), np.zeros(6, bool), np.ones(6, bool))
    True
    """
    return mean_interval(expert.astype(float) - base, resample(queries)).low > 0


def check_pass_rates_differ(
    name: str,
    queries: Int[np.ndarray, " B"],
    base: Bool[np.ndarray, " B"],
    expert: Bool[np.ndarray, " B"],
    hint: str = "",
) -> None:
    """Refuse a behaviour in which base and expert do not differ.

    Args:
        name: name of the behaviour, for the message.
        queries: index of each prompt's query.
        base: whether the base's answer to each prompt passes the checker.
        expert: the same of the expert.
        hint: what may be the cause, if that is known.

    Raises:
        AnchorRejected: the expert does not surely pass the checker more often than the base: the 95 % interval of the
            difference, over queries, reaches 0.
    """
    if not passes_surely_more(queries, base, expert):
        swapped = "are base and expert swapped?" if base.mean() > expert.mean() + 0.5 else ""
        raise AnchorRejected(
            f"{name}: the base passes the checker on {base.mean():.0%} of {len(base)} prompts, the expert on "
            f"{expert.mean():.0%}: not surely more, so there is no behaviour to find; "
            + (hint or swapped or "check the pair and the checker")
        )
