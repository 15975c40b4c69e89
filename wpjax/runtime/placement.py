"""Where arrays stand: patches over the devices of a mesh, each device with both models.

Nothing is exchanged on the way: a patch is independent of all others, so only its changes come back. How a parameter
would be cut over a mesh follows from its logical axes (`models.parameters`): see `partition`. A model that does not fit
one device is not swept yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

PATCHES = "patch"
"""Name of the mesh axis that patches are divided along."""

WHOLE, SPLIT = PartitionSpec(), PartitionSpec(PATCHES)


class Placement(NamedTuple):
    """Places a sweep's arrays: copied to every device of a mesh, or divided among them; one device keeps them.

    Attributes:
        mesh: devices along the axis `PATCHES`.
    """

    mesh: Mesh

    @classmethod
    def on(cls, devices: Sequence[jax.Device] | None = None) -> Placement:
        """Over some devices; None for all of this process.

        >>> Placement.on(jax.local_devices()[:1]).n_devices
        1
        """
        return cls(Mesh(jax.local_devices() if devices is None else list(devices), (PATCHES,)))

    @classmethod
    def single(cls) -> Placement:
        """On one device, the first of this process."""
        return cls.on(jax.local_devices()[:1])

    @property
    def n_devices(self) -> int:
        """How many devices; the leading axis of what is split must be a multiple of it."""
        return int(self.mesh.size)

    def whole(self, tree: T) -> T:
        """A copy of every array on each device; one copy of an array that stands in several places."""
        if self.n_devices == 1:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        placed = {id(leaf): jax.device_put(leaf, NamedSharding(self.mesh, WHOLE)) for leaf in leaves}
        return jax.tree.unflatten(structure, [placed[id(leaf)] for leaf in leaves])

    def split(self, array: Any) -> jax.Array:
        """The leading axis of an array divided among the devices."""
        return jnp.asarray(array) if self.n_devices == 1 else jax.device_put(array, NamedSharding(self.mesh, SPLIT))

    def divide(self, run: Callable[..., T], n_whole: int, n_split: int) -> Callable[..., T]:
        """A function that each device runs on its share; what it returns is put together along the leading axis.

        Args:
            run: a function of arrays, first the whole ones.
            n_whole: how many arguments each device has a copy of.
            n_split: how many arguments are divided.
        """
        specs = (WHOLE,) * n_whole + (SPLIT,) * n_split
        return jax.shard_map(run, mesh=self.mesh, in_specs=specs, out_specs=SPLIT, check_vma=False)


def partition(axes: Sequence[str], rules: Mapping[str, str]) -> PartitionSpec:
    """How an array with named axes is cut over a mesh.

    Args:
        axes: logical names, such as `models.parameters.PARAMETERS[path].axes`; "layer" comes first in stacked leaves.
        rules: logical axis -> mesh axis; axes that are not in it are whole on every device.

    >>> tuple(partition(("layer", "d_model", "head", "d_head"), {"head": "model"}))
    (None, None, 'model', None)
    """
    return PartitionSpec(*(rules.get(axis) for axis in axes))
