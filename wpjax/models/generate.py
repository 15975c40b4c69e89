"""Greedy and sampled generation with a KV cache. One compiled program reads the prompts and makes all new tokens.

A prompt can be read once and continued many times (`prefill`, then `continue_prompts` or `read_on`): steering that
starts at the last prompt token changes nothing before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.errors import WpjaxError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, decoder
from wpjax.models.edits import Edit
from wpjax.models.layouts import Cached, Causal, Layout, Packed
from wpjax.models.ops import heads_first
from wpjax.runtime.batching import map_batches
from wpjax.runtime.placement import Placement


class Generation(NamedTuple):
    """The new tokens of a batch of prompts.

    Attributes:
        tokens: [B, N], ids of the new tokens. After its stop token a row is filled up with that token.
        lengths: [B], number of new tokens, stop token included.
    """

    tokens: Int[np.ndarray | Array, "*S B N"]
    lengths: Int[np.ndarray | Array, "*S B"]


class Prefix(NamedTuple):
    """Prompts as a model has read them. The last token of each is still to be run: its output makes the first new one.

    Attributes:
        last: [B], id of the last token of each prompt.
        at: [B], its position.
        keys: [L, B, K, T, Dh], keys of every layer by position. From `at` on they are of no meaning.
        values: [L, B, K, T, Dh], values likewise.
    """

    last: Int[Array, " B"]
    at: Int[Array, " B"]
    keys: Float[Array, "L B K T Dh"]
    values: Float[Array, "L B K T Dh"]


@functools.partial(jax.jit, static_argnames=("cfg", "n_shared"))
def prefill(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    n_shared: int = 0,
    edits: Sequence[Edit] = (),
) -> Prefix:
    """Read prompts, and keep what their continuations need.

    Args:
        cfg: the model (static).
        params: parameter tree; its leaves may be `Blend`s.
        tokens: prompts, padded on the right.
        lengths: number of tokens of each prompt.
        n_shared: number of tokens that all prompts begin with, such as those of a template; they are read once
            (static). See `Tokens.n_shared`.
        edits: changes on the way; see `generate`. With `n_shared`, none that starts or stops by prompt.

    Raises:
        WpjaxError: an edit names no layer.
    """
    _check_edits(edits)
    n_prompts, n_tokens = tokens.shape
    n_shared = min(n_shared, n_tokens - 1)  # prompts that are all alike still have a token each
    packed = Packed.side_by_side(n_prompts, n_tokens, n_shared) if n_shared else None
    layout: Layout = Causal.of(n_tokens) if packed is None else packed

    def by_prompt(x: Array) -> Array:
        return heads_first(x if packed is None else packed.keys(x)[0])

    def through(x: Array, layer: Any) -> tuple[Array, tuple[Array, Array]]:
        """All prompt tokens through one layer; returns its keys and values."""
        params, number = layer
        one = block(cfg, params, number)(x, layout, edits=edits)
        return one.resid_post, (by_prompt(one.k), by_prompt(one.v))

    x = decoder(cfg, params).embed(tokens if packed is None else packed.lay(tokens), layout.positions)
    _, (keys, values) = jax.lax.scan(through, x, (params["blocks"], jnp.arange(cfg.n_layers)))
    at = lengths - 1
    return Prefix(jnp.take_along_axis(tokens, at[:, None], axis=1)[:, 0], at, keys, values)


def _check_edits(edits: Sequence[Edit]) -> None:
    if any(edit.layer is None for edit in edits):
        raise WpjaxError("an edit of a generation names its layer: pass one Edit(..., layer=i) for each")


def _check_fits(cfg: ModelConfig, prefix: Prefix, n_new: int) -> None:
    """Refuse prompts and so many new tokens that exceed the context together."""
    n_prompt = prefix.keys.shape[3]
    if n_prompt + n_new > cfg.n_ctx:
        raise WpjaxError(
            f"{n_prompt} prompt tokens and {n_new} new ones exceed the context of {cfg.n_ctx}; shorten the prompts or "
            f"lower max_new_tokens{cfg.longer_context}"
        )


Cache = tuple[Array, Array]
"""Keys and values of new tokens in every layer, each [L, B, K, N, Dh]."""


def _run(
    cfg: ModelConfig,
    params: Params,
    edits: Sequence[Edit],
    prefix: Prefix,
    tokens: Int[Array, "B T"],
    n_before: Int[Array, ""] | int,
    cache: Cache,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Run some new tokens of each row through all layers.

    Args:
        cfg: the model.
        params: its parameters.
        edits: changes on the way.
        prefix: the prompts.
        tokens: ids of the tokens; the first that is ever run is the last of the prompt.
        n_before: number of tokens that were run before.
        cache: their keys and values.

    Returns:
        the stream after the last layer, and the tokens' own keys and values.
    """
    at = prefix.at[:, None] + n_before + jnp.arange(tokens.shape[1])

    def through(x: Array, layer: Any) -> tuple[Array, Cache]:
        params, number, prompt, before = layer
        one = block(cfg, params, number)(x, Cached(at, prefix.at, prompt, n_before, before), edits=edits)
        return one.resid_post, (heads_first(one.k), heads_first(one.v))

    x = decoder(cfg, params).embed(tokens, at)
    return jax.lax.scan(through, x, (params["blocks"], jnp.arange(cfg.n_layers), (prefix.keys, prefix.values), cache))


