"""Suffix replay: the exact effect of single components, with the host's weights shared by all patches.

A component of layer l changes nothing before layer l. So the host runs once and its residual stream is kept; a
patch recomputes only the component's own contribution inside layer l, and the layers after it run with the host's
weights, for all patches x prompts x tokens in one matmul, up to the layer that the metric reads. There, only the
positions that are read are computed. One compiled program a kind serves every layer: the layer index is traced.

A component's new output o(weights, input) takes its weights and its input each from the host or from the donor:

    weights  input                                                                     (METHOD 5, ours)
    donor    host     weight patching (arXiv 2604.13694)
    donor    donor    activation patching: the donor's own output
    host     donor    relay: what the host makes of the donor's input
    host     host     nothing; with the host as its own donor, a sham

    head      resid_mid'  = resid_mid  + z'[h] W_O'[h] - z[h] W_O[h]        input: normed stream, keys and values
    kv_group  resid_mid'  = resid_mid  + sum over its heads of (z' - z) W_O     input: normed stream; z' of host's q
    neuron    resid_post' = resid_post + a'[f] W_out'[f] - a[f] W_out[f]    input: normed stream
    attn, mlp, layer, norm: likewise, as modules

Swap host and donor for knock-out, a component of the base in the expert.

Where the metric is a projection <r, v> of the stream, a sum of what everything has written, its change is followed from
the supplier c through every later head and MLP u on the way (METHOD 4; ours):

    dF_c = d_cc + sum_u d_cu,    d_cu = <v, o_u(host with c) - o_u(host)> at the positions that are read
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.components import KINDS, LEAVES, Component, count, gate_shapes, open_gates
from wpjax.errors import ComponentError
from wpjax.metrics import Along, Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, Site, block, decoder, take_layer
from wpjax.models.layers import Block
from wpjax.models.leaves import project
from wpjax.patching import PatchMask, patch, patch_layer

Side: TypeAlias = Literal["host", "donor"]


class Run(NamedTuple):
    """What a sweep keeps of a model's own forward pass.

    Attributes:
        resid_pre: [l + 1, B, T, D], the residual stream before each layer up to the one that the metric reads.
        score: [B], the metric.
        writes: [B, L, H + 1], what every head and, last, the MLP of each layer adds to it; None where the metric is
            no projection.
    """

    resid_pre: Float[Array, "A B T D"]
    score: Float[Array, " B"]
    writes: Float[Array, "B L G"] | None = None


@functools.partial(jax.jit, static_argnames="cfg")
def run_model(cfg: ModelConfig, params: Params, metric: Metric) -> Run:
    """Run a model once up to the layer that the metric reads."""
    out = metric.run(cfg, params, sites=(Site.RESID_PRE,))
    resid_pre, score = out.sites[Site.RESID_PRE], metric.read(cfg, params, metric.pick(out.resid))
    if not isinstance(metric.readout, Along):
        return Run(resid_pre, score)
    where = jnp.asarray(metric.at)
    tap = Tap(metric.readout, jnp.asarray(metric.weight))
    return Run(
        resid_pre, score, suffix(cfg, params["blocks"], resid_pre[0], jnp.asarray(0), metric.layer, where, tap)[1]
    )


class Stream(NamedTuple):
    """One layer of a model, and the residual stream that enters it there."""

    block: Block
    resid_pre: Float[Array, "B T D"]

    @property
    def positions(self) -> Int[Array, "1 T"]:
        """Of the tokens."""
        return jnp.arange(self.resid_pre.shape[1])[None]

    @property
    def attn_input(self) -> Float[Array, "B T D"]:
        """The normed stream that attention reads."""
        return self.block.norm_attn(self.resid_pre)

    @property
    def resid_mid(self) -> Float[Array, "B T D"]:
        """The stream after attention."""
        return self.block.attend(self.resid_pre, self.positions)[0]

    @property
    def mlp_input(self) -> Float[Array, "B T D"]:
        """The normed stream that the MLP reads."""
        return self.block.norm_mlp(self.resid_mid)


class LayerPatch(NamedTuple):
    """One layer of the host, and where a component's new output comes from.

    Attributes:
        host: the host's layer and stream.
        weights: the layer whose weights the component takes.
        source: the layer and stream whose input it sees.
    """

    host: Stream
    weights: Block
    source: Stream


class Rows(NamedTuple):
    """The residual stream of a layer with one component at a time patched.

    Attributes:
        mid: after attention; None where it is the host's.
        post: after the layer.
    """

    mid: Float[Array, "P B T D"] | None
    post: Float[Array, "P B T D"]


class HeadValues(NamedTuple):
    """Attention of one layer before the output projection, as the host has it and as a patch would."""

    host: Float[Array, "B T H Dh"]
    patched: Float[Array, "B T H Dh"]


def _heads(weights: Block, source: Stream) -> Float[Array, "B T H Dh"]:
    """Every head by some weights' queries on the keys and values of what they see."""
    x = source.attn_input
    q = weights.attn.queries(x, source.positions)
    return source.block.attn.mix(q, *source.block.attn.keys_values(x, source.positions))


