"""The output-linearised screen, kind by kind: one rule a kind says what its components change to first order.

    <grad_o F at base, o_c(theta_E, h_B) - o_c(theta_B, h_B)>       (ours: docs/method.md, "First-order screens")

o_c is what component c writes, and h its input. One backward pass gives the gradient at every site of every layer
(`Slopes`). A rule then runs all components of its kind in one layer with the new weights. `estimators.screens` holds
the functions to call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from wpjax.components import KINDS, indices
from wpjax.engines.contributions import (
    HeadValues,
    LayerPatch,
    Run,
    Side,
    joint_head_patch,
    joint_kv_patch,
    kv_patch,
    layer_patch,
    layer_rows,
    module_patch,
    norm_inputs,
    query_patch,
)
from wpjax.metrics.metric import Metric
from wpjax.models.block import NORMS, Block
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, decoder, take_layer
from wpjax.models.edits import Add, Edit, Scale
from wpjax.models.layouts import Packed
from wpjax.models.leaves import project, resolve
from wpjax.models.sites import Site
from wpjax.patching import PatchMask, patch


class Slopes(NamedTuple):
    """Gradient of the metric in one layer, with respect to what components write, and to factors of what they write.

    Imagine each head and neuron multiplied by a factor of 1. It enters the stream linearly, so the slope in its factor
    is <gradient, what it writes in the host>. The backward pass gives these products for nothing. In bfloat16 they are
    rounded otherwise than the same products of the donor, and the difference of the two would be rounding. So there
    they are None, and both are computed in the same way.

    What a layer computes is packed: tokens that all prompts share are there once. A slope differs from prompt to prompt
    at these tokens too, so slopes are not packed.

    Attributes:
        at: site -> [B, T, D], gradient with respect to the value there.
        heads: [B, H], gradient with respect to the factors of heads; None except in float32.
        neurons: [B, F], gradient with respect to the factors of neurons; None except in float32.
        packed: layout of the packed tokens.
    """

    at: dict[Site, Float[Array, "B T D"]]
    heads: Float[Array, "B H"] | None
    neurons: Float[Array, "B F"] | None
    packed: Packed

    def along(self, site: Site, change: Float[Array, "1 S D"]) -> Float[Array, " B"]:
        """First-order change of the metric when the value at a site changes."""
        return (self.spread(change) * self.at[site]).sum((1, 2))

    def spread(self, x: Float[Array, "1 S *n"]) -> Float[Array, "B T *n"]:
        """Values of packed tokens, prompt by prompt."""
        # Each prompt has a bin of its own here, so the bins of `keys`, [1, B, T, ...], are the prompts.
        return self.packed.keys(x)[0]


def _head_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "H B"]:
    if at.heads_act_on_others:
        return _one_by_one(joint_head_patch, at, at.host.block.cfg.n_heads, slopes)
    return _by_head(query_patch(at), at, at.weights, slopes)


def _by_head(z: HeadValues, at: LayerPatch, weights: Block, slopes: Slopes) -> Float[Array, "H B"]:
    """First-order change of the metric by the new values of each head.

    Args:
        z: values of all heads before W_O, as the host has them and as the patch makes them.
        at: the layer.
        weights: the layer whose W_O the new values go through; the old ones go through the host's.
        slopes: gradient of the metric.
    """

    def through(z: Float[Array, "1 S H Dh"], b: Block) -> Float[Array, "B H"]:
        w_o, splits = jnp.moveaxis(b.attn.W_O.get_value(), -1, 0), b.attn.cfg.activation_splits
        written = slopes.at[b.residual_site(Site.ATTN_PROJ)]
        # <gradient, z W_O> = <gradient W_O^T, z>: one product for all heads, [B, T, H, Dh], summed over T and Dh.
        return (slopes.spread(z) * project(written, w_o, splits=splits)).sum((1, 3))

    own = through(z.host, at.host.block) if slopes.heads is None else slopes.heads
    return (through(z.patched, weights) - own).T


def _kv_group_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "K B"]:
    if at.heads_act_on_others:
        return _one_by_one(joint_kv_patch, at, at.host.block.cfg.n_kv_heads, slopes)
    by_head = _by_head(kv_patch(at), at, at.host.block, slopes)
    # Heads of one group stand side by side: [H, B] -> [K, heads of a group, B].
    return by_head.reshape(-1, at.host.block.attn.cfg.n_rep, by_head.shape[1]).sum(1)


def _one_by_one(
    patched: Callable[[LayerPatch, Array], Array], at: LayerPatch, n: int, slopes: Slopes
) -> Float[Array, "n B"]:
    """First-order change of the metric by each of n components of which all of attention's output is known."""
    site, own = at.host.block.residual_site(Site.ATTN_PROJ), at.host.attn_proj

    def change(i: Int[Array, ""]) -> Float[Array, " B"]:
        return slopes.along(site, patched(at, i[None])[0] - own)

    return jax.lax.map(change, jnp.arange(n))


