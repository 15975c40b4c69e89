"""What a patch does besides: to answers that nobody asked the behaviour of, to plain text, and to other behaviours.

    divergence    KL(base || patched) on the prompts without the instruction, along the base's own answers; nats a token
    perplexity    exp(mean negative log-likelihood of a text's tokens), of base and patched base
    others        how often the patched base passes the checkers of other behaviours, beside the base

(docs/method.md, "The smallest patch"; ours)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wpjax.behaviours import PromptBatch, Tokens, prompt_ids
from wpjax.errors import WpjaxError
from wpjax.metrics.answers import answer_of, divergence_metric
from wpjax.metrics.metric import Metric, scores
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, decoder, forward
from wpjax.pairs import Pair
from wpjax.runtime.batching import map_batches
from wpjax.runtime.placement import Placement
from wpjax.stats import Interval, mean_interval, ratio_of_means, resample

WINDOW = 256
"""Tokens of a text that a model reads at once, at most."""

MOST_TOKENS = 4096
"""Tokens of a text that are read, at most: enough for the perplexity, and not too many to wait for."""

LEAST_TOKENS = 64
"""A text with fewer tokens tells nothing."""


class Neutral(NamedTuple):
    """The prompts of a behaviour without its instruction, one for each query, and the base's answers to them.

    Attributes:
        metric: minus the divergence from the base along its own answers.
        queries: [N], index of each prompt's query.
    """

    metric: Metric
    queries: Int[np.ndarray, " N"]

    @classmethod
    def of(cls, pair: Pair, batch: PromptBatch, max_new_tokens: int = 32) -> Neutral:
        """Let the base answer; of each query one prompt, as phrasings differ in the instruction alone.

        Args:
            pair: base and expert.
            batch: prompts of the behaviour.
            max_new_tokens: length of an answer, at most.

        >>> import wpjax as wp
        >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
        >>> neutral = Neutral.of(pair, task.encode(pair.tokenizer, "test", n_prompts=4), max_new_tokens=4)
        >>> bool((neutral.divergence(pair, pair.base) < 1e-5).all())
        True
        """
        queries, first = np.unique(batch.queries, return_index=True)
        prompts = batch.take(first).without
        answers = answer_of(pair, pair.base, prompts, max_new_tokens)
        return cls(divergence_metric(pair.cfg, pair.base, prompts, answers), queries)

    def divergence(self, pair: Pair, params: Params) -> Float[np.ndarray, " N"]:
        """KL(base || model) of each prompt, mean over the tokens of the base's answer, in nats."""
        # Rounding makes a model's divergence from itself a hair less than 0.
        return np.maximum(-scores(pair.cfg, params, self.metric), 0).astype(np.float64)

    def mean(self, divergence: Float[np.ndarray, " N"]) -> Interval:
        """The mean over prompts, with its 95 % interval over queries."""
        return mean_interval(divergence, resample(self.queries))


class Windows(NamedTuple):
    """A text as N windows of W tokens, the last of which may be shorter.

    Attributes:
        tokens: the windows. Each begins with the tokens that the tokenizer opens a text with, if there are any.
        n_opening: number of those tokens. They are not predicted, nor is a window's first token if there are none.
    """

    tokens: Tokens
    n_opening: int

    @property
    def n_predicted(self) -> Int[np.ndarray, " N"]:
        """[N], number of tokens of each window that are predicted."""
        return np.asarray(self.tokens.lengths) - max(self.n_opening, 1)


def windows_of(tokenizer: Any, text: str, n_ctx: int, name: str = "the text") -> Windows:
    """A text cut into windows of `WINDOW` tokens, `MOST_TOKENS` of it at most.

    Args:
        tokenizer: a tokenizer of the library transformers.
        text: the text.
        n_ctx: context of the model, which no window exceeds.
        name: what to call the text in an error.

    Raises:
        WpjaxError: the text has fewer than `LEAST_TOKENS` tokens.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> windows = windows_of(model.tokenizer, "owls hunt at night . " * 50, n_ctx=128)
    >>> windows.tokens.ids.shape, windows.n_predicted.tolist()
    ((4, 128), [127, 127, 127, 117])
    """
    word = prompt_ids(tokenizer, "a", templated=False)
    opening = word[: len(word) - len(prompt_ids(tokenizer, "a", templated=True))]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:MOST_TOKENS]
    if len(ids) < LEAST_TOKENS:
        raise WpjaxError(f"{name} has {len(ids)} tokens, at least {LEAST_TOKENS} are needed for a perplexity")
    width = min(WINDOW, n_ctx)
    step = width - len(opening)
    rows = [[*opening, *ids[i : i + step]] for i in range(0, len(ids), step)]
    rows = [row for row in rows if len(row) > max(len(opening), 1)]  # a window must have a token to predict
    padded = np.zeros((len(rows), width), np.int32)
    for row, window in zip(padded, rows, strict=True):
        row[: len(window)] = window
    return Windows(Tokens(padded, np.array([len(row) for row in rows], np.int32)), len(opening))


