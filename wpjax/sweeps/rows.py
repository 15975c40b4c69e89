"""What a component contributes inside its layer, whichever weights and input it is given: one rule a kind.

    weights  input                                             (docs/method.md, "Source or relay"; ours)
    donor    host     weight patching (arXiv 2604.13694)
    donor    donor    activation patching: the donor's own output
    host     donor    relay: what the host makes of the donor's input
    host     host     nothing; with the host as its own donor, a sham

    head      resid_mid'  = resid_mid  + z'[h] W_O'[h] - z[h] W_O[h]        input: normed stream, keys and values
    kv_group  resid_mid'  = resid_mid  + sum over its heads of (z' - z) W_O     input: normed stream; z' of host's q
    neuron    resid_post' = resid_post + a'[f] W_out'[f] - a[f] W_out[f]    input: normed stream
    attn, mlp, layer, norm: likewise, as modules

A kind without a rule of its own is weight-patched through `Blend`s.
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

from wpjax.components import LEAVES, Component, count, gate_shapes, open_gates
from wpjax.errors import ComponentError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, Site, block, take_layer
from wpjax.models.layers import Block, Packed
from wpjax.models.leaves import base_of, project
from wpjax.patching import patch_layer

Side: TypeAlias = Literal["host", "donor"]


class Run(NamedTuple):
    """What a sweep keeps of a model's own forward pass.

    Attributes:
        resid_pre: [l + 1, B, T, D], the residual stream before each layer up to the one that the metric reads;
            [l + 1, 1, S, D] packed.
        score: [B], the metric.
        slope: [B, R, D], its gradient by the stream where it is read; None where flow is not followed.
        writes: [B, L, H + 1], what every head and, last, the MLP of each layer adds along the slope.
        kept: `resid_mid` and `resid_post` likewise; where they are not there, they are made again.
    """

    resid_pre: Float[Array, "A B T D"]
    score: Float[Array, " B"]
    slope: Float[Array, "B R D"] | None = None
    writes: Float[Array, "B L G"] | None = None
    kept: dict[Site, Float[Array, "A B T D"]] | None = None


class Stream(NamedTuple):
    """One layer of a model and the residual stream that enters it there.

    Attributes:
        block: the layer.
        resid_pre: the stream.
        packed: how its tokens are packed, if they are.
        kept: `resid_mid` and `resid_post`, where they are known already.
    """

    block: Block
    resid_pre: Float[Array, "B T D"]
    packed: Packed | None = None
    kept: dict[Site, Float[Array, "B T D"]] | None = None

    def _site(self, site: Site, make: Callable[[], Array]) -> Float[Array, "B T D"]:
        return self.kept[site] if self.kept and site in self.kept else make()

    @property
    def positions(self) -> Int[Array, "1 T"]:
        """Of the tokens."""
        return jnp.arange(self.resid_pre.shape[1])[None] if self.packed is None else self.packed.positions

    @property
    def where(self) -> Int[Array, "1 T"] | Packed:
        """What a block needs to know of the tokens."""
        return self.positions if self.packed is None else self.packed

    def mix(self, q: Array, k: Array, v: Array) -> Float[Array, "B T H Dh"]:
        """Attend among the tokens of this stream."""
        attn = self.block.attn
        return attn.mix(q, k, v) if self.packed is None else attn.mix_packed(q, k, v, self.packed)

    @property
    def attn_input(self) -> Float[Array, "B T D"]:
        """The normed stream that attention reads."""
        return self.block.norm_attn(self.resid_pre)

    @property
    def resid_mid(self) -> Float[Array, "B T D"]:
        """The stream after attention."""
        return self._site(Site.RESID_MID, lambda: self.block.attend(self.resid_pre, self.where)[0])

    @property
    def mlp_input(self) -> Float[Array, "B T D"]:
        """The normed stream that the MLP reads."""
        return self.block.norm_mlp(self.resid_mid)

    @property
    def resid_post(self) -> Float[Array, "B T D"]:
        """The stream after the layer."""
        return self._site(Site.RESID_POST, lambda: self.block.feed(self.resid_mid))


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
        mid: after attention; None where the component changes nothing there.
        post: after the layer; None where the host's own MLP is to read `mid`, as it reads any stream.
    """

    mid: Float[Array, "P B T D"] | None = None
    post: Float[Array, "P B T D"] | None = None

    def handed_over(self, at: LayerPatch) -> tuple[Site, Float[Array, "P B T D"], Float[Array, "B T D"]]:
        """Where the host alone goes on: the site, these rows and the host's own stream there."""
        if self.post is not None:
            return Site.RESID_POST, self.post, at.host.resid_post
        assert self.mid is not None
        return Site.RESID_MID, self.mid, at.host.resid_mid


class HeadValues(NamedTuple):
    """Attention of one layer before the output projection, as the host has it and as a patch would."""

    host: Float[Array, "B T H Dh"]
    patched: Float[Array, "B T H Dh"]


def _heads(weights: Block, source: Stream) -> Float[Array, "B T H Dh"]:
    """Every head by some weights' queries on the keys and values of what they see."""
    x = source.attn_input
    q = weights.attn.queries(x, source.positions)
    return source.mix(q, *source.block.attn.keys_values(x, source.positions))


