"""What a component contributes inside its layer, whichever weights and input it is given: one rule a kind.

    weights  input
    donor    host     weight patching (arXiv 2604.13694)
    donor    donor    activation patching: the donor's own output
    host     donor    relay: what the host makes of the donor's input
    host     host     nothing; with the host as its own donor, a sham

    head      attn_proj' = attn_proj + z'[h] W_O'[h] - z[h] W_O[h]            input: normed stream, keys and values
    kv_group  attn_proj' = attn_proj + sum over its heads of (z' - z) W_O     input: normed stream; z' of host's q
    neuron    mlp_proj'  = mlp_proj + a'[f] W_out'[f] - a[f] W_out[f]         input: normed stream
    attn, mlp, layer, norm: likewise, as modules

A rule asks the layer (`models.block`) for what passes at its sites, and says which value is replaced; how that reaches
the stream is the layer's business. A kind without a rule of its own is weight-patched through `Blend`s
(docs/method.md, "Suffix replay" and "Source or relay").
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

from wpjax.components import LEAVES, Component, indices, open_units, unit_shapes
from wpjax.errors import ComponentError
from wpjax.models.block import Block, LayerPass
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, take_layer
from wpjax.models.layouts import Layout
from wpjax.models.leaves import base_of, project
from wpjax.models.sites import Site
from wpjax.patching import patch_layer

Side: TypeAlias = Literal["host", "donor"]


class Run(NamedTuple):
    """What a sweep keeps of a model's own forward pass, on packed prompts.

    Attributes:
        resid_pre: [l + 1, 1, S, D], the residual stream before each layer up to the one that the metric reads.
        score: [B], the metric.
        slope: [B, R, D], its gradient by the stream where it is read; None where flow is not followed.
        written: what heads and MLPs write there, for the flow; None likewise.
        kept: `resid_mid` and `resid_post` likewise; where they are not there, they are made again.
    """

    resid_pre: Float[Array, "A B T D"]
    score: Float[Array, " B"]
    slope: Float[Array, "B R D"] | None = None
    written: Written | None = None
    kept: dict[Site, Float[Array, "A B T D"]] | None = None


class Written(NamedTuple):
    """What a model's heads and MLPs write where the metric reads, layer by layer.

    Attributes:
        z: [L, B, R, H, Dh], of each head before W_O.
        mlp: [L, B], what the MLP adds to the stream, along the metric's slope.
    """

    z: Float[Array, "*L B R H Dh"]
    mlp: Float[Array, "*L B"]


class LayerPatch(NamedTuple):
    """One layer of the host, and where a component's new output comes from.

    Attributes:
        host: the host's own pass through the layer.
        weights: the layer whose weights the component takes.
        source: the pass whose input it sees.
    """

    host: LayerPass
    weights: Block
    source: LayerPass

    @property
    def layout(self) -> Layout:
        """How the tokens stand."""
        return self.host.layout

    def attention(self, **known: Array) -> LayerPass:
        """The patching weights' attention on what the source's attention reads, some sites being known."""
        sites = {Site.ATTN_INPUT: self.source.attn_input, **{Site(name): value for name, value in known.items()}}
        return self.weights(self.source.resid_pre, self.layout, known=sites)


class Rows(NamedTuple):
    """The residual stream of a layer with one component at a time patched.

    Attributes:
        mid: [P, 1, S, D], after attention; None where the component changes nothing there.
        post: [P, 1, S, D], after the layer; None where the host's own MLP is to read `mid`, as it reads any stream.
    """

    mid: Float[Array, "P B T D"] | None = None
    post: Float[Array, "P B T D"] | None = None

    @classmethod
    def of_attention(cls, patched: LayerPass) -> Rows:
        """Of passes that are changed in attention: its own MLP goes on from there, if it reads what is changed."""
        return cls(mid=patched.resid_mid) if patched.block.mlp_reads_attention else cls(post=patched.resid_post)

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


def query_patch(at: LayerPatch) -> HeadValues:
    """Every head as a component: its queries are its own, keys and values are input."""
    return HeadValues(at.host.z, at.attention(k=at.source.k, v=at.source.v).z)


def module_patch(at: LayerPatch) -> HeadValues:
    """Attention as one component: queries, keys and values are its own, the normed stream is input."""
    return HeadValues(at.host.z, at.attention().z)


def kv_patch(at: LayerPatch) -> HeadValues:
    """Every KV group as a component: the host's queries on its keys and values."""
    new = at.attention()
    return HeadValues(at.host.z, at.host.replaced({Site.K: new.k, Site.V: new.v}).z)


def _write(z: Float[Array, "B T n Dh"], w_o: Float[Array, "n Dh D"], splits: int) -> Float[Array, "n B T D"]:
    """What each of some heads writes on its own."""
    return jax.vmap(functools.partial(project, splits=splits), in_axes=(2, 0))(z, w_o)