def query_patch(at: LayerPatch) -> HeadValues:
    """Every head as a component: its queries are its own, keys and values are input."""
    return HeadValues(_heads(at.host.block, at.host), _heads(at.weights, at.source))


def kv_patch(at: LayerPatch) -> HeadValues:
    """Every KV group as a component: the host's queries on its keys and values."""
    attn = at.host.block.attn
    q = attn.queries(at.host.attn_input, at.host.positions)
    kv = attn.keys_values(at.host.attn_input, at.host.positions)
    new = at.weights.attn.keys_values(at.source.attn_input, at.source.positions)
    return HeadValues(attn.mix(q, *kv), attn.mix(q, *new))


def _write(z: Float[Array, "B T n Dh"], w_o: Float[Array, "n Dh D"]) -> Float[Array, "n B T D"]:
    """What each of some heads writes on its own."""
    return jax.vmap(project, in_axes=(2, 0))(z, w_o)


def _attention_rows(at: LayerPatch, mid: Float[Array, "P B T D"]) -> Rows:
    return Rows(mid, at.host.block.feed(mid))


def _head_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    z, attn = query_patch(at), at.host.block.attn
    w_host, w_new = (b.attn.W_O.get_value() for b in (at.host.block, at.weights))
    delta = _write(z.patched[:, :, index], w_new[index]) - _write(z.host[:, :, index], w_host[index])
    return _attention_rows(at, at.host.resid_pre + attn.out(z.host) + delta)


def _kv_group_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    z, attn = kv_patch(at), at.host.block.attn
    heads = index[:, None] * attn.cfg.n_rep + jnp.arange(attn.cfg.n_rep)  # [P, n_rep]
    w_o, change = attn.W_O.get_value(), z.patched - z.host
    delta = jax.vmap(lambda h: project(change[:, :, h], w_o[h], n_in=2))(heads)
    return _attention_rows(at, at.host.resid_pre + attn.out(z.host) + delta)


def _neuron_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    mid, mlp = at.host.resid_mid, at.host.block.mlp
    a_host, a_new = mlp.neurons(at.host.mlp_input), at.weights.mlp.neurons(at.source.mlp_input)
    w_host, w_new = (b.mlp.W_out.get_value() for b in (at.host.block, at.weights))

    def write(a: Array, w: Array) -> Array:
        chosen = jnp.moveaxis(a[:, :, index], 2, 0)  # [P, B, T]
        return chosen[..., None] * w[index][:, None, None, :].astype(jnp.float32)

    return Rows(None, mid + mlp.out(a_host) + (write(a_new, w_new) - write(a_host, w_host)))


def _attend(weights: Block, x: Array, positions: Array) -> Float[Array, "B T D"]:
    """What an attention module adds to the stream."""
    q, kv = weights.attn.queries(x, positions), weights.attn.keys_values(x, positions)
    return weights.attn.out(weights.attn.mix(q, *kv))


