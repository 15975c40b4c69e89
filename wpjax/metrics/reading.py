"""Where an anchor is read: at the last prompt token, or at the tokens of an answer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.behaviours import Tokens
from wpjax.metrics.answers import answer_of, answer_positions, with_answers
from wpjax.models.generate import Generation
from wpjax.pairs import Pair


class Reading(NamedTuple):
    """Where the stream is read.

    Attributes:
        tokens: token ids of B prompts, with their answers if those are read.
        at: [B, S], token positions that are read.
        weight: [B, S], weight of each position in the mean over S.
    """

    tokens: Tokens
    at: Int[Array | np.ndarray, "B S"]
    weight: Float[Array | np.ndarray, "B S"]


def read_at(prompts: Tokens, answers: Generation | None) -> Reading:
    """Where to read prompts: at the last prompt token, or at all tokens of their answers, the end token included."""
    if answers is None:
        return Reading(prompts, prompts.last[:, None], np.ones((len(prompts.ids), 1), np.float32))
    at, is_token = answer_positions(prompts, answers)
    # `at` predicts a token, so it is one position before it. The state of a token is read where the token stands.
    where = np.where(is_token > 0, at + 1, 0)
    return Reading(with_answers(prompts, answers), where, is_token / is_token.sum(1, keepdims=True))


def first_answers(pair: Pair, prompts: Tokens, n: int) -> Generation | None:
    """Greedy answers of the expert, n tokens at most; None for n = 0."""
    return answer_of(pair, pair.expert, prompts, n) if n else None
