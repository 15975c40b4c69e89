"""Where arrays stand: patches are divided among the devices of a mesh, and each device has a copy of both models.

Patches are independent, so devices exchange nothing while they work; only results come back. A model that does not fit
on one device cannot be swept yet. How its parameters would be cut follows from their logical axes
(`models.parameters`); `partition` says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wpjax.errors import WpjaxError

T = TypeVar("T")

PATCHES = "patch"
"""Name of the mesh axis that patches are divided along."""

WHOLE, SPLIT = PartitionSpec(), PartitionSpec(PATCHES)


class Placement(NamedTuple):
    """Places the arrays of a sweep on devices: as a copy on each, or divided among them.

    On a single device arrays stay as they are.

    Attributes:
        mesh: the devices, along one axis named `PATCHES`.
    """

    mesh: Mesh

    @classmethod
    def on(cls, devices: Sequence[jax.Device] | None = None) -> Placement:
        """A placement on given devices; None for all devices of this process.

        >>> Placement.on(jax.local_devices()[:1]).n_devices
        1
        """
        return cls(Mesh(jax.local_devices() if devices is None else list(devices), (PATCHES,)))

    @classmethod
    def single(cls) -> Placement:
        """A placement on one device, the first of this process."""
        return cls.on(jax.local_devices()[:1])

    @property
    def n_devices(self) -> int:
        """Number of devices. The length of an axis that is divided must be a multiple of it."""
        return int(self.mesh.size)

    def replicate(self, tree: T) -> T:
        """The tree with a copy of every array on each device. An array that stands in it twice is copied once."""
        if self.n_devices == 1:
            return tree
        # by identity: a tied embedding, or a weight that base and expert share, takes memory once
        leaves, structure = jax.tree.flatten(tree)
        placed = {id(leaf): jax.device_put(leaf, NamedSharding(self.mesh, WHOLE)) for leaf in leaves}
        return jax.tree.unflatten(structure, [placed[id(leaf)] for leaf in leaves])

    def shard(self, array: Any) -> jax.Array:
        """An array [N, ...] with its leading axis divided among the devices."""
        return jnp.asarray(array) if self.n_devices == 1 else jax.device_put(array, NamedSharding(self.mesh, SPLIT))

    def divide(self, run: Callable[..., T], n_whole: int, n_split: int) -> Callable[..., T]:
        """A function that runs on all devices at once, each on its share of the rows.

        What the devices return is put together along the leading axis.

        Args:
            run: function of `n_whole` + `n_split` arguments, in this order.
            n_whole: number of arguments that each device has a copy of.
            n_split: number of arguments whose leading axis is divided.
        """
        specs = (WHOLE,) * n_whole + (SPLIT,) * n_split
        return jax.shard_map(run, mesh=self.mesh, in_specs=specs, out_specs=SPLIT, check_vma=False)


def check_devices() -> None:
    """Refuse to go on without a device, before any work is done.

    Raises:
        WpjaxError: JAX finds none; as a rule the environment variable JAX_PLATFORMS names one that is not there.

    >>> check_devices()  # no error: there is one
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # which of them depends on the name
        asked, why = os.environ.get("JAX_PLATFORMS", ""), str(error) or "it is not there"
        raise WpjaxError(
            f"JAX finds no device for JAX_PLATFORMS={asked!r} ({why}); unset it, or install JAX for that device"
        ) from error


def partition(axes: Sequence[str], rules: Mapping[str, str]) -> PartitionSpec:
    """How an array with named axes would be cut over a mesh.

    Args:
        axes: logical names of the array's axes, such as `models.parameters.PARAMETERS[path].axes`; parameters of all
            layers, stacked, have "layer" in front.
        rules: mesh axis that each logical axis is cut along; axes that are not named are whole on every device.

    Heads are cut along the mesh axis "model":

    >>> tuple(partition(("layer", "d_model", "head", "d_head"), {"head": "model"}))
    (None, None, 'model', None)
    """
    return PartitionSpec(*(rules.get(axis) for axis in axes))
