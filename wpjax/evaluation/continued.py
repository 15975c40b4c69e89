"""Many steered versions of a model that go on from one reading of the prompts, all in one program.

Steering that starts at the last prompt token changes nothing before it. So the model reads the prompts once, and every
version continues them from there; the weights, and the keys and values of the prompts, are shared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.behaviours import Tokens
from wpjax.metrics.metric import Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, decoder
from wpjax.models.edits import ClampTo, Edit
from wpjax.models.generate import Generation, Prefix, continue_versions, prefill, read_on
from wpjax.models.ops import log_softmax
from wpjax.models.sites import Site
from wpjax.runtime.batching import map_batches
from wpjax.runtime.placement import Placement

ROWS_AT_ONCE = 128
"""Answers of one program, at most: steered models times prompts."""


class Steer(NamedTuple):
    """S ways to steer a model, stacked.

    Attributes:
        layer: [S], 0-based layer after which the stream is held.
        read: [S, D], unit vector, the coordinate that is measured.
        write: [S, D], unit vector along which the stream is moved; 0 moves nothing.
        target: [S], value that the coordinate would get if `write` were `read`.
    """

    layer: Int[np.ndarray | Array, " S"]
    read: Float[np.ndarray | Array, "S D"]
    write: Float[np.ndarray | Array, "S D"]
    target: Float[np.ndarray | Array, " S"]

    def take(self, rows: Int[np.ndarray, " n"]) -> Steer:
        """Some of the ways."""
        return Steer(*(a[rows] for a in self))

    def edit(self, start: Int[Array, " B"]) -> Edit:
        """One way as an edit from a position of each prompt on; the arrays are those of this way alone."""
        clamp = ClampTo(jnp.asarray(self.read), jnp.asarray(self.write), jnp.asarray(self.target))
        return Edit(Site.RESID_POST, clamp, jnp.asarray(self.layer), start)


def steer(ways: Sequence[tuple[int, np.ndarray, np.ndarray, float]]) -> Steer:
    """Stack (layer, read, write, target) of S ways to steer."""
    layer, read, write, target = zip(*ways, strict=True)
    return Steer(np.asarray(layer, np.int32), *(np.asarray(a, np.float32) for a in (read, write, target)))  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames=("cfg", "max_new_tokens"))
def _answers(
    cfg: ModelConfig,
    params: Params,
    prefix: Prefix,
    stop_tokens: Int[Array, " E"],
    ways: Steer,
    *,
    max_new_tokens: int,
) -> Generation:
    """Greedy answers of S steered versions of a model, [S, B, N]; the weights and the prefix are shared."""

    def edits(way: Steer) -> tuple[Edit]:
        return (way.edit(prefix.at),)

    options = {"max_new_tokens": max_new_tokens, "stop_tokens": stop_tokens}
    return continue_versions(cfg, params, prefix, ways, edits, **options)  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames="cfg")
def _scores(
    cfg: ModelConfig,
    params: Params,
    prefix: Prefix,
    tokens: Int[Array, "B N"],
    step: Int[Array, "B R"],
    metric: Metric,
    ways: Steer,
) -> Float[Array, "S B"]:
    """A metric of S steered versions of a model, which read the same words."""

    def one(way: Steer) -> Float[Array, " B"]:
        resid = read_on(cfg, params, prefix, tokens, edits=(way.edit(prefix.at),))
        return metric.read(cfg, params, jnp.take_along_axis(resid, step[..., None], axis=1))

    return jax.vmap(one)(ways)


@functools.partial(jax.jit, static_argnames="cfg")
def _nll(cfg: ModelConfig, params: Params, prefix: Prefix, answers: Generation) -> Float[Array, "S B"]:
    """Mean negative log-likelihood of answers, in nats per token."""

    def one(tokens: Int[Array, "B N"], lengths: Int[Array, " B"]) -> Float[Array, " B"]:
        resid = read_on(cfg, params, prefix, tokens)

        def step(at: tuple[Array, Array]) -> Float[Array, " B"]:  # logits of one token at a time take less memory
            logp = log_softmax(decoder(cfg, params).logits(at[0]))
            return jnp.take_along_axis(jnp.asarray(logp), at[1][:, None], axis=1)[:, 0]

        logp = jax.lax.map(step, (jnp.moveaxis(resid, 1, 0), tokens.T)).T  # [B, N]
        is_token = jnp.arange(tokens.shape[1]) < lengths[:, None]
        return -jnp.mean(logp, axis=1, where=is_token)

    return jax.vmap(one)(jnp.asarray(answers.tokens), jnp.asarray(answers.lengths))


class Continued:
    """A model that has read some prompts, and goes on from there in many steered versions.

    Args:
        cfg: the model.
        params: its parameters.
        prompts: B prompts, few enough to run at once.
        room: longest continuation, in tokens.

    >>> import wpjax as wp
    >>> model, task = wp.load_model("tiny:base"), wp.behaviour("tiny:english_capital")
    >>> prompts = task.encode(model.tokenizer, n_prompts=4).with_instruction
    >>> still = steer([(0, np.zeros(128), np.zeros(128), 0.0)] * 3)  # three versions, none of them moved
    >>> Continued(model.cfg, model.params, prompts, room=5).answers(still, ()).tokens.shape
    (3, 4, 5)
    """

    def __init__(self, cfg: ModelConfig, params: Params, prompts: Tokens, room: int):
        self.cfg, self.params, self.room = cfg, params, room
        self.at_once = max(1, ROWS_AT_ONCE // len(prompts.lengths))
        prompts = prompts.widened(cfg.n_ctx - room)
        ids, lengths = jnp.asarray(prompts.ids), jnp.asarray(prompts.lengths)
        self.prefix = prefill(cfg, params, ids, lengths, n_shared=prompts.n_shared)

    def answers(self, ways: Steer, stop_tokens: tuple[int, ...]) -> Generation:
        """Greedy answers of each version, [S, B, room].

        Args:
            ways: how the versions are steered.
            stop_tokens: ids that end an answer.
        """
        stop = jnp.asarray(stop_tokens, jnp.int32)
        return self._over(len(ways.layer), _answers, (stop,), ways.take, max_new_tokens=self.room)

    def scores(
        self, ways: Steer, tokens: Int[np.ndarray, "B N"], step: Int[np.ndarray, "B R"], metric: Metric
    ) -> Float[np.ndarray, "S B"]:
        """A metric of each version along given words, [S, B].

        Args:
            ways: how the versions are steered.
            tokens: the words after each prompt; N is at most `room`.
            step: for every position that the metric reads, the word that is predicted there, from 0.
            metric: its readout and its weights are used.
        """
        given = jnp.asarray(tokens), jnp.asarray(step), metric
        return self._over(len(ways.layer), _scores, given, ways.take)

    def nll(self, answers: Generation) -> Float[np.ndarray, "S B"]:
        """Mean negative log-likelihood of answers under the model as it is, in nats per token.

        Args:
            answers: S answers to each prompt, [S, B, N].
        """
        return self._over(len(answers.tokens), _nll, (), lambda rows: Generation(*(a[rows] for a in answers)))

    def _over(
        self,
        n: int,
        run: Callable[..., Any],
        whole: tuple[Any, ...],
        take: Callable[[Int[np.ndarray, " n"]], Any],
        **options: int,
    ) -> Any:
        """Call a function on all n versions, some at a time; they are divided among the devices of the model.

        Args:
            n: number of versions.
            run: a function of `cfg`, the parameters, the prefix, `whole`, some versions and `options`.
            whole: arguments that all versions share.
            take: from numbers of versions to these versions, a tree of arrays.
            options: arguments that are not arrays.
        """
        placement = Placement.of(self.params)
        shared = placement.replicate((self.params, self.prefix, *whole))

        def some(rows: Int[np.ndarray, " n"]) -> Any:
            return placement.call(run, (self.cfg,), shared, (take(rows),), **options)

        return map_batches(n, self.at_once, some, what="steered models", parts=placement.n_patch)
