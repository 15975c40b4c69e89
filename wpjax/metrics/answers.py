"""Metrics that read answers: of the expert's own words, and of where base and expert part ways."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.behaviours import PromptBatch, Tokens
from wpjax.errors import MetricRejected
from wpjax.metrics.metric import Metric, over_prompts
from wpjax.metrics.readouts import Divergence, LogOdds, LogProb
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, decoder, forward
from wpjax.models.generate import Generation, generate_batched
from wpjax.pairs import Pair
from wpjax.runtime.batching import map_batches


def with_answers(tokens: Tokens, answers: Generation) -> Tokens:
    """Prompts followed by answers, [B, T + N]."""
    n_prompt, n_new = np.asarray(tokens.lengths), np.asarray(answers.lengths)
    ids = np.zeros((len(n_prompt), tokens.ids.shape[1] + answers.tokens.shape[1]), np.int32)
    for row, prompt, new, n, m in zip(ids, tokens.ids, np.asarray(answers.tokens), n_prompt, n_new, strict=True):
        row[:n], row[n : n + m] = prompt[:n], new[:m]
    return Tokens(ids, (n_prompt + n_new).astype(np.int32))


def answer_positions(tokens: Tokens, answers: Generation) -> tuple[Int[np.ndarray, "B N"], Float[np.ndarray, "B N"]]:
    """Positions that predict each token of the answers, and 1 where there is such a token (0 fills up)."""
    step = np.arange(answers.tokens.shape[1])
    here = step < np.asarray(answers.lengths)[:, None]
    return np.where(here, np.asarray(tokens.last)[:, None] + step, 0), here.astype(np.float32)


def answer_metric(cfg: ModelConfig, prompts: Tokens, answers: Generation) -> Metric:
    """Mean log-probability of the tokens of some answers, teacher-forced; of one shape for all answers of a length."""
    at, here = answer_positions(prompts, answers)
    readout = LogProb(jnp.asarray(np.where(here > 0, np.asarray(answers.tokens), 0)))
    weight = jnp.asarray(here / here.sum(1, keepdims=True))
    return Metric(with_answers(prompts, answers), jnp.asarray(at), weight, readout, cfg.n_layers - 1, "response")


def trimmed(answers: Generation) -> Generation:
    """Answers without the columns that none of them fills."""
    return Generation(np.asarray(answers.tokens)[:, : int(np.asarray(answers.lengths).max())], answers.lengths)


def answer_of(pair: Pair, params: Params, tokens: Tokens, max_new_tokens: int = 32, batch_size: int = 32) -> Generation:
    """Greedy answers of a model of the pair's architecture to encoded prompts.

    Raises:
        WpjaxError: prompts and answers would outgrow the context.
    """
    return generate_batched(pair.cfg, params, *tokens, pair.stop_tokens, max_new_tokens, batch_size)


def response_metric(
    pair: Pair, batch: PromptBatch, max_new_tokens: int = 32, answers: Generation | None = None
) -> Metric:
    """Mean log-probability of the tokens of the expert's own greedy answer, the end token included.

        F_r(M, x) = 1 / |y| sum_t log p_M(y_t | x, y_<t)        (docs/method.md, "What the model says"; ours)

    Args:
        pair: base and expert.
        batch: prompts with the instruction.
        max_new_tokens: length of an answer.
        answers: the expert's, if they are known already.
    """
    prompts = batch.with_instruction
    answers = answer_of(pair, pair.expert, prompts, max_new_tokens) if answers is None else answers
    metric = answer_metric(pair.cfg, prompts, trimmed(answers))
    width = int(metric.tokens.lengths.max())
    return dataclasses.replace(metric, tokens=Tokens(metric.tokens.ids[:, :width], metric.tokens.lengths))


@functools.partial(jax.jit, static_argnames="cfg")
def _picked(cfg: ModelConfig, params: Params, metric: Metric) -> Float[Array, "B S D"]:
    return metric.pick(metric.run(cfg, params).resid)


def kl_metric(pair: Pair, batch: PromptBatch, max_new_tokens: int = 32, answers: Generation | None = None) -> Metric:
    """How near the model's next-token distributions are to the expert's, along the expert's own greedy answer.

        F_k(M, x) = -1 / |y| sum_t KL(p_E(. | x, y_<t) || p_M(. | x, y_<t))        (nats a token; 0 for the expert)

    Args:
        pair: base and expert.
        batch: prompts with the instruction.
        max_new_tokens: length of an answer.
        answers: the expert's, if they are known already.
    """
    metric = response_metric(pair, batch, max_new_tokens, answers)
    resid = jnp.asarray(over_prompts(metric, lambda some: _picked(pair.cfg, pair.expert, some)))
    return dataclasses.replace(metric, readout=Divergence(resid, pair.expert), name="kl")


def decision_metric(
    pair: Pair, batch: PromptBatch, max_new_tokens: int = 32, answers: Generation | None = None
) -> Metric:
    """Log-odds of the expert's token against the base's, where the two first part ways.

        F_d(M, x) = log p_M(y_t | x, y_<t) - log p_M(b_t | x, y_<t),   t = min{t : b_t != y_t}
        (docs/method.md, "What the model says"; ours)

    y is the expert's greedy answer and b_t what the base would say after y_<t: no context gives the behaviour away
    yet. A prompt on which they never part counts 0.

    Args:
        pair: base and expert.
        batch: prompts with the instruction.
        max_new_tokens: how far to look.
        answers: the expert's, if they are known already.

    Raises:
        MetricRejected: base and expert answer most prompts alike.
    """
    prompts = batch.with_instruction
    answers = answer_of(pair, pair.expert, prompts, max_new_tokens) if answers is None else answers
    tokens, (at, here) = with_answers(prompts, answers), answer_positions(prompts, answers)
    theirs = np.asarray(answers.tokens)[:, : at.shape[1]]
    ours = _base_choices(pair, tokens, at)
    parts = (here > 0) & (ours != theirs)
    parted = parts.any(1)
    if parted.mean() < 0.5:
        raise MetricRejected(
            f"base and expert part ways on {int(parted.sum())} of {len(batch)} prompts of {batch.behaviour} only: the "
            "base answers them as the expert does; use other prompts, or a longer answer"
        )
    first = parts.argmax(1)[:, None]
    where = [np.take_along_axis(a, first, axis=1) for a in (at, theirs, ours)]
    longest = int(where[0].max()) + 1  # what comes after the decision is not needed
    tokens = Tokens(tokens.ids[:, :longest], np.minimum(tokens.lengths, longest))
    readout = LogOdds(jnp.asarray(where[1]), jnp.asarray(where[2]))
    weight = jnp.asarray(parted[:, None].astype(np.float32))
    return Metric(tokens, jnp.asarray(where[0]), weight, readout, pair.cfg.n_layers - 1, "decision")


@functools.partial(jax.jit, static_argnames="cfg")
def _choices(cfg: ModelConfig, params: Params, ids: Array, at: Array) -> Int[Array, "B S"]:
    resid = forward(cfg, params, ids, logits=False).resid
    picked = jnp.take_along_axis(resid, at[..., None], axis=1)
    return jax.lax.map(lambda row: decoder(cfg, params).logits(row).argmax(-1), picked)


def _base_choices(pair: Pair, tokens: Tokens, at: np.ndarray, batch_size: int = 32) -> Int[np.ndarray, "B S"]:
    """The base's greedy choice after each position."""

    def run(rows: Int[np.ndarray, " N"]) -> Int[Array, "N S"]:
        return _choices(pair.cfg, pair.base, jnp.asarray(tokens.ids[rows]), jnp.asarray(at[rows]))

    return map_batches(len(at), batch_size, run)
