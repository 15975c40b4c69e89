"""Suffix replay: the exact effect of single components, with the base's weights shared by all patches.

A component of layer l changes nothing before layer l. So the base runs once and its residual stream is kept; a
patch recomputes only the component's own contribution inside layer l, and the layers after it run with the base's
weights, for all patches x prompts x tokens in one matmul, up to the anchor's layer. There, only the anchor's
position is computed. One compiled program a kind serves every layer: the layer index is traced.

    head      resid_mid'  = resid_mid  + z_E[h] W_O_E[h] - z_B[h] W_O_B[h]     z_E: expert's queries, base's K and V
    kv_group  resid_mid'  = resid_mid  + sum over its heads of (z_E - z_B) W_O_B     z_E: base's queries, expert's K, V
    neuron    resid_post' = resid_post + a_E[f] W_out_E[f] - a_B[f] W_out_B[f]
    others    resid_post' = the layer run with `Blend` leaves

The donor is an argument: the expert for weight patching, the base itself for a sham.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.behaviours import Tokens
from wpjax.components import LEAVES, Component, count, gate_shapes, open_gates
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, Site, block, decoder, forward, take_layer
from wpjax.models.layers import Block
from wpjax.models.leaves import project
from wpjax.patching import patch_layer


class BaseRun(NamedTuple):
    """What the sweep keeps of the base's own forward pass.

    Attributes:
        resid_pre: [a + 1, B, T, D], the residual stream before each layer up to the anchor's.
        last: [B], the anchor's position in each prompt.
        vector: [D], the anchor.
        score: [B], the base's anchor score.
    """

    resid_pre: Float[Array, "A B T D"]
    last: Int[Array, " B"]
    vector: Float[Array, " D"]
    score: Float[Array, " B"]


@functools.partial(jax.jit, static_argnames=("cfg", "stop"))
def _run_base(cfg: ModelConfig, params: Params, ids: Array, last: Array, vector: Array, stop: int) -> BaseRun:
    out = forward(cfg, params, ids, sites=(Site.RESID_PRE,), stop=stop, logits=False)
    final = jnp.take_along_axis(out.resid, last[:, None, None], axis=1)[:, 0]
    return BaseRun(out.sites[Site.RESID_PRE], last, vector, dot(final, vector))


def run_base(cfg: ModelConfig, base: Params, tokens: Tokens, vector: Array, layer: int) -> BaseRun:
    """Run the base once up to the anchor's layer."""
    return _run_base(cfg, base, jnp.asarray(tokens.ids), jnp.asarray(tokens.last), vector, layer + 1)


def dot(x: Float[Array, "N D"], vector: Float[Array, " D"]) -> Float[Array, " N"]:
    """The anchor score of residual streams, in full float32 on every device."""
    return jnp.matmul(x, vector, precision=jax.lax.Precision.HIGHEST)


class Layer(NamedTuple):
    """One layer of host and donor, and what the host computes in it on its own input."""

    host: Block
    donor: Block
    resid_pre: Float[Array, "B T D"]

    @property
    def positions(self) -> Int[Array, "1 T"]:
        """Of the tokens."""
        return jnp.arange(self.resid_pre.shape[1])[None]


class HeadOutputs(NamedTuple):
    """Attention of one layer before the output projection, as the host has it and as a patch would."""

    host: Float[Array, "B T H Dh"]
    patched: Float[Array, "B T H Dh"]


def query_patch(at: Layer) -> HeadOutputs:
    """Every head with the donor's queries on the host's keys and values."""
    x = at.host.norm_attn(at.resid_pre)
    k, v = at.host.attn.keys_values(x, at.positions)
    q = at.host.attn.queries(x, at.positions), at.donor.attn.queries(x, at.positions)
    return HeadOutputs(*(at.host.attn.mix(each, k, v) for each in q))