@functools.partial(jax.jit, static_argnames="cfg")
def _nll(cfg: ModelConfig, params: Params, ids: Int[Array, "N W"], counts: Bool[Array, "N V"]) -> Float[Array, " N"]:
    """Negative log-likelihood of each row's tokens that count, V = W - 1 of which have one before them."""
    resid = forward(cfg, params, ids, logits=False).resid

    def of_row(row: tuple) -> Array:
        stream, own, counted = row
        log_p = jax.nn.log_softmax(decoder(cfg, params).logits(stream[None, :-1])[0].astype(jnp.float32), axis=-1)
        return -jnp.where(counted, jnp.take_along_axis(log_p, own[1:, None], axis=-1)[:, 0], 0).sum()

    # One window at a time: the logits of all of them may not fit in memory.
    return jax.lax.map(of_row, (resid, ids, counts))


def text_nll(cfg: ModelConfig, params: Params, windows: Windows) -> Float[np.ndarray, " N"]:
    """Negative log-likelihood of each window, in nats, summed over its predicted tokens.

    Args:
        cfg: architecture of the model.
        params: its parameters.
        windows: the text.
    """
    ids, lengths = np.asarray(windows.tokens.ids), np.asarray(windows.tokens.lengths)
    at = np.arange(1, ids.shape[1])
    counts = (at >= windows.n_opening) & (at < lengths[:, None])
    placement = Placement.of(params)

    def run(rows: Int[np.ndarray, " n"]) -> Float[Array, " n"]:
        return placement.call(_nll, (cfg,), (params,), (jnp.asarray(ids[rows]), jnp.asarray(counts[rows])))

    found = map_batches(len(ids), 8, run, parts=placement.n_patch)
    return found.astype(np.float64)


class Perplexity(NamedTuple):
    """Perplexities of a text, and what the patch changes.

    Attributes:
        models: name of the model -> its perplexity.
        ratio: that of the patched base over the base's, with its 95 % interval over windows of the text.
        n_tokens: number of tokens that were predicted.
    """

    models: Mapping[str, float]
    ratio: Interval
    n_tokens: int


def perplexity(nll: Mapping[str, Float[np.ndarray, " N"]], windows: Windows) -> Perplexity:
    """Perplexities from the likelihood of each window.

        perplexity(M) = exp( sum_i NLL_i(M) / sum_i n_i )        n_i: predicted tokens of window i

    Args:
        nll: model -> what `text_nll` gives, of "base" and "patched" at least.
        windows: the text.
    """
    n = windows.n_predicted.astype(np.float64)
    change = (nll["patched"] - nll["base"])[None]
    bounds = ratio_of_means(change, n, resample(np.arange(len(n))))  # nats a token
    ratio = Interval(*(float(np.exp(bound[0])) for bound in bounds))
    return Perplexity({model: float(np.exp(of.sum() / n.sum())) for model, of in nll.items()}, ratio, int(n.sum()))


class Other(NamedTuple):
    """How often models pass the checker of another behaviour.

    Attributes:
        passes: name of the model -> share of the prompts, with its 95 % interval over queries.
        change: that of the patched base minus that of the base.
        n_prompts: number of prompts.
    """

    passes: Mapping[str, Interval]
    change: Interval
    n_prompts: int


def other(passes: Mapping[str, Bool[np.ndarray, " B"]], queries: Int[np.ndarray, " B"]) -> Other:
    """Pass rates from which answers passed.

    Args:
        passes: model -> whether its answer to each prompt passes, of "base" and "patched" at least.
        queries: [B], index of each prompt's query.
    """
    resamples = resample(queries)
    change = mean_interval(passes["patched"].astype(float) - passes["base"], resamples)
    return Other({m: mean_interval(of.astype(float), resamples) for m, of in passes.items()}, change, len(queries))


class Harm(NamedTuple):
    """What a patch does besides.

    Attributes:
        divergence: name of the model -> KL(base || model) on prompts without the instruction, in nats a token, with its
            95 % interval over queries; of "patched" and "expert".
        perplexity: of a text; None if none was given.
        others: behaviour -> its pass rates.
    """

    divergence: Mapping[str, Interval]
    perplexity: Perplexity | None
    others: Mapping[str, Other]
