"""What models answer, and what a behaviour's checker says of it."""

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
    """Answers a pair's models give to some prompts, steered or not, and what the checker says of them.

    Args:
        pair: base and expert.
        behaviour: its checker judges.
        batch: prompts with the instruction.
        max_new_tokens: length of an answer.
    """

    def __init__(self, pair: Pair, behaviour: Behaviour, batch: PromptBatch, max_new_tokens: int = 32):
        self.pair, self.behaviour, self.batch, self.max_new_tokens = pair, behaviour, batch, max_new_tokens

    def answers(self, params: Params, clamp: ClampTo | None = None, layer: int = 0) -> Generation:
        """Greedy answers to the prompts.

        Args:
            params: of the model that answers.
            clamp: holds the stream after `layer`, at the last prompt token and at every new one; None for none.
            layer: 0-based.
        """
        prompts, stop = self.batch.with_instruction, self.pair.stop_tokens
        start = jnp.asarray(prompts.last)
        edits = () if clamp is None else (Edit(Site.RESID_POST, clamp, jnp.asarray(layer), start),)
        return generate_batched(self.pair.cfg, params, *prompts, stop, self.max_new_tokens, edits=edits)

    def texts(self, answers: Generation) -> list[str]:
        """Answers as text."""
        decode = self.pair.tokenizer.decode
        return [
            decode(ids[:n], skip_special_tokens=True)
            for ids, n in zip(answers.tokens, np.asarray(answers.lengths).tolist(), strict=True)
        ]

    def passes(self, answers: Generation, how: Callable[..., bool] = strict) -> Bool[np.ndarray, " B"]:
        """Which answers the checker accepts.

        Args:
            answers: to the prompts.
            how: `behaviours.strict`, or `behaviours.loose`.

        Raises:
            BehaviourError: the checker fails on an answer.
        """
        found = []
        for text, prompt in zip(self.texts(answers), self.batch.pairs, strict=True):
            try:
                found.append(bool(how(self.behaviour.checker, text, prompt.args)))
            except BehaviourError:
                raise
            except Exception as error:  # whatever a user's function raises
                raise BehaviourError(
                    f"{self.behaviour.name}: the checker fails on the answer {text[:40]!r} ({type(error).__name__}: "
                    f"{error}); make it return True or False for any text"
                ) from error
        return np.array(found)

    def nll(self, answers: Generation) -> float:
        """Mean negative log-likelihood of answers under the base, nats a token."""
        metric = answer_metric(self.pair.cfg, self.batch.with_instruction, answers)
        return -float(scores(self.pair.cfg, self.pair.base, metric).mean())


def check_behaviour_differs(judge: Judge, base: Generation, expert: Generation) -> None:
    """Refuse a behaviour that the base already has, or that the expert does not show, and models that say nothing.

    Raises:
        AnchorRejected: with the rates at which both pass.
    """
    name = judge.behaviour.name
    for which, answers in (("base", base), ("expert", expert)):
        if not any(text.strip() for text in judge.texts(answers)):
            raise AnchorRejected(
                f"{name}: the {which}'s answers are all empty; check its chat template and stop tokens"
            )
    ours, theirs = judge.passes(base), judge.passes(expert)
    more = theirs.astype(float) - ours
    _, low, _ = mean_interval(more, resample(judge.batch.queries))
    if not low > 0:
        raise AnchorRejected(
            f"{name}: the base passes the checker on {ours.mean():.0%} of {len(ours)} prompts, the expert on "
            f"{theirs.mean():.0%}: not surely more, so there is no behaviour to find; check the pair and the checker"
        )
