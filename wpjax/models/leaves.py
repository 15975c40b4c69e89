"""How a weight is applied, whether it is one array or something else.

The decoder calls `project`, `lookup` and `resolve` for every weight and knows nothing of what a leaf is. So the same
forward pass serves a plain model, a patched one and a relaxed mask, also under `vmap` over masks with the weights
shared. Another kind of leaf is a subclass of `CustomLeaf`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

Mask: TypeAlias = Bool[Array, "..."] | Float[Array, "..."]
Leaf: TypeAlias = "Array | CustomLeaf"
Form: TypeAlias = Callable[[Leaf], Leaf]


class CustomLeaf(abc.ABC):
    """A weight that is not one array; a pytree whose arrays may carry a leading layer axis."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """Of the weights."""

    @abc.abstractmethod
    def resolve(self) -> Any:
        """See `resolve`."""

    @abc.abstractmethod
    def lookup(self, ids: Int[Array, "..."], axis: int) -> Any:
        """See `lookup`."""

    @abc.abstractmethod
    def project(self, x: Any, n_in: int, splits: int) -> Any:
        """See `project`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blend(CustomLeaf):
    """Two arrays of one shape and a mask that says, channel by channel, which of them is in force.

    The value is (1 - mask) * base + mask * expert; a boolean mask selects, so that an open mask is the expert and
    a closed one the base, bit for bit. No blended array is ever formed for a matrix: x W becomes
    (1 - m) * x W_base + m * x W_expert on output channels, and the input is split on input channels
    (docs/method.md, "Joint patches").

    Attributes:
        base: the weight where the mask is 0.
        expert: the weight where the mask is 1.
        mask: boolean, or float in [0, 1]; shape [] or [n] for the n channels of `axis`. A leading layer axis, if
            the leaves are stacked, leads the mask too.
        axis: axis of one layer's weight that the mask runs along (static); None where the mask is a scalar.
        index: [K], if `expert` holds these channels only: the mask must be closed at all others. None for all.
        slot: [n], where in `index` each channel stands, with `index`.
        confined: this leaf, with an `expert` of few channels, for layers where the mask is open at no others.
        extent: [], how much of `expert` a layer needs: 0 nothing, where the mask is closed everywhere and it costs
            nothing; then, one by one, what `confined` holds, if that is there, and all of it. None for all of it.
    """

    base: Array
    expert: Array
    mask: Mask
    axis: int | None = dataclasses.field(metadata={"static": True})
    index: Int[Array, "..."] | None = None
    slot: Int[Array, "..."] | None = None
    confined: Blend | None = None
    extent: Int[Array, "..."] | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """Of the weights, not of the mask."""
        return self.base.dtype

    def by_extent(self, plain: Callable[[], Array], blended: Callable[[Form], Array]) -> Array:
        """What is made of `base` alone or, where the mask is open somewhere, of both weights.

        Args:
            plain: makes it of `base`.
            blended: makes it of both; takes which form is to be used of each leaf with this mask.
        """
        if self.extent is None:
            return blended(_all_channels)
        forms = [_all_channels] if self.confined is None else [_few_channels, _all_channels]
        return jax.lax.switch(self.extent, [plain, *(functools.partial(blended, form) for form in forms)])

    def mix(self, base: Array, expert: Array, axis: int) -> Array:
        """Combine two results whose axis `axis` (negative: counted from the end) is the gated one."""
        if self.slot is not None:
            expert = jnp.take(expert, self.slot, axis=axis)
        return _blend(self._along(self.mask, axis), base, expert)

    def closed(self, x: Array, axis: int) -> Array:
        """The part of an input that goes through `base`; `axis` is its gated one, counted from the end."""
        return _blend(self._along(self.mask, axis), x, jnp.zeros_like(x))

    def opened(self, x: Array, axis: int) -> Array:
        """The part of an input, of the channels that `expert` holds, that goes through it."""
        mask = self.mask
        if self.index is not None:
            assert self.slot is not None
            is_held = self.slot[self.index] == jnp.arange(self.index.size)  # what fills `index` up is not
            mask = jnp.where(is_held, mask[self.index], jnp.zeros_like(mask[:1]))
        return _blend(self._along(mask, axis), jnp.zeros_like(x), x)

    def _along(self, mask: Mask, axis: int) -> Mask:
        return mask if self.axis is None else mask.reshape(mask.shape + (1,) * (-axis - 1))

    @property
    def _mask_axis(self) -> int:
        """The axis of one layer's weight that the mask runs along, counted from the end."""
        return -1 if self.axis is None else self.axis - self.base.ndim

    def resolve(self) -> Array:
        """The blend itself, for small leaves."""
        return self.mix(self.base, self.expert, self._mask_axis).astype(jnp.float32)

    def lookup(self, ids: Int[Array, "..."], axis: int) -> Array:
        """Rows (or columns) of both weights, then one of them."""
        return self.mix(take_rows(self.base, ids, axis), take_rows(self.expert, ids, axis), -1)

    def project(self, x: Array, n_in: int, splits: int) -> Array:
        """x W: both products, then a choice of outputs; or a choice of inputs, then both products."""
        return self.by_extent(
            lambda: contract(x, self.base, n_in, splits), lambda form: _blended(x, form(self), n_in, splits)
        )


def _all_channels(leaf: Leaf) -> Leaf:
    return leaf


def _few_channels(leaf: Leaf) -> Leaf:
    assert isinstance(leaf, Blend)
    assert leaf.confined is not None
    return leaf.confined