def kv_patch(at: Layer) -> HeadOutputs:
    """Every head with the host's queries on the donor's keys and values."""
    x = at.host.norm_attn(at.resid_pre)
    q = at.host.attn.queries(x, at.positions)
    kv = at.host.attn.keys_values(x, at.positions), at.donor.attn.keys_values(x, at.positions)
    return HeadOutputs(*(at.host.attn.mix(q, k, v) for k, v in kv))


def _write(z: Float[Array, "B T n Dh"], w_o: Float[Array, "n Dh D"]) -> Float[Array, "n B T D"]:
    """What each of some heads writes on its own."""
    return jax.vmap(project, in_axes=(2, 0))(z, w_o)


def _head_rows(at: Layer, index: Int[Array, " P"]) -> Float[Array, "P B T D"]:
    z = query_patch(at)
    w_host, w_donor = (b.attn.W_O.get_value() for b in (at.host, at.donor))
    delta = _write(z.patched[:, :, index], w_donor[index]) - _write(z.host[:, :, index], w_host[index])
    return at.host.feed(at.resid_pre + at.host.attn.out(z.host) + delta)


def _kv_group_rows(at: Layer, index: Int[Array, " P"]) -> Float[Array, "P B T D"]:
    z = kv_patch(at)
    heads = index[:, None] * at.host.attn.cfg.n_rep + jnp.arange(at.host.attn.cfg.n_rep)  # [P, n_rep]
    w_o = at.host.attn.W_O.get_value()
    change = z.patched - z.host
    delta = jax.vmap(lambda h: project(change[:, :, h], w_o[h], n_in=2))(heads)
    return at.host.feed(at.resid_pre + at.host.attn.out(z.host) + delta)


def _neuron_rows(at: Layer, index: Int[Array, " P"]) -> Float[Array, "P B T D"]:
    mid, _ = at.host.attend(at.resid_pre, at.positions)
    x = at.host.norm_mlp(mid)
    a_host, a_donor = at.host.mlp.neurons(x), at.donor.mlp.neurons(x)
    w_host, w_donor = (b.mlp.W_out.get_value() for b in (at.host, at.donor))

    def write(a: Array, w: Array) -> Array:
        chosen = jnp.moveaxis(a[:, :, index], 2, 0)  # [P, B, T]
        return chosen[..., None] * w[index][:, None, None, :].astype(jnp.float32)

    return mid + at.host.mlp.out(a_host) + (write(a_donor, w_donor) - write(a_host, w_host))


RowRule = Callable[[Layer, Array], Array]
ROWS: Mapping[str, RowRule] = MappingProxyType({"head": _head_rows, "kv_group": _kv_group_rows, "neuron": _neuron_rows})
"""Kinds whose own contribution has a closed form; every other kind in a layer goes through `Blend`s."""


@functools.cache
def _layer_gates(cfg: ModelConfig, kind: str) -> dict[str, np.ndarray]:
    """For each component of a kind in one layer, the gates it opens there: gate -> [n, ...]."""
    opened = [open_gates(cfg, [Component(kind, 0, i)]) for i in range(count(cfg, kind))]
    layered = [owner.gate for path, owner in LEAVES.items() if path.startswith("blocks/")]
    used = [gate for gate in gate_shapes(cfg) if gate in layered and any(gates[gate][0].any() for gates in opened)]
    return {gate: np.stack([gates[gate][0] for gates in opened]) for gate in used}


def blend_rows(
    cfg: ModelConfig, kind: str, host: Params, donor: Params, resid_pre: Float[Array, "B T D"], index: Int[Array, " P"]
) -> Float[Array, "P B T D"]:
    """`resid_post` of a layer with each of some components of a kind patched, for any kind in a layer."""
    gates = {gate: jnp.asarray(value)[index] for gate, value in _layer_gates(cfg, kind).items()}
    positions = jnp.arange(resid_pre.shape[1])[None]
    return jax.vmap(lambda g: block(cfg, patch_layer(host, donor, g))(resid_pre, positions))(gates)


