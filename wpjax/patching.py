"""Patches: a mask over components, and a base whose masked slices come from the expert.

    theta_patched[c] = theta_expert[c] if mask[c] else theta_base[c]        (arXiv 2604.13694)

`materialize` is that definition, one select per leaf. `patch` returns the same model without forming it: leaves
become `Blend`s that share both models' weights, so `vmap` over masks copies no weight and `grad` with respect to a
float mask works. Swap the first two arguments for the reverse patch, base slices in the expert (knock-out).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wpjax.components import LEAVES, Component, gate_shapes, open_gates
from wpjax.models.config import ModelConfig
from wpjax.models.convert import flatten, unflatten
from wpjax.models.decoder import Params
from wpjax.models.leaves import Blend, Gate

PatchedParams: TypeAlias = Params
"""A parameter tree whose leaves may be `Blend`s."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatchMask:
    """Which gates are open: a pytree of arrays, boolean (select) or float in [0, 1] (a relaxed patch).

    Attributes:
        gates: gate -> array of the shape `components.gate_shapes` gives. A gate that is absent is closed, and the
            leaves it owns stay plain arrays, which is cheaper.
    """

    gates: Mapping[str, Gate]

    @classmethod
    def empty(cls, cfg: ModelConfig, dtype: Any = bool) -> PatchMask:
        """Nothing patched."""
        return cls({gate: jnp.zeros(shape, dtype) for gate, shape in gate_shapes(cfg).items()})

    @classmethod
    def full(cls, cfg: ModelConfig, dtype: Any = bool) -> PatchMask:
        """Everything patched."""
        return cls({gate: jnp.ones(shape, dtype) for gate, shape in gate_shapes(cfg).items()})

    @classmethod
    def of(cls, cfg: ModelConfig, components: Iterable[Component | str]) -> PatchMask:
        """The union of some components.

        Raises:
            ComponentError: a name that is not a component of this model.
        """
        return cls({gate: jnp.asarray(value) for gate, value in open_gates(cfg, components).items()})

    def astype(self, dtype: Any) -> PatchMask:
        """The same mask in another dtype: float32 to differentiate, bool to select."""
        return jax.tree.map(lambda gate: gate.astype(dtype), self)

    def __or__(self, other: PatchMask) -> PatchMask:
        return jax.tree.map(jnp.logical_or, self, other)

    def __and__(self, other: PatchMask) -> PatchMask:
        return jax.tree.map(jnp.logical_and, self, other)

    def __invert__(self) -> PatchMask:
        return jax.tree.map(jnp.logical_not, self)


def patch(base: Params, expert: Params, mask: PatchMask) -> PatchedParams:
    """The base with the masked slices of the expert, as `Blend` leaves; nothing is copied.

    Args:
        base: parameter tree of the host.
        expert: parameter tree of the donor, same structure and shapes.
        mask: gates; may be traced, batched by `vmap` or differentiated.
    """
    return _blend(base, expert, mask.gates, "")


def patch_layer(base: Params, expert: Params, gates: Mapping[str, Gate]) -> PatchedParams:
    """`patch` for the parameters of one layer (the "blocks" tree without its layer axis) and that layer's gates."""
    return _blend(base, expert, gates, "blocks/")


def _blend(base: Params, expert: Params, gates: Mapping[str, Gate], prefix: str) -> PatchedParams:
    theirs = flatten(expert)

    def blend(path: str, leaf: Array) -> Array | Blend:
        gate, axis = LEAVES[prefix + path]
        return Blend(leaf, theirs[path], gates[gate], axis) if gate in gates else leaf

    return unflatten({path: blend(path, leaf) for path, leaf in flatten(base).items()})


def materialize(base: Params, expert: Params, mask: PatchMask) -> Params:
    """The patched model as plain arrays: `where(mask, expert, base)` leaf by leaf, the definition of a patch.

    Args:
        base: parameter tree of the host.
        expert: parameter tree of the donor.
        mask: gates; float gates interpolate.
    """

    def select(path: str, host: Array, donor: Array) -> Array:
        name, axis = LEAVES[path]
        if name not in mask.gates:
            return host
        gate, stacked = jnp.asarray(mask.gates[name]), path.startswith("blocks/")
        shape = [1] * host.ndim
        if stacked:
            shape[0] = gate.shape[0]
        if axis is not None:
            shape[axis + stacked] = gate.shape[-1]
        gate = gate.reshape(shape)
        if gate.dtype == jnp.bool_:
            return jnp.where(gate, donor, host)
        return ((1 - gate) * host + gate * donor).astype(host.dtype)

    ours, theirs = flatten(base), flatten(expert)
    return unflatten({path: select(path, leaf, theirs[path]) for path, leaf in ours.items()})
