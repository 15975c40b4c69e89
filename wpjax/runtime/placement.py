"""Patches over the devices of a process: each device holds both models and runs an equal share of every chunk.

Nothing is exchanged on the way: a patch is independent of all others, so only its changes come back. A model that does
not fit one device is not served by this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

WHOLE, SPLIT = PartitionSpec(), PartitionSpec("patch")


class Spread(NamedTuple):
    """Places a sweep's arrays: copied to every device of this process, or divided among them; one device keeps them.

    Attributes:
        mesh: the devices of this process along one axis.
    """

    mesh: Mesh

    @classmethod
    def local(cls) -> Spread:
        """Over all devices of this process."""
        return cls(Mesh(jax.local_devices(), ("patch",)))

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