def _head_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    z, attn = query_patch(at), at.host.block.attn
    w_host, w_new = (b.attn.W_O.get_value() for b in (at.host.block, at.weights))
    splits = attn.cfg.activation_splits
    delta = _write(z.patched[:, :, index], w_new[index], splits) - _write(z.host[:, :, index], w_host[index], splits)
    return Rows.of_attention(at.host.moved(Site.ATTN_PROJ, delta))


def _kv_group_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    z, attn = kv_patch(at), at.host.block.attn
    heads = index[:, None] * attn.cfg.n_rep + jnp.arange(attn.cfg.n_rep)  # [P, n_rep]
    w_o, change = attn.W_O.get_value(), z.patched - z.host
    delta = jax.vmap(lambda h: project(change[:, :, h], w_o[h], n_in=2, splits=attn.cfg.activation_splits))(heads)
    return Rows.of_attention(at.host.moved(Site.ATTN_PROJ, delta))


def _neuron_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    def write(b: Block, x: Float[Array, "B T D"]) -> Float[Array, "P B T D"]:
        a = b.mlp.neurons(x, lambda leaf: jnp.asarray(base_of(leaf))[..., index])  # those alone
        w = b.mlp.W_out.get_value()[index].astype(jnp.float32)
        return jnp.moveaxis(a, 2, 0)[..., None] * w[:, None, None, :]

    change = write(at.weights, at.source.mlp_input) - write(at.host.block, at.host.mlp_input)
    return Rows(post=at.host.moved(Site.MLP_PROJ, change).resid_post)


def _repeated(x: Float[Array, "B T D"], index: Int[Array, " P"]) -> Float[Array, "P B T D"]:
    """The one component of its kind in a layer fills all rows."""
    return x[None].repeat(index.size, 0)


def _attn_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    return Rows.of_attention(at.host.replaced({Site.ATTN_PROJ: _repeated(at.attention().attn_proj, index)}))


def _mlp_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    new = at.weights.mlp(at.source.mlp_input)
    return Rows(post=_repeated(at.host.replaced({Site.MLP_PROJ: new}).resid_post, index))


def _layer_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    x = at.source.resid_pre
    return Rows(post=_repeated(at.host.resid_pre + (at.weights(x, at.layout).resid_post - x), index))


def norm_inputs(at: LayerPatch) -> dict[Site, Array]:
    """What each norm of the layer writes as a component, by the site that it makes; in the order of its parts."""
    reads = {
        Site.ATTN_INPUT: at.source.resid_pre,
        Site.MLP_INPUT: at.source.mlp_reads,
        Site.ATTN_OUT: at.source.attn_proj,
        Site.MLP_OUT: at.source.mlp_proj,
    }
    return {site: at.weights.normed(site, x) for site, x in reads.items() if at.weights.has_norm(site)}


def _norm_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    passes = [at.host.replaced({site: value}) for site, value in norm_inputs(at).items()]
    place = jnp.searchsorted(jnp.asarray(indices(at.host.block.cfg, "norm")), index)
    return Rows(*(jnp.stack([p.at(site) for p in passes])[place] for site in (Site.RESID_MID, Site.RESID_POST)))


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
def _layer_units(cfg: ModelConfig, kind: str) -> dict[str, np.ndarray]:
    """For each component of a kind in one layer, the units it opens there: unit -> [n, ...]."""
    opened = [open_units(cfg, [Component(kind, 0, i)]) for i in indices(cfg, kind)]
    layered = [owner.unit for path, owner in LEAVES.items() if path.startswith("blocks/")]
    used = [unit for unit in unit_shapes(cfg) if unit in layered and any(units[unit][0].any() for units in opened)]
    return {unit: np.stack([units[unit][0] for units in opened]) for unit in used}


def blend_rows(
    cfg: ModelConfig, kind: str, host: Params, donor: Params, at: LayerPass, index: Int[Array, " P"]
) -> Float[Array, "P B T D"]:
    """`resid_post` of a layer with each of some components of a kind weight-patched, for any kind in a layer."""
    place = jnp.searchsorted(jnp.asarray(indices(cfg, kind)), index)
    units = {unit: jnp.asarray(value)[place] for unit, value in _layer_units(cfg, kind).items()}
    return jax.vmap(lambda g: block(cfg, patch_layer(host, donor, g))(at.resid_pre, at.layout).resid_post)(units)


def layer_patch(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    runs: tuple[Run, Run | None],
    layer: Int[Array, ""],
    weights: Side,
    inputs: Side,
    layout: Layout,
) -> LayerPatch:
    """The layer of host and donor, with weights and input taken from one or the other."""
    blocks = {"host": block(cfg, take_layer(host["blocks"], layer)),
              "donor": block(cfg, take_layer(donor["blocks"], layer))}  # fmt: skip

    def passed(side: Side, run: Run) -> LayerPass:
        return blocks[side](take_layer(run.resid_pre, layer), layout, known=take_layer(run.kept, layer))

    here = passed("host", runs[0])
    if inputs == "host":
        return LayerPatch(here, blocks[weights], here)
    assert runs[1] is not None
    return LayerPatch(here, blocks[weights], passed("donor", runs[1]))


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
