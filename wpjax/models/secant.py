"""Secant values: a quantity in base and expert, and its change by a patch, which is linear in the patch's masks.

A gradient uses the slope at the base. Here every operation uses the slope of its *secant*, the straight line between
its values in base and expert. So the change of its output is linear in the changes of its inputs and weights:

    x y          d(xy) = dx (y_B + y_E) / 2 + (x_B + x_E) / 2 dy             every product, also of matrices
    f(x)         df = (f(x_E) - f(x_B)) / (x_E - x_B) dx                     every function of one number
    (q)^-1/2     ds = -s_B^2 s_E^2 / (s_B + s_E) dq,   s = q^-1/2            of norms
    top k        of a router's softmax: as it, or the share of the whole way (`top_k_softmax`)
    softmax      dp = L (ds - dlogZ),  L = (p_E - p_B) / (log p_E - log p_B),  dlogZ = sum L ds / sum L

Subscripts B and E are base and expert, d is a change. L is the logarithmic mean of the two probabilities, log Z the
logarithm of the softmax's normaliser.

The change of each weight is multiplied by its mask. With all masks at 1 the change of the output is
F(expert) - F(base), without any remainder (docs/method.md, "Path estimators"; ours).

The forward pass does not know of this. If the weights are `SecantWeight`s, the residual stream is a `Secant`, and the
operations of `models.ops` follow the rules above.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wpjax.models.leaves import CustomLeaf, Mask, contract, take_rows

NEAR = 1e-3
"""If two values are nearer than this, the slope halfway stands in for their secant: the quotient would be rounding."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Secant:
    """A quantity in base and expert, and its change by a patch: three arrays of one shape.

    Its operators (+, -, *, /, indexing, sums) follow the rules of this module.

    Attributes:
        base: the value in the base.
        expert: the value in the expert.
        change: the change by the patch, linear in the masks. It is `expert - base` if all masks are 1.

    x goes from 1 to 3, and its change is half the way. By the rule for products, so is that of x^2, from 1 to 9:

    >>> import jax.numpy as jnp
    >>> x = Secant(jnp.array(1.0), jnp.array(3.0), jnp.array(1.0))
    >>> float((x * x).change)
    4.0
    """

    base: Array
    expert: Array
    change: Array

    @property
    def middle(self) -> Array:
        """The mean of base and expert."""
        return (self.base + self.expert) / 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each of the three arrays."""
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of each of the three arrays."""
        return self.base.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.base.ndim

    def each(self, function: Callable[[Array], Array]) -> Secant:
        """Apply a linear function to all three arrays."""
        return jax.tree.map(function, self)

    def __add__(self, other: Secant | Array | float) -> Secant:
        if isinstance(other, Secant):
            return jax.tree.map(jnp.add, self, other)
        # A constant changes nothing; its zeros only broadcast the change.
        return Secant(self.base + other, self.expert + other, self.change + jnp.zeros_like(other))

    def __neg__(self) -> Secant:
        return self.each(jnp.negative)

    def __sub__(self, other: Secant | Array | float) -> Secant:
        return self + (-other)

    def __rsub__(self, other: Array | float) -> Secant:
        return -self + other

    def __mul__(self, other: Secant | Array | float) -> Secant:
        if isinstance(other, Secant):
            change = self.change * other.middle + self.middle * other.change
            return Secant(self.base * other.base, self.expert * other.expert, change)
        return self.each(lambda a: a * other)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Array | float) -> Secant:
        return self.each(lambda a: a / other)

    def __getitem__(self, at: Any) -> Secant:
        return self.each(lambda a: a[at])

    def sum(self, axis: int | tuple[int, ...], keepdims: bool = False) -> Secant:
        """Sum over axes."""
        return self.each(lambda a: a.sum(axis, keepdims=keepdims))

    def mean(self, axis: int | tuple[int, ...], keepdims: bool = False) -> Secant:
        """Mean over axes."""
        return self.each(lambda a: a.mean(axis, keepdims=keepdims))

    def reshape(self, *shape: int) -> Secant:
        """The same numbers in another shape."""
        return self.each(lambda a: a.reshape(*shape))


if TYPE_CHECKING:
    Value = Array  # a forward pass does the same to both, so a type checker need not tell them apart
else:
    Value = Array | Secant