def _attn_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    new = _attend(at.weights, at.source.attn_input, at.source.positions)
    return _attention_rows(at, (at.host.resid_pre + new)[None].repeat(index.size, 0))


def _mlp_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    mlp = at.weights.mlp
    return Rows(None, (at.host.resid_mid + mlp.out(mlp.neurons(at.source.mlp_input)))[None].repeat(index.size, 0))


def _layer_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    x = at.source.resid_pre
    mid, _ = at.weights.attend(x, at.source.positions)
    rows = (at.host.resid_pre + (mid - x), at.host.resid_pre + (at.weights.feed(mid) - x))
    return Rows(*(row[None].repeat(index.size, 0) for row in rows))


def _norm_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    host, mlp = at.host.block, at.host.block.mlp
    mid_host = at.host.resid_mid
    mid = at.host.resid_pre + _attend(host, at.weights.norm_attn(at.source.resid_pre), at.host.positions)
    post = mid_host + mlp.out(mlp.neurons(at.weights.norm_mlp(at.source.resid_mid)))
    mids, posts = jnp.stack([mid, mid_host]), jnp.stack([host.feed(mid), post])
    return Rows(mids[index], posts[index])


RowRule = Callable[[LayerPatch, Array], Rows]
ROWS: Mapping[str, RowRule] = MappingProxyType(
    {
        "head": _head_rows,
        "kv_group": _kv_group_rows,
        "neuron": _neuron_rows,
        "attn": _attn_rows,
        "mlp": _mlp_rows,
        "layer": _layer_rows,
        "norm": _norm_rows,
    }
)
"""What each kind in a layer contributes; weight patches of a kind without a rule go through `Blend`s."""


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
    """`resid_post` of a layer with each of some components of a kind weight-patched, for any kind in a layer."""
    gates = {gate: jnp.asarray(value)[index] for gate, value in _layer_gates(cfg, kind).items()}
    positions = jnp.arange(resid_pre.shape[1])[None]
    return jax.vmap(lambda g: block(cfg, patch_layer(host, donor, g))(resid_pre, positions))(gates)


