"""The secant adjoint: scores of every weight that sum to the whole gap, prompt by prompt
(docs/method.md, "Path estimators"; ours).

A gradient is the slope at the base. Here every operation has its slope between base and expert instead, so that the
change dy = y_E - y_B of its output is exactly linear in the changes of its inputs and weights:

    x W          dy = dx (W_B + W_E) / 2 + (x_B + x_E) / 2 dW                 likewise for every product
    norm         ds = -s_B^2 s_E^2 / (s_B + s_E) dq,   s = (q + eps)^-1/2,   dq = mean((c_B + c_E) dc)
    act          dy = (act(x_E) - act(x_B)) / (x_E - x_B) dx
    softmax      dp = L (ds - dlogZ),  L = (p_E - p_B) / (log p_E - log p_B),  dlogZ = sum L ds / sum L

Each dW enters multiplied by a gate. The result is linear in the gates and, with all of them at 1, it is
F(expert) - F(base) without any remainder; a component's score is its slope. Like integrated gradients it answers
for a path, not for one patch in the base, but with two forward passes and one backward.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wpjax.components import Component
from wpjax.errors import WpjaxError
from wpjax.metrics import Metric, over_prompts
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Held, Params, keep_products, take_layer
from wpjax.models.layers import activation
from wpjax.models.leaves import Blend, project
from wpjax.models.rotary import rotate
from wpjax.patching import PatchMask, patch
from wpjax.readouts import Along, LogOdds, LogProb
from wpjax.sweeps.screens import by_component, zero_where_unfelt


class Two(NamedTuple):
    """A quantity in base and expert, and its change, which is linear in the gates."""

    base: Array
    expert: Array
    change: Array

    @property
    def mean(self) -> Array:
        """Halfway between base and expert."""
        return (self.base + self.expert) / 2

    def __add__(self, other: Two) -> Two:  # type: ignore[override]
        return Two(*(a + b for a, b in zip(self, other, strict=True)))

    def each(self, function: Any) -> Two:
        """A linear function of it."""
        return Two(*(function(a) for a in self))


def _product(a: Two, b: Two) -> Two:
    return Two(a.base * b.base, a.expert * b.expert, a.change * b.mean + a.mean * b.change)


def _einsum(form: str, a: Two, b: Two) -> Two:
    def product(x: Array, y: Array) -> Array:
        return jnp.einsum(form, x, y, precision=jax.lax.Precision.HIGHEST)

    change = product(a.change, b.mean) + product(a.mean, b.change)
    return Two(product(a.base, b.base), product(a.expert, b.expert), change)


def _leaf(w: Blend) -> Two:
    """A small leaf: a bias, a norm's scale, rows of an embedding."""
    ours, theirs = w.base.astype(jnp.float32), w.expert.astype(jnp.float32)
    gate = w.gate if w.axis is None else w.gate.reshape(w.gate.shape + (1,) * (w.base.ndim - w.axis - 1))
    return Two(ours, theirs, gate * (theirs - ours))


def _project(x: Two, w: Blend, n_in: int = 1) -> Two:
    ours, theirs = w.base.astype(jnp.float32), w.expert.astype(jnp.float32)
    middle, task_vector = (ours + theirs) / 2, theirs - ours
    if w.axis is not None and w.axis < n_in:  # gated inputs
        trail = w.axis - n_in + 1  # axes of x after the gated one, as a negative number
        gated = x.mean * w.gate.reshape(w.gate.shape + (1,) * -trail)
        own = project(gated, task_vector, n_in)
    else:
        trail = 0 if w.axis is None else w.base.ndim - w.axis - 1
        own = project(x.mean, task_vector, n_in) * w.gate.reshape(w.gate.shape + (1,) * trail)
    change = project(x.change, middle, n_in) + own
    return Two(project(x.base, ours, n_in), project(x.expert, theirs, n_in), change)


