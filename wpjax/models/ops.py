"""Operations of a forward pass on what flows through it: arrays, or `Secant`s of a base and an expert.

Sums, products and indexing need no function of their own, as a `Secant` has operators for them. A new operation of a
family goes here, with its rule in `models.secant`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from wpjax.models import secant
from wpjax.models.secant import Secant, Value


def linear(function: Callable[[Array], Array], x: Value) -> Value:
    """A linear function, say a choice of positions."""
    return jax.tree.map(function, x)


def affine(function: Callable[[Array], Array], x: Value) -> Value:
    """A linear function and a constant: a change passes through the linear part."""
    if isinstance(x, Secant):
        _, change = jax.jvp(function, (x.base,), (x.change,))
        return Secant(function(x.base), function(x.expert), change)
    return function(x)


def elementwise(function: Callable[[Array], Array], x: Value) -> Value:
    """A function of single numbers, say an activation."""
    return secant.elementwise(function, x) if isinstance(x, Secant) else function(x)


def rsqrt(x: Value) -> Value:
    """x^-1/2."""
    return secant.rsqrt(x) if isinstance(x, Secant) else jax.lax.rsqrt(x)


def log_softmax(x: Value) -> Value:
    """Log-probabilities along the last axis, in nats."""
    return secant.log_softmax(x) if isinstance(x, Secant) else jax.nn.log_softmax(x, axis=-1)


def soft_cap(x: Value, cap: float | None) -> Value:
    """cap tanh(x / cap): bounded, and x where it is small; x itself without a cap (Gemma 2, arXiv 2408.00118)."""
    return x if cap is None else elementwise(lambda a: cap * jnp.tanh(a / cap), x)


def attention(
    q: Value, k: Value, v: Value, seen: Bool[Array, "#B T S"] | None, scale: float, cap: float | None, dtype: Any
) -> Value:
    """softmax(cap(scale q k)) v for grouped heads: query head h reads KV head h // (H / K).

    Args:
        q: [B, T, H, Dh], queries.
        k: [B, S, K, Dh], keys.
        v: [B, S, K, Dh], values.
        seen: which of the S keys each query sees; None for causal attention with T = S.
        scale: of the scores.
        cap: bound on the scores, see `soft_cap`.
        dtype: that products are made in.

    Returns:
        [B, T, H, Dh], float32.
    """
    if isinstance(q, Secant):
        seen = jnp.tri(q.shape[1], dtype=bool)[None] if seen is None else seen
        return secant.attention(q, k, v, seen, scale, None if cap is None else lambda a: soft_cap(a, cap))
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    # float32 stays float32 on any device; JAX's own function needs implicit promotion for bfloat16. The kernel is
    # what JAX chooses, XLA's: cuDNN's takes plain half precision only, in which small effects drown.
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        if cap is not None:
            return _capped_attention(q, k, v, seen, scale, cap)
        mask = None if seen is None else seen[:, None]
        z = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=seen is None)
    return z.astype(jnp.float32)


def _capped_attention(q: Array, k: Array, v: Array, seen: Array | None, scale: float, cap: float) -> Array:
    """JAX's own attention bounds no scores."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btkrd,bskd->bkrts", grouped, k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, cap)
    seen = jnp.tri(q.shape[1], dtype=bool)[None] if seen is None else seen
    p = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30))
    z = jnp.einsum("bkrts,bskd->btkrd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return z.reshape(q.shape)
