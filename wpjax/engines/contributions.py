"""What a component adds inside its layer, given somebody's weights and somebody's input. There is one rule a kind.

    weights  input
    donor    host     weight patching (arXiv 2604.13694)
    donor    donor    activation patching: the donor's own output
    host     donor    relay: what the host makes of the donor's input
    host     host     no change. The same happens in a sham, a weight patch with the host as its own donor

    head      attn_proj' = attn_proj + z'[h] W_O'[h] - z[h] W_O[h]            input: normed stream, keys and values
    kv_group  attn_proj' = attn_proj + sum over its heads of (z' - z) W_O     input: normed stream; z' of host's q
    neuron    mlp_proj'  = mlp_proj + a'[f] W_out'[f] - a[f] W_out[f]         input: normed stream
    routed_expert: the sum over its neurons
    router    mlp_proj'  = neurons as r' routes them, W_out                   input: normed stream
    attn, mlp, layer, norm: likewise, as modules

If one norm spans all heads (`ModelConfig.joint_qk_norm`), new weights of one head change the queries of all, and
attn_proj' is computed with all heads.

Primed quantities have the new weights and input; z is a head's mix of values, a a neuron's activation. A rule asks the
layer (`models.block`) for the values at its sites and says which value is replaced. How that value reaches the stream
is the layer's business. A kind without a rule can still be weight-patched, through `Blend`s
(docs/method.md, "Suffix replay" and "Source or relay").

Streams are packed here: B is 1 and T is S, the packed tokens (see `engines.packing`). P counts patches.
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

from wpjax.checkpoints.convert import flatten, unflatten
from wpjax.components import LEAVES, Component, indices, unit_positions, unit_shapes
from wpjax.errors import ComponentError
from wpjax.models.block import Block, LayerPass
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, take_layer
from wpjax.models.layouts import Layout
from wpjax.models.leaves import base_of, project
from wpjax.models.sites import Site
from wpjax.patching import patch_layer

Side: TypeAlias = Literal["host", "donor"]

LAYERS_AT_ONCE = 8
"""Patches of kinds without a rule whose layer is computed together; the activations of each are in memory."""


class Run(NamedTuple):
    """What a sweep keeps of a model's own forward pass, on packed prompts.

    A is the number of layers up to the one that the metric reads.

    Attributes:
        resid_pre: [A, 1, S, D], the residual stream before each layer.
        score: [B], the metric of each prompt.
        slope: [B, R, D], the gradient of the metric by the stream, at the positions that are read. None: the flow is
            not followed.
        written: what heads and MLPs write at these positions. None: the flow is not followed.
        kept: [A, 1, S, D] each, values at other sites of every layer, such as `resid_post`. Values that are not kept
            are computed again when a patch needs them.
    """

    resid_pre: Float[Array, "A B T D"]
    score: Float[Array, " B"]
    slope: Float[Array, "B R D"] | None = None
    written: HostWrites | None = None
    kept: dict[Site, Float[Array, "A B T D"]] | None = None


class HostWrites(NamedTuple):
    """What a model's heads and MLPs write at the positions that the metric reads, layer by layer.

    Attributes:
        z: [L, B, R, H, Dh], each head's mix of values, before W_O.
        mlp: [L, B], the MLP's output times the metric's slope, in the metric's units.
    """

    z: Float[Array, "*L B R H Dh"]
    mlp: Float[Array, "*L B"]


class LayerPatch(NamedTuple):
    """One layer in which components are to be patched: whose stream they write to, whose weights and input they have.

    Attributes:
        host: the host's own pass through the layer.
        weights: the layer, of host or donor, that gives a component its weights.
        source: the pass, of host or donor, that gives a component its input.
        channels: the layer that gives a head, KV group or neuron its weights. It is `weights`, except for what all of
            them share and none of them owns, the norms of queries and keys and the router: in a weight patch these
            stay the host's.
    """

    host: LayerPass
    weights: Block
    source: LayerPass
    channels: Block

    @property
    def layout(self) -> Layout:
        """How the tokens of all these passes are laid out."""
        return self.host.layout

    @property
    def heads_act_on_others(self) -> bool:
        """Whether a patch of one head or KV group changes what the other heads write.

        It does if all heads go through one norm (`ModelConfig.joint_qk_norm`) and a single one has new weights. With
        an input that is given, its own output is put in, and that is its own alone.
        """
        return self.host.block.cfg.joint_qk_norm and self.channels is not self.weights

    def attention(self, weights: Block, **known: Array) -> LayerPass:
        """A pass with new weights on the input of the source's attention.

        Args:
            weights: the layer with these weights.
            known: values that are not computed but given, by the name of their site, such as `k=...`.
        """
        sites = {Site.ATTN_INPUT: self.source.attn_input, **{Site(name): value for name, value in known.items()}}
        return weights(self.source.resid_pre, self.layout, known=sites)


class Rows(NamedTuple):
    """The residual stream of a layer in P versions, one for each patch.

    Attributes:
        mid: [P, 1, S, D], the stream after attention. None: the component changes nothing there.
        post: [P, 1, S, D], the stream after the layer. None: the host's own MLP is still to run on `mid`.
    """

    mid: Float[Array, "P B T D"] | None = None
    post: Float[Array, "P B T D"] | None = None

    @classmethod
    def of_attention(cls, patched: LayerPass) -> Rows:
        """Rows of a pass whose attention is patched.

        If the MLP reads the changed stream, it is left to run with all other patches. If it stands beside attention
        (`ModelConfig.parallel`), the layer is finished here.
        """
        return cls(mid=patched.resid_mid) if patched.block.mlp_reads_attention else cls(post=patched.resid_post)

    def handoff(self, at: LayerPatch) -> tuple[Site, Float[Array, "P B T D"], Float[Array, "B T D"]]:
        """Where plain replay with the host's weights takes over.

        Returns:
            the site (`resid_mid` or `resid_post`); the patched rows there; the host's own stream there.
        """
        if self.post is not None:
            return Site.RESID_POST, self.post, at.host.resid_post
        assert self.mid is not None
        return Site.RESID_MID, self.mid, at.host.resid_mid


class HeadValues(NamedTuple):
    """Each head's mix of values in one layer, before W_O.

    Attributes:
        host: in the host.
        patched: with the patch of that head, or of its KV group.
    """

    host: Float[Array, "B T H Dh"]
    patched: Float[Array, "B T H Dh"]


def query_patch(at: LayerPatch) -> HeadValues:
    """Every head as a component: queries by the new weights; keys and values are input, taken from the source."""
    return HeadValues(at.host.z, at.attention(at.channels, k=at.source.k, v=at.source.v).z)


def module_patch(at: LayerPatch) -> HeadValues:
    """Attention as one component: queries, keys and values by the new weights; the normed stream is input."""
    return HeadValues(at.host.z, at.attention(at.weights).z)


def kv_patch(at: LayerPatch) -> HeadValues:
    """Every KV group as a component: keys and values by the new weights; the queries stay the host's."""
    new = at.attention(at.channels)
    return HeadValues(at.host.z, at.host.replaced({Site.K: new.k, Site.V: new.v}).z)