def _neuron_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "F B"]:
    return _by_neuron(at, at.channels, slopes)


def _by_neuron(at: LayerPatch, weights: Block, slopes: Slopes) -> Float[Array, "F B"]:
    """First-order change of the metric by each neuron with the weights of a layer, as its router routes it."""

    def through(b: Block, x: Float[Array, "1 S D"]) -> Float[Array, "B F"]:
        written = project(
            slopes.at[b.residual_site(Site.MLP_PROJ)], b.mlp.W_out.get_value().T, splits=b.cfg.activation_splits
        )
        return (slopes.spread(b.mlp.neurons(x)) * written).sum(1)  # [B, T, F] -> [B, F]

    own = through(at.host.block, at.host.mlp_input) if slopes.neurons is None else slopes.neurons
    return (through(weights, at.source.mlp_input) - own).T


def _routed_expert_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "E B"]:
    """The neurons of an expert stand side by side, and their changes just add up."""
    by_neuron = _neuron_change(at, slopes)
    return by_neuron.reshape(at.host.block.cfg.n_experts, -1, by_neuron.shape[1]).sum(1)


def _attn_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "1 B"]:
    """All heads with new queries, keys and values, and the output bias."""
    change = _by_head(module_patch(at), at, at.weights, slopes).sum(0)
    if at.weights.attn.cfg.out_bias:
        written = slopes.at[at.host.block.residual_site(Site.ATTN_PROJ)]
        change += _shifted(written, at.weights.attn.b_O, at.host.block.attn.b_O)
    return change[None]


def _mlp_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "1 B"]:
    """All neurons, whose changes just add up, and the output bias."""
    change = _by_neuron(at, at.weights, slopes).sum(0)
    if at.weights.mlp.cfg.mlp_bias:
        written = slopes.at[at.host.block.residual_site(Site.MLP_PROJ)]
        change += _shifted(written, at.weights.mlp.b_out, at.host.block.mlp.b_out)
    return change[None]


def _shifted(slope: Float[Array, "B T D"], new: nnx.Param, own: nnx.Param) -> Float[Array, " B"]:
    """First-order change of the metric by another bias, which is added at every token."""
    return (slope * (resolve(new.get_value()) - resolve(own.get_value()))).sum((1, 2))


def _norm_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "n B"]:
    return jnp.stack([slopes.along(site, new - at.host.at(site)) for site, new in norm_inputs(at).items()])


def _layer_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "1 B"]:
    x = at.source.resid_pre
    new = at.weights(x, at.layout).resid_post - x
    return slopes.along(Site.RESID_POST, new - (at.host.resid_post - at.host.resid_pre))[None]


CHANGES: Mapping[str, Callable[[LayerPatch, Slopes], Array]] = MappingProxyType(
    {
        "head": _head_change,
        "kv_group": _kv_group_change,
        "neuron": _neuron_change,
        "routed_expert": _routed_expert_change,
        "attn": _attn_change,
        "mlp": _mlp_change,
        "norm": _norm_change,
        "layer": _layer_change,
    }
)
"""Kind -> its rule. Kinds without a rule are linearised from one row of the stream per component (`layer_rows`)."""


def _slopes_at(b: Block, kinds: Sequence[str]) -> tuple[Site, ...]:
    """Sites at which the gradient is needed, for the rules of some kinds and for rows of kinds without a rule."""
    sites = [Site.RESID_MID, Site.RESID_POST, *(b.residual_site(site) for site in (Site.ATTN_PROJ, Site.MLP_PROJ))]
    if "norm" in kinds:
        sites += [site for site in NORMS if b.has_norm(site)]
    if "embed" in kinds:
        sites.append(Site.RESID_PRE)
    return tuple(dict.fromkeys(sites))


