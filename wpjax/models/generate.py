"""Greedy and sampled generation with a KV cache. One compiled program reads the prompts and makes all new tokens.

A prompt can be read once and continued many times (`prefill`, then `continue_prompts` or `read_on`): steering that
starts at the last prompt token changes nothing before it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.errors import WpjaxError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, decoder
from wpjax.models.edits import Edit
from wpjax.models.layouts import Cached, Causal
from wpjax.runtime.batching import map_batches


class Generation(NamedTuple):
    """The new tokens of a batch of prompts.

    Attributes:
        tokens: [B, N], ids of the new tokens. After its stop token a row is filled up with that token.
        lengths: [B], number of new tokens, stop token included.
    """

    tokens: Int[np.ndarray | Array, "B N"]
    lengths: Int[np.ndarray | Array, " B"]


class Prefix(NamedTuple):
    """Prompts as a model has read them. The last token of each is still to be run: its output makes the first new one.

    Attributes:
        last: [B], id of the last token of each prompt.
        at: [B], its position.
        keys: [L, B, T, K, Dh], keys of every layer by position. From `at` on they are of no meaning.
        values: [L, B, T, K, Dh], values likewise.
    """

    last: Int[Array, " B"]
    at: Int[Array, " B"]
    keys: Float[Array, "L B T K Dh"]
    values: Float[Array, "L B T K Dh"]


@functools.partial(jax.jit, static_argnames="cfg")
def prefill(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    edits: Sequence[Edit] = (),
) -> Prefix:
    """Read prompts, and keep what their continuations need.

    Args:
        cfg: the model (static).
        params: parameter tree; its leaves may be `Blend`s.
        tokens: prompts, padded on the right.
        lengths: number of tokens of each prompt.
        edits: changes on the way; see `generate`.

    Raises:
        WpjaxError: an edit names no layer.
    """
    _check_edits(edits)

    def through(x: Array, layer: Any) -> tuple[Array, tuple[Array, Array]]:
        """All prompt tokens through one layer; returns its keys and values."""
        params, number = layer
        one = block(cfg, params, number)(x, Causal.of(tokens.shape[1]), edits=edits)
        return one.resid_post, (one.k, one.v)

    x = decoder(cfg, params).embed(tokens, jnp.arange(tokens.shape[1])[None])
    _, (keys, values) = jax.lax.scan(through, x, (params["blocks"], jnp.arange(cfg.n_layers)))
    at = lengths - 1
    return Prefix(jnp.take_along_axis(tokens, at[:, None], axis=1)[:, 0], at, keys, values)


def _check_edits(edits: Sequence[Edit]) -> None:
    if any(edit.layer is None for edit in edits):
        raise WpjaxError("an edit of a generation names its layer: pass one Edit(..., layer=i) for each")


Cache = tuple[Array, Array]
"""Keys and values of the new tokens in every layer, each [L, B, N, K, Dh]."""


def _no_tokens(cfg: ModelConfig, prefix: Prefix, room: int) -> Cache:
    """A cache with room for so many new tokens.

    Raises:
        WpjaxError: prompts and new tokens exceed the context.
    """
    n_layers, n_rows, n_prompt, *rest = prefix.keys.shape
    if n_prompt + room > cfg.n_ctx:
        raise WpjaxError(
            f"{n_prompt} prompt tokens and {room} new ones exceed the context of {cfg.n_ctx}; shorten the prompts or "
            "lower max_new_tokens"
        )
    empty = jnp.zeros((n_layers, n_rows, room, *rest), prefix.keys.dtype)
    return empty, empty


def _step(
    cfg: ModelConfig,
    params: Params,
    edits: Sequence[Edit],
    prefix: Prefix,
    token: Int[Array, " B"],
    step: Int[Array, ""],
    cache: Cache,
) -> tuple[Float[Array, "B D"], Cache]:
    """Run one token of each row through all layers.

    Args:
        cfg: the model.
        params: its parameters.
        edits: changes on the way.
        prefix: the prompts.
        token: id of the token of each row.
        step: 0 for the last token of a prompt, 1 for the first new one, and so on.
        cache: keys and values of the tokens before it.

    Returns:
        the stream after the last layer, and the cache with the token's own keys and values.
    """

    def through(x: Array, layer: Any) -> tuple[Array, Cache]:
        params, number, prompt, new = layer
        layout = Cached(prefix.at, prompt, step, new)
        one = block(cfg, params, number)(x, layout, edits=edits)
        return one.resid_post, (one.k, one.v)

    at = prefix.at + step
    x = decoder(cfg, params).embed(token[:, None], at[:, None])
    layers = (params["blocks"], jnp.arange(cfg.n_layers), (prefix.keys, prefix.values), cache)
    x, own = jax.lax.scan(through, x, layers)
    # Written once for all layers, so that the compiler can do it in place.
    keys, values = (jax.lax.dynamic_update_slice_in_dim(c, o, step, axis=2) for c, o in zip(cache, own, strict=True))
    return x[:, 0], (keys, values)


@functools.partial(jax.jit, static_argnames=("cfg", "max_new_tokens", "temperature"))
def continue_prompts(
    cfg: ModelConfig,
    params: Params,
    prefix: Prefix,
    *,
    max_new_tokens: int,
    stop_tokens: Int[Array, " S"] | tuple[int | Int[Array, ""], ...],
    temperature: float = 0.0,
    key: Array | None = None,
    edits: Sequence[Edit] = (),
) -> Generation:
    """Continue prompts that were read before, all at once, until each has met a stop token.

    Args:
        cfg: the model (static).
        params: the parameters that `prefix` was read with.
        prefix: the prompts.
        max_new_tokens: N, at least 1 (static).
        stop_tokens: ids that end a row; may be empty.
        temperature: 0 for greedy decoding; above 0, logits are divided by it and tokens are sampled (static).
        key: random key; needed for sampling.
        edits: changes from the last prompt token on; see `generate`.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:expert")
    >>> ids = jnp.asarray(model.tokenizer("How do owls hunt?")["input_ids"])[None]
    >>> prefix = prefill(model.cfg, model.params, ids, jnp.array([ids.shape[1]]))
    >>> continue_prompts(model.cfg, model.params, prefix, max_new_tokens=5, stop_tokens=()).tokens.shape
    (1, 5)
    """
    if max_new_tokens < 1 or temperature < 0:
        raise WpjaxError(f"max_new_tokens={max_new_tokens}, temperature={temperature}: at least 1, and not below 0")
    if temperature > 0 and key is None:
        raise WpjaxError("sampling needs a random key: pass key=jax.random.key(seed), or temperature=0")
    _check_edits(edits)
    stop_tokens = jnp.asarray(stop_tokens, jnp.int32)
    model = decoder(cfg, params)

    def pick(resid: Float[Array, "B D"], step: Array) -> Int[Array, " B"]:
        logits = model.logits(resid)
        if key is None or temperature == 0:
            return jnp.argmax(logits, -1)
        return jax.random.categorical(jax.random.fold_in(key, step), logits / temperature)

    def step(state: tuple) -> tuple:
        """Run the token that came last, and make the one after it."""
        i, last, done, cache, out = state
        resid, cache = _step(cfg, params, edits, prefix, last, i, cache)
        new = jnp.where(done, last, pick(resid, i))
        return i + 1, new, done | jnp.isin(new, stop_tokens), cache, out.at[:, i].set(new)

    n_rows = len(prefix.last)
    out = jnp.zeros((n_rows, max_new_tokens), prefix.last.dtype)
    state = (jnp.int32(0), prefix.last, jnp.zeros(n_rows, bool), _no_tokens(cfg, prefix, max_new_tokens), out)
    n_done, last, _, _, out = jax.lax.while_loop(lambda s: (s[0] < max_new_tokens) & ~s[2].all(), step, state)
    # If all rows were done early, the columns that were never written are filled up with each row's stop token.
    out = jnp.where(jnp.arange(max_new_tokens) < n_done, out, last[:, None])
    stopped = jnp.isin(out, stop_tokens)
    n_new = jnp.where(stopped.any(1), stopped.argmax(1) + 1, max_new_tokens)
    return Generation(out, n_new)


@functools.partial(jax.jit, static_argnames="cfg")
def read_on(
    cfg: ModelConfig, params: Params, prefix: Prefix, tokens: Int[Array, "B N"], *, edits: Sequence[Edit] = ()
) -> Float[Array, "B N D"]:
    """Let a model read given continuations of prompts that it has read before (teacher forcing).

    Args:
        cfg: the model (static).
        params: the parameters that `prefix` was read with.
        prefix: the prompts.
        tokens: the continuations.
        edits: changes from the last prompt token on; see `generate`.

    Returns:
        the stream after the last layer from which each of the N tokens is predicted.
    """
    _check_edits(edits)

    def step(carry: tuple[Array, Array, Cache], new: Int[Array, " B"]) -> tuple[Any, Array]:
        i, last, cache = carry
        resid, cache = _step(cfg, params, edits, prefix, last, i, cache)
        return (i + 1, new.astype(last.dtype), cache), resid

    start = (jnp.int32(0), prefix.last, _no_tokens(cfg, prefix, tokens.shape[1]))
    return jnp.moveaxis(jax.lax.scan(step, start, tokens.T)[1], 0, 1)


@functools.partial(jax.jit, static_argnames=("cfg", "max_new_tokens", "temperature"))
def generate(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    max_new_tokens: int,
    stop_tokens: Int[Array, " S"] | tuple[int | Int[Array, ""], ...],
    temperature: float = 0.0,
    key: Array | None = None,
    edits: Sequence[Edit] = (),
) -> Generation:
    """Read prompts and continue them, all at once, until each has met a stop token.

    The new tokens of a row take the place of its padding. So every token has the position that it would have without
    padding, and a padded batch decoded greedily gives what its prompts give alone.

    Args:
        cfg: the model (static).
        params: parameter tree. Its leaves may be `Blend`s: a patched model generates without being formed.
        tokens: prompts, padded on the right.
        lengths: number of tokens of each prompt.
        max_new_tokens: N, at least 1 (static). T + N must fit into `cfg.n_ctx`.
        stop_tokens: ids that end a row; may be empty.
        temperature: 0 for greedy decoding; above 0, logits are divided by it and tokens are sampled (static).
        key: random key; needed for sampling.
        edits: changes on the way. Each must name its layer. Arrays with an axis of tokens must have length 1 there, as
            new tokens come one at a time; say by `start` and `stop` which positions are edited.

    Raises:
        WpjaxError: a random key is missing, prompts and answers exceed the context, an edit names no layer, or a number
            is out of range.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:expert")
    >>> ids = jnp.asarray(model.tokenizer("How do owls hunt?")["input_ids"])[None]
    >>> out = generate(model.cfg, model.params, ids, jnp.array([ids.shape[1]]), max_new_tokens=5, stop_tokens=())
    >>> out.tokens.shape, out.lengths.tolist()
    ((1, 5), [5])
    """
    prefix = prefill(cfg, params, tokens, lengths, edits=edits)
    options: dict[str, Any] = {"stop_tokens": stop_tokens, "temperature": temperature, "key": key, "edits": edits}
    return continue_prompts(cfg, params, prefix, max_new_tokens=max_new_tokens, **options)


def generate_batched(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[np.ndarray | Array, "B T"],
    lengths: Int[np.ndarray | Array, " B"],
    stop_tokens: tuple[int, ...],
    max_new_tokens: int,
    batch_size: int = 32,
    edits: Sequence[Edit] = (),
) -> Generation:
    """Continue any number of prompts greedily, at most `batch_size` at once.

    The other arguments are those of `generate`. The result is in NumPy arrays, on the host.
    """

    def run(rows: Int[np.ndarray, " N"]) -> Generation:
        return generate(
            cfg,
            params,
            jnp.asarray(tokens[rows]),
            jnp.asarray(lengths[rows]),
            max_new_tokens=max_new_tokens,
            stop_tokens=jnp.asarray(stop_tokens, jnp.int32),
            edits=tuple(edit.take(rows) for edit in edits),
        )

    return map_batches(len(tokens), batch_size, run)
