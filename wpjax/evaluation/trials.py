"""Patched bases answer the prompts of a split, a few at a time, and the checker judges; nothing is answered twice.

recovery(S)  =  (pass rate of the base with S - pass rate of the base)  /  (that of the expert - that of the base)
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import MutableMapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from wpjax.components import Component
from wpjax.evaluation.judge import Judge, check_pass_rates_differ, passes_surely_more
from wpjax.evaluation.steering import PROMPTS_A_LOOK
from wpjax.models.decoder import Params
from wpjax.pairs import Pair
from wpjax.patching import PatchMask, materialize
from wpjax.runtime.shards import finished_part
from wpjax.stats import Interval, ratio_of_means, resample


class Trials:
    """Which answers of patched bases to the prompts of a split pass the checker.

    Attributes:
        judge: the prompts and the checker.
        base: [B], whether the base's own answer to each prompt passes.
        expert: [B], the same of the expert.
        seconds: how long a model takes to answer all prompts, once its programs are compiled.
        done: finished parts; new ones are added.

    >>> import wpjax as wp
    >>> from wpjax.evaluation.judge import Judge
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> trials = Trials.of(Judge(pair, task, task.encode(pair.tokenizer, "test", 4), max_new_tokens=8), {})
    >>> everything = trials.passes(wp.enumerate_components(pair.cfg, ["layer"]))
    >>> everything.tolist(), trials.recovery(everything).mean
    ([True, True, True, True], 1.0)
    """

    def __init__(
        self,
        judge: Judge,
        base: Bool[np.ndarray, " B"],
        expert: Bool[np.ndarray, " B"],
        seconds: float,
        done: MutableMapping[str, np.ndarray],
    ):
        self.judge, self.base, self.expert, self.seconds, self.done = judge, base, expert, seconds, done
        self.queries, self.looks = judge.batch.queries, _looks(len(judge.batch))

    @classmethod
    def of(cls, judge: Judge, done: MutableMapping[str, np.ndarray]) -> Trials:
        """Let base and expert answer.

        Raises:
            AnchorRejected: they do not differ in the behaviour on these prompts.
        """
        passes, seconds = list[np.ndarray](), 0.0
        for name, params in (("base", judge.pair.base), ("expert", judge.pair.expert)):
            began, parts = time.monotonic(), list[np.ndarray]()
            for rows in _looks(len(judge.batch)):
                some = judge.take(rows)
                answers = some.answers(params)
                if not parts:
                    some.check_not_empty(name, answers)
                parts.append(some.passes(answers))
            seconds = time.monotonic() - began  # the last counts: its programs are compiled
            passes.append(np.concatenate(parts))
        base, expert = passes
        check_pass_rates_differ(judge.behaviour.name, judge.batch.queries, base, expert)
        return cls(judge, base, expert, seconds, done)

    def passes(self, components: Sequence[Component], need: int = 0) -> Bool[np.ndarray, " n"]:
        """Which answers of the base with some components pass; of all prompts, or of those before it was hopeless.

        Args:
            components: the components.
            need: answers that must pass; once that cannot be any more, the other prompts are left out.
        """
        pair, params, parts = self.judge.pair, None, list[np.ndarray]()
        for i, rows in enumerate(self.looks):
            key = f"{self.judge.batch.split}-{digest(components)}-{i}"
            if key not in self.done:
                params = patched(pair, components) if params is None else params
                judge = self.judge.take(rows)
                self.done[key] = judge.passes(judge.answers(params)).astype(np.float64)
            parts.append(finished_part(self.done, key, (len(rows),)) > 0)
            left = len(self.base) - sum(map(len, parts))
            if sum(int(part.sum()) for part in parts) + left < need:
                break
        return np.concatenate(parts)

    def recovery(self, passes: Bool[np.ndarray, " n"]) -> Interval:
        """The recovery on the first n prompts, with its 95 % interval over queries."""
        n = len(passes)
        return recovery(passes, self.base[:n], self.expert[:n], self.queries[:n])


def recovery(
    passes: Bool[np.ndarray, " B"],
    base: Bool[np.ndarray, " B"],
    expert: Bool[np.ndarray, " B"],
    queries: Int[np.ndarray, " B"],
) -> Interval:
    """The share of the difference in pass rates that a patched base brings back, with its 95 % interval over queries.

    Args:
        passes: [B], whether the patched base's answer to each prompt passes.
        base: the same of the base.
        expert: the same of the expert.
        queries: [B], index of each prompt's query.

    Returns:
        the ratio of means; NaN if the expert does not surely pass more often. Resamples whose gap is not positive are
        left out: they hold no prompt that tells base from expert.

    >>> base, expert = np.zeros(8, bool), np.ones(8, bool)
    >>> recovery(np.arange(8) < 6, base, expert, np.arange(8)).mean
    0.75
    """
    gap = expert.astype(float) - base
    if not passes_surely_more(queries, base, expert):
        return Interval(float("nan"), float("nan"), float("nan"))
    resamples = resample(queries)
    usable = resamples._replace(weights=resamples.weights[resamples.weights @ gap > 0])
    return Interval(*(float(bound[0]) for bound in ratio_of_means((passes.astype(float) - base)[None], gap, usable)))


def patched(pair: Pair, components: Sequence[Component]) -> Params:
    """The base with some components of the expert."""
    return materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, components))


def digest(components: Sequence[Component]) -> str:
    """A hash of a set, whatever its order."""
    return hashlib.blake2b(" ".join(sorted(c.name for c in components)).encode(), digest_size=12).hexdigest()


def _looks(n: int) -> list[Int[np.ndarray, " m"]]:
    """The prompts in as many equal parts as it takes for none to have more than `PROMPTS_A_LOOK`."""
    return np.array_split(np.arange(n), -(-n // PROMPTS_A_LOOK))
