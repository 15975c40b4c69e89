"""Relevance: what the backward pass does instead of taking gradients, if `ModelConfig.backward` says so.

Layer-wise relevance propagation (LRP) is a gradient with other slopes. The forward pass is the same to the last bit.

    norms             1 / sqrt(mean(x^2) + eps) is a constant                      LN-rule (Ali et al., ICML 2022)
    activations       f(x) = (f(x) / x) x, with the quotient a constant            identity rule
    gate times up     each factor gets half of the slope                           half rule (arXiv 1907.01949)
    attention         "relp": who attends to whom is a constant                    AH-rule (Ali et al., ICML 2022)
                      "attnlrp": the half rule for queries times keys and for pattern times values; the softmax has its
                      gradient                                                     (arXiv 2402.05602)

"relp" is the set of rules of RelP (arXiv 2508.21258). In a model without biases every value then equals its inputs
times their slopes, so relevance is conserved: what a metric that is linear in the logits reads is the sum of what
arrives at the embeddings. Queries and keys get none of it. By "attnlrp" they get some, and the sum is kept only up to
the softmax. The half rule is the mean of our secant's products, taken at one run (`models.secant`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NEAR = 1e-6
"""Nearer to 0 than this, f(x) / x is taken at this distance: the quotient would be rounding."""

frozen = jax.lax.stop_gradient
"""The same value, as a constant."""


def halved(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same value with half of its slope: for a product, so that each of its two factors gets half.

    >>> float(halved(jnp.array(3.0))), float(jax.grad(lambda x: halved(x * x))(3.0))
    (3.0, 3.0)
    """
    return x / 2 + frozen(x / 2)


def proportional(function: Callable[[Array], Array], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """f(x) of each entry, with the slope f(x) / x.

    >>> float(proportional(jnp.square, jnp.array(3.0))), float(jax.grad(lambda x: proportional(jnp.square, x))(3.0))
    (9.0, 3.0)
    """
    fixed = frozen(x)
    value, away = function(fixed), jnp.where(jnp.abs(fixed) < NEAR, NEAR, fixed)
    return value + function(away) / away * (x - fixed)