def written_by_head(z: Float[Array, "B T n Dh"], w_o: Float[Array, "n Dh D"], splits: int) -> Float[Array, "n B T D"]:
    """What each of n heads writes to the stream on its own, without the bias of all of them.

    Args:
        z: each head's mix of values.
        w_o: the heads' output weights.
        splits: `ModelConfig.activation_splits`.
    """
    return jax.vmap(functools.partial(project, splits=splits), in_axes=(2, 0))(z, w_o)


def joint_head_patch(at: LayerPatch, index: Int[Array, " P"]) -> Float[Array, "P B T D"]:
    """`attn_proj` with each of P heads patched, where a head acts on the others (`heads_act_on_others`)."""
    host, x = at.host, at.host.layout.pick(at.host.attn_input)
    ours, theirs = host.block.attn, at.channels.attn
    own, new = ours.projected_queries(x), theirs.projected_queries(x)
    splits = ours.cfg.activation_splits

    def one(i: Int[Array, ""]) -> Float[Array, "B T D"]:
        mixed = jnp.where((jnp.arange(own.shape[2]) == i)[:, None], new, own)
        q = ours.queries_of(mixed, host.layout.query_positions, host.block.layer)
        patched = host.replaced({Site.Q: q})
        w_host, w_new = (a.W_O.get_value()[i] for a in (ours, theirs))
        z = patched.z[:, :, i]
        return patched.attn_proj + (project(z, w_new, splits=splits) - project(z, w_host, splits=splits))

    return jax.vmap(one)(index)


