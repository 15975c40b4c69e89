"""How a weight is applied, whether it is one array or something else.

A leaf of the parameter tree is an array or a `CustomLeaf`. The decoder applies every weight by `project` (a matrix
product), `lookup` (rows of an embedding) or `resolve` (the value itself) and does not look inside. So one forward pass
serves a plain model, a patched model and a relaxed mask. Under `vmap` over masks the weights are shared.

To add another kind of leaf, write a subclass of `CustomLeaf`.
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
    """A weight that is not one array.

    Subclasses are pytrees. Their arrays may have a leading axis of layers, as the leaves under "blocks" do.
    """

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """Dtype of the weights."""

    @abc.abstractmethod
    def resolve(self) -> Any:
        """The value of the leaf; see the function `resolve`."""

    @abc.abstractmethod
    def lookup(self, ids: Int[Array, "..."], axis: int) -> Any:
        """Some rows or columns; see the function `lookup`."""

    @abc.abstractmethod
    def project(self, x: Any, n_in: int, splits: int) -> Any:
        """A matrix product; see the function `project`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blend(CustomLeaf):
    """Two weights of one shape, and a mask that chooses between them, channel by channel.

    The value is (1 - mask) * base + mask * expert. A boolean mask selects instead of adding. So an open mask is the
    expert and a closed one is the base, bit for bit.

    The blended matrix itself is never formed (docs/method.md, "Joint patches"). With m the mask:

        x W  =  (1 - m) * (x W_base) + m * (x W_expert)        mask on output channels
        z W  =  ((1 - m) * z) W_base + (m * z) W_expert        mask on input channels

    Most of the time the first four attributes are all there is. The other four save work where a batch of masks opens
    few channels or none; `engines.joint` sets them.

    Attributes:
        base: the weight where the mask is 0.
        expert: the weight where the mask is 1.
        mask: boolean, or float in [0, 1]. Shape [n] for the n channels along `axis`, or [] for the whole weight. If
            the leaves are stacked over layers, the mask has the same leading axis.
        axis: the axis of the channels in one layer's weight (static); None if the mask is a scalar.
        channels: [K], the channels that `expert` holds, if it was cut down to these. The mask must be closed at all
            other channels. None: `expert` holds all channels.
        place: [n], the place of each channel in `channels`; given together with `channels`.
        narrow: the same leaf with an `expert` that is cut down to few channels. It is used in layers where the mask
            is open at no other channel. None: there is no such leaf.
        breadth: [] integer, how much of `expert` this layer needs. None: all of it.

            0. Nothing: the mask is closed everywhere. The layer costs what a plain one does.
            1. The few channels of `narrow`; without `narrow`, all channels.
            2. All channels, with `narrow`.

    Columns 0 and 2 of the base, column 1 of the expert:

    >>> import jax.numpy as jnp
    >>> base, expert = jnp.zeros((2, 3)), jnp.ones((2, 3))
    >>> leaf = Blend(base, expert, jnp.array([False, True, False]), axis=1)
    >>> project(jnp.array([1.0, 1.0]), leaf).tolist()
    [0.0, 2.0, 0.0]
    """

    base: Array
    expert: Array
    mask: Mask
    axis: int | None = dataclasses.field(metadata={"static": True})
    channels: Int[Array, "..."] | None = None
    place: Int[Array, "..."] | None = None
    narrow: Blend | None = None
    breadth: Int[Array, "..."] | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weights, not of the mask."""
        return self.base.dtype

    def by_breadth(self, plain: Callable[[], Array], blended: Callable[[Form], Array]) -> Array:
        """Compute something with no more of `expert` than this layer needs; see `breadth`.

        Args:
            plain: computes it from `base` alone.
            blended: computes it from both weights. It is given a function that maps a leaf with this mask to the form
                to use: the leaf itself, or its `narrow`.
        """
        # `breadth` is shared by all masks of a vmap. So one branch runs, where a batched index would run them all.
        if self.breadth is None:
            return blended(_all_channels)
        forms = [_all_channels] if self.narrow is None else [_few_channels, _all_channels]
        return jax.lax.switch(self.breadth, [plain, *(functools.partial(blended, form) for form in forms)])

    def mix(self, base: Array, expert: Array, axis: int) -> Array:
        """Choose between two results, channel by channel.

        Args:
            base: what `base` gives.
            expert: what `expert` gives, for the channels that it holds.
            axis: the axis of the channels in both, counted from the end (negative).
        """
        if self.place is not None:  # from the K channels that are held back to all n; closed ones get any value
            expert = jnp.take(expert, self.place, axis=axis)
        return _blend(self._along(self.mask, axis), base, expert)

    def closed(self, x: Array, axis: int) -> Array:
        """The part of an input that goes through `base`, 0 elsewhere; `axis` is its axis of channels, negative."""
        return _blend(self._along(self.mask, axis), x, jnp.zeros_like(x))

    def opened(self, x: Array, axis: int) -> Array:
        """The part of an input that goes through `expert`, 0 elsewhere.

        Args:
            x: the input at the channels that `expert` holds.
            axis: its axis of channels, counted from the end (negative).
        """
        mask = self.mask
        if self.channels is not None:
            assert self.place is not None
            # Rows of `channels` are filled up to one length. The filling is no channel of its own and must add nothing.
            is_held = self.place[self.channels] == jnp.arange(self.channels.size)
            mask = jnp.where(is_held, mask[self.channels], jnp.zeros_like(mask[:1]))
        return _blend(self._along(mask, axis), jnp.zeros_like(x), x)

    def _along(self, mask: Mask, axis: int) -> Mask:
        """The mask, shaped to broadcast along an axis that is counted from the end."""
        return mask if self.axis is None else mask.reshape(mask.shape + (1,) * (-axis - 1))

    @property
    def _mask_axis(self) -> int:
        """The axis of the channels in one layer's weight, counted from the end."""
        return -1 if self.axis is None else self.axis - self.base.ndim

    def resolve(self) -> Array:
        """The blended value in float32, for small leaves (biases, norms)."""
        return self.mix(self.base, self.expert, self._mask_axis).astype(jnp.float32)

    def lookup(self, ids: Int[Array, "..."], axis: int) -> Array:
        """Rows (or columns) of both weights, then the mask's choice; see the function `lookup`."""
        return self.mix(take_rows(self.base, ids, axis), take_rows(self.expert, ids, axis), -1)

    def project(self, x: Array, n_in: int, splits: int) -> Array:
        """x W: both products, then a choice of outputs; or a choice of inputs, then both products.

        Shapes as in the function `project`.
        """
        return self.by_breadth(
            lambda: contract(x, self.base, n_in, splits), lambda form: _blended(x, form(self), n_in, splits)
        )


