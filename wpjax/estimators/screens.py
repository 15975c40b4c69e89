"""First-order screens: estimates of the effects of all components at once, by one forward and one backward pass.

    output-linearised   <grad_o F at base, o_c(theta_E, h_B) - o_c(theta_B, h_B)>
                        (ours: docs/method.md, "First-order screens")
    weight gradient     dF/dm_c at m = 0 for theta_B + sum_c m_c (theta_E - theta_B)_c  (first order, arXiv 2604.13694)
    attribution         <grad_o F at base, o_c(theta_E, h_E) - o_c(theta_B, h_B)>       (AtP, arXiv 2403.00745)

o_c is what component c writes, and h its input. What a norm writes is what its module reads.

- Output-linearised runs the component with the expert's weights, and linearises only what comes after it.
- The weight gradient linearises in the component's weights as well.
- Attribution takes the output that the component has in the expert. It is the screen of activation patching.

A screen only chooses. The components that matter are then replaced for real.

In bfloat16 and in bfloat16x2, a gradient is rounded to bfloat16 on its way back through each matrix. In bfloat16x2, on
the small models of the tests, output-linearised effects of a kind are within 0.5 % of those in float32 with the same
rounded weights. Weight gradients are within 3 %, as each is the difference of two numbers.

    integrated          int_0^1 dF/dm_c at m = alpha (1, ..., 1) d alpha               (arXiv 1703.01365)

Integrated gradients answer another question: the average slope on the way from base to expert, where everything else
moves, too. Over all units of the model they sum to F(expert) - F(base).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from wpjax.components import KINDS, MODEL_LAYER, Component, indices, units_of
from wpjax.engines.contributions import (
    HeadValues,
    LayerPatch,
    Run,
    Side,
    kv_patch,
    layer_patch,
    layer_rows,
    module_patch,
    norm_inputs,
    query_patch,
)
from wpjax.engines.packing import shared_tokens
from wpjax.metrics.metric import Metric, over_prompts
from wpjax.models.block import NORMS, Block
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, decoder, take_layer
from wpjax.models.edits import Add, Edit, Scale
from wpjax.models.layouts import Packed
from wpjax.models.leaves import project, resolve
from wpjax.models.sites import Site
from wpjax.patching import PatchMask, patch

Screen = TypeVar("Screen", bound=Callable[..., np.ndarray])


def zero_beyond_reach(screen: Screen) -> Screen:
    """Make a screen give 0 to components that cannot change the metric; it is called on the others alone."""

    @functools.wraps(screen)
    def screen_of_any(
        cfg: ModelConfig,
        host: Params,
        donor: Params,
        components: Sequence[Component],
        metric: Metric,
        **options: Any,
    ) -> Float[np.ndarray, "C B"]:
        reached = [i for i, c in enumerate(components) if metric.reaches(c)]
        changes = np.zeros((len(components), len(metric)))
        if reached:
            changes[reached] = screen(cfg, host, donor, [components[i] for i in reached], metric, **options)
        return changes

    return cast(Screen, screen_of_any)


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


# One rule for each kind follows: the first-order change of the metric by every component of the kind in one layer.


def _head_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "H B"]:
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
        written = slopes.at[b.where_added(Site.ATTN_PROJ)]
        # <gradient, z W_O> = <gradient W_O^T, z>: one product for all heads, [B, T, H, Dh], summed over T and Dh.
        return (slopes.spread(z) * project(written, w_o, splits=splits)).sum((1, 3))

    own = through(z.host, at.host.block) if slopes.heads is None else slopes.heads
    return (through(z.patched, weights) - own).T


def _kv_group_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "K B"]:
    by_head = _by_head(kv_patch(at), at, at.host.block, slopes)
    # Heads of one group stand side by side: [H, B] -> [K, heads of a group, B].
    return by_head.reshape(-1, at.host.block.attn.cfg.n_rep, by_head.shape[1]).sum(1)


def _neuron_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "F B"]:
    def through(b: Block, x: Float[Array, "1 S D"]) -> Float[Array, "B F"]:
        written = project(
            slopes.at[b.where_added(Site.MLP_PROJ)], b.mlp.W_out.get_value().T, splits=b.cfg.activation_splits
        )
        return (slopes.spread(b.mlp.neurons(x)) * written).sum(1)  # [B, T, F] -> [B, F]

    own = through(at.host.block, at.host.mlp_input) if slopes.neurons is None else slopes.neurons
    return (through(at.weights, at.source.mlp_input) - own).T


def _attn_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "1 B"]:
    """All heads with new queries, keys and values, and the output bias."""
    change = _by_head(module_patch(at), at, at.weights, slopes).sum(0)
    if at.weights.attn.cfg.out_bias:
        written = slopes.at[at.host.block.where_added(Site.ATTN_PROJ)]
        change += _shifted(written, at.weights.attn.b_O, at.host.block.attn.b_O)
    return change[None]


def _mlp_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "1 B"]:
    """All neurons, whose changes just add up, and the output bias."""
    change = _neuron_change(at, slopes).sum(0)
    if at.weights.mlp.cfg.mlp_bias:
        written = slopes.at[at.host.block.where_added(Site.MLP_PROJ)]
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
        "attn": _attn_change,
        "mlp": _mlp_change,
        "norm": _norm_change,
        "layer": _layer_change,
    }
)
"""Kind -> its rule. Kinds without a rule are linearised from one row of the stream per component (`layer_rows`)."""


def _slopes_at(b: Block, kinds: Sequence[str]) -> tuple[Site, ...]:
    """Sites at which the gradient is needed, for the rules of some kinds and for rows of kinds without a rule."""
    sites = [Site.RESID_MID, Site.RESID_POST, *(b.where_added(site) for site in (Site.ATTN_PROJ, Site.MLP_PROJ))]
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
    any_layer = block(cfg, take_layer(host["blocks"], 0))  # all layers have the same sites
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
            site, rows, own = patched.handed_over(at)
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


@jax.numpy_dtype_promotion("standard")  # as above
@functools.partial(jax.jit, static_argnames="cfg")
def unit_gradient(
    cfg: ModelConfig, host: Params, donor: Params, metric: Metric, at: PatchMask
) -> dict[str, Float[Array, "B ..."]]:
    """dF/dm of every unit, prompt by prompt, at a float mask.

    Args:
        cfg: architecture of both models (static).
        host: parameters at m = 0.
        donor: parameters at m = 1.
        metric: the metric F.
        at: the mask at which the gradient is taken.

    Returns:
        unit -> [B, *shape of the unit].
    """

    def score(mask: PatchMask, i: Array) -> Array:
        return metric.take(i[None])(cfg, patch(host, donor, mask))[0]

    slopes = jax.vmap(jax.grad(score), in_axes=(None, 0))(at, jnp.arange(len(metric)))
    return dict(slopes.units)


@zero_beyond_reach
def output_linearised(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    components: Sequence[Component],
    metric: Metric,
    *,
    weights: Side = "donor",
    inputs: Side = "host",
) -> Float[np.ndarray, "C B"]:
    """First-order change of the metric by each component; the component itself is exact, what comes after is linear.

    Args:
        cfg: architecture of both models.
        host: parameters of the model that receives the patches.
        donor: parameters of the model that the components come from.
        components: components to score; those that cannot change the metric get 0.
        metric: the metric F.
        weights: whose weights a component has.
        inputs: whose input it sees; "donor" for attribution patching.

    Returns:
        [C, B], change of F in its own units.

    >>> import wpjax as wp
    >>> from wpjax.estimators.screens import output_linearised
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> metric = wp.decision_metric(pair, task.encode(pair.tokenizer, n_prompts=4), max_new_tokens=8)
    >>> heads = wp.enumerate_components(pair.cfg, ["head"])
    >>> output_linearised(pair.cfg, pair.base, pair.expert, heads, metric).shape  # 64 heads, 4 prompts
    (64, 4)
    """
    kinds, n_shared = tuple(dict.fromkeys(c.kind for c in components)), shared_tokens(metric)

    def run(part: Metric) -> dict[str, Array]:
        return linearised_by_kind(cfg, host, donor, part, kinds, weights, inputs, n_shared)

    by_kind = over_prompts(metric, run, axis=2)
    # For each kind: position in `components`, layer (0 for kinds outside the layers), index.
    places: dict[str, list[tuple[int, int, int]]] = {kind: [] for kind in kinds}
    for i, c in enumerate(components):
        places[c.kind].append((i, max(c.layer, 0), c.index))
    changes = np.empty((len(components), len(metric)))
    for kind, triples in places.items():
        i, layer, index = np.array(triples).T
        column = np.searchsorted(indices(cfg, kind), index)  # a model may lack the first norms of a layer
        changes[i] = by_kind[kind][layer, column]
    return changes


@zero_beyond_reach
def weight_gradient(
    cfg: ModelConfig, host: Params, donor: Params, components: Sequence[Component], metric: Metric
) -> Float[np.ndarray, "C B"]:
    """First-order change of the metric by each component, linear in its weights.

    Args:
        cfg: architecture of both models.
        host: parameters of the model that receives the patches.
        donor: parameters of the model that the components come from.
        components: components to score; those that cannot change the metric get 0.
        metric: the metric F.

    Returns:
        [C, B], change of F in its own units.
    """
    return by_component(unit_slopes(cfg, host, donor, metric, 0.0), components)


def unit_slopes(
    cfg: ModelConfig, host: Params, donor: Params, metric: Metric, at: float | PatchMask
) -> dict[str, Float[np.ndarray, "B ..."]]:
    """dF/dm of every unit of the model, prompt by prompt, computed for a few prompts at a time.

    Args:
        cfg: architecture of both models.
        host: parameters at m = 0.
        donor: parameters at m = 1.
        metric: the metric F.
        at: where the slope is taken: a float mask, or one number for all units.

    Returns:
        unit -> [B, *shape of the unit].
    """
    if not isinstance(at, PatchMask):
        value = jnp.asarray(at, jnp.float32)
        at = jax.tree.map(lambda unit: unit + value, PatchMask.empty(cfg, jnp.float32))
    return over_prompts(metric, lambda part: unit_gradient(cfg, host, donor, part, at), axis=0)


@zero_beyond_reach
def integrated_gradients(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    components: Sequence[Component],
    metric: Metric,
    steps: int = 8,
) -> Float[np.ndarray, "C B"]:
    """Slope of the metric in each component, averaged over the straight way from host to donor.

    All weights move along the way, not only those of the component.

    Args:
        cfg: architecture of both models.
        host: parameters at the beginning of the way.
        donor: parameters at its end.
        components: components to score; those that cannot change the metric get 0.
        metric: the metric F.
        steps: number of points of the midpoint rule.

    Returns:
        [C, B], change of F in its own units.
    """
    totals = np.zeros((len(components), len(metric)))
    for i in range(steps):
        totals += by_component(unit_slopes(cfg, host, donor, metric, (i + 0.5) / steps), components)
    return totals / steps


def by_component(
    by_unit: Mapping[str, Float[np.ndarray, "B ..."]], components: Sequence[Component]
) -> Float[np.ndarray, "C B"]:
    """Sum figures of units over the units that each component opens, prompt by prompt.

    Args:
        by_unit: unit -> [B, *shape of the unit].
        components: the C components.
    """

    def total(c: Component) -> Float[np.ndarray, " B"]:
        kind = KINDS[c.kind]
        parts = []
        for figures in (by_unit[unit] for unit in units_of(c) if unit in by_unit):
            of_layer = figures if c.layer == MODEL_LAYER else figures[:, c.layer]
            opened = of_layer[:, c.index] if kind.opens == "channel" else of_layer
            parts.append(opened.reshape(len(figures), -1).sum(1, dtype=np.float64))
        return np.sum(parts, axis=0)

    return np.stack([total(c) for c in components])