def _blend(mask: Mask, base: Array, expert: Array) -> Array:
    if mask.dtype == jnp.bool_:
        return jnp.where(mask, expert, base)
    return _interpolate(mask.astype(base.dtype), base, expert)


@jax.custom_jvp
def _interpolate(mask: Array, base: Array, expert: Array) -> Array:
    """(1 - mask) base + mask expert, exactly one of them where the mask is 0 or 1."""
    return (1 - mask) * base + mask * expert


def _interpolate_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    """The mask's slope as one product, expert - base, so that its transpose is one sum over tokens.

    Left to itself JAX makes one sum of each term, and XLA's CPU compiler (seen in jaxlib 0.10.2) returns
    uninitialised memory for some channels of such several sums in one fusion.
    """
    mask, base, expert = primals
    slopes = (expert - base, 1 - mask, mask)
    terms = [s * t for s, t in zip(slopes, tangents, strict=True) if not isinstance(t, SymbolicZero)]
    out = _interpolate(mask, base, expert)
    return out, sum(terms[1:], start=terms[0]) if terms else jnp.zeros_like(out)


_interpolate.defjvp(_interpolate_jvp, symbolic_zeros=True)


def resolve(leaf: Leaf) -> Any:
    """The value of a small leaf (a bias, a norm's scale), in float32."""
    return leaf.resolve() if isinstance(leaf, CustomLeaf) else leaf.astype(jnp.float32)


def lookup(leaf: Leaf, ids: Int[Array, "*ids"], axis: int = 0) -> Any:
    """Rows of an embedding [V, D], or (`axis` 1) columns of an unembedding [D, V]: [*ids, D], float32."""
    return leaf.lookup(ids, axis) if isinstance(leaf, CustomLeaf) else take_rows(leaf, ids, axis)


def project(x: Any, leaf: Leaf, n_in: int = 1, splits: int = 1) -> Any:
    """Contract the last `n_in` axes of x with the first `n_in` axes of a weight.

    Operands are in the weight's dtype (x as the sum of `splits` numbers of it), the sum and the result in float32.

    Args:
        x: [..., *in].
        leaf: [*in, *out].
        n_in: how many leading axes of the weight are inputs.
        splits: 1, or 2 (see `ModelConfig.activation_splits`).

    Returns:
        [..., *out], float32.

    >>> import jax.numpy as jnp
    >>> project(jnp.ones((5, 3)), jnp.ones((3, 4, 2))).shape
    (5, 4, 2)
    """
    if isinstance(leaf, CustomLeaf):
        return leaf.project(x, n_in, splits)
    return jax.tree.map(lambda a: contract(a, leaf, n_in, splits), x)


def take_rows(w: Array, ids: Int[Array, "*ids"], axis: int) -> Float[Array, "*ids D"]:
    """Rows (`axis` 0) or columns of one matrix, in float32; an id beyond it gives the last."""
    found = jnp.take(w, ids, axis=axis, mode="clip").astype(jnp.float32)
    return jnp.moveaxis(found, 0, -1) if axis else found


def _blended(x: Array, leaf: Leaf, n_in: int, splits: int) -> Array:
    assert isinstance(leaf, Blend)
    if leaf.axis is None or leaf.axis >= n_in:  # masked outputs: both products, then choose
        base, expert = (contract(x, w, n_in, splits) for w in (leaf.base, leaf.expert))
        return leaf.mix(base, expert, leaf._mask_axis)
    return project_both(
        x, x if leaf.index is None else jnp.take(x, leaf.index, axis=leaf.axis - n_in), leaf, n_in, splits
    )


def project_both(
    ours: Float[Array, "..."], theirs: Float[Array, "..."], leaf: Leaf, n_in: int = 1, splits: int = 1
) -> Float[Array, "..."]:
    """`project` through a leaf gated along an input: each channel of it goes through one of the two weights.

    Args:
        ours: the input, where it goes through `base`.
        theirs: the input at the channels that `expert` holds, where it goes through that.
        leaf: gated along one of its first `n_in` axes.
        n_in: as above.
        splits: as above.
    """
    assert isinstance(leaf, Blend)
    assert leaf.axis is not None
    axis = leaf.axis - n_in
    closed, opened = leaf.closed(ours, axis), leaf.opened(theirs, axis)
    return contract(closed, leaf.base, n_in, splits) + contract(opened, leaf.expert, n_in, splits)


def base_of(leaf: Leaf) -> Leaf:
    """A weight with its mask closed."""
    return leaf.base if isinstance(leaf, Blend) else leaf


def expert_of(leaf: Leaf) -> Leaf:
    """A weight with its mask open, at the channels that are held."""
    return leaf.expert if isinstance(leaf, Blend) else leaf


def contract(x: Float[Array, "..."], w: Array, n_in: int = 1, splits: int = 1) -> Float[Array, "..."]:
    """`project` through one array."""
    lead, out = x.shape[: x.ndim - n_in], w.shape[n_in:]
    flat, matrix = x.reshape(*lead, -1), w.reshape(-1, math.prod(out))

    def times(part: Array) -> Array:
        return jnp.matmul(
            part.astype(w.dtype),
            matrix,
            preferred_element_type=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,  # float32 stays float32 on GPU and TPU; no effect on bfloat16
        )

    if splits == 1 or w.dtype != jnp.bfloat16:
        return times(flat).reshape(*lead, *out)
    coarse = jax.lax.reduce_precision(flat, 8, 7)  # a cast there and back XLA may take for nothing
    return (times(coarse) + times(flat - coarse)).reshape(*lead, *out)