def _all_channels(leaf: Leaf) -> Leaf:
    return leaf


def _few_channels(leaf: Leaf) -> Leaf:
    assert isinstance(leaf, Blend)
    assert leaf.narrow is not None
    return leaf.narrow


def _blend(mask: Mask, base: Array, expert: Array) -> Array:
    """(1 - mask) base + mask expert; a boolean mask selects."""
    if mask.dtype == jnp.bool_:
        return jnp.where(mask, expert, base)
    return _interpolate(mask.astype(base.dtype), base, expert)


@jax.custom_jvp
def _interpolate(mask: Array, base: Array, expert: Array) -> Array:
    """(1 - mask) base + mask expert, exactly one of them where the mask is 0 or 1."""
    return (1 - mask) * base + mask * expert


def _interpolate_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    """The derivative by the mask is one product with expert - base, so its transpose is one sum over tokens.

    JAX's own rule has two terms, hence two sums. XLA's CPU compiler (seen in jaxlib 0.10.2) fuses these and then
    returns uninitialised memory for some channels.
    """
    mask, base, expert = primals
    slopes = (expert - base, 1 - mask, mask)
    terms = [s * t for s, t in zip(slopes, tangents, strict=True) if not isinstance(t, SymbolicZero)]
    out = _interpolate(mask, base, expert)
    return out, sum(terms[1:], start=terms[0]) if terms else jnp.zeros_like(out)


_interpolate.defjvp(_interpolate_jvp, symbolic_zeros=True)


def resolve(leaf: Leaf) -> Any:
    """The value of a small leaf (a bias, a norm's scale), in float32 and of the leaf's own shape.

    >>> import jax.numpy as jnp
    >>> resolve(Blend(jnp.zeros(2), jnp.ones(2), jnp.asarray(0.25), axis=None)).tolist()
    [0.25, 0.25]
    """
    return leaf.resolve() if isinstance(leaf, CustomLeaf) else leaf.astype(jnp.float32)