class Tap(NamedTuple):
    """Reads what heads and MLPs add to a projection of the stream.

    Attributes:
        along: the direction.
        weight: [N, S], how much each position counts.
    """

    along: Along
    weight: Float[Array, "N S"]

    def __call__(self, b: Block, z: Float[Array, "N S H Dh"], fed: Float[Array, "N S D"]) -> Float[Array, "N G"]:
        """Of one layer: its heads (before W_O) and what its MLP adds, at the positions that are read."""
        w_o = jnp.matmul(
            b.attn.W_O.get_value().astype(jnp.float32), self.along.vector, precision=jax.lax.Precision.HIGHEST
        )
        heads = jnp.einsum("nshd,hd,ns->nh", z, w_o, self.weight, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([heads, self.sum(fed)[:, None]], axis=1)

    def sum(self, x: Float[Array, "N S D"]) -> Float[Array, " N"]:
        """The projection of a change of the stream."""
        along = jnp.matmul(x, self.along.vector, precision=jax.lax.Precision.HIGHEST)
        return (along * self.weight).sum(-1)


def suffix(
    cfg: ModelConfig,
    blocks: Params,
    resid: Float[Array, "N T D"],
    start: Int[Array, ""],
    last: int,
    at: Int[Array, "N S"],
    tap: Tap | None = None,
) -> tuple[Float[Array, "N S D"], Float[Array, "N L G"] | None]:
    """The residual stream at each row's positions after layer `last`, having entered at layer `start`.

    Args:
        cfg: static.
        blocks: the host's stacked layers.
        resid: the stream before layer `start`.
        start: traced; `last + 1` if nothing is left to run.
        last: the layer whose `resid_post` is read, static.
        at: positions that are read.
        tap: read there what every head and MLP of the layers adds, too; of layers before `start`, 0.
    """
    positions = jnp.arange(resid.shape[1])[None]

    def pick(x: Array) -> Array:
        return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)

    def tapped(writes: Array | None, layer: Array | int, b: Block, z: Array, mid: Array, post: Array) -> Array | None:
        return None if tap is None else writes.at[:, layer].set(tap(b, z, post - mid))  # type: ignore[union-attr]

    def run(layer: Array, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        x, writes = carry
        b = block(cfg, take_layer(blocks, layer))
        normed = b.norm_attn(x)
        z = b.attn.mix(b.attn.queries(normed, positions), *b.attn.keys_values(normed, positions))
        mid = x + b.attn.out(z)
        post = b.feed(mid)
        return post, tapped(writes, layer, b, pick(z), pick(mid), pick(post)) if tap else None

    def final(carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        """The last layer: keys and values of every token, everything else at the positions that are read only."""
        x, writes = carry
        b = block(cfg, take_layer(blocks, last))
        normed = b.norm_attn(x)
        q = b.attn.queries(pick(normed), at)
        z = b.attn.mix(q, *b.attn.keys_values(normed, positions), seen=at + 1)
        mid = pick(x) + b.attn.out(z)
        post = b.feed(mid)
        return post, tapped(writes, last, b, z, mid, post)

    writes = None if tap is None else jnp.zeros((len(resid), last + 1, cfg.n_heads + 1), jnp.float32)
    carry = jax.lax.fori_loop(start, last, run, (resid, writes))
    return jax.lax.cond(start <= last, final, lambda carry: (pick(carry[0]), carry[1]), carry)


class Replayed(NamedTuple):
    """What a program of patches returns.

    Attributes:
        score: [P, B], the metric; [P + 1, B] with a reference, which is the last row.
        flow: [P, 1 + L (H + 1)], mean over prompts of the change of the metric by way of each target: what the
            component adds itself, then the heads and the MLP of each layer; None where the metric is no projection.
    """

    score: Float[Array, "P B"]
    flow: Float[Array, "P U"] | None


@functools.partial(jax.jit, static_argnames=("cfg", "kind", "weights", "inputs", "with_reference"))
def replay(
    cfg: ModelConfig,
    kind: str,
    host: Params,
    donor: Params,
    runs: tuple[Run, Run | None],
    metric: Metric,
    layer: Int[Array, ""],
    index: Int[Array, " P"],
    jitter: Float[Array, "P T D"],
    *,
    weights: Side = "donor",
    inputs: Side = "host",
    with_reference: bool = False,
) -> Replayed:
    """The metric of the host with one component's output at a time replaced.

    Args:
        cfg: static.
        kind: kind of all P components, static.
        host: parameters of the host; shared by all patches.
        donor: parameters of the donor.
        runs: the host's own run on the metric's tokens, and the donor's where its input is asked for.
        metric: what is measured.
        layer: their layer, traced.
        index: which of the layer's components.
        jitter: relative change of the patched residual stream; 0 for a patch, one rounding step for a sham.
        weights: whose weights the component takes, static.
        inputs: whose input it sees, static.
        with_reference: append a row for the host itself, so that rounding that depends on the batch's shape can be
            subtracted.

    """
    ids, run = jnp.asarray(metric.tokens.ids), runs[0]
    found: Rows | None = None
    if not KINDS[kind].in_layer:
        giver = donor if weights == "donor" else host
        patched = patch(host, giver, PatchMask.of(cfg, kind))
        if metric.held is None:  # the tokens are the only input
            after, unpatched = jnp.asarray(0), run.resid_pre[0]
            rows = decoder(cfg, patched).embed(ids, jnp.arange(ids.shape[1])[None])[None]
        else:  # only readers come after the state that is given
            after, unpatched = jnp.asarray(metric.layer), run.resid_pre[metric.layer]
            rows = unpatched[None]
    else:
        patched, after = host, layer + 1
        at = layer_patch(cfg, host, donor, runs, layer, weights, inputs)
        found = layer_rows(cfg, kind, at, (host, donor), layer, index)
        rows = found.post
        unpatched = at.host.block(at.host.resid_pre, at.host.positions)
    mids = found.mid if found is not None else None
    rows = rows * (1 + jitter[:, None])
    if with_reference:
        rows = jnp.concatenate([rows, unpatched[None]])
    n_rows, n_prompts, *rest = rows.shape
    where = jnp.tile(jnp.asarray(metric.at), (n_rows, 1))
    tap = None
    if isinstance(metric.readout, Along):
        tap = Tap(metric.readout, jnp.tile(jnp.asarray(metric.weight), (n_rows, 1)))
    final, writes = suffix(cfg, host["blocks"], rows.reshape(-1, *rest), after, metric.layer, where, tap)
    picked = final.reshape(n_rows, n_prompts, *final.shape[1:])
    # A vocabulary of logits takes its place for one patch at a time.
    at_once = 1 if metric.readout.reads_logits else len(index)
    n = len(index) if KINDS[kind].in_layer else 1
    scores = jax.lax.map(lambda x: metric.read(cfg, patched, x), picked[:n], batch_size=at_once)
    if with_reference:
        scores = jnp.concatenate([scores, metric.read(cfg, host, picked[-1])[None]])
    if writes is None or run.writes is None:
        return Replayed(scores, None)
    writes = writes.reshape(n_rows, n_prompts, *writes.shape[1:])
    before = writes[-1] if with_reference else run.writes
    later = jnp.arange(metric.layer + 1)[:, None] >= after
    through = jnp.where(later, writes[:n] - before, 0.0).mean(1)  # [P, L, H + 1]
    own = _own(metric, rows[:n], unpatched)
    if mids is not None:  # what the layer's own MLP makes of a change before it is not the supplier's own
        direct = _own(metric, mids, at.host.resid_mid)
        through = through.at[:, layer, -1].set(own - direct)
        own = direct
    return Replayed(scores, jnp.concatenate([own[:, None], through.reshape(n, -1)], axis=1))


def _own(metric: Metric, rows: Float[Array, "P B T D"], host: Float[Array, "B T D"]) -> Float[Array, " P"]:
    """Change of the projection by a change of the stream, mean over prompts."""
    assert isinstance(metric.readout, Along)
    tap = Tap(metric.readout, jnp.asarray(metric.weight))
    return jax.vmap(lambda x: tap.sum(metric.pick(x - host)).mean())(rows)


def flow_targets(cfg: ModelConfig, last: int) -> list[str]:
    """Names of the columns of `Replayed.flow`: `self`, then `L0.head.0` ... `L0.mlp` ... of layers up to `last`."""
    heads = [f"head.{h}" for h in range(cfg.n_heads)]
    return ["self", *(f"L{layer}.{part}" for layer in range(last + 1) for part in (*heads, "mlp"))]


def layer_patch(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    runs: tuple[Run, Run | None],
    layer: Int[Array, ""],
    weights: Side,
    inputs: Side,
) -> LayerPatch:
    """The layer of host and donor, with weights and input taken from one or the other."""
    blocks = {"host": block(cfg, take_layer(host["blocks"], layer)),
              "donor": block(cfg, take_layer(donor["blocks"], layer))}  # fmt: skip
    here = Stream(blocks["host"], take_layer(runs[0].resid_pre, layer))
    if inputs == "host":
        return LayerPatch(here, blocks[weights], here)
    assert runs[1] is not None
    return LayerPatch(here, blocks[weights], Stream(blocks["donor"], take_layer(runs[1].resid_pre, layer)))


def layer_rows(
    cfg: ModelConfig, kind: str, at: LayerPatch, models: tuple[Params, Params], layer: Array, index: Array
) -> Rows:
    """The layer with each of some components patched, by the kind's rule or, for a weight patch, by `Blend`s."""
    if kind in ROWS:
        return ROWS[kind](at, index)
    if at.source is not at.host:
        raise ComponentError(
            f"no rule says what the output of {kind} is, so only its weights can be patched; add one to ROWS"
        )
    ours, theirs = (take_layer(model["blocks"], layer) for model in models)
    return Rows(None, blend_rows(cfg, kind, ours, theirs, at.host.resid_pre, index))
