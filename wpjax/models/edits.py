"""Edits: changes of the value at a site of a forward pass, as data.

    Add        x + value                        steering; with zeros, a place to take a gradient at
    Scale      x * factor                       0 knocks out
    Set        value                            activation patching, mean-ablation
    ClampTo    x + (target - <x, read>) write   holds one coordinate of the stream

Every forward pass takes a tuple of edits. They are pytrees: they can be arguments of a jitted function, `vmap` runs
many of them at once, and `grad` differentiates by their values. All four operations are affine in x.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wpjax.errors import WpjaxError
from wpjax.models import ops
from wpjax.models.secant import Value
from wpjax.models.sites import Site

CHANNELS = (Site.Q, Site.K, Site.V, Site.Z, Site.NEURON)
"""Sites whose third axis is heads, KV heads or neurons."""


Operation: TypeAlias = Callable[[Array], Array]
"""A function of the value at a site. It must be affine in that value, and a pytree."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Add:
    """x + value.

    Attributes:
        value: array that broadcasts to the site's shape.

    >>> Add(jnp.array([1.0, 2.0]))(jnp.zeros((1, 3, 2)))[0, 0].tolist()  # the same at every token
    [1.0, 2.0]
    """

    value: Float[Array, "..."]

    def __call__(self, x: Array) -> Array:
        """The new value."""
        return x + self.value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scale:
    """x * factor.

    Attributes:
        factor: array that broadcasts to the site's shape.

    >>> Scale(jnp.asarray(0.5))(jnp.ones((1, 3, 2)))[0, 0].tolist()
    [0.5, 0.5]
    """

    factor: Float[Array, "..."]

    def __call__(self, x: Array) -> Array:
        """The new value."""
        return x * self.factor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Set:
    """The given value in place of x.

    Attributes:
        value: array that broadcasts to the site's shape.

    >>> Set(jnp.array([1.0, 2.0]))(jnp.ones((1, 3, 2)))[0, 0].tolist()
    [1.0, 2.0]
    """

    value: Float[Array, "..."]

    def __call__(self, x: Array) -> Array:
        """The new value."""
        return jnp.broadcast_to(self.value, x.shape).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClampTo:
    """x + (target - <x, read>) write: holds one coordinate of x, in full float32 on every device.

    Attributes:
        read: [D], unit vector, the coordinate that is measured.
        write: [D], unit vector, the direction in which x is moved. With `read` itself, the coordinate becomes the
            target. Any other direction is a control that moves x as far.
        target: value of the coordinate, in the units of the stream.

    >>> first = jnp.array([1.0, 0.0])
    >>> ClampTo(first, first, jnp.asarray(5.0))(jnp.array([[[2.0, 3.0]]]))[0, 0].tolist()
    [5.0, 3.0]
    """

    read: Float[Array, " D"]
    write: Float[Array, " D"]
    target: Float[Array, ""]

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """The new value."""
        coordinate = jnp.matmul(x, self.read, precision=jax.lax.Precision.HIGHEST)
        return x + (self.target - coordinate)[..., None] * self.write


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["operation", "layer", "start", "stop", "channels"],
    meta_fields=["site"],
)
@dataclasses.dataclass(frozen=True)
class Edit:
    """One change at one site. Everything but the site may be traced.

    Attributes:
        site: the site (static).
        operation: what becomes of the value there.
        layer: 0-based number of the layer; it may be traced, so that one program serves all layers. None: all layers
            that run; then every array of the operation has a leading axis of layers.
        start: the first position that is edited: one number, or [B], one for each prompt. None: 0.
        stop: the position before which editing ends: one number, or [B]. None: no end.
        channels: the heads, KV heads or neurons that are edited, at sites that have them: their numbers, or a boolean
            for each of the site. None: all.

    Head 2 of layer 1 writes nothing from the fourth token on:

    >>> import jax.numpy as jnp
    >>> edit = Edit(Site.Z, Scale(jnp.zeros(())), layer=1, start=3, channels=2)
    >>> x = jnp.ones((1, 5, 4, 8))  # [B, T, H, Dh]
    >>> changed = edit(x, jnp.asarray(1), jnp.arange(5)[None])
    >>> float(changed.sum()), float(changed[0, 3:, 2].sum())
    (144.0, 0.0)
    """

    site: Site
    operation: Operation
    layer: Int[Array, ""] | int | None = None
    start: Int[Array | np.ndarray, "..."] | int | None = None
    stop: Int[Array | np.ndarray, "..."] | int | None = None
    channels: Int[Array | np.ndarray, "..."] | Bool[Array | np.ndarray, " n"] | int | None = None

    def __call__(self, x: Value, layer: Int[Array, ""] | int, positions: Int[Array, "#B T"]) -> Value:
        """The value at the site after the edit.

        Args:
            x: [B, T, ...], the value before it.
            layer: number of the layer of that site.
            positions: positions of the tokens in their prompts.

        Raises:
            WpjaxError: the edit names channels of a site that has none, or its start or stop is by prompt and the
                prompts are packed into one row.
        """
        changed = ops.affine(self.operation, x)
        # A mask that broadcasts to x: by layer (a scalar), by token on axes 0 and 1, by channel on axis 2.
        edited = jnp.asarray(True) if self.layer is None else jnp.asarray(self.layer) == layer
        if self.start is not None or self.stop is not None:
            within = self._within(positions)
            if within.shape[0] not in (1, x.shape[0]):
                raise WpjaxError(
                    "an edit that starts at another token of each prompt needs prompts side by side, not packed as one"
                )
            edited = edited & within.reshape(*within.shape, *(1,) * (x.ndim - 2))
        if self.channels is not None:
            edited = edited & self._chosen(x.shape[2]).reshape(-1, *(1,) * (x.ndim - 3))
        if self.layer is None and edited.ndim == 0:
            return changed
        return jax.tree.map(lambda new, old: jnp.where(edited, new, old), changed, x)

    def _within(self, positions: Int[Array, "#B T"]) -> Bool[Array, "B T"]:
        """Which tokens stand between `start` and `stop`."""
        start, stop = (None if at is None else jnp.asarray(at)[..., None] for at in (self.start, self.stop))
        after = jnp.ones(positions.shape, bool) if start is None else positions >= start
        return after if stop is None else after & (positions < stop)

    def _chosen(self, n: int) -> Bool[Array, " n"]:
        """Which of a site's n channels are edited."""
        if self.site not in CHANNELS:
            raise WpjaxError(f"the site {self.site} has no heads or neurons; leave `channels` out of its edit")
        channels = jnp.asarray(self.channels)
        if channels.dtype == jnp.bool_:
            return channels
        return (jnp.arange(n) == channels.reshape(-1, 1)).any(0)

    def take(self, rows: Int[Array | np.ndarray, " N"]) -> Edit:
        """The edit for some of the prompts."""
        rows = jnp.asarray(rows)
        axis = 1 if self.layer is None else 0
        n_axes = (4 if self.site in (Site.Q, Site.K, Site.V, Site.Z) else 3) + axis

        def some(a: Array) -> Array:
            """An array with fewer axes than the site has no axis of prompts; one prompt stands for all of them."""
            return jnp.take(a, rows, axis=axis) if a.ndim == n_axes and a.shape[axis] > 1 else a

        start, stop = (
            at if at is None or jnp.ndim(at) == 0 else jnp.asarray(at)[rows] for at in (self.start, self.stop)
        )
        return dataclasses.replace(self, operation=jax.tree.map(some, self.operation), start=start, stop=stop)


def apply(
    edits: Sequence[Edit], site: Site, x: Value, layer: Int[Array, ""] | int, positions: Int[Array, "#B T"]
) -> Value:
    """The value at a site after all edits of that site, made one after the other; arguments as in `Edit.__call__`."""
    for edit in edits:
        if edit.site == site:
            x = edit(x, layer, positions)
    return x