def _norm(cfg: ModelConfig, x: Two, params: Params) -> Two:
    if cfg.norm == "layer":
        x = x.each(lambda a: a - a.mean(-1, keepdims=True))
    s = [jax.lax.rsqrt(jnp.square(a).mean(-1, keepdims=True) + cfg.norm_eps) for a in x[:2]]
    dq = (2 * x.mean * x.change).mean(-1, keepdims=True)
    slope = -jnp.square(s[0]) * jnp.square(s[1]) / (s[0] + s[1])
    normed = _product(x, Two(s[0], s[1], slope * dq))
    normed = _product(normed, _leaf(params["scale"]))
    return normed + _leaf(params["bias"]) if "bias" in params else normed


def _activation(cfg: ModelConfig, x: Two) -> Two:
    act = activation(cfg)
    ours, theirs, way = act(x.base), act(x.expert), x.expert - x.base
    near = jnp.abs(way) < 1e-3
    tangent = jax.vmap(jax.grad(act))(x.mean.ravel()).reshape(way.shape)
    slope = jnp.where(near, tangent, (theirs - ours) / jnp.where(near, 1.0, way))
    return Two(ours, theirs, slope * x.change)


def _log_mean(log_a: Array, log_b: Array) -> Array:
    """(b - a) / (log b - log a), from logarithms."""
    d = -jnp.abs(log_b - log_a)  # from the larger down, which cannot overflow
    small = d > -1e-4
    return jnp.exp(jnp.maximum(log_a, log_b)) * jnp.where(small, 1 + d / 2, jnp.expm1(d) / jnp.where(small, 1.0, d))


def _log_softmax(x: Two) -> tuple[Two, Array]:
    """Log-probabilities along the last axis, and the logarithmic means of the probabilities."""
    ours, theirs = jax.nn.log_softmax(x.base), jax.nn.log_softmax(x.expert)
    weights = _log_mean(ours, theirs)
    log_z = (weights * x.change).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)
    return Two(ours, theirs, x.change - log_z), weights


def _attention(cfg: ModelConfig, x: Two, params: Params) -> Two:
    n_tokens = x.base.shape[1]
    positions = jnp.arange(n_tokens)[None]

    def projected(name: str, rotated: bool) -> Two:
        y = _project(x, params[f"W_{name}"])
        if cfg.qkv_bias:
            y = y + _leaf(params[f"b_{name}"])
        return y.each(lambda a: rotate(cfg, a, positions)) if rotated and cfg.rope else y

    q, k = projected("Q", True), projected("K", True)
    v = projected("V", False)
    k, v = (y.each(lambda a: jnp.repeat(a, cfg.n_rep, axis=2)) for y in (k, v))
    scores = _einsum("bqhd,bkhd->bhqk", q, k).each(lambda a: a / cfg.d_head**0.5)
    hidden = jnp.arange(n_tokens)[:, None] < jnp.arange(n_tokens)
    ours, theirs = (jnp.where(hidden, -1e30, a) for a in scores[:2])
    scores = Two(ours, theirs, jnp.where(hidden, 0.0, scores.change))
    log_p, weights = _log_softmax(scores)
    p = Two(jnp.exp(log_p.base), jnp.exp(log_p.expert), weights * log_p.change)
    z = _einsum("bhqk,bkhd->bqhd", p, v)
    out = _project(z, params["W_O"], n_in=2)
    return out + _leaf(params["b_O"]) if cfg.out_bias else out


def _mlp(cfg: ModelConfig, x: Two, params: Params) -> Two:
    def projected(name: str) -> Two:
        y = _project(x, params[f"W_{name}"])
        return y + _leaf(params[f"b_{name}"]) if cfg.mlp_bias else y

    inner = projected("in")
    a = _product(_activation(cfg, projected("gate")), inner) if cfg.gated else _activation(cfg, inner)
    out = _project(a, params["W_out"])
    return out + _leaf(params["b_out"]) if cfg.mlp_bias else out


def _held(x: Two, held: Held, layer: Array) -> Two:
    """Affine in the stream: a change keeps what does not lie along the direction that is read."""
    linear = held._replace(steer=held.steer._replace(target=0.0))
    return Two(held(x.base, layer), held(x.expert, layer), linear(x.change, layer))


