"""Metrics that read answers: the expert's own words, and the first word at which base and expert differ."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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
    """Prompts followed by their answers, [B, T + N], padded on the right.

    Args:
        tokens: prompts, [B, T].
        answers: answers to them, [B, N].
    """
    n_prompt, n_new = np.asarray(tokens.lengths), np.asarray(answers.lengths)
    ids = np.zeros((len(n_prompt), tokens.ids.shape[1] + answers.tokens.shape[1]), np.int32)
    # Each answer begins where its prompt ends, so its padding moves behind the answer.
    for row, prompt, new, n, m in zip(ids, tokens.ids, np.asarray(answers.tokens), n_prompt, n_new, strict=True):
        row[:n], row[n : n + m] = prompt[:n], new[:m]
    return Tokens(ids, (n_prompt + n_new).astype(np.int32))


def answer_positions(tokens: Tokens, answers: Generation) -> tuple[Int[np.ndarray, "B N"], Float[np.ndarray, "B N"]]:
    """The position that predicts each token of the answers: the one just before it.

    Args:
        tokens: prompts, [B, T].
        answers: answers to them, [B, N].

    Returns:
        positions, [B, N], in the tokens that `with_answers` makes; and 1 for each token of an answer, 0 where the array
        is only filled up.
    """
    step = np.arange(answers.tokens.shape[1])
    is_token = step < np.asarray(answers.lengths)[:, None]
    # The last prompt token predicts the first token of the answer, and so on.
    return np.where(is_token, np.asarray(tokens.last)[:, None] + step, 0), is_token.astype(np.float32)


def answer_metric(cfg: ModelConfig, prompts: Tokens, answers: Generation) -> Metric:
    """Mean log-probability, in nats, of the tokens of given answers.

    The model reads the prompt and the answer (teacher forcing); nothing is generated. Shapes depend on the width of
    `answers.tokens` alone, so answers of one width share a compiled program.

    Args:
        cfg: architecture of the models that are measured.
        prompts: prompts, [B, T].
        answers: answers to them, [B, N].
    """
    at, is_token = answer_positions(prompts, answers)
    readout = LogProb(jnp.asarray(np.where(is_token > 0, np.asarray(answers.tokens), 0)))
    weight = jnp.asarray(is_token / is_token.sum(1, keepdims=True))
    return Metric(with_answers(prompts, answers), jnp.asarray(at), weight, readout, cfg.n_layers - 1, "response")


def trimmed(answers: Generation) -> Generation:
    """The same answers, as narrow as the longest of them."""
    return Generation(np.asarray(answers.tokens)[:, : int(np.asarray(answers.lengths).max())], answers.lengths)


def answer_of(pair: Pair, params: Params, tokens: Tokens, max_new_tokens: int = 32, batch_size: int = 32) -> Generation:
    """Greedy answers of one model to prompts.

    Args:
        pair: gives the architecture and the stop tokens.
        params: parameters of the model that answers.
        tokens: prompts.
        max_new_tokens: length of an answer, at most.
        batch_size: prompts that are answered at once, at most.

    Raises:
        WpjaxError: a prompt and its answer may exceed the context.
    """
    return generate_batched(pair.cfg, params, *tokens, pair.stop_tokens, max_new_tokens, batch_size)


def response_metric(
    pair: Pair, batch: PromptBatch, max_new_tokens: int = 32, answers: Generation | None = None
) -> Metric:
    """Mean log-probability, in nats, of the expert's own greedy answer y, the end token included.

        F_r(M, x) = 1 / |y| sum_t log p_M(y_t | x, y_<t)        (docs/method.md, "What the model says"; ours)

    Args:
        pair: base and expert.
        batch: prompts; those with the instruction are used.
        max_new_tokens: length of an answer, at most.
        answers: answers of the expert, if they are known already; None to generate them.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> metric = wp.response_metric(pair, task.encode(pair.tokenizer, n_prompts=4), max_new_tokens=8)
    >>> metric.at.shape, metric.layer  # 4 answers of 8 tokens, read after the last of 8 layers
    ((4, 8), 7)
    """
    prompts = batch.with_instruction
    answers = answer_of(pair, pair.expert, prompts, max_new_tokens) if answers is None else answers
    return _as_narrow(answer_metric(pair.cfg, prompts, trimmed(answers)))


def _as_narrow(metric: Metric) -> Metric:
    """The metric without columns that are padding in every row: the longest prompt need not have the longest answer."""
    width = int(metric.tokens.lengths.max())
    return dataclasses.replace(metric, tokens=Tokens(metric.tokens.ids[:, :width], metric.tokens.lengths))


@functools.partial(jax.jit, static_argnames="cfg")
def _picked(cfg: ModelConfig, params: Params, metric: Metric) -> Float[Array, "B S D"]:
    return metric.pick(metric.run(cfg, params).resid)


def kl_metric(pair: Pair, batch: PromptBatch, max_new_tokens: int = 32, answers: Generation | None = None) -> Metric:
    """Minus the divergence of the model's next-token distributions from the expert's, along the expert's answer y.

        F_k(M, x) = -1 / |y| sum_t KL(p_E(. | x, y_<t) || p_M(. | x, y_<t))        (nats per token; 0 for the expert)

    (docs/method.md, "What the model says"; ours)

    Args:
        pair: base and expert.
        batch: prompts; those with the instruction are used.
        max_new_tokens: length of an answer, at most.
        answers: answers of the expert, if they are known already; None to generate them.

    >>> import wpjax as wp
    >>> from wpjax.metrics.metric import scores
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> metric = wp.kl_metric(pair, task.encode(pair.tokenizer, n_prompts=4), max_new_tokens=8)
    >>> base, expert = (scores(pair.cfg, params, metric) for params in (pair.base, pair.expert))
    >>> bool((base < -0.1).all()), bool((abs(expert) < 1e-4).all())
    (True, True)
    """
    prompts = batch.with_instruction
    answers = answer_of(pair, pair.expert, prompts, max_new_tokens) if answers is None else answers
    return divergence_metric(pair.cfg, pair.expert, prompts, answers)


def divergence_metric(cfg: ModelConfig, reference: Params, prompts: Tokens, answers: Generation) -> Metric:
    """Minus the divergence of the model's next-token distributions from a reference model's, along given answers y.

        F(M, x) = -1 / |y| sum_t KL(p_R(. | x, y_<t) || p_M(. | x, y_<t))      (nats per token; 0 for the reference R)

    Args:
        cfg: architecture of the models.
        reference: parameters of R.
        prompts: prompts x, [B, T].
        answers: answers to them, [B, N].

    >>> import wpjax as wp
    >>> from wpjax.metrics.answers import answer_of, divergence_metric
    >>> from wpjax.metrics.metric import scores
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> prompts = task.encode(pair.tokenizer, n_prompts=4).without
    >>> metric = divergence_metric(pair.cfg, pair.base, prompts, answer_of(pair, pair.base, prompts, 8))
    >>> bool((abs(scores(pair.cfg, pair.base, metric)) < 1e-4).all())
    True
    """
    # Tokens, positions and weights are those of the response; the readout compares with the reference's own stream.
    metric = _as_narrow(answer_metric(cfg, prompts, trimmed(answers)))
    resid = jnp.asarray(over_prompts(metric, _picked, cfg, reference))
    return dataclasses.replace(metric, readout=Divergence(resid, reference), name="kl")


def decision_metric(
    pair: Pair, batch: PromptBatch, max_new_tokens: int = 32, answers: Generation | None = None
) -> Metric:
    """Log-odds, in nats, of the expert's token against the base's, where the two first part ways.

        F_d(M, x) = log p_M(y_t | x, y_<t) - log p_M(b_t | x, y_<t),   t = min{t : b_t != y_t}
        (docs/method.md, "What the model says"; ours)

    y is the expert's greedy answer, and b_t is the base's first choice after y_<t. Up to t the base would say the same
    words, so they do not give the behaviour away yet. A prompt on which the two never part has F_d = 0.

    Args:
        pair: base and expert.
        batch: prompts; those with the instruction are used.
        max_new_tokens: tokens of the answer that are searched for t.
        answers: answers of the expert, if they are known already; None to generate them.

    Raises:
        MetricRejected: base and expert part ways on fewer than half of the prompts.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> metric = wp.decision_metric(pair, task.encode(pair.tokenizer, n_prompts=4), max_new_tokens=8)
    >>> metric.at.shape  # one position for each prompt
    (4, 1)
    """
    tokens, at, experts, bases, differs = _partings(pair, batch, max_new_tokens, answers)
    first = differs.argmax(1)[:, None]  # [B, 1], the step t; 0 where they never part, which gets weight 0 below
    at_decision, experts, bases = (np.take_along_axis(a, first, axis=1) for a in (at, experts, bases))
    longest = int(at_decision.max()) + 1  # tokens after the decision are not needed
    tokens = Tokens(tokens.ids[:, :longest], np.minimum(tokens.lengths, longest))
    readout = LogOdds(jnp.asarray(experts), jnp.asarray(bases))
    weight = jnp.asarray(differs.any(1, keepdims=True).astype(np.float32))
    return Metric(tokens, jnp.asarray(at_decision), weight, readout, pair.cfg.n_layers - 1, "decision")


def partings_metric(
    pair: Pair, batch: PromptBatch, max_new_tokens: int = 32, answers: Generation | None = None
) -> Metric:
    """Log-odds, in nats, of the expert's token against the base's: the mean over all places where the two part ways.

        F_p(M, x) = mean over t in P of  log p_M(y_t | x, y_<t) - log p_M(b_t | x, y_<t),   P = {t : b_t != y_t}
        (docs/method.md, "What the model says"; ours)

    y is the expert's greedy answer, its end included, and b_t is the base's first choice after y_<t. The first of these
    places is that of `decision_metric`. The later ones tell whether a behaviour goes on, and how it ends: a quotation
    must be closed, too. A prompt on which the two never part has F_p = 0.

    Args:
        pair: base and expert.
        batch: prompts; those with the instruction are used.
        max_new_tokens: length of an answer, at most.
        answers: answers of the expert, if they are known already; None to generate them.

    Raises:
        MetricRejected: base and expert part ways on fewer than half of the prompts.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> metric = wp.partings_metric(pair, task.encode(pair.tokenizer, n_prompts=4), max_new_tokens=8)
    >>> bool((metric.weight.sum(1) == 1).all())
    True
    """
    tokens, at, experts, bases, differs = _partings(pair, batch, max_new_tokens, answers)
    longest = int(np.where(differs, at, 0).max()) + 1
    steps = differs.any(0)  # a step at which no prompt parts is not read
    at, experts, bases, differs = (a[:, steps] for a in (np.where(differs, at, 0), experts, bases, differs))
    tokens = Tokens(tokens.ids[:, :longest], np.minimum(tokens.lengths, longest))
    weight = differs / np.maximum(differs.sum(1, keepdims=True), 1)
    readout = LogOdds(jnp.asarray(experts), jnp.asarray(bases))
    weight = jnp.asarray(weight.astype(np.float32))
    return Metric(tokens, jnp.asarray(at), weight, readout, pair.cfg.n_layers - 1, "partings")


def _partings(
    pair: Pair, batch: PromptBatch, max_new_tokens: int, answers: Generation | None
) -> tuple[Tokens, Int[np.ndarray, "B N"], Int[np.ndarray, "B N"], Int[np.ndarray, "B N"], Bool[np.ndarray, "B N"]]:
    """Prompts with the expert's answers; for each step of an answer its position, the expert's token, the base's choice
    there, and whether the two differ.

    Raises:
        MetricRejected: they differ on fewer than half of the prompts.
    """
    prompts = batch.with_instruction
    answers = answer_of(pair, pair.expert, prompts, max_new_tokens) if answers is None else answers
    tokens, (at, is_token) = with_answers(prompts, answers), answer_positions(prompts, answers)
    experts = np.asarray(answers.tokens)[:, : at.shape[1]]
    bases = _base_choices(pair, tokens, at)
    differs = (is_token > 0) & (bases != experts)
    n_parted = int(differs.any(1).sum())
    if n_parted < len(batch) / 2:
        raise MetricRejected(
            f"base and expert part ways on {n_parted} of {len(batch)} prompts of {batch.behaviour} only: the "
            "base answers them as the expert does; use other prompts, or a longer answer"
        )
    return tokens, at, experts, bases, differs


@functools.partial(jax.jit, static_argnames="cfg")
def _choices(cfg: ModelConfig, params: Params, ids: Array, at: Array) -> Int[Array, "B S"]:
    resid = forward(cfg, params, ids, logits=False).resid
    picked = jnp.take_along_axis(resid, at[..., None], axis=1)
    # One prompt at a time: the logits of all of them, [B, S, V], may not fit in memory.
    return jax.lax.map(lambda row: decoder(cfg, params).logits(row).argmax(-1), picked)


def _base_choices(pair: Pair, tokens: Tokens, at: np.ndarray, batch_size: int = 32) -> Int[np.ndarray, "B S"]:
    """The base's greedy choice after each position."""

    placement = pair.placement

    def run(rows: Int[np.ndarray, " N"]) -> Int[Array, "N S"]:
        some = jnp.asarray(tokens.ids[rows]), jnp.asarray(at[rows])
        return placement.call(_choices, (pair.cfg,), (pair.base,), some)

    return map_batches(len(at), batch_size, run, parts=placement.n_patch)
