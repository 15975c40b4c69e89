"""The operations of a forward pass, for arrays and for `Secant`s of a base and an expert.

Sums, products and indexing need no function here: a `Secant` has operators for them. If a family needs another
operation, it goes here, and its rule for a `Secant` goes into `models.secant`.
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
    """Apply a linear function, for example a choice of positions."""
    return jax.tree.map(function, x)


def affine(function: Callable[[Array], Array], x: Value) -> Value:
    """Apply a function A x + b. The change of a `Secant` goes through A alone."""
    if isinstance(x, Secant):
        _, change = jax.jvp(function, (x.base,), (x.change,))
        return Secant(function(x.base), function(x.expert), change)
    return function(x)


def elementwise(function: Callable[[Array], Array], x: Value) -> Value:
    """Apply a function of single numbers, for example an activation, to each entry."""
    return secant.elementwise(function, x) if isinstance(x, Secant) else function(x)


def rsqrt(x: Value) -> Value:
    """x^-1/2 of each entry."""
    return secant.rsqrt(x) if isinstance(x, Secant) else jax.lax.rsqrt(x)


def log_softmax(x: Value) -> Value:
    """Log-probabilities along the last axis, in nats."""
    return secant.log_softmax(x) if isinstance(x, Secant) else jax.nn.log_softmax(x, axis=-1)


def soft_cap(x: Value, cap: float | None) -> Value:
    """cap tanh(x / cap): near x for small x, never beyond the cap (Gemma 2, arXiv 2408.00118). No cap (None): x."""
    return x if cap is None else elementwise(lambda a: cap * jnp.tanh(a / cap), x)


def attention(
    q: Value, k: Value, v: Value, seen: Bool[Array, "#B T S"] | None, scale: float, cap: float | None, dtype: Any
) -> Value:
    """softmax(cap(scale q k)) v for grouped heads: query head h reads KV head h // (H / K).

    Args:
        q: [B, T, H, Dh], queries.
        k: [B, S, K, Dh], keys.
        v: [B, S, K, Dh], values.
        seen: [#B, T, S], true where a query sees a key. None: causal attention, with T = S.
        scale: factor of the scores, before the cap.
        cap: bound on the scores, see `soft_cap`; None for no bound.
        dtype: dtype of the operands of products.

    Returns:
        [B, T, H, Dh], float32.

    Two query heads on one KV head. The first token sees only itself:

    >>> import jax.numpy as jnp
    >>> q, k, v = jnp.ones((1, 2, 2, 4)), jnp.ones((1, 2, 1, 4)), jnp.arange(8.0).reshape(1, 2, 1, 4)
    >>> attention(q, k, v, None, 0.5, None, jnp.float32)[0, :, 0].tolist()
    [[0.0, 1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0]]
    """
    if isinstance(q, Secant):
        seen = jnp.tri(q.shape[1], dtype=bool)[None] if seen is None else seen
        return secant.attention(q, k, v, seen, scale, None if cap is None else lambda a: soft_cap(a, cap))
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    # "highest": float32 products stay float32 on every device. "standard" promotion: JAX's own function needs it for
    # bfloat16. JAX picks XLA's kernel; cuDNN's takes plain half precision only, and small effects drown in that.
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        if cap is not None:
            return _capped_attention(q, k, v, seen, scale, cap)
        mask = None if seen is None else seen[:, None]
        z = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=seen is None)
    return z.astype(jnp.float32)


def _capped_attention(q: Array, k: Array, v: Array, seen: Array | None, scale: float, cap: float) -> Array:
    """`attention` with a bound on the scores, which JAX's own function does not have."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])  # [B, T, K, query heads a KV head, Dh]
    scores = jnp.einsum("btkrd,bskd->bkrts", grouped, k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, cap)
    seen = jnp.tri(q.shape[1], dtype=bool)[None] if seen is None else seen
    p = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30))
    z = jnp.einsum("bkrts,bskd->btkrd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return z.reshape(q.shape)