def lookup(leaf: Leaf, ids: Int[Array, "*ids"], axis: int = 0) -> Any:
    """The vectors of some tokens.

    Args:
        leaf: an embedding [V, D], or an unembedding [D, V].
        ids: token ids, of any shape.
        axis: the axis of `leaf` that counts tokens: 0 for an embedding, 1 for an unembedding.

    Returns:
        [*ids, D], float32.

    >>> import jax.numpy as jnp
    >>> lookup(jnp.arange(6).reshape(3, 2), jnp.array([2, 0])).tolist()
    [[4.0, 5.0], [0.0, 1.0]]
    """
    return leaf.lookup(ids, axis) if isinstance(leaf, CustomLeaf) else take_rows(leaf, ids, axis)


def project(x: Any, leaf: Leaf, n_in: int = 1, splits: int = 1) -> Any:
    """Contract the last `n_in` axes of x with the first `n_in` axes of a weight.

    Products are made in the weight's dtype and added up in float32. With `splits` 2, x is written as the sum of two
    numbers of that dtype.

    Args:
        x: [..., *in].
        leaf: [*in, *out].
        n_in: number of axes of the input; W_O [H, Dh, D] has 2.
        splits: 1 or 2, see `ModelConfig.activation_splits`.

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
    """Rows (`axis` 0) or columns (`axis` 1) of one matrix, in float32. An id beyond the last gives the last one."""
    vectors = jnp.take(w, ids, axis=axis, mode="clip").astype(jnp.float32)
    return jnp.moveaxis(vectors, 0, -1) if axis else vectors  # columns come as [D, *ids]


def _blended(x: Array, leaf: Leaf, n_in: int, splits: int) -> Array:
    """x W through both weights of a leaf in the form that `Blend.by_breadth` chose."""
    assert isinstance(leaf, Blend)
    if leaf.axis is None or leaf.axis >= n_in:  # masked outputs: both products, then choose
        base, expert = (contract(x, w, n_in, splits) for w in (leaf.base, leaf.expert))
        return leaf.mix(base, expert, leaf._mask_axis)
    # Masked inputs: `expert` needs x at the channels that it holds only.
    return project_both(
        x, x if leaf.channels is None else jnp.take(x, leaf.channels, axis=leaf.axis - n_in), leaf, n_in, splits
    )


def project_both(
    ours: Float[Array, "..."], theirs: Float[Array, "..."], leaf: Leaf, n_in: int = 1, splits: int = 1
) -> Float[Array, "..."]:
    """`project` through a `Blend` with the mask on an input axis: each input channel goes through one of its weights.

    The two weights may see different inputs. In an MLP, for example, the neurons that W_out reads are made by base
    weights for the one and by expert weights for the other.

    Args:
        ours: [..., *in], the input of `base`; only closed channels count.
        theirs: [..., *in], the input of `expert`, at the channels that it holds; only open channels count.
        leaf: a `Blend` whose `axis` is one of its first `n_in`.
        n_in: as in `project`.
        splits: as in `project`.

    Returns:
        [..., *out], float32.
    """
    assert isinstance(leaf, Blend)
    assert leaf.axis is not None
    axis = leaf.axis - n_in
    closed, opened = leaf.closed(ours, axis), leaf.opened(theirs, axis)
    return contract(closed, leaf.base, n_in, splits) + contract(opened, leaf.expert, n_in, splits)


def base_of(leaf: Leaf) -> Leaf:
    """The weight of the base: a `Blend` as if its mask were closed, any other leaf itself."""
    return leaf.base if isinstance(leaf, Blend) else leaf


def expert_of(leaf: Leaf) -> Leaf:
    """The weight of the expert, at the channels that a `Blend` holds of it; any other leaf itself."""
    return leaf.expert if isinstance(leaf, Blend) else leaf


def contract(x: Float[Array, "..."], w: Array, n_in: int = 1, splits: int = 1) -> Float[Array, "..."]:
    """`project` through one array; shapes and dtypes as there."""
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
    # x = coarse + rest, both bfloat16 (8 bits of exponent, 7 of mantissa). XLA may drop a cast to bfloat16 and back.
    coarse = jax.lax.reduce_precision(flat, 8, 7)
    return (times(coarse) + times(flat - coarse)).reshape(*lead, *out)
