"""Patches: a mask over components, and a base whose masked slices come from the expert.

    theta_patched[c] = theta_expert[c] if mask[c] else theta_base[c]        (arXiv 2604.13694)

`materialize` is that definition, one select per leaf. `patch` returns the same model without forming it: leaves
become `Blend`s that share both models' weights, so `vmap` over masks copies no weight and `grad` with respect to a
float mask works. Swap the first two arguments for the reverse patch, base slices in the expert (knock-out).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from wpjax.checkpoints.convert import flatten, unflatten
from wpjax.components import LEAVES, Component, open_units, unit_names, unit_shapes
from wpjax.errors import ComponentError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.models.leaves import Blend, CustomLeaf, Leaf, Mask
from wpjax.models.secant import SecantWeight

PatchedParams: TypeAlias = Params
"""A parameter tree whose leaves may be `Blend`s."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatchMask:
    """Which units are open: a pytree of arrays, boolean (select) or float in [0, 1] (a relaxed patch).

    Attributes:
        units: unit -> array of the shape `components.unit_shapes` gives. A unit that is absent is closed, and the
            leaves it owns stay plain arrays, which is cheaper.
    """

    units: Mapping[str, Mask]

    @classmethod
    def empty(cls, cfg: ModelConfig, dtype: Any = bool) -> PatchMask:
        """Nothing patched."""
        return cls({unit: jnp.zeros(shape, dtype) for unit, shape in unit_shapes(cfg).items()})

    @classmethod
    def full(cls, cfg: ModelConfig, dtype: Any = bool) -> PatchMask:
        """Everything patched."""
        return cls({unit: jnp.ones(shape, dtype) for unit, shape in unit_shapes(cfg).items()})

    @classmethod
    def of(cls, cfg: ModelConfig, components: str | Iterable[Component | str]) -> PatchMask:
        """The union of some components; one name alone will do.

        Raises:
            ComponentError: a name that is not a component of this model.
        """
        names = [components] if isinstance(components, str) else components
        return cls({unit: jnp.asarray(value) for unit, value in open_units(cfg, names).items()})

    def astype(self, dtype: Any) -> PatchMask:
        """The same mask in another dtype: float32 to differentiate, bool to select."""
        return jax.tree.map(lambda unit: unit.astype(dtype), self)

    def __or__(self, other: PatchMask) -> PatchMask:
        """Union; of float units, the larger."""
        both = {g: _pairwise(jnp.logical_or, jnp.maximum, self, other, g) for g in self.units if g in other.units}
        return PatchMask({**self.units, **other.units, **both})

    def __and__(self, other: PatchMask) -> PatchMask:
        """Intersection; of float units, the smaller."""
        return PatchMask(
            {g: _pairwise(jnp.logical_and, jnp.minimum, self, other, g) for g in self.units if g in other.units}
        )

    def __invert__(self) -> PatchMask:
        """Complement; of float units, 1 - m.

        Raises:
            ComponentError: a unit is absent, and the mask does not know its shape.
        """
        absent = [g for g in unit_names() if g not in self.units and g not in _OPTIONAL_GATES]
        if absent:
            raise ComponentError(
                f"the complement of a mask needs all its units, this one lacks {', '.join(absent)}; start from "
                "PatchMask.empty(cfg) or PatchMask.of(cfg, ...)"
            )
        return jax.tree.map(lambda m: ~m if m.dtype == jnp.bool_ else 1 - m, self)


_OPTIONAL_GATES = frozenset(
    {"attn_bias", "mlp_bias", "unembed", "norm_attn", "norm_mlp", "norm_attn_out", "norm_mlp_out"}
)
"""UnitMasks that not every architecture has."""


def _pairwise(boolean: Any, real: Any, one: PatchMask, other: PatchMask, unit: str) -> Array:
    a, b = one.units[unit], other.units[unit]
    return boolean(a, b) if a.dtype == b.dtype == jnp.bool_ else real(a.astype(jnp.float32), b.astype(jnp.float32))


def patch(base: Params, expert: Params, mask: PatchMask) -> PatchedParams:
    """The base with the masked slices of the expert, as `Blend` leaves; nothing is copied.

    Args:
        base: parameter tree of the host.
        expert: parameter tree of the donor, same structure and shapes.
        mask: units; may be traced, batched by `vmap` or differentiated.

    Raises:
        ComponentError: a unit that does not exist or does not fit, or parameters that are patched already.
    """
    return _masked(Blend, base, expert, mask.units, "")


def secant_patch(base: Params, expert: Params, mask: PatchMask) -> PatchedParams:
    """The base and the expert at once, as `SecantWeight` leaves: what is computed with them is a `Secant`.

    Its change is linear in the units, and with all of them at 1 it is the expert's value minus the base's.

    Args:
        base: parameter tree of one end.
        expert: parameter tree of the other end, same structure and shapes.
        mask: float units, all of the model's; may be traced or differentiated.

    Raises:
        ComponentError: as `patch`.
    """
    return _masked(SecantWeight, base, expert, mask.units, "")


def patch_layer(base: Params, expert: Params, units: Mapping[str, Mask]) -> PatchedParams:
    """`patch` for the parameters of one layer (the "blocks" tree without its layer axis) and that layer's units."""
    return _masked(Blend, base, expert, units, "blocks/")


