"""First-order screens: the effect of every component at once, from one forward and one backward pass.

    output-linearised   <grad_o F at base, o_c(theta_E, h_B) - o_c(theta_B, h_B)>      (ours: METHOD 6)
    weight gradient     dF/dm_c at m = 0 for theta_B + sum_c m_c (theta_E - theta_B)_c  (first order, arXiv 2604.13694)

The first recomputes each component's own output with the expert's weights and linearises only what comes after it;
the second linearises in the weights as well. Gradients screen; what matters is then replaced for real.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wpjax.anchors import Anchor
from wpjax.behaviours import Tokens
from wpjax.components import KINDS, MODEL_LAYER, Component, count
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, Site, block, decoder, forward, take_layer
from wpjax.models.leaves import project
from wpjax.patching import PatchMask, patch
from wpjax.sweeps.replay import Layer, blend_rows, dot, kv_patch, query_patch

PROMPTS_AT_ONCE = 16


class Slopes(NamedTuple):
    """Gradient of the anchor score with respect to one layer's residual stream, [B, T, D] each."""

    mid: Float[Array, "B T D"]
    post: Float[Array, "B T D"]


def _head_change(at: Layer, slopes: Slopes) -> Float[Array, "H B"]:
    z = query_patch(at)
    return _through_outputs(at, slopes.mid, z.patched, z.host, at.donor.attn.W_O.get_value())


def _kv_group_change(at: Layer, slopes: Slopes) -> Float[Array, "K B"]:
    z = kv_patch(at)
    by_head = _through_outputs(at, slopes.mid, z.patched, z.host, at.host.attn.W_O.get_value())
    n_rep = at.host.attn.cfg.n_rep
    return by_head.reshape(-1, n_rep, by_head.shape[-1]).sum(1)


def _through_outputs(at: Layer, slope: Array, z_patched: Array, z_host: Array, w_patched: Array) -> Float[Array, "H B"]:
    """<slope, z_patched W_patched - z_host W_host> of each head, summed over tokens."""

    def pull(w_o: Array) -> Float[Array, "B T H Dh"]:
        return project(slope, jnp.moveaxis(w_o, -1, 0))

    after, before = z_patched * pull(w_patched), z_host * pull(at.host.attn.W_O.get_value())
    return (after - before).sum((1, 3)).T


def _neuron_change(at: Layer, slopes: Slopes) -> Float[Array, "F B"]:
    mid, _ = at.host.attend(at.resid_pre, at.positions)
    x = at.host.norm_mlp(mid)
    sides = [b.mlp.neurons(x) * project(slopes.post, b.mlp.W_out.get_value().T) for b in (at.donor, at.host)]
    return (sides[0] - sides[1]).sum(1).T


CHANGES: Mapping[str, Callable[[Layer, Slopes], Array]] = MappingProxyType(
    {"head": _head_change, "kv_group": _kv_group_change, "neuron": _neuron_change}
)
"""Kinds whose linearised change needs no row per component; the others go through `blend_rows`."""


@functools.partial(jax.jit, static_argnames=("cfg", "kinds"))
def _output_linearised(
    cfg: ModelConfig, base: Params, expert: Params, anchor: Anchor, tokens: Tokens, kinds: tuple[str, ...]
) -> dict[str, Float[Array, "A n B"]]:
    n_layers = anchor.layer + 1
    ids, last = jnp.asarray(tokens.ids), jnp.asarray(tokens.last)
    zeros = jnp.zeros((n_layers, *ids.shape, cfg.d_model), jnp.float32)

    def score(add: dict[Site, Array]) -> tuple[Array, Array]:
        out = forward(cfg, base, ids, sites=(Site.RESID_PRE,), stop=n_layers, logits=False, add=add)
        final = jnp.take_along_axis(out.resid, last[:, None, None], axis=1)[:, 0]
        return dot(final, anchor.vector).sum(), out.sites[Site.RESID_PRE]

    slopes, resid_pre = jax.grad(score, has_aux=True)(dict.fromkeys(Site, zeros))

    def layer_changes(_: None, i: Array) -> tuple[None, dict[str, Array]]:
        ours, theirs = take_layer(base["blocks"], i), take_layer(expert["blocks"], i)
        at = Layer(block(cfg, ours), block(cfg, theirs), resid_pre[i])
        here = Slopes(slopes[Site.RESID_MID][i], slopes[Site.RESID_POST][i])

        def change(kind: str) -> Array:
            if kind in CHANGES:
                return CHANGES[kind](at, here)
            rows = blend_rows(cfg, kind, ours, theirs, at.resid_pre, jnp.arange(count(cfg, kind)))
            return ((rows - at.host(at.resid_pre, at.positions)) * here.post).sum((2, 3))

        return None, {kind: change(kind) for kind in kinds if KINDS[kind].in_layer}

    changes = jax.lax.scan(layer_changes, None, jnp.arange(n_layers))[1]
    if "embed" in kinds:
        donated = decoder(cfg, expert).embed(ids, jnp.arange(ids.shape[1])[None]) - resid_pre[0]
        changes["embed"] = (donated * slopes[Site.RESID_PRE][0]).sum((1, 2))[None, None]
    return changes


