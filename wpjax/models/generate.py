"""Greedy and sampled generation with a KV cache: one compiled program for the prompt and all new tokens."""

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
    """New tokens of a batch of prompts.

    Attributes:
        tokens: [B, N]; after a stop token (kept) a row holds that stop token only.
        lengths: [B], new tokens up to and including the stop token.
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
    """Continue prompts, all rows at once, until each has met a stop token.

    A row's new tokens overwrite its padding, so every token sits at the position it would have alone and, decoded
    greedily, a padded batch generates what single prompts do.

    Args:
        cfg: static.
        params: parameter tree; leaves may be `Blend`s, so a patched model generates without being built.
        tokens: prompts, padded on the right.
        lengths: tokens of each prompt.
        max_new_tokens: N, at least 1; T + N must fit in `cfg.n_ctx`.
        stop_tokens: ids that end a row; may be empty.
        temperature: 0 for greedy, otherwise (above 0) logits are divided by it and sampled.
        key: random key, required when sampling.
        edits: what is changed on the way, by position; each names its layer, and their arrays have no token axis
            longer than 1, as new tokens come one at a time.

    Raises:
        WpjaxError: sampling without a key, sequences that would outgrow the context, or a number out of range.
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
        params, number = layer
        one = block(cfg, params)(x, Causal.of(n_prompt), edits=edits, layer=number)
        room = ((0, 0), (0, max_new_tokens), (0, 0), (0, 0))
        return one.resid_post, (jnp.pad(one.k, room), jnp.pad(one.v, room))

    def extend(x: Array, layer: Any, at: Int[Array, " B"]) -> tuple[Array, tuple[Array, Array]]:
        """One token a row through one layer, its key and value written at the row's own position."""
        params, number, k_cache, v_cache = layer
        one = block(cfg, params)(x, Cached(at, k_cache, v_cache), edits=edits, layer=number)
        return one.resid_post, one.seen

    def step(state: tuple) -> tuple:
        i, last, done, cache, out = state
        at = lengths + i - 1
        x = model.embed(last[:, None], at[:, None])
        x, cache = jax.lax.scan(lambda x, layer: extend(x, layer, at), x, (params["blocks"], layers, *cache))
        new = jnp.where(done, last, pick(x[:, 0], i))
        return i + 1, new, done | jnp.isin(new, stop_tokens), cache, out.at[:, i].set(new)

    x, cache = jax.lax.scan(prefill, model.embed(tokens, jnp.arange(n_prompt)[None]), (params["blocks"], layers))
    first = pick(x[rows, lengths - 1], jnp.int32(0))
    out = jnp.zeros((n_rows, max_new_tokens), first.dtype).at[:, 0].set(first)
    state = (jnp.int32(1), first, jnp.isin(first, stop_tokens), cache, out)
    n_done, last, _, _, out = jax.lax.while_loop(lambda s: (s[0] < max_new_tokens) & ~s[2].all(), step, state)
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
    """Greedy continuation of any number of prompts, at most `batch_size` at once, the result on the host. Arguments as
    `generate`.
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