def _masked(
    leaf_type: type[Blend] | type[SecantWeight], base: Params, expert: Params, units: Mapping[str, Mask], prefix: str
) -> PatchedParams:
    ours, theirs = flatten(base), flatten(expert)
    checked = _checked(units, {prefix + path: leaf for path, leaf in ours.items()}, stacked=not prefix)

    def masked(path: str, leaf: Array) -> Leaf:
        unit, axis = LEAVES[prefix + path]
        return leaf_type(leaf, theirs[path], checked[unit], axis) if unit in checked else leaf

    return unflatten({path: masked(path, leaf) for path, leaf in ours.items()})


def _checked(units: Mapping[str, Mask], leaves: Mapping[str, Any], stacked: bool) -> dict[str, Mask]:
    """The units as arrays, if each one fits the leaves that it owns."""
    arrays = {name: jnp.asarray(unit) for name, unit in units.items()}
    for name, array in arrays.items():
        if array.dtype != jnp.bool_ and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ComponentError(f"unit {name} is {array.dtype}; give a boolean mask, or a float one in [0, 1]")
    unknown = sorted(set(arrays) - set(unit_names()))
    if unknown:
        raise ComponentError(f"a mask has no unit {unknown[0]!r}; units: {', '.join(unit_names())}")
    for path, leaf in leaves.items():
        unit, axis = LEAVES[path]
        if isinstance(leaf, CustomLeaf):
            raise ComponentError(f"{path} is patched already; give plain parameters, or join the masks with |")
        if unit not in arrays:
            continue
        layers = leaf.shape[:1] if stacked and path.startswith("blocks/") else ()
        expected = layers if axis is None else (*layers, leaf.shape[axis + len(layers)])
        if arrays[unit].shape != expected:
            raise ComponentError(
                f"unit {unit} has shape {arrays[unit].shape}, the model needs {expected}; for many masks, jax.vmap "
                "over the leading axis"
            )
    return arrays


def materialize(base: Params, expert: Params, mask: PatchMask) -> Params:
    """The patched model as plain arrays: `where(mask, expert, base)` leaf by leaf, the definition of a patch.

    Args:
        base: parameter tree of the host.
        expert: parameter tree of the donor.
        mask: units; float units interpolate.

    Raises:
        ComponentError: as `patch`.
    """
    ours, theirs = flatten(base), flatten(expert)
    units = _checked(mask.units, ours, stacked=True)

    def select(path: str, host: Array, donor: Array) -> Array:
        name, axis = LEAVES[path]
        if name not in units:
            return host
        unit, stacked = units[name], path.startswith("blocks/")
        shape = [1] * host.ndim
        if stacked:
            shape[0] = unit.shape[0]
        if axis is not None:
            shape[axis + stacked] = unit.shape[-1]
        unit = unit.reshape(shape)
        if unit.dtype == jnp.bool_:
            return jnp.where(unit, donor, host)
        return ((1 - unit) * host + unit * donor).astype(host.dtype)

    return unflatten({path: select(path, leaf, theirs[path]) for path, leaf in ours.items()})


def permuted(base: Params, expert: Params, seed: int = 0) -> Params:
    """An expert whose changes are dealt out anew among the heads, KV groups and neurons of each layer: a null model.

    Every component gets the whole change of another one of its kind and layer. The sizes of the changes are the
    expert's; what they do together with the weights that they change is not. Leaves that no channel owns are the
    base's.

    Args:
        base: parameter tree.
        expert: parameter tree of the same structure.
        seed: of the permutations.
    """
    rng = np.random.default_rng(seed)
    ours, theirs = flatten(base), flatten(expert)
    orders: dict[str, Array] = {}

    def deal(path: str, host: Array, donor: Array) -> Array:
        unit, axis = LEAVES[path]
        if axis is None or not path.startswith("blocks/"):
            return host
        shape = (host.shape[0], host.shape[axis + 1])
        if unit not in orders:  # one order for all leaves of a unit: a change stays whole
            orders[unit] = jnp.asarray(np.stack([rng.permutation(shape[1]) for _ in range(shape[0])]))
        return deal_out(host, donor, orders[unit], axis)

    return unflatten({path: deal(path, leaf, theirs[path]) for path, leaf in ours.items()})


@functools.partial(jax.jit, static_argnames="axis")
def deal_out(host: Array, donor: Array, order: Int[Array, "L n"], axis: int) -> Array:
    """One stacked leaf with the changes of its channels in another order, in one program: no copy is kept in float32.

    Args:
        host: the base's leaf, layers first.
        donor: the expert's.
        order: layer by layer, whose change each channel gets.
        axis: of the channels, in one layer's leaf.
    """

    def dealt(leaf: Array) -> Array:
        return jax.vmap(lambda a, to: jnp.take(a, to, axis=axis))(leaf, order).astype(jnp.float32)

    kept = jnp.finfo(host.dtype)  # a change is rounded as the weights are
    change = jax.lax.reduce_precision(dealt(donor) - dealt(host), kept.nexp, kept.nmant)
    return (host.astype(jnp.float32) + change).astype(host.dtype)