"""What flows through a forward pass: an array, or the `Secant` of two."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SecantWeight(CustomLeaf):
    """A weight in base and expert, whose change is multiplied by a mask. Products with it are `Secant`s.

    Attributes:
        base: the weight of the base.
        expert: the weight of the expert.
        mask: float; shape [n] for the n channels along `axis`, or [] for the whole weight.
        axis: the axis of the channels in one layer's weight (static); None if the mask is a scalar.
    """

    base: Array
    expert: Array
    mask: Mask
    axis: int | None = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weights."""
        return self.base.dtype

    @property
    def _float32(self) -> tuple[Array, Array]:
        return self.base.astype(jnp.float32), self.expert.astype(jnp.float32)

    def resolve(self) -> Secant:
        """The weight itself as a `Secant`, for small leaves (biases, norms)."""
        ours, theirs = self._float32
        mask = self.mask
        if self.axis is not None:
            mask = mask.reshape(mask.shape + (1,) * (ours.ndim - self.axis - 1))
        return Secant(ours, theirs, mask * (theirs - ours))

    def lookup(self, ids: Int[Array, "..."], axis: int) -> Secant:
        """Some rows or columns as a `Secant`. The mask is a scalar here, as an embedding is one unit."""
        ours, theirs = (take_rows(w, ids, axis) for w in (self.base, self.expert))
        return Secant(ours, theirs, self.mask * (theirs - ours))

    def project(self, x: Value, n_in: int, splits: int) -> Secant:
        """x W by the rule for products: d(x W) = dx W_mid + x_mid (m dW), with mid the mean of base and expert.

        The mask m is applied to the input or to the output, so that no masked matrix is formed. Shapes as in
        `leaves.project`; `splits` does not matter, as everything is float32 here.
        """
        value = x if isinstance(x, Secant) else Secant(x, x, jnp.zeros_like(x))
        ours, theirs = self._float32
        middle, task_vector = (ours + theirs) / 2, theirs - ours
        if self.axis is not None and self.axis < n_in:  # mask on an input axis
            trail = n_in - self.axis - 1  # number of axes of x after the one of the channels
            masked = value.middle * self.mask.reshape(self.mask.shape + (1,) * trail)
            own = contract(masked, task_vector, n_in)
        else:  # mask on an output axis, or a scalar
            trail = 0 if self.axis is None else ours.ndim - self.axis - 1
            own = contract(value.middle, task_vector, n_in) * self.mask.reshape(self.mask.shape + (1,) * trail)
        change = contract(value.change, middle, n_in) + own
        return Secant(contract(value.base, ours, n_in), contract(value.expert, theirs, n_in), change)


def elementwise(function: Callable[[Array], Array], x: Secant) -> Secant:
    """A function of single numbers: the change is multiplied by the slope between base and expert.

    >>> import jax.numpy as jnp
    >>> x = Secant(jnp.array(0.0), jnp.array(2.0), jnp.array(1.0))
    >>> float(elementwise(jnp.square, x).change)  # the secant from (0, 0) to (2, 4) has slope 2
    2.0
    """
    ours, theirs, difference = function(x.base), function(x.expert), x.expert - x.base
    near = jnp.abs(difference) < NEAR
    _, tangent = jax.jvp(function, (x.middle,), (jnp.ones_like(difference),))
    slope = jnp.where(near, tangent, (theirs - ours) / jnp.where(near, 1.0, difference))  # never divides by 0
    return Secant(ours, theirs, slope * x.change)


def rsqrt(x: Secant) -> Secant:
    """x^-1/2. Its slope is written in closed form, which is exact however near base and expert are."""
    ours, theirs = jax.lax.rsqrt(x.base), jax.lax.rsqrt(x.expert)
    slope = -jnp.square(ours) * jnp.square(theirs) / (ours + theirs)
    return Secant(ours, theirs, slope * x.change)


def logarithmic_mean(log_a: Float[Array, "..."], log_b: Float[Array, "..."]) -> Float[Array, "..."]:
    """(b - a) / (log b - log a) from the logarithms of a and b; a if they are equal.

    >>> import jax.numpy as jnp
    >>> print(logarithmic_mean(jnp.log(jnp.array(1.0)), jnp.log(jnp.array(2.0))))  # 1 / log 2
    1.442695
    """
    # With m = max(a, b) and d = log(min / max) <= 0 the mean is m (e^d - 1) / d, which cannot overflow.
    d = -jnp.abs(log_b - log_a)
    small = d > -1e-4  # there (e^d - 1) / d = 1 + d / 2 in float32
    return jnp.exp(jnp.maximum(log_a, log_b)) * jnp.where(small, 1 + d / 2, jnp.expm1(d) / jnp.where(small, 1.0, d))


