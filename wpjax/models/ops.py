"""The operations of a forward pass, for arrays and for `Secant`s of a base and an expert.

Sums, products and indexing need no function here: a `Secant` has operators for them. If a family needs another
operation, it goes here, and its rule for a `Secant` goes into `models.secant`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def top_k_softmax(logits: Value, k: int, renormalise: bool) -> Value:
    """Softmax along the last axis, with 0 in place of all but its k largest numbers. Of equal ones the first count.

    Args:
        logits: [..., E].
        k: how many numbers stay.
        renormalise: whether these are divided by their sum; it is the same as the softmax of their logits alone.

    >>> import jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
    >>> for renormalise in (False, True):
    ...     print([f"{p:.2f}" for p in top_k_softmax(logits, 2, renormalise)])
    ['0.00', '0.60', '0.30']
    ['0.00', '0.67', '0.33']
    """
    if isinstance(logits, Secant):
        return secant.top_k_softmax(logits, k, renormalise)
    chosen = secant.largest(logits, k)
    if renormalise:
        return jax.nn.softmax(jnp.where(chosen, logits, -jnp.inf), axis=-1)
    return jnp.where(chosen, jax.nn.softmax(logits, axis=-1), 0.0)


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
    if cap is not None:  # JAX's own function has no bound on the scores
        seen = jnp.tri(q.shape[1], dtype=bool)[None] if seen is None else seen
        return attention_in_parts(q, [(heads_first(k), heads_first(v))], seen, scale, cap, dtype)
    # "highest": float32 products stay float32 on every device. "standard" promotion: JAX's own function needs it for
    # bfloat16. JAX picks XLA's kernel; cuDNN's takes plain half precision only, and small effects drown in that.
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        mask = None if seen is None else seen[:, None]
        z = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=seen is None)
    return z.astype(jnp.float32)


def heads_first(x: Array) -> Array:
    """Keys or values from [B, S, K, Dh] to [B, K, S, Dh]."""
    return jnp.swapaxes(x, -3, -2)


def attention_in_parts(
    q: Array,
    parts: Sequence[tuple[Array, Array]],
    seen: Bool[Array, "#B T S"],
    scale: float,
    cap: float | None,
    dtype: Any,
) -> Array:
    """`attention` to keys that stand in several arrays: only the scores are joined, never the keys or the values.

    So some of the arrays can be shared by many versions of a model under `vmap`, and none is copied.

    Args:
        q: [B, T, H, Dh], queries.
        parts: keys and values of each part, [B, K, S_i, Dh] both: heads come before tokens here, so that each head's
            keys are one block of memory. S is the sum of all S_i.
        seen: [#B, T, S], true where a query sees a key; the keys in the order of the parts.
        scale: factor of the scores, before the cap.
        cap: bound on the scores, see `soft_cap`; None for no bound.
        dtype: dtype of the operands of products.

    Returns:
        [B, T, H, Dh], float32.

    Two parts of one key each. The query is as near to either:

    >>> import jax.numpy as jnp
    >>> q, k, seen = jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 2), bool)
    >>> attention_in_parts(q, [(k, 0 * k), (k, 4 * k)], seen, 1.0, None, jnp.float32)[0, 0, 0].tolist()
    [2.0, 2.0]
    """
    n_rows, n_tokens, _, width = q.shape
    n_groups = parts[0][0].shape[1]
    # [B, K, (H / K) T, Dh]: the query heads of a KV head are rows of one product.
    grouped = jnp.moveaxis(q.astype(dtype).reshape(n_rows, n_tokens, n_groups, -1, width), 1, 3)
    rows = grouped.reshape(n_rows, n_groups, -1, width)

    def product(form: str, a: Array, b: Array) -> Array:
        return jnp.einsum(form, a, b.astype(dtype), preferred_element_type=jnp.float32)

    with jax.default_matmul_precision("highest"):
        scores = jnp.concatenate([product("bkqd,bksd->bkqs", rows, k) for k, _ in parts], axis=-1)
        scores = soft_cap(scores * scale, cap).reshape(*grouped.shape[:4], -1)  # [B, K, H / K, T, S]
        p = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30)).reshape(*rows.shape[:3], -1).astype(dtype)
        z, first = jnp.zeros(rows.shape, jnp.float32), 0
        for _, v in parts:
            z = z + product("bkqs,bksd->bkqd", p[..., first : first + v.shape[2]], v)
            first += v.shape[2]
    return jnp.moveaxis(z.reshape(grouped.shape), 3, 1).reshape(q.shape)