def _no_tokens(prefix: Prefix, versions: tuple[int, ...], n_new: int) -> Cache:
    """A cache with room for so many new tokens of some versions: [L, (S,) B, K, N, Dh]."""
    n_layers, n_rows, n_heads, _, width = prefix.keys.shape
    empty = jnp.zeros((n_layers, *versions, n_rows, n_heads, n_new, width), prefix.keys.dtype)
    return empty, empty


@functools.partial(jax.jit, static_argnames=("cfg", "max_new_tokens", "temperature", "top_k"))
def continue_prompts(
    cfg: ModelConfig,
    params: Params,
    prefix: Prefix,
    *,
    max_new_tokens: int,
    stop_tokens: Int[Array, " E"] | tuple[int | Int[Array, ""], ...],
    temperature: float = 0.0,
    top_k: int | None = None,
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
        top_k: sample among so many of the likeliest tokens; None for all (static).
        key: random key; needed for sampling.
        edits: changes from the last prompt token on; see `generate`.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:expert")
    >>> ids = jnp.asarray(model.tokenizer("How do owls hunt?")["input_ids"])[None]
    >>> prefix = prefill(model.cfg, model.params, ids, jnp.array([ids.shape[1]]))
    >>> continue_prompts(model.cfg, model.params, prefix, max_new_tokens=5, stop_tokens=()).tokens.shape
    (1, 5)
    """
    if temperature < 0:
        raise WpjaxError(f"temperature={temperature}: not below 0")
    if temperature > 0 and key is None:
        raise WpjaxError("sampling needs a random key: pass key=jax.random.key(seed), or temperature=0")
    _check_edits(edits)

    def run(last: Int[Array, " B"], step: Array, cache: Cache) -> tuple[Array, Cache]:
        resid, own = _run(cfg, params, edits, prefix, last[:, None], step, cache)
        return resid[:, 0], own

    def pick(logits: Float[Array, "B V"], step: Array) -> Int[Array, " B"]:
        if key is None or temperature == 0:
            return jnp.argmax(logits, -1)
        if top_k is not None:
            least = jax.lax.top_k(logits, top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(jax.random.fold_in(key, step), logits / temperature)

    return _decode(cfg, params, prefix, run, pick, (), max_new_tokens, stop_tokens)


def continue_versions(
    cfg: ModelConfig,
    params: Params,
    prefix: Prefix,
    versions: Any,
    edits: Callable[[Any], Sequence[Edit]],
    *,
    max_new_tokens: int,
    stop_tokens: Int[Array, " E"] | tuple[int | Int[Array, ""], ...],
) -> Generation:
    """Continue prompts greedily by many edited versions of a model at once, until all have met a stop token.

    The versions share the weights, and the keys and values of the prompts. Call it in a jitted function.

    Args:
        cfg: the model (static).
        params: the parameters that `prefix` was read with.
        prefix: the prompts.
        versions: a tree of arrays with a leading axis of S versions.
        edits: makes the edits of one version from its part of that tree; they start at the last prompt token.
        max_new_tokens: N, at least 1 (static).
        stop_tokens: ids that end a row; may be empty.

    Returns:
        the new tokens, [S, B, N], and their numbers, [S, B].
    """

    def run(version: Any, last: Int[Array, " B"], step: Array, cache: Cache) -> tuple[Array, Cache]:
        made = edits(version)
        _check_edits(made)
        resid, own = _run(cfg, params, made, prefix, last[:, None], step, cache)
        return resid[:, 0], own

    def run_all(last: Int[Array, "S B"], step: Array, cache: Cache) -> tuple[Array, Cache]:
        # Caches have the axis of versions second, as the scan over layers wants theirs first.
        return jax.vmap(run, (0, 0, None, 1), (0, 1))(versions, last, step, cache)

    n_versions = len(jax.tree.leaves(versions)[0])
    return _decode(
        cfg, params, prefix, run_all, lambda logits, _: jnp.argmax(logits, -1), (n_versions,), max_new_tokens,
        stop_tokens,
    )  # fmt: skip


def _decode(
    cfg: ModelConfig,
    params: Params,
    prefix: Prefix,
    run: Callable[[Array, Array, Cache], tuple[Array, Cache]],
    pick: Callable[[Array, Array], Array],
    versions: tuple[int, ...],
    max_new_tokens: int,
    stop_tokens: Int[Array, " E"] | tuple[int | Int[Array, ""], ...],
) -> Generation:
    """The loop of a generation. The versions are an axis inside it: one test ends it, and nothing is copied for each.

    Args:
        cfg: the model.
        params: the parameters that make logits.
        prefix: the prompts.
        run: runs the newest token of every row: (tokens, number of steps before, cache) to stream and own cache.
        pick: chooses tokens: (logits, step).
        versions: () for one version, or (S,).
        max_new_tokens: N.
        stop_tokens: ids that end a row.
    """
    if max_new_tokens < 1:
        raise WpjaxError(f"max_new_tokens={max_new_tokens}: at least 1")
    _check_fits(cfg, prefix, max_new_tokens)
    stop_tokens, model = jnp.asarray(stop_tokens, jnp.int32), decoder(cfg, params)

    def step(state: tuple) -> tuple:
        """Run the token that came last, and make the one after it."""
        i, last, done, cache, out = state
        resid, own = run(last, i, cache)
        # Written once for all layers, so that the compiler can do it in place.
        cache = jax.tree.map(lambda c, o: jax.lax.dynamic_update_slice_in_dim(c, o, i, axis=c.ndim - 2), cache, own)
        new = jnp.where(done, last, pick(model.logits(resid), i))
        return i + 1, new, done | jnp.isin(new, stop_tokens), cache, out.at[..., i].set(new)

    last = jnp.broadcast_to(prefix.last, (*versions, len(prefix.last)))
    out = jnp.zeros((*last.shape, max_new_tokens), last.dtype)
    state = (jnp.int32(0), last, jnp.zeros(last.shape, bool), _no_tokens(prefix, versions, max_new_tokens), out)
    n_done, last, _, _, out = jax.lax.while_loop(lambda s: (s[0] < max_new_tokens) & ~s[2].all(), step, state)
    # If all rows were done early, the columns that were never written are filled up with each row's stop token.
    out = jnp.where(jnp.arange(max_new_tokens) < n_done, out, last[..., None])
    stopped = jnp.isin(out, stop_tokens)
    n_new = jnp.where(stopped.any(-1), stopped.argmax(-1) + 1, max_new_tokens)
    return Generation(out, n_new)


@functools.partial(jax.jit, static_argnames="cfg")
def read_on(
    cfg: ModelConfig, params: Params, prefix: Prefix, tokens: Int[Array, "B N"], *, edits: Sequence[Edit] = ()
) -> Float[Array, "B N D"]:
    """Let a model read given continuations of prompts that it has read before (teacher forcing), all tokens at once.

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
    _check_fits(cfg, prefix, tokens.shape[1])
    # The last prompt token predicts the first token; what the last token would predict is not asked for.
    read = jnp.concatenate([prefix.last[:, None], tokens[:, :-1].astype(prefix.last.dtype)], axis=1)
    return _run(cfg, params, edits, prefix, read, 0, _no_tokens(prefix, (), 0))[0]


@functools.partial(jax.jit, static_argnames=("cfg", "max_new_tokens", "temperature", "top_k"))
def generate(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    max_new_tokens: int,
    stop_tokens: Int[Array, " S"] | tuple[int | Int[Array, ""], ...],
    temperature: float = 0.0,
    top_k: int | None = None,
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
        top_k: sample among so many of the likeliest tokens; None for all (static).
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
    options: dict[str, Any] = {"stop_tokens": stop_tokens, "temperature": temperature, "top_k": top_k, "key": key}
    return continue_prompts(cfg, params, prefix, max_new_tokens=max_new_tokens, edits=edits, **options)


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
    """Continue any number of prompts greedily, at most `batch_size` at once on a device.

    The other arguments are those of `generate`. The prompts are divided among the devices on which the model stands.
    The result is in NumPy arrays, on the host.
    """
    placement = Placement.of(params)
    whole = placement.replicate((params, jnp.asarray(stop_tokens, jnp.int32), tuple(edits)))

    def run(rows: Int[np.ndarray, " N"]) -> Generation:
        some = jnp.asarray(tokens[rows]), jnp.asarray(lengths[rows]), jnp.asarray(rows)
        return placement.call(continue_some, (cfg, max_new_tokens), whole, some)

    return map_batches(len(tokens), batch_size, run, parts=placement.n_patch)


def continue_some(
    cfg: ModelConfig,
    max_new_tokens: int,
    params: Params,
    stop_tokens: Int[Array, " S"],
    edits: tuple[Edit, ...],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    rows: Int[Array, " B"],
) -> Generation:
    """`generate` on some prompts; `rows` are their numbers, by which edits know their part."""
    some = tuple(edit.take(rows) for edit in edits)
    return generate(cfg, params, tokens, lengths, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, edits=some)
