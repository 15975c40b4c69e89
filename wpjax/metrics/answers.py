"""Metrics that read answers: the expert's own words, and the first word at which base and expert differ."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

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


class Along(NamedTuple):
    """What base and expert choose along the expert's answers, step by step.

    Attributes:
        tokens: prompts with the expert's answers.
        at: [B, N], the position that predicts each token of an answer.
        experts: [B, N], the expert's token.
        bases: [B, N], the base's first choice there.
        differs: [B, N], whether the two differ; False where the array is only filled up.
    """

    tokens: Tokens
    at: Int[np.ndarray, "B N"]
    experts: Int[np.ndarray, "B N"]
    bases: Int[np.ndarray, "B N"]
    differs: Bool[np.ndarray, "B N"]


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertAnswers:
    """The expert's greedy answers to prompts, and the base's choices along them.

    Each is made when it is asked for, and once. So metrics of the same prompts that are given the same `ExpertAnswers`
    share them.

    Attributes:
        pair: base and expert.
        prompts: the prompts.
        max_new_tokens: length of an answer, at most.
        given: the answers, if they are known already; None to generate them.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> batch = task.encode(pair.tokenizer, n_prompts=4)
    >>> answers = wp.ExpertAnswers(pair, batch.with_instruction, max_new_tokens=8)
    >>> [make(pair, batch, answers=answers).at.shape for make in (wp.response_metric, wp.decision_metric)]
    [(4, 8), (4, 1)]
    """

    pair: Pair
    prompts: Tokens
    max_new_tokens: int = 32
    given: Generation | None = None

    @functools.cached_property
    def generation(self) -> Generation:
        """The answers.

        Raises:
            WpjaxError: a prompt and its answer may exceed the context.
        """
        if self.given is not None:
            return self.given
        return answer_of(self.pair, self.pair.expert, self.prompts, self.max_new_tokens)

    @functools.cached_property
    def along(self) -> Along:
        """What both models choose along the answers; one forward pass of the base."""
        tokens, (at, is_token) = (
            with_answers(self.prompts, self.generation),
            answer_positions(self.prompts, self.generation),
        )
        experts = np.asarray(self.generation.tokens)[:, : at.shape[1]]
        bases = _base_choices(self.pair, tokens, at)
        return Along(tokens, at, experts, bases, (is_token > 0) & (bases != experts))


def response_metric(
    pair: Pair, batch: PromptBatch, max_new_tokens: int = 32, answers: ExpertAnswers | None = None
) -> Metric:
    """Mean log-probability, in nats, of the expert's own greedy answer y, the end token included.

        F_r(M, x) = 1 / |y| sum_t log p_M(y_t | x, y_<t)        (docs/method.md, "What the model says"; ours)

    Args:
        pair: base and expert.
        batch: prompts; those with the instruction are used.
        max_new_tokens: length of an answer, at most.
        answers: the expert's answers, if other metrics share them or they are known already; None to generate them.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> metric = wp.response_metric(pair, task.encode(pair.tokenizer, n_prompts=4), max_new_tokens=8)
    >>> metric.at.shape, metric.layer  # 4 answers of 8 tokens, read after the last of 8 layers
    ((4, 8), 7)
    """
    answers = answers or ExpertAnswers(pair, batch.with_instruction, max_new_tokens)
    return _as_narrow(answer_metric(pair.cfg, answers.prompts, trimmed(answers.generation)))


def _as_narrow(metric: Metric) -> Metric:
    """The metric without columns that are padding in every row: the longest prompt need not have the longest answer."""
    width = int(metric.tokens.lengths.max())
    return dataclasses.replace(metric, tokens=Tokens(metric.tokens.ids[:, :width], metric.tokens.lengths))


@functools.partial(jax.jit, static_argnames="cfg")
def _picked(cfg: ModelConfig, params: Params, metric: Metric) -> Float[Array, "B S D"]:
    return metric.pick(metric.run(cfg, params).resid)


def kl_metric(pair: Pair, batch: PromptBatch, max_new_tokens: int = 32, answers: ExpertAnswers | None = None) -> Metric:
    """Minus the divergence of the model's next-token distributions from the expert's, along the expert's answer y.

        F_k(M, x) = -1 / |y| sum_t KL(p_E(. | x, y_<t) || p_M(. | x, y_<t))        (nats per token; 0 for the expert)

    (docs/method.md, "What the model says"; ours)

    Args:
        pair: base and expert.
        batch: prompts; those with the instruction are used.
        max_new_tokens: length of an answer, at most.
        answers: the expert's answers, if other metrics share them or they are known already; None to generate them.

    >>> import wpjax as wp
    >>> from wpjax.metrics.metric import scores
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> metric = wp.kl_metric(pair, task.encode(pair.tokenizer, n_prompts=4), max_new_tokens=8)
    >>> base, expert = (scores(pair.cfg, params, metric) for params in (pair.base, pair.expert))
    >>> bool((base < -0.1).all()), bool((abs(expert) < 1e-4).all())
    (True, True)
    """
    answers = answers or ExpertAnswers(pair, batch.with_instruction, max_new_tokens)
    return divergence_metric(pair.cfg, pair.expert, answers.prompts, answers.generation)


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
    pair: Pair, batch: PromptBatch, max_new_tokens: int = 32, answers: ExpertAnswers | None = None
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
        answers: the expert's answers, if other metrics share them or they are known already; None to generate them.

    Raises:
        MetricRejected: base and expert part ways on fewer than half of the prompts.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> metric = wp.decision_metric(pair, task.encode(pair.tokenizer, n_prompts=4), max_new_tokens=8)
    >>> metric.at.shape  # one position for each prompt
    (4, 1)
    """
    along = _partings(pair, batch, max_new_tokens, answers)
    return _at_one_step(pair, along, along.differs.argmax(1), "decision")


