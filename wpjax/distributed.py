"""Patches over the devices of a process: each device holds both models and takes an equal share of every chunk.

Nothing is exchanged on the way: a patch is independent of all others, so only scores come back. A model that does not
fit one device is not served by this.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")


class Spread(NamedTuple):
    """Where arrays of a sweep stand; leaves everything as it is where there is one device.

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
        """A copy of every array on each device."""
        return self._put(tree, PartitionSpec())

    def split(self, tree: T) -> T:
        """The leading axis of every array divided among the devices."""
        return self._put(tree, PartitionSpec("patch"))

    def _put(self, tree: T, spec: PartitionSpec) -> T:
        return tree if self.n_devices == 1 else jax.device_put(tree, NamedSharding(self.mesh, spec))