@jax.numpy_dtype_promotion("standard")  # JAX's own attention relies on it for the gradient of bfloat16
@functools.partial(jax.jit, static_argnames=("cfg", "kinds", "weights", "inputs", "n_shared"))
def linearised_by_kind(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    metric: Metric,
    kinds: tuple[str, ...],
    weights: Side,
    inputs: Side,
    n_shared: int,
) -> dict[str, Float[Array, "A n B"]]:
    """`output_linearised` for every component of some kinds, in one compiled program.

    Args:
        cfg: architecture of both models (static).
        host: parameters of the model that receives the patches.
        donor: parameters of the model that the components come from.
        metric: the metric F.
        kinds: kinds of components (static).
        weights: whose weights a component has (static).
        inputs: whose input it sees (static).
        n_shared: number of tokens that all prompts begin with (static).

    Returns:
        kind -> [A, n, B]: the layers up to the one that is read, the n components of a layer, the prompts. A kind
        outside the layers has [1, 1, B].
    """
    n_layers = metric.layer + 1
    ids = jnp.asarray(metric.tokens.ids)
    packed = Packed.side_by_side(len(ids), ids.shape[1], n_shared)
    is_exact = host["embed"]["W_E"].dtype == jnp.float32
    any_layer = block(cfg, take_layer(host["blocks"], 0), 0)  # all layers have the same sites
    # An edit that adds 0 at a site, or multiplies by 1, changes nothing. The gradient in that 0 or 1 is the slope.
    shape = (n_layers, *ids.shape, cfg.d_model)
    edits = {site: Edit(site, Add(jnp.zeros(shape, jnp.float32))) for site in _slopes_at(any_layer, kinds)}
    if is_exact:
        ones = {Site.Z: (cfg.n_heads, 1), Site.NEURON: (cfg.d_mlp,)}
        edits |= {site: Edit(site, Scale(jnp.ones((n_layers, len(ids), 1, *n)))) for site, n in ones.items()}

    def run(model: Params, edits: Mapping[Site, Edit] = MappingProxyType({})) -> tuple[Run, Array]:
        read = (Site.RESID_PRE, Site.RESID_MID, Site.RESID_POST)
        out = metric.run(cfg, model, sites=read, edits=tuple(edits.values()))
        picked = metric.pick(out.resid)
        sites = jax.tree.map(jax.vmap(packed.lay), out.sites)  # [A, B, T, D] -> [A, 1, S, D]
        return Run(sites.pop(Site.RESID_PRE), metric.read(cfg, model, picked), kept=sites), picked

    def score(edits: dict[Site, Edit]) -> tuple[Array, tuple[Run, Array]]:
        result = run(host, edits)
        # No prompt acts on another, so the gradient of the sum holds the gradient of each prompt.
        return result[0].score.sum(), result

    slopes, (own, picked) = jax.grad(score, has_aux=True)(edits)
    # The gradient has the structure of the edits. The one array of an operation is the slope there, [A, B, T, D].
    slopes = {site: jax.tree.leaves(edit.operation)[0] for site, edit in slopes.items()}
    by_factor = [slopes.pop(site)[:, :, 0] if is_exact else None for site in (Site.Z, Site.NEURON)]
    # [A, B, H, 1] -> [A, B, H]; neurons are [A, B, F] already.
    by_head, by_neuron = by_factor[0] if by_factor[0] is None else by_factor[0][..., 0], by_factor[1]
    runs = own, run(donor)[0] if inputs == "donor" else None

    def layer_changes(_: None, i: Array) -> tuple[None, dict[str, Array]]:
        at = layer_patch(cfg, host, donor, runs, i, weights, inputs, packed)
        slope, head, neuron = jax.tree.map(lambda a: a[i], (slopes, by_head, by_neuron))
        layer_slopes = Slopes(slope, head, neuron, packed)

        def change(kind: str) -> Array:
            if kind in CHANGES:
                return CHANGES[kind](at, layer_slopes)
            patched = layer_rows(cfg, kind, at, (host, donor), i, jnp.asarray(np.asarray(indices(cfg, kind))))
            site, rows, own = patched.handoff(at)
            return jax.vmap(lambda row: layer_slopes.along(site, row - own))(rows)

        return None, {kind: change(kind) for kind in kinds if KINDS[kind].in_layer}

    # A scan compiles one layer and holds the intermediate values of one layer at a time.
    changes = jax.lax.scan(layer_changes, None, jnp.arange(n_layers))[1]
    giver = donor if weights == "donor" else host
    for kind in (kind for kind in kinds if not KINDS[kind].in_layer):
        # What the component adds to the stream is linearised. What it does to the readout is exact.
        patched = patch(host, giver, PatchMask.of(cfg, kind))
        added = decoder(cfg, patched).embed(packed.lay(ids), packed.positions) - own.resid_pre[0]
        first = Slopes(jax.tree.map(lambda a: a[0], slopes), None, None, packed)
        through = first.along(Site.RESID_PRE, added) if kind == "embed" else 0.0
        changes[kind] = (through + metric.read(cfg, patched, picked) - own.score)[None, None]
    return changes
