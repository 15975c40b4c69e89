"""Greedy and sampled generation with a KV cache. One compiled program reads the prompts and makes all new tokens."""

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
    """Continue prompts, all at once, until each has met a stop token.

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
    n_rows, n_prompt = tokens.shape
    if max_new_tokens < 1 or temperature < 0:
        raise WpjaxError(f"max_new_tokens={max_new_tokens}, temperature={temperature}: at least 1, and not below 0")
    if temperature > 0 and key is None:
        raise WpjaxError("sampling needs a random key: pass key=jax.random.key(seed), or temperature=0")
    if n_prompt + max_new_tokens > cfg.n_ctx:
        raise WpjaxError(
            f"{n_prompt} prompt tokens and {max_new_tokens} new ones exceed the context of {cfg.n_ctx}; "
            "shorten the prompts or lower max_new_tokens"
        )
    if any(edit.layer is None for edit in edits):
        raise WpjaxError("an edit of a generation names its layer: pass one Edit(..., layer=i) for each")
    stop_tokens = jnp.asarray(stop_tokens, jnp.int32)
    model, rows, layers = decoder(cfg, params), jnp.arange(n_rows), jnp.arange(cfg.n_layers)

    def pick(resid: Float[Array, "B D"], step: Array) -> Int[Array, " B"]:
        logits = model.logits(resid)
        if key is None or temperature == 0:
            return jnp.argmax(logits, -1)
        return jax.random.categorical(jax.random.fold_in(key, step), logits / temperature)

    def prefill(x: Array, layer: Any) -> tuple[Array, tuple[Array, Array]]:
        """All prompt tokens through one layer; returns its cache, with room for the new tokens."""
        params, number = layer
        one = block(cfg, params, number)(x, Causal.of(n_prompt), edits=edits)
        room = ((0, 0), (0, max_new_tokens), (0, 0), (0, 0))
        return one.resid_post, (jnp.pad(one.k, room), jnp.pad(one.v, room))

    def extend(x: Array, layer: Any, at: Int[Array, " B"]) -> tuple[Array, tuple[Array, Array]]:
        """One token of each row through one layer; its key and value enter the cache at its position `at`."""
        params, number, k_cache, v_cache = layer
        one = block(cfg, params, number)(x, Cached(at, k_cache, v_cache), edits=edits)
        return one.resid_post, one.seen

    def step(state: tuple) -> tuple:
        """Run the token that was made last, and make the one after it."""
        i, last, done, cache, out = state
        at = lengths + i - 1  # position of `last`, new token i - 1
        x = model.embed(last[:, None], at[:, None])
        x, cache = jax.lax.scan(lambda x, layer: extend(x, layer, at), x, (params["blocks"], layers, *cache))
        new = jnp.where(done, last, pick(x[:, 0], i))
        return i + 1, new, done | jnp.isin(new, stop_tokens), cache, out.at[:, i].set(new)

    x, cache = jax.lax.scan(prefill, model.embed(tokens, jnp.arange(n_prompt)[None]), (params["blocks"], layers))
    first = pick(x[rows, lengths - 1], jnp.int32(0))
    out = jnp.zeros((n_rows, max_new_tokens), first.dtype).at[:, 0].set(first)
    state = (jnp.int32(1), first, jnp.isin(first, stop_tokens), cache, out)
    n_done, last, _, _, out = jax.lax.while_loop(lambda s: (s[0] < max_new_tokens) & ~s[2].all(), step, state)
    # If all rows were done early, the columns that were never written are filled up with each row's stop token.
    out = jnp.where(jnp.arange(max_new_tokens) < n_done, out, last[:, None])
    stopped = jnp.isin(out, stop_tokens)
    n_new = jnp.where(stopped.any(1), stopped.argmax(1) + 1, max_new_tokens)
    return Generation(out, n_new)


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
