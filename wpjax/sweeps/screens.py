"""First-order screens: the effect of every component at once, from one forward and one backward pass.

    output-linearised   <grad_o F at base, o_c(theta_E, h_B) - o_c(theta_B, h_B)>      (ours: METHOD 6)
    weight gradient     dF/dm_c at m = 0 for theta_B + sum_c m_c (theta_E - theta_B)_c  (first order, arXiv 2604.13694)

The first recomputes each component's own output with the expert's weights and linearises only what comes after it;
the second linearises in the weights as well. With the expert's output o_c(theta_E, h_E) in place of o_c(theta_E, h_B)
the first is attribution patching (AtP, arXiv 2403.00745), the screen of activation patching. Gradients screen; what
matters is then replaced for real.

    integrated          int_0^1 dF/dm_c at m = alpha (1, ..., 1) d alpha               (arXiv 1703.01365)

is another question: the average slope on the way from base to expert, where everything else moves too. Over all
gates of the model it sums to F(expert) - F(base).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wpjax.components import KINDS, MODEL_LAYER, Component, count, gates_of
from wpjax.metrics import Metric, over_prompts
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, Scale, Site, decoder
from wpjax.models.layers import Block
from wpjax.models.leaves import project
from wpjax.patching import PatchMask, patch
from wpjax.sweeps.replay import run_model
from wpjax.sweeps.rows import LayerPatch, Run, Side, attend, kv_patch, layer_patch, layer_rows, query_patch

Screen = TypeVar("Screen", bound=Callable[..., np.ndarray])


def zero_where_unfelt(screen: Screen) -> Screen:
    """A screen of any components: [C, B], 0 for those that the metric cannot feel."""

    @functools.wraps(screen)
    def whole(
        cfg: ModelConfig,
        host: Params,
        donor: Params,
        components: Sequence[Component],
        metric: Metric,
        **options: Any,
    ) -> Float[np.ndarray, "C B"]:
        felt = [i for i, c in enumerate(components) if metric.reaches(c)]
        found = np.zeros((len(components), len(metric)))
        if felt:
            found[felt] = screen(cfg, host, donor, [components[i] for i in felt], metric, **options)
        return found

    return cast(Screen, whole)


class Slopes(NamedTuple):
    """Gradient of the metric in one layer: of the residual stream, and of factors of what heads and neurons write.

    As each of those enters linearly, its factor's slope is <gradient, what the host's own component writes>, which the
    backward pass has at hand. In bfloat16 that product is rounded otherwise than a donor's, and their difference would
    be rounding: None there, and both are made the same way.
    """

    mid: Float[Array, "B T D"]
    post: Float[Array, "B T D"]
    heads: Float[Array, "B H"] | None
    neurons: Float[Array, "B F"] | None


def _head_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "H B"]:
    z = query_patch(at)
    own = _through(slopes.mid, z.host, at.host.block) if slopes.heads is None else slopes.heads
    return (_through(slopes.mid, z.patched, at.weights) - own).T


def _kv_group_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "K B"]:
    z = kv_patch(at)
    own = _through(slopes.mid, z.host, at.host.block) if slopes.heads is None else slopes.heads
    by_head = _through(slopes.mid, z.patched, at.host.block) - own
    return by_head.reshape(len(by_head), -1, at.host.block.attn.cfg.n_rep).sum(-1).T


def _through(slope: Float[Array, "B T D"], z: Float[Array, "B T H Dh"], b: Block) -> Float[Array, "B H"]:
    """<slope, z W_O> of each head."""
    return (z * project(slope, jnp.moveaxis(b.attn.W_O.get_value(), -1, 0), terms=b.attn.cfg.terms)).sum((1, 3))


def _neuron_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "F B"]:
    def through(b: Block, x: Float[Array, "B T D"]) -> Float[Array, "B F"]:
        written = project(slopes.post, b.mlp.W_out.get_value().T, terms=b.mlp.cfg.terms)
        return (b.mlp.neurons(x) * written).sum(1)

    own = through(at.host.block, at.host.mlp_input) if slopes.neurons is None else slopes.neurons
    return (through(at.weights, at.source.mlp_input) - own).T


def _attn_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "1 B"]:
    new = attend(at.weights, at.source.attn_input, at.source)
    return ((new - attend(at.host.block, at.host.attn_input, at.host)) * slopes.mid).sum((1, 2))[None]


def _mlp_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "1 B"]:
    new = _fed(at.weights, at.source.mlp_input)
    return ((new - _fed(at.host.block, at.host.mlp_input)) * slopes.post).sum((1, 2))[None]


def _norm_change(at: LayerPatch, slopes: Slopes) -> Float[Array, "2 B"]:
    host, norms, source = at.host.block, at.weights, at.source
    before_attn = attend(host, norms.norm_attn(source.resid_pre), at.host) - attend(host, at.host.attn_input, at.host)
    before_mlp = _fed(host, norms.norm_mlp(source.resid_mid)) - _fed(host, at.host.mlp_input)
    return jnp.stack([(before_attn * slopes.mid).sum((1, 2)), (before_mlp * slopes.post).sum((1, 2))])


def _fed(b: Block, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """What an MLP adds to the stream."""
    return b.mlp.out(b.mlp.neurons(x))


CHANGES: Mapping[str, Callable[[LayerPatch, Slopes], Array]] = MappingProxyType(
    {
        "head": _head_change,
        "kv_group": _kv_group_change,
        "neuron": _neuron_change,
        "attn": _attn_change,
        "mlp": _mlp_change,
        "norm": _norm_change,
    }
)
"""Kinds whose linearised change needs no row per component; the others take their rows."""


@jax.numpy_dtype_promotion("standard")  # JAX's own attention relies on it for the gradient of bfloat16
@functools.partial(jax.jit, static_argnames=("cfg", "kinds", "weights", "inputs"))
def _output_linearised(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    metric: Metric,
    kinds: tuple[str, ...],
    weights: Side,
    inputs: Side,
) -> dict[str, Float[Array, "A n B"]]:
    n_layers = metric.layer + 1
    ids = jnp.asarray(metric.tokens.ids)
    zeros = jnp.zeros((n_layers, *ids.shape, cfg.d_model), jnp.float32)
    is_exact = host["embed"]["W_E"].dtype == jnp.float32
    ones = Scale(*(jnp.ones((n_layers, len(ids), n)) if is_exact else None for n in (cfg.n_heads, cfg.d_mlp)))

    def score(add: dict[Site, Array], scale: Scale) -> tuple[Array, tuple[Run, Array]]:
        out = metric.run(cfg, host, sites=(Site.RESID_PRE,), add=add, scale=scale)
        picked = metric.pick(out.resid)
        scores = metric.read(cfg, host, picked)
        return scores.sum(), (Run(out.sites[Site.RESID_PRE], scores), picked)

    (slopes, scale), (run, picked) = jax.grad(score, argnums=(0, 1), has_aux=True)(dict.fromkeys(Site, zeros), ones)
    runs = run, run_model(cfg, donor, metric) if inputs == "donor" else None

    def layer_changes(_: None, i: Array) -> tuple[None, dict[str, Array]]:
        at = layer_patch(cfg, host, donor, runs, i, weights, inputs)
        here = Slopes(*jax.tree.map(lambda a: a[i], (slopes[Site.RESID_MID], slopes[Site.RESID_POST], *scale)))

        def change(kind: str) -> Array:
            if kind in CHANGES:
                return CHANGES[kind](at, here)
            rows = layer_rows(cfg, kind, at, (host, donor), i, jnp.arange(count(cfg, kind))).post
            return ((rows - at.host.block(at.host.resid_pre, at.host.positions)) * here.post).sum((2, 3))

        return None, {kind: change(kind) for kind in kinds if KINDS[kind].in_layer}

    changes = jax.lax.scan(layer_changes, None, jnp.arange(n_layers))[1]
    giver = donor if weights == "donor" else host
    for kind in (kind for kind in kinds if not KINDS[kind].in_layer):
        # What a component of the model adds to the stream is linearised; what it does to the readout is exact.
        patched = patch(host, giver, PatchMask.of(cfg, kind))
        added = decoder(cfg, patched).embed(ids, jnp.arange(ids.shape[1])[None]) - run.resid_pre[0]
        through = (added * slopes[Site.RESID_PRE][0]).sum((1, 2))
        changes[kind] = (through + metric.read(cfg, patched, picked) - run.score)[None, None]
    return changes


@jax.numpy_dtype_promotion("standard")  # as above
@functools.partial(jax.jit, static_argnames="cfg")
def _weight_gradient(
    cfg: ModelConfig, host: Params, donor: Params, metric: Metric, at: PatchMask
) -> dict[str, Float[Array, "B ..."]]:
    """dF/dm of every gate, prompt by prompt, at a float mask."""

    def score(mask: PatchMask, i: Array) -> Array:
        return metric.take(i[None])(cfg, patch(host, donor, mask))[0]

    slopes = jax.vmap(jax.grad(score), in_axes=(None, 0))(at, jnp.arange(len(metric)))
    return dict(slopes.gates)


@zero_where_unfelt
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
    """First-order change of the metric by each component, exact inside the component.

    Args:
        cfg: the model.
        host: parameters that receive the patches.
        donor: parameters that the components come from.
        components: any; 0 is the change by those that the metric cannot feel.
        metric: what is measured.
        weights: whose weights a component takes.
        inputs: whose input it sees; "donor" for attribution patching.
    """
    kinds = tuple(dict.fromkeys(c.kind for c in components))

    def run(part: Metric) -> dict[str, Array]:
        return _output_linearised(cfg, host, donor, part, kinds, weights, inputs)

    by_kind = over_prompts(metric, run, axis=2)
    return np.stack([by_kind[c.kind][max(c.layer, 0), c.index] for c in components])


@zero_where_unfelt
def weight_gradient(
    cfg: ModelConfig, host: Params, donor: Params, components: Sequence[Component], metric: Metric
) -> Float[np.ndarray, "C B"]:
    """First-order change of the metric by each component, linear in its weights; arguments as above."""
    return by_component(gate_slopes(cfg, host, donor, metric, 0.0), components)


def gate_slopes(
    cfg: ModelConfig, host: Params, donor: Params, metric: Metric, at: float | PatchMask
) -> dict[str, Float[np.ndarray, "B ..."]]:
    """dF/dm of every gate of the model, prompt by prompt.

    Args:
        cfg: the model.
        host: parameters at m = 0.
        donor: parameters at m = 1.
        metric: what is measured.
        at: a float mask, or one number for all its gates.
    """
    if not isinstance(at, PatchMask):
        value = jnp.asarray(at, jnp.float32)
        at = jax.tree.map(lambda gate: gate + value, PatchMask.empty(cfg, jnp.float32))
    return over_prompts(metric, lambda part: _weight_gradient(cfg, host, donor, part, at), axis=0)


@zero_where_unfelt
def integrated_gradients(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    components: Sequence[Component],
    metric: Metric,
    steps: int = 8,
) -> Float[np.ndarray, "C B"]:
    """Slope of the metric in each component, averaged over the straight way from host to donor.

    Args:
        cfg: the model.
        host: where the way begins.
        donor: where it ends.
        components: what slopes are taken of; everything moves.
        metric: what is measured.
        steps: points of the midpoint rule.
    """
    totals = np.zeros((len(components), len(metric)))
    for i in range(steps):
        totals += by_component(gate_slopes(cfg, host, donor, metric, (i + 0.5) / steps), components)
    return totals / steps


def by_component(
    by_gate: Mapping[str, Float[np.ndarray, "B ..."]], components: Sequence[Component]
) -> Float[np.ndarray, "C B"]:
    """Figures of every gate, prompt by prompt, summed over the gates that each component opens."""

    def total(c: Component) -> Float[np.ndarray, " B"]:
        kind = KINDS[c.kind]
        parts = []
        for figures in (by_gate[gate] for gate in gates_of(c) if gate in by_gate):
            here = figures if c.layer == MODEL_LAYER else figures[:, c.layer]
            channel = here[:, c.index] if kind.opens == "channel" else here
            parts.append(channel.reshape(len(figures), -1).sum(1, dtype=np.float64))
        return np.sum(parts, axis=0)

    return np.stack([total(c) for c in components])
