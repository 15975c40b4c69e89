"""A forward pass in which every receiver reads the stream through its own edges, and what every sender writes.

The stream that a receiver reads is a sum of what earlier senders write. Edge (s, r) is patched by another value of
what s writes, in the sum that r reads alone:

    x_r = x + sum_s mask_sr (replacement_s - write_s)

x is the live stream, and write_s what s writes in this run. With all edges of s patched, s is patched as a node.

Heads write z_h W_O; MLPs write their output, bias included. The bias of attention belongs to no sender. In families
with a norm or a factor between attention and the stream, a head's share is its own part times what is applied to the
sum in this run: so the writes still add up to the stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wpjax.engines.contributions import written_by_head
from wpjax.models.block import Block, LayerPass
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, decoder, keep_products, take_layer
from wpjax.models.edits import Edit
from wpjax.models.layouts import Causal, Layout
from wpjax.models.sites import Site

Shift: TypeAlias = Callable[[Array], Array]
"""From what the heads of a layer write, [H, B, T, D], to what is added to the stream that its MLP reads."""


class Shifts(NamedTuple):
    """What is added to the stream that each receiver of a layer reads.

    Attributes:
        q: [H, B, T, D], one for each query head.
        k: [K, B, T, D], one for each KV group.
        v: [K, B, T, D], likewise.
        mlp: from what this layer's heads write to [B, T, D].
    """

    q: Array
    k: Array
    v: Array
    mlp: Shift


def embedding(cfg: ModelConfig, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """What the sender "embed" writes."""
    return decoder(cfg, params).embed(tokens, Causal.of(tokens.shape[1]).positions)


def head_writes(one: LayerPass) -> Float[Array, "H B T D"]:
    """What each head of a pass adds to the stream."""
    attn = one.block.attn
    written = written_by_head(one.z, attn.W_O.get_value(), attn.cfg.activation_splits)
    if one.block.residual_site(Site.ATTN_PROJ) != Site.ATTN_PROJ:  # nothing stands between
        return written
    gain = jnp.where(one.attn_proj == 0, 0.0, one.attn_out / jnp.where(one.attn_proj == 0, 1.0, one.attn_proj))
    return written * gain


def _by_head(
    cfg: ModelConfig, weights: Params, layer: Array, site: Site, streams: Float[Array, "n B T D"], layout: Layout
) -> Float[Array, "B T n Dh"]:
    """Queries, keys or values of which each head (or KV group) sees a stream of its own.

    Every one is a layer with that head alone. If one norm spans all heads, it is the whole layer, of which that head
    is taken.
    """
    if cfg.joint_qk_norm and site is not Site.V:
        own: Block = block(cfg, weights, layer)
        every = jax.vmap(lambda stream: own(stream, layout).at(site))(streams)  # [n, B, T, n, Dh]
        return jnp.moveaxis(jnp.diagonal(every, axis1=0, axis2=3), -1, 2)
    attn, names = weights["attn"], (f"W_{site.upper()}", f"b_{site.upper()}")
    alone = {name: jnp.moveaxis(attn[name], -2, 0)[..., None, :] for name in names if name in attn}

    def one(stream: Array, alone: Params) -> Array:
        return block(cfg, {**weights, "attn": {**attn, **alone}}, layer)(stream, layout).at(site)[:, :, 0]

    return jax.vmap(one, out_axes=2)(streams, alone)


def wired_layer(
    cfg: ModelConfig,
    weights: Params,
    layer: Array,
    resid: Float[Array, "B T D"],
    layout: Layout,
    shifts: Shifts | None = None,
    edits: Sequence[Edit] = (),
) -> tuple[Float[Array, "B T D"], Float[Array, "N B T D"]]:
    """One layer in which every receiver reads the stream with its own shift.

    Args:
        cfg: the model.
        weights: the layer's parameters.
        layer: its number; it may be traced.
        resid: the live stream before it.
        layout: how the tokens are laid out.
        shifts: what is added for each receiver; None for nothing, which costs a plain pass.
        edits: changes of what attention (`attn_out`) or the MLP (`mlp_out`) adds to the live stream.

    Returns:
        the live stream after the layer; and what its heads and then its MLP wrote, N = H + 1.
    """
    own: Block = block(cfg, weights, layer)
    if shifts is None:
        one = own(resid, layout, edits=edits)
        return one.resid_post, jnp.concatenate([head_writes(one), one.mlp_out[None]])
    read = {Site.Q: shifts.q, Site.K: shifts.k, Site.V: shifts.v}
    known = {site: _by_head(cfg, weights, layer, site, resid + shift, layout) for site, shift in read.items()}
    one = own(resid, layout, known=known, edits=edits)
    heads = head_writes(one)
    shift = shifts.mlp(heads)
    # The MLP's own reading: where it reads depends on the family, so both streams are shifted.
    written = own(resid + shift, layout, known={Site.RESID_MID: one.resid_mid + shift}, edits=edits).mlp_out
    return one.replaced({Site.MLP_OUT: written}).resid_post, jnp.concatenate([heads, written[None]])


def writes(
    cfg: ModelConfig, params: Params, tokens: Int[Array, "B T"], n_layers: int
) -> tuple[Float[Array, "B T D"], Float[Array, "S B T D"]]:
    """The stream after the last layer of a plain run, and what every sender wrote, in the order of `Graph.senders`."""
    start = embedding(cfg, params, tokens)
    layout = Causal.of(tokens.shape[1])

    def through(x: Array, layer: Array) -> tuple[Array, Array]:
        return wired_layer(cfg, take_layer(params["blocks"], layer), layer, x, layout)

    last, made = jax.lax.scan(through, start, jnp.arange(n_layers))  # [L, H + 1, B, T, D]
    return last, jnp.concatenate([start[None], made.reshape(-1, *made.shape[2:])])


def n_inputs(cfg: ModelConfig) -> int:
    """Receivers of a layer: q of each head, k and v of each KV group, the MLP."""
    return cfg.n_heads + 2 * cfg.n_kv_heads + 1


def _parts(cfg: ModelConfig, by_receiver: Array, axis: int = 0) -> tuple[Array, Array, Array, Array]:
    """An array with an axis of a layer's receivers, cut into those of q, k, v and the MLP."""
    h, k = cfg.n_heads, cfg.n_kv_heads
    q, keys, values, mlp = jnp.split(by_receiver, [h, h + k, h + 2 * k], axis)
    return q, keys, values, mlp