def _rows(w: Blend, ids: Array, axis: int = 0) -> Two:
    def take(a: Array) -> Array:
        found = jnp.take(a, ids, axis=axis, mode="clip")
        return jnp.moveaxis(found, 0, -1) if axis else found

    return _leaf(Blend(take(w.base), take(w.expert), w.gate, None))


def _readout(cfg: ModelConfig, params: Params, resid: Two, metric: Metric) -> Float[Array, "B S"]:
    """Change of what is read at each position."""
    readout = metric.readout
    if isinstance(readout, Along):
        return jnp.matmul(resid.change, readout.vector, precision=jax.lax.Precision.HIGHEST)
    normed = _norm(cfg, resid, params["final_norm"])
    matrix, axis = (params["embed"]["W_E"], 0) if cfg.tied else (params["unembed"]["W_U"], 1)
    if isinstance(readout, LogOdds):
        ours, foils = (_rows(matrix, ids, axis) for ids in (readout.tokens, readout.foils))
        return _product(normed, ours + foils.each(jnp.negative)).change.sum(-1)
    if isinstance(readout, LogProb):
        flipped = Blend(matrix.base.T, matrix.expert.T, matrix.gate, None) if cfg.tied else matrix
        log_p, _ = _log_softmax(_project(normed, flipped))
        return jnp.take_along_axis(log_p.change, readout.tokens[..., None], axis=-1)[..., 0]
    raise WpjaxError(f"no secant rule for the readout {type(readout).__name__}; add one to `_readout`")


def secant_change(cfg: ModelConfig, host: Params, donor: Params, mask: PatchMask, metric: Metric) -> Float[Array, " B"]:
    """The linear function of the gates that equals F(donor) - F(host) where all of them are 1.

    Args:
        cfg: the model.
        host: parameters at one end.
        donor: parameters at the other.
        mask: every gate of the model, float.
        metric: what is measured.
    """
    params = patch(host, donor, mask)
    ids = jnp.asarray(metric.tokens.ids)
    resid = _rows(params["embed"]["W_E"], ids)
    if "W_pos" in params["embed"]:
        resid = resid + _rows(params["embed"]["W_pos"], jnp.arange(ids.shape[1])[None])

    def layer(x: Two, number: Array) -> tuple[Two, None]:
        here = take_layer(params["blocks"], number)
        x = x + _attention(cfg, _norm(cfg, x, here["norm_attn"]), here["attn"])
        x = x + _mlp(cfg, _norm(cfg, x, here["norm_mlp"]), here["mlp"])
        return x if metric.held is None else _held(x, metric.held, number), None

    resid, _ = jax.lax.scan(keep_products(layer), resid, jnp.arange(metric.layer + 1))
    return (_readout(cfg, params, resid.each(metric.pick), metric) * metric.weight).sum(-1)


@functools.partial(jax.jit, static_argnames="cfg")
def _gate_scores(cfg: ModelConfig, host: Params, donor: Params, metric: Metric) -> dict[str, Float[Array, "B ..."]]:
    def change(mask: PatchMask, i: Array) -> Array:
        return secant_change(cfg, host, donor, mask, metric.take(i[None]))[0]

    slopes = jax.vmap(jax.grad(change), in_axes=(None, 0))(PatchMask.full(cfg, jnp.float32), jnp.arange(len(metric)))
    return dict(slopes.gates)


@zero_where_unfelt
def secant_adjoint(
    cfg: ModelConfig, host: Params, donor: Params, components: Sequence[Component], metric: Metric
) -> Float[np.ndarray, "C B"]:
    """Each component's share of F(donor) - F(host), prompt by prompt; over all gates of the model the shares add up.

    Args:
        cfg: the model.
        host: parameters at one end.
        donor: parameters at the other.
        components: whose shares are returned.
        metric: what is measured.
    """
    return by_component(over_prompts(metric, lambda part: _gate_scores(cfg, host, donor, part), axis=0), components)