def joint_kv_patch(at: LayerPatch, index: Int[Array, " P"]) -> Float[Array, "P B T D"]:
    """`attn_proj` with each of P KV groups patched, where a group's keys act on the others'."""
    host, x = at.host, at.host.attn_input
    ours, theirs = host.block.attn, at.channels.attn
    own, new = ours.projected_keys(x), theirs.projected_keys(x)
    new_v = theirs.values(x)

    def one(i: Int[Array, ""]) -> Float[Array, "B T D"]:
        is_new = (jnp.arange(own.shape[2]) == i)[:, None]
        k = ours.keys_of(jnp.where(is_new, new, own), host.layout.positions, host.block.layer)
        return host.replaced({Site.K: k, Site.V: jnp.where(is_new, new_v, host.v)}).attn_proj

    return jax.vmap(one)(index)


def _head_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    if at.heads_act_on_others:
        return Rows.of_attention(at.host.replaced({Site.ATTN_PROJ: joint_head_patch(at, index)}))
    z, attn = query_patch(at), at.host.block.attn
    w_host, w_new = (b.attn.W_O.get_value() for b in (at.host.block, at.weights))
    splits = attn.cfg.activation_splits
    # [P, B, T, D]: z is indexed along its heads, so `index` picks one head a patch.
    delta = written_by_head(z.patched[:, :, index], w_new[index], splits) - written_by_head(
        z.host[:, :, index], w_host[index], splits
    )
    return Rows.of_attention(at.host.shifted(Site.ATTN_PROJ, delta))


def _kv_group_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    if at.heads_act_on_others:
        return Rows.of_attention(at.host.replaced({Site.ATTN_PROJ: joint_kv_patch(at, index)}))
    z, attn = kv_patch(at), at.host.block.attn
    heads = index[:, None] * attn.cfg.n_rep + jnp.arange(attn.cfg.n_rep)  # [P, n_rep]
    w_o, change = attn.W_O.get_value(), z.patched - z.host
    delta = jax.vmap(lambda h: project(change[:, :, h], w_o[h], n_in=2, splits=attn.cfg.activation_splits))(heads)
    return Rows.of_attention(at.host.shifted(Site.ATTN_PROJ, delta))


def _neuron_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    def write(b: Block, x: Float[Array, "B T D"]) -> Float[Array, "P B T D"]:
        # Only the P neurons are computed: their columns of the input weights give a [B, T, P].
        a = b.mlp.neurons(x, lambda leaf: jnp.asarray(base_of(leaf))[..., index], index)
        w = b.mlp.W_out.get_value()[index].astype(jnp.float32)
        return jnp.moveaxis(a, 2, 0)[..., None] * w[:, None, None, :]

    change = write(at.channels, at.source.mlp_input) - write(at.host.block, at.host.mlp_input)
    return Rows(post=at.host.shifted(Site.MLP_PROJ, change).resid_post)