def suffix(
    cfg: ModelConfig,
    blocks: Params,
    resid: Float[Array, "N T D"],
    start: Int[Array, ""],
    anchor_layer: int,
    last: Array,
) -> Float[Array, "N D"]:
    """The residual stream at each row's anchor position after layer `anchor_layer`, having entered at layer `start`.

    Args:
        cfg: static.
        blocks: the base's stacked layers.
        resid: the stream before layer `start`.
        start: traced; `anchor_layer + 1` if nothing is left to run.
        anchor_layer: the layer whose `resid_post` the anchor reads, static.
        last: [N], anchor positions.
    """
    positions = jnp.arange(resid.shape[1])[None]

    def run(layer: Array, x: Array) -> Array:
        return block(cfg, take_layer(blocks, layer))(x, positions)

    def pick(x: Array) -> Array:
        return jnp.take_along_axis(x, last[:, None, None], axis=1)

    def final(x: Array) -> Array:
        """The anchor's layer: keys and values of every token, everything else at the anchor's position only."""
        b = block(cfg, take_layer(blocks, anchor_layer))
        normed = b.norm_attn(x)
        q = b.attn.queries(pick(normed), last[:, None])
        z = b.attn.mix(q, *b.attn.keys_values(normed, positions), lengths=last + 1)
        return b.feed(pick(x) + b.attn.out(z))

    resid = jax.lax.fori_loop(start, anchor_layer, run, resid)
    return jax.lax.cond(start <= anchor_layer, final, pick, resid)[:, 0]


@functools.partial(jax.jit, static_argnames=("cfg", "kind", "anchor_layer", "with_reference"))
def replay(
    cfg: ModelConfig,
    kind: str,
    anchor_layer: int,
    host: Params,
    donor: Params,
    run: BaseRun,
    ids: Int[Array, "B T"],
    layer: Int[Array, ""],
    index: Int[Array, " P"],
    jitter: Float[Array, "P T D"],
    with_reference: bool = False,
) -> Float[Array, "P B"]:
    """Anchor scores of the host with one component at a time taken from the donor.

    Args:
        cfg: static.
        kind: kind of all P components, static.
        anchor_layer: the layer whose `resid_post` the anchor reads, static.
        host: parameters of the host; shared by all patches.
        donor: parameters of the donor.
        run: the host's own run on the same prompts.
        ids: tokens of the prompts (used by `embed` alone).
        layer: their layer, traced.
        index: which of the layer's components.
        jitter: relative change of the patched residual stream; 0 for a patch, one rounding step for a sham.
        with_reference: append a row for the host itself, so that rounding that depends on the batch's shape can be
            subtracted.

    Returns:
        [P, B], or [P + 1, B] with a reference.
    """
    if kind == "embed":
        after = jnp.asarray(0)
        rows = decoder(cfg, donor).embed(ids, jnp.arange(ids.shape[1])[None])[None]
        unpatched = run.resid_pre[0]
    else:
        after = layer + 1
        ours, theirs = take_layer(host["blocks"], layer), take_layer(donor["blocks"], layer)
        at = Layer(block(cfg, ours), block(cfg, theirs), take_layer(run.resid_pre, layer))
        rows = ROWS[kind](at, index) if kind in ROWS else blend_rows(cfg, kind, ours, theirs, at.resid_pre, index)
        unpatched = at.host(at.resid_pre, at.positions)
    rows = rows * (1 + jitter[:, None])
    if with_reference:
        rows = jnp.concatenate([rows, unpatched[None]])
    n_rows, n_prompts, *rest = rows.shape
    last = jnp.tile(run.last, n_rows)
    final = suffix(cfg, host["blocks"], rows.reshape(-1, *rest), after, anchor_layer, last)
    return dot(final, run.vector).reshape(n_rows, n_prompts)