@functools.partial(jax.jit, static_argnames="cfg")
def _weight_gradient(
    cfg: ModelConfig, base: Params, expert: Params, anchor: Anchor, tokens: Tokens
) -> dict[str, Float[Array, "B ..."]]:
    """dF/dm of every gate, prompt by prompt, at the empty mask."""

    def score(mask: PatchMask, ids: Array, length: Array) -> Array:
        return anchor.score(cfg, patch(base, expert, mask), Tokens(ids[None], length[None]))[0]

    empty = PatchMask.empty(cfg, jnp.float32)
    slopes = jax.vmap(jax.grad(score), in_axes=(None, 0, 0))(empty, tokens.ids, tokens.lengths)
    return dict(slopes.gates)


def output_linearised(
    cfg: ModelConfig, base: Params, expert: Params, components: Sequence[Component], anchor: Anchor, tokens: Tokens
) -> Float[np.ndarray, "C B"]:
    """First-order change of the anchor score by each component, exact inside the component.

    Args:
        cfg: the model.
        base: host.
        expert: donor.
        components: of layers up to the anchor's.
        anchor: what is scored.
        tokens: prompts with the instruction.
    """
    kinds = tuple(dict.fromkeys(c.kind for c in components))
    by_kind = _in_parts(tokens, lambda part: _output_linearised(cfg, base, expert, anchor, part, kinds), axis=2)
    return np.stack([by_kind[c.kind][max(c.layer, 0), c.index] for c in components])


def weight_gradient(
    cfg: ModelConfig, base: Params, expert: Params, components: Sequence[Component], anchor: Anchor, tokens: Tokens
) -> Float[np.ndarray, "C B"]:
    """First-order change of the anchor score by each component, linear in its weights; arguments as above."""
    by_gate = _in_parts(tokens, lambda part: _weight_gradient(cfg, base, expert, anchor, part), axis=0)

    def change(c: Component) -> Float[np.ndarray, " B"]:
        kind = KINDS[c.kind]
        gates = kind.gates if kind.opens != "part" else kind.gates[c.index : c.index + 1]
        total = np.zeros(len(tokens.ids))
        for slope in (by_gate[gate] for gate in gates if gate in by_gate):
            here = slope if c.layer == MODEL_LAYER else slope[:, c.layer]
            channel = here[:, c.index] if kind.opens == "channel" else here
            total += channel.reshape(len(total), -1).sum(1)
        return total

    return np.stack([change(c) for c in components])


def _in_parts(tokens: Tokens, run: Callable[[Tokens], dict[str, Array]], axis: int) -> dict[str, np.ndarray]:
    """Run on a few prompts at a time (the last part filled up), and join the results along their prompt axis."""
    n, size = len(tokens.ids), min(PROMPTS_AT_ONCE, len(tokens.ids))
    parts: list[dict[str, np.ndarray]] = []
    for first in range(0, n, size):
        rows = np.minimum(np.arange(first, first + size), n - 1)
        got = run(Tokens(tokens.ids[rows], tokens.lengths[rows]))
        keep = np.arange(min(size, n - first))
        parts.append({name: np.take(np.asarray(value), keep, axis=axis) for name, value in got.items()})
    return {name: np.concatenate([p[name] for p in parts], axis=axis) for name in parts[0]}