def _routed_expert_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    cfg = at.host.block.cfg

    def write(b: Block, x: Float[Array, "B T D"], neurons: Int[Array, " n"]) -> Float[Array, "B T D"]:
        a = b.mlp.neurons(x, lambda leaf: jnp.asarray(base_of(leaf))[..., neurons], neurons)
        return project(a, b.mlp.W_out.get_value()[neurons], splits=cfg.activation_splits)

    def change(i: Int[Array, ""]) -> Float[Array, "B T D"]:
        neurons = i * cfg.d_expert + jnp.arange(cfg.d_expert)
        return write(at.channels, at.source.mlp_input, neurons) - write(at.host.block, at.host.mlp_input, neurons)

    # One after the other, as each takes a copy of its expert's weights.
    return Rows(post=at.host.shifted(Site.MLP_PROJ, jax.lax.map(change, index)).resid_post)


def _router_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    routing = at.weights.mlp.routing(at.source.mlp_input)
    new = at.host.block.mlp.neurons(at.host.mlp_input, routing=routing)
    return Rows(post=_repeated(at.host.replaced({Site.NEURON: new}).resid_post, index))


def _repeated(x: Float[Array, "B T D"], index: Int[Array, " P"]) -> Float[Array, "P B T D"]:
    """One stream for all P rows. A layer has one component of such a kind, and `index` only says how many rows."""
    return x[None].repeat(index.size, 0)


def _attn_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    return Rows.of_attention(at.host.replaced({Site.ATTN_PROJ: _repeated(at.attention(at.weights).attn_proj, index)}))


def _mlp_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    new = at.weights.mlp(at.source.mlp_input)
    return Rows(post=_repeated(at.host.replaced({Site.MLP_PROJ: new}).resid_post, index))


def _layer_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    x = at.source.resid_pre  # what the layer adds to its own input is put onto the host's input
    return Rows(post=_repeated(at.host.resid_pre + (at.weights(x, at.layout).resid_post - x), index))


def norm_inputs(at: LayerPatch) -> dict[Site, Array]:
    """What each norm of the layer gives as a component, by the site whose value it makes.

    Norms that the model does not have are left out. The order is that of the parts of the kind "norm".
    """
    reads = {
        Site.ATTN_INPUT: at.source.resid_pre,
        Site.MLP_INPUT: at.source.mlp_reads,
        Site.ATTN_OUT: at.source.attn_proj,
        Site.MLP_OUT: at.source.mlp_proj,
    }
    return {site: at.weights.normed(site, x) for site, x in reads.items() if at.weights.has_norm(site)}


def _norm_rows(at: LayerPatch, index: Int[Array, " P"]) -> Rows:
    passes = [at.host.replaced({site: value}) for site, value in norm_inputs(at).items()]
    # A part that the model lacks has an index but no pass, so indices are looked up among those that there are.
    place = jnp.searchsorted(jnp.asarray(np.asarray(indices(at.host.block.cfg, "norm"))), index)
    return Rows(*(jnp.stack([p.at(site) for p in passes])[place] for site in (Site.RESID_MID, Site.RESID_POST)))


RowRule = Callable[[LayerPatch, Array], Rows]
ROWS: Mapping[str, RowRule] = MappingProxyType(
    {
        "head": _head_rows,
        "kv_group": _kv_group_rows,
        "neuron": _neuron_rows,
        "routed_expert": _routed_expert_rows,
        "router": _router_rows,
        "attn": _attn_rows,
        "mlp": _mlp_rows,
        "layer": _layer_rows,
        "norm": _norm_rows,
    }
)
"""The rule of each kind of component in a layer: from a layer and P indices to P rows of the stream.

Kinds without a rule are weight-patched by `blend_rows`.
"""


@functools.cache
def _layer_units(cfg: ModelConfig, kind: str) -> dict[str, np.ndarray]:
    """The units that each component of a kind opens in its own layer.

    Returns:
        unit -> boolean [n, channels] or [n], for the n components of a layer; units that none of them opens are absent.
    """
    members, units = indices(cfg, kind), dict[str, np.ndarray]()
    for row, i in enumerate(members):
        for unit, at in unit_positions(cfg, Component(kind, 0, i)).items():
            shape = unit_shapes(cfg)[unit][1:]
            units.setdefault(unit, np.zeros((len(members), *shape), bool)).reshape(len(members), -1)[row, at] = True
    return units