def _at_one_step(pair: Pair, along: Along, step: Int[np.ndarray, " B"], name: str) -> Metric:
    """Log-odds of the expert's token against the base's at one step of each answer; 0 where the two never part."""
    at, experts, bases = (np.take_along_axis(a, step[:, None], axis=1) for a in (along.at, along.experts, along.bases))
    longest = int(at.max()) + 1  # tokens after the step are not needed
    tokens = Tokens(along.tokens.ids[:, :longest], np.minimum(along.tokens.lengths, longest))
    readout = LogOdds(jnp.asarray(experts), jnp.asarray(bases))
    weight = jnp.asarray(along.differs.any(1, keepdims=True).astype(np.float32))
    return Metric(tokens, jnp.asarray(at), weight, readout, pair.cfg.n_layers - 1, name)


LARGE = 0.5
"""What the instruction does at a step is large if it is so much of the most that it does in the answer."""


def instructed_metric(
    pair: Pair, batch: PromptBatch, max_new_tokens: int = 32, answers: ExpertAnswers | None = None
) -> Metric:
    """Log-odds, in nats, of the expert's token against the base's, where the instruction first makes the two part ways.

        F_i(M, x) = log p_M(y_t | x, y_<t) - log p_M(b_t | x, y_<t),   t = min{t in P : d_t >= max_P d / 2}
        d_t = [log p_E(y_t | x, y_<t) - log p_E(b_t | x, y_<t)]  -  [log p_E(y_t | x', y_<t) - log p_E(b_t | x', y_<t)]
        (docs/method.md, "What the model says"; ours)

    P are the places where base and expert part ways (`partings_metric`), and x' is the prompt without the instruction.
    A fine-tuned model also begins or words its answers differently when nobody asks for the behaviour. At such a place
    d is small, and `decision_metric` may stop there. Where the instruction makes no difference at all, t is the first
    place in P.

    Args:
        pair: base and expert.
        batch: prompts, with and without the instruction.
        max_new_tokens: tokens of the answer that are searched for t.
        answers: the expert's answers, if other metrics share them or they are known already; None to generate them.

    Raises:
        MetricRejected: base and expert part ways on fewer than half of the prompts.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> metric = wp.instructed_metric(pair, task.encode(pair.tokenizer, n_prompts=4), max_new_tokens=8)
    >>> metric.at.shape  # one position for each prompt
    (4, 1)
    """
    answers = answers or ExpertAnswers(pair, batch.with_instruction, max_new_tokens)
    along = _partings(pair, batch, max_new_tokens, answers)
    asked, unasked = (_experts_odds(pair, p, answers.generation, along) for p in (answers.prompts, batch.without))
    due = np.where(along.differs, asked - unasked, -np.inf)
    most = due.max(1, keepdims=True)
    large = np.where(most > 0, due >= LARGE * most, along.differs)
    return _at_one_step(pair, along, large.argmax(1), "instructed")


def _experts_odds(pair: Pair, prompts: Tokens, answers: Generation, along: Along) -> Float[np.ndarray, "B N"]:
    """Log-odds by which the expert prefers its token to the base's at each step of its answers, after given prompts."""
    at, is_token = answer_positions(prompts, answers)
    readout = LogOdds(jnp.asarray(along.experts), jnp.asarray(along.bases))
    tokens = with_answers(prompts, answers)
    metric = Metric(tokens, jnp.asarray(at), jnp.asarray(is_token), readout, pair.cfg.n_layers - 1, "odds")
    found: Float[np.ndarray, "B N"] = over_prompts(metric, _read_steps, pair.cfg, pair.expert)
    return found


@functools.partial(jax.jit, static_argnames="cfg")
def _read_steps(cfg: ModelConfig, params: Params, metric: Metric) -> Float[Array, "B S"]:
    return metric.readout(cfg, params, metric.pick(metric.run(cfg, params).resid))


def partings_metric(
    pair: Pair, batch: PromptBatch, max_new_tokens: int = 32, answers: ExpertAnswers | None = None
) -> Metric:
    """Log-odds, in nats, of the expert's token against the base's: the mean over all places where the two part ways.

        F_p(M, x) = mean over t in P of  log p_M(y_t | x, y_<t) - log p_M(b_t | x, y_<t),   P = {t : b_t != y_t}
        (docs/method.md, "What the model says"; ours)

    y is the expert's greedy answer, its end included, and b_t is the base's first choice after y_<t. The first of these
    places is that of `decision_metric`; that of `instructed_metric` is one of them, too. The later ones tell whether a
    behaviour goes on, and how it ends: a quotation must be closed. A prompt on which the two never part has F_p = 0.

    Args:
        pair: base and expert.
        batch: prompts; those with the instruction are used.
        max_new_tokens: length of an answer, at most.
        answers: the expert's answers, if other metrics share them or they are known already; None to generate them.

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


def _partings(pair: Pair, batch: PromptBatch, max_new_tokens: int, answers: ExpertAnswers | None) -> Along:
    """What the models choose along the expert's answers.

    Raises:
        MetricRejected: they differ on fewer than half of the prompts.
    """
    along = (answers or ExpertAnswers(pair, batch.with_instruction, max_new_tokens)).along
    n_parted = int(along.differs.any(1).sum())
    if n_parted < len(batch) / 2:
        raise MetricRejected(
            f"base and expert part ways on {n_parted} of {len(batch)} prompts of {batch.behaviour} only: the "
            "base answers them as the expert does; use other prompts, or a longer answer"
        )
    return along


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