def query_patch(at: LayerPatch) -> HeadValues:
    """Every head as a component: its queries are its own, keys and values are input."""
    return HeadValues(_heads(at.host.block, at.host), _heads(at.weights, at.source))


def module_patch(at: LayerPatch) -> HeadValues:
    """Attention as one component: queries, keys and values are its own, the normed stream is input."""
    x, b = at.source.attn_input, at.weights
    q, kv = b.attn.queries(x, at.source.positions), b.attn.keys_values(x, at.source.positions)
    return HeadValues(_heads(at.host.block, at.host), at.source.mix(q, *kv))


def kv_patch(at: LayerPatch) -> HeadValues:
    """Every KV group as a component: the host's queries on its keys and values."""
    attn = at.host.block.attn
    q = attn.queries(at.host.attn_input, at.host.positions)
    kv = attn.keys_values(at.host.attn_input, at.host.positions)
    new = at.weights.attn.keys_values(at.source.attn_input, at.source.positions)
    return HeadValues(at.host.mix(q, *kv), at.host.mix(q, *new))


def _write(z: Float[Array, "B T n Dh"], w_o: Float[Array, "n Dh D"], terms: int) -> Float[Array, "n B T D"]:
    """What each of some heads writes on its own."""
    return jax.vmap(functools.partial(project, terms=terms), in_axes=(2, 0))(z, w_o)


def _head_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    z, attn = query_patch(at), at.host.block.attn
    w_host, w_new = (b.attn.W_O.get_value() for b in (at.host.block, at.weights))
    terms = attn.cfg.terms
    delta = _write(z.patched[:, :, index], w_new[index], terms) - _write(z.host[:, :, index], w_host[index], terms)
    return Rows(mid=at.host.resid_pre + attn.out(z.host) + delta)


def _kv_group_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    z, attn = kv_patch(at), at.host.block.attn
    heads = index[:, None] * attn.cfg.n_rep + jnp.arange(attn.cfg.n_rep)  # [P, n_rep]
    w_o, change = attn.W_O.get_value(), z.patched - z.host
    delta = jax.vmap(lambda h: project(change[:, :, h], w_o[h], n_in=2, terms=attn.cfg.terms))(heads)
    return Rows(mid=at.host.resid_pre + attn.out(z.host) + delta)


def _neuron_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    def write(b: Block, x: Float[Array, "B T D"]) -> Float[Array, "P B T D"]:
        a = b.mlp.neurons(x, lambda leaf: base_of(leaf)[..., index])  # those alone
        w = b.mlp.W_out.get_value()[index].astype(jnp.float32)
        return jnp.moveaxis(a, 2, 0)[..., None] * w[:, None, None, :]

    change = write(at.weights, at.source.mlp_input) - write(at.host.block, at.host.mlp_input)
    return Rows(post=at.host.resid_post + change)


def _attn_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    new, _ = at.weights.attn(at.source.attn_input, at.source.where)
    return Rows(mid=(at.host.resid_pre + new)[None].repeat(index.size, 0))


def _mlp_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    return Rows(post=(at.host.resid_mid + at.weights.mlp(at.source.mlp_input))[None].repeat(index.size, 0))


def _layer_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    x = at.source.resid_pre
    return Rows(post=(at.host.resid_pre + (at.weights(x, at.source.where) - x))[None].repeat(index.size, 0))


def _norm_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    host, mid_host = at.host.block, at.host.resid_mid
    mid = at.host.resid_pre + host.attn(at.weights.norm_attn(at.source.resid_pre), at.host.where)[0]
    post = mid_host + host.mlp(at.weights.norm_mlp(at.source.resid_mid))
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
    cfg: ModelConfig, kind: str, host: Params, donor: Params, at: Stream, index: Int[Array, " P"]
) -> Float[Array, "P B T D"]:
    """`resid_post` of a layer with each of some components of a kind weight-patched, for any kind in a layer."""
    gates = {gate: jnp.asarray(value)[index] for gate, value in _layer_gates(cfg, kind).items()}
    return jax.vmap(lambda g: block(cfg, patch_layer(host, donor, g))(at.resid_pre, at.where))(gates)


def layer_patch(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    runs: tuple[Run, Run | None],
    layer: Int[Array, ""],
    weights: Side,
    inputs: Side,
    packed: Packed | None = None,
) -> LayerPatch:
    """The layer of host and donor, with weights and input taken from one or the other."""
    blocks = {"host": block(cfg, take_layer(host["blocks"], layer)),
              "donor": block(cfg, take_layer(donor["blocks"], layer))}  # fmt: skip

    def stream(side: Side, run: Run) -> Stream:
        return Stream(blocks[side], take_layer(run.resid_pre, layer), packed, take_layer(run.kept, layer))

    here = stream("host", runs[0])
    if inputs == "host":
        return LayerPatch(here, blocks[weights], here)
    assert runs[1] is not None
    return LayerPatch(here, blocks[weights], stream("donor", runs[1]))


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
    return Rows(post=blend_rows(cfg, kind, ours, theirs, at.host, index))