def _log_softmax(x: Secant) -> tuple[Secant, Array]:
    """Log-probabilities along the last axis, and the logarithmic means L of the probabilities."""
    ours, theirs = jax.nn.log_softmax(x.base), jax.nn.log_softmax(x.expert)
    weights = logarithmic_mean(ours, theirs)
    log_z = (weights * x.change).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)
    return Secant(ours, theirs, x.change - log_z), weights


def log_softmax(x: Secant) -> Secant:
    """Log-probabilities along the last axis, in nats."""
    return _log_softmax(x)[0]


def largest(x: Float[Array, "*n E"], k: int) -> Bool[Array, "*n E"]:
    """Which are the k largest numbers along the last axis; of equal ones the first count.

    >>> import jax.numpy as jnp
    >>> largest(jnp.array([3.0, 1.0, 3.0, 3.0]), 2).tolist()
    [True, False, True, False]
    """
    return jax.nn.one_hot(jax.lax.top_k(x, k)[1], x.shape[-1], dtype=jnp.bool_).any(-2)


def top_k_softmax(logits: Secant, k: int, renormalise: bool) -> Secant:
    """Softmax along the last axis without all but its k largest numbers, as `ops.top_k_softmax`.

    Where base and expert choose the same k, these follow the rule of the softmax. Where they do not, the result jumps
    on the way from base to expert. It then goes the share of its own way that the logits x have gone of theirs,

        dp = <dx, x_E - x_B> / |x_E - x_B|^2 (p_E - p_B)

    which is linear in dx too, and with dx = x_E - x_B leaves no remainder.
    """
    x = logits
    ours, theirs = largest(x.base, k), largest(x.expert, k)
    same = (ours == theirs).all(-1, keepdims=True)
    if renormalise:
        x = Secant(jnp.where(ours, x.base, -1e30), jnp.where(theirs, x.expert, -1e30), jnp.where(ours, x.change, 0.0))
    log_p, weights = _log_softmax(x)
    base, expert = jnp.where(ours, jnp.exp(log_p.base), 0.0), jnp.where(theirs, jnp.exp(log_p.expert), 0.0)
    smooth = jnp.where(ours, weights * log_p.change, 0.0)
    way = logits.expert - logits.base
    share = (logits.change * way).sum(-1, keepdims=True) / jnp.maximum((way * way).sum(-1, keepdims=True), 1e-30)
    return Secant(base, expert, jnp.where(same, smooth, share * (expert - base)))


def _einsum(form: str, a: Secant, b: Secant) -> Secant:
    """An einsum of two values, by the rule for products."""

    def product(x: Array, y: Array) -> Array:
        return jnp.einsum(form, x, y, precision=jax.lax.Precision.HIGHEST)

    change = product(a.change, b.middle) + product(a.middle, b.change)
    return Secant(product(a.base, b.base), product(a.expert, b.expert), change)


def attention(
    q: Secant, k: Secant, v: Secant, seen: Bool[Array, "#B T S"], scale: float, cap: Callable[[Array], Array] | None
) -> Secant:
    """Attention of grouped heads; every product and the softmax follow their rules.

    Args:
        q: [B, T, H, Dh], queries.
        k: [B, S, K, Dh], keys.
        v: [B, S, K, Dh], values.
        seen: [#B, T, S], true where a query sees a key.
        scale: factor of the scores.
        cap: function that bounds the scores; None for no bound.

    Returns:
        [B, T, H, Dh].
    """
    n_rep = q.shape[2] // k.shape[2]
    k, v = (y.each(lambda a: jnp.repeat(a, n_rep, axis=2)) for y in (k, v))
    scores = _einsum("bqhd,bkhd->bhqk", q, k) * scale
    if cap is not None:
        scores = elementwise(cap, scores)
    hidden = ~seen[:, None]
    # -1e30 rather than -inf: log-probabilities of hidden keys are subtracted, and inf - inf is NaN.
    ours, theirs = (jnp.where(hidden, -1e30, a) for a in (scores.base, scores.expert))
    log_p, weights = _log_softmax(Secant(ours, theirs, jnp.where(hidden, 0.0, scores.change)))
    p = Secant(jnp.exp(log_p.base), jnp.exp(log_p.expert), weights * log_p.change)
    return _einsum("bhqk,bkhd->bqhd", p, v)