def shifted(
    cfg: ModelConfig,
    params: Params,
    start: Float[Array, "B T D"],
    shifts: Float[Array, "R B T D"],
    n_layers: int,
    edits: Sequence[Edit] = (),
) -> Float[Array, "B T D"]:
    """The stream that "logits" reads, if each receiver's own reading of the stream is shifted by a given amount.

    The gradient by a shift is the gradient by that receiver's input.

    Args:
        cfg: the model.
        params: its parameters.
        start: what is embedded.
        shifts: one for each receiver, in the order of `Graph.receivers`.
        n_layers: number of layers that run.
        edits: as in `wired_layer`; each names its layer.
    """
    layout = Causal.of(start.shape[1])
    by_layer = shifts[:-1].reshape(n_layers, n_inputs(cfg), *start.shape)

    def through(x: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        layer, own = at
        q, k, v, mlp = _parts(cfg, own)
        given = Shifts(q, k, v, lambda heads: mlp[0])
        return wired_layer(cfg, take_layer(params["blocks"], layer), layer, x, layout, given, edits)[0], None

    last, _ = jax.lax.scan(keep_products(through), start, (jnp.arange(n_layers), by_layer))
    return last + shifts[-1]


def patched(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    replacement: Float[Array, " S #B #T D"],
    mask: Float[Array, "S R"],
    n_layers: int,
) -> Float[Array, "B T D"]:
    """The stream that "logits" reads, with the edges of a mask patched.

    Args:
        cfg: the model.
        params: its parameters.
        tokens: token ids.
        replacement: what each sender is taken to write, along patched edges.
        mask: 1 where an edge is patched, 0 where it is live; in between, that share of it. Rows are senders and columns
            are receivers, in the order of `Graph`. Where there is no edge it counts for nothing.
        n_layers: number of layers that run.
    """
    start, layout, h = embedding(cfg, params, tokens), Causal.of(tokens.shape[1]), cfg.n_heads
    by_layer = jnp.moveaxis(mask[:, :-1].reshape(len(mask), n_layers, n_inputs(cfg)), 1, 0)  # [L, S, r]
    # replacement - write for the senders that have written; 0 for those that have not.
    delta = jnp.zeros((len(mask), *start.shape)).at[0].set(replacement[0] - start)
    added = functools.partial(jnp.einsum, "sr,sbtd->rbtd", precision=jax.lax.Precision.HIGHEST)

    def through(carry: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        x, delta = carry
        layer, own = at
        first = 1 + layer * (h + 1)  # number of the layer's first head among the senders
        replaced = jax.lax.dynamic_slice_in_dim(replacement, first, h + 1)
        q, k, v, mlp = _parts(cfg, own, axis=1)

        def mlp_shift(heads: Array) -> Array:
            before = added(mlp, delta)[0]
            if cfg.parallel:  # it does not read the heads of its own layer
                return before
            mine = jax.lax.dynamic_slice_in_dim(mlp, first, h)
            return before + added(mine, replaced[:h] - heads)[0]

        given = Shifts(added(q, delta), added(k, delta), added(v, delta), mlp_shift)
        x, made = wired_layer(cfg, take_layer(params["blocks"], layer), layer, x, layout, given)
        new: Any = jax.lax.dynamic_update_slice_in_dim(delta, replaced - made, first, 0)
        return (x, new), None

    (last, delta), _ = jax.lax.scan(through, (start, delta), (jnp.arange(n_layers), by_layer))
    return last + added(mask[:, -1:], delta)[0]