def blend_rows(
    cfg: ModelConfig, kind: str, host: Params, donor: Params, at: LayerPass, index: Int[Array, " P"]
) -> Float[Array, "P B T D"]:
    """The stream after a layer with each of P components weight-patched, for any kind in a layer.

    Args:
        cfg: the model.
        kind: kind of the components.
        host: the host's parameters of the layer ("blocks" without its axis of layers).
        donor: the donor's, likewise.
        at: the host's own pass through the layer.
        index: which components of the kind.
    """
    place = jnp.searchsorted(jnp.asarray(np.asarray(indices(cfg, kind))), index)
    units = {unit: jnp.asarray(value)[place] for unit, value in _layer_units(cfg, kind).items()}

    def patched(units: dict[str, Array]) -> Float[Array, "B T D"]:
        return block(cfg, patch_layer(host, donor, units), at.block.layer)(at.resid_pre, at.layout).resid_post

    # A few at a time, as each runs all of the layer.
    return jax.lax.map(patched, units, batch_size=min(len(index), LAYERS_AT_ONCE))


def _with_channels_of(donor: Params, host: Params) -> Params:
    """A layer's parameters: the donor's heads, KV groups and neurons, and what these share as the host has it."""
    ours, theirs = flatten(host), flatten(donor)
    owned = {path for path in ours if LEAVES[f"blocks/{path}"].axis is not None}
    return unflatten({path: (theirs if path in owned else ours)[path] for path in ours})


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
    """Set up one layer for patching, with weights and input taken from host or donor.

    Args:
        cfg: the model.
        host: parameters of the host.
        donor: parameters of the donor.
        runs: the runs of host and donor. The donor's may be None if `inputs` is "host".
        layer: number of the layer; traced.
        weights: whose weights a component takes.
        inputs: whose input it sees.
        layout: how the tokens are laid out.
    """
    ours, theirs = take_layer(host["blocks"], layer), take_layer(donor["blocks"], layer)
    blocks = {"host": block(cfg, ours, layer), "donor": block(cfg, theirs, layer)}
    mixed = block(cfg, _with_channels_of(theirs, ours), layer)

    def own_pass(side: Side, run: Run) -> LayerPass:
        return blocks[side](take_layer(run.resid_pre, layer), layout, known=take_layer(run.kept, layer))

    host_pass = own_pass("host", runs[0])
    if inputs == "host":
        return LayerPatch(host_pass, blocks[weights], host_pass, mixed if weights == "donor" else blocks["host"])
    assert runs[1] is not None
    return LayerPatch(host_pass, blocks[weights], own_pass("donor", runs[1]), blocks[weights])


def layer_rows(
    cfg: ModelConfig, kind: str, at: LayerPatch, models: tuple[Params, Params], layer: Array, index: Array
) -> Rows:
    """The layer with each of P components patched, by the kind's rule in `ROWS` or else by `Blend`s.

    Args:
        cfg: the model.
        kind: kind of the components.
        at: the layer, from `layer_patch`.
        models: parameters of host and donor.
        layer: number of the layer; traced.
        index: [P], which components of the kind.

    Raises:
        ComponentError: the kind has no rule, and another input than the host's is asked for.
    """
    if kind in ROWS:
        return ROWS[kind](at, index)
    if at.source is not at.host:  # `Blend`s say what weights do, not what a component's output is
        raise ComponentError(
            f"no rule says what the output of {kind} is, so only its weights can be patched; add one to ROWS"
        )
    ours, theirs = (take_layer(model["blocks"], layer) for model in models)
    return Rows(post=blend_rows(cfg, kind, ours, theirs, at.host, index))
