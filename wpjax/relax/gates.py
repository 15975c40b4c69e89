"""Gates: one number a component, and the mask that a vector of them makes.

mask of a unit's entry  =  the gate of the component that owns it, 0 if no component of the list does
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.components import Component, n_parameters, unit_positions, unit_shapes
from wpjax.errors import ComponentError
from wpjax.models.config import ModelConfig
from wpjax.patching import PatchMask


@runtime_checkable
class AnyGates(Protocol):
    """What a learner needs of C gates: of weights (`Gates`), or of anything else that an objective takes a mask of.

    A pytree with a number of gates, `len`.
    """

    @property
    def share(self) -> Float[Array, " C"]:
        """What each gate costs of what all gates cost; sums to 1."""
        ...

    def __len__(self) -> int: ...

    def mask(self, values: Float[Array, " C"]) -> Any:
        """What objectives are called with; differentiable in the values of the gates."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gates:
    """Which entries of a mask each of C gates opens; a pytree.

    Attributes:
        owner: unit -> number of the gate that each of its entries follows; C for entries that no gate opens. A unit
            that no gate opens is absent, which is cheaper.
        share: [C], the part of all gates' parameters that each gate opens. The parts sum to 1.

    >>> import wpjax as wp
    >>> cfg = wp.ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 2 layers, 4 heads
    >>> gates = Gates.of(cfg, wp.enumerate_components(cfg, ["head", "mlp"]))
    >>> mask = gates.mask(jnp.linspace(0, 1, len(gates)))
    >>> mask.units["head"].shape, mask.units["neuron"].shape, round(float(gates.share.sum()), 6)
    ((2, 4), (2, 32), 1.0)
    """

    owner: Mapping[str, Int[Array, "..."]]
    share: Float[Array, " C"]

    @classmethod
    def of(cls, cfg: ModelConfig, components: Sequence[Component]) -> Gates:
        """The gates of some components, in their order.

        Raises:
            ComponentError: there is no component, or two of them own the same weights, such as a head and its module.
        """
        if not components:
            raise ComponentError("there is no component to learn a gate of; name some, or a kind of them")
        nobody, shapes = len(components), unit_shapes(cfg)
        owner: dict[str, np.ndarray] = {}
        for i, component in enumerate(components):
            for unit, at in unit_positions(cfg, component).items():
                entries = owner.setdefault(unit, np.full(shapes[unit], nobody, np.int32)).reshape(-1)
                taken = entries[at][entries[at] != nobody]
                if taken.size:
                    raise ComponentError(
                        f"{component.name} and {components[int(taken[0])].name} own the same weights; choose kinds "
                        "that do not overlap, such as head, kv_group and neuron"
                    )
                entries[at] = i
        sizes = np.array([n_parameters(cfg, component) for component in components], np.float64)
        return cls({unit: jnp.asarray(n) for unit, n in owner.items()}, jnp.asarray(sizes / sizes.sum(), jnp.float32))

    def __len__(self) -> int:
        return len(self.share)

    def mask(self, values: Float[Array, " C"]) -> PatchMask:
        """The relaxed mask of C gates. It is linear in them, and works under `jit`, `vmap` and `grad`."""
        padded = jnp.append(values, jnp.zeros((), values.dtype))
        return PatchMask({unit: padded[number] for unit, number in self.owner.items()})
