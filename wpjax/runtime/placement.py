"""Where arrays stand: a mesh of devices with two axes.

    patch    patches (or prompts, where models answer or are screened) are divided along it. Each of its rows of devices
             has both models, and nothing is exchanged along it while devices work; only results come back.
    model    the weights are cut along it: heads, KV groups, neurons, vocabulary (`models.sharding`). XLA adds the sums
             that this needs.

The weights of a pair are placed when it is loaded. Everything that runs them follows: `Placement.of(params)` says where
they stand, and `Placement.call` divides the work. So no function takes a mesh as an argument.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wpjax.errors import WpjaxError

T = TypeVar("T")

PATCHES, MODEL = "patch", "model"
"""Names of the axes of the mesh: patches are divided along the first, weights are cut along the second."""

AXES = (PATCHES, MODEL)

WHOLE = PartitionSpec()


class Placement(NamedTuple):
    """Places arrays on a mesh of devices, and divides work among them. On one device arrays stay as they are.

    Attributes:
        mesh: the devices, along the axes `PATCHES` and `MODEL`.

    >>> import jax.numpy as jnp
    >>> placement = Placement.on(jax.devices()[:1])
    >>> str(placement), placement.n_devices
    ('patch=1,model=1', 1)
    >>> placement.call(jnp.add, (), (1,), (jnp.arange(3),)).tolist()  # 1 stands whole on each device, 0 1 2 are divided
    [1, 2, 3]
    """

    mesh: Mesh

    @classmethod
    def on(cls, devices: Sequence[jax.Device] | None = None, model: int = 1) -> Placement:
        """A placement on given devices.

        Args:
            devices: the devices; None for all that this program has.
            model: number of devices that the weights are cut among; it divides the number of devices.
        """
        devices = jax.devices() if devices is None else list(devices)
        shape = len(devices) // model, model
        return cls(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices))

    @classmethod
    def single(cls) -> Placement:
        """A placement on one device, the first of this process."""
        return _single()

    @classmethod
    def of(cls, params: Any) -> Placement:
        """Where the arrays of a tree stand; one device if they were never placed.

        Args:
            params: a tree of arrays that were placed together, such as the parameters of a model.
        """
        for leaf in jax.tree.leaves(params):
            sharding = getattr(leaf, "sharding", None)
            if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == AXES:
                return cls(sharding.mesh)  # type: ignore[arg-type]
        return cls.single()

    @property
    def n_devices(self) -> int:
        """Number of devices."""
        return int(self.mesh.size)

    @property
    def n_patch(self) -> int:
        """Number of parts that patches are divided into. The length of an axis that is divided is a multiple of it."""
        return int(self.mesh.shape[PATCHES])

    @property
    def n_model(self) -> int:
        """Number of parts that the weights are cut into."""
        return int(self.mesh.shape[MODEL])

    def __str__(self) -> str:
        return f"{PATCHES}={self.n_patch},{MODEL}={self.n_model}"

    def _put(self, tree: T, spec: PartitionSpec) -> T:
        """The tree with every array on the mesh. One that stands on it already, however it is cut, is not moved."""
        if self.n_devices == 1:
            return tree

        def moved(leaf: Any) -> Any:
            sharding = getattr(leaf, "sharding", None)
            if isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh:
                return leaf
            return put(leaf, NamedSharding(self.mesh, spec))

        # by identity: a tied embedding, or a weight that base and expert share, takes memory once
        leaves, structure = jax.tree.flatten(tree)
        placed = {id(leaf): moved(leaf) for leaf in leaves if hasattr(leaf, "dtype")}
        return jax.tree.unflatten(structure, [placed.get(id(leaf), leaf) for leaf in leaves])

    def replicate(self, tree: T) -> T:
        """The tree with a copy of every array on each device.

        An array that stands in it twice is copied once. Arrays that stand on the mesh already stay as they are, so
        weights that are cut among devices remain so.
        """
        return self._put(tree, WHOLE)

    def shard(self, tree: T) -> T:
        """The tree with the leading axis of every array divided along `PATCHES`."""
        return self._put(tree, PartitionSpec(PATCHES))

    def call(
        self,
        run: Callable[..., T],
        static: tuple[Any, ...],
        whole: tuple[Any, ...],
        split: tuple[Any, ...],
        axis: int = 0,
        **options: Any,
    ) -> T:
        """Call `run(*static, *whole, *split, **options)` on all devices at once, each on its share of `split`.

        Rows must not act on each other: what the devices return is put together along `axis`.

        Args:
            run: a function that JAX can trace. It must be one object from call to call (no lambda, no closure), since
                the compiled program is kept by it.
            static: arguments that are not arrays; hashable.
            whole: trees of arrays that every device has.
            split: trees of arrays whose leading axis is divided; its length is a multiple of `n_patch`.
            axis: the axis of the rows in what `run` returns.
            options: more arguments that are not arrays; hashable.
        """
        if self.n_patch == 1:
            return run(*static, *self.replicate(whole), *self.replicate(split), **options)
        program = divided(self, run, static, len(whole), len(split), axis, **options)
        return program(*self.replicate(whole), *self.shard(split))


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array, which every process has, on the devices of a mesh.

    Of several processes each puts its own devices' share there. (`jax.device_put` would first send the whole array to
    all of them, to see whether they have the same.)
    """
    if sharding.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@functools.cache
def _single() -> Placement:
    return Placement.on(jax.local_devices()[:1])


@functools.cache
def divided(
    placement: Placement,
    run: Callable[..., T],
    static: tuple[Any, ...],
    n_whole: int,
    n_split: int,
    axis: int = 0,
    **options: Any,
) -> Callable[..., T]:
    """The compiled program of `Placement.call`.

    `PATCHES` is a manual axis: each device sees its own rows alone, so that nothing can be exchanged along it. `MODEL`
    is left to XLA, which finds how the weights are cut.

    Args:
        placement: the devices.
        run: the function.
        static: its first arguments, which are not arrays.
        n_whole: number of arguments that every device has.
        n_split: number of arguments whose leading axis is divided.
        axis: the axis of the rows in what it returns.
        options: more arguments that are not arrays.
    """
    specs = (WHOLE,) * n_whole + (PartitionSpec(PATCHES),) * n_split
    rows = PartitionSpec(*(None,) * axis, PATCHES)
    share = jax.shard_map(
        functools.partial(run, *static, **options),
        mesh=placement.mesh,
        in_specs=specs,
        out_specs=rows,
        axis_names={PATCHES},
        check_vma=False,
    )
    return jax.jit(share)


def fetch(tree: Any) -> Any:
    """The arrays of a tree on the host, as NumPy arrays; this waits until they are there.

    >>> import jax.numpy as jnp
    >>> fetch({"a": jnp.arange(3)})
    {'a': array([0, 1, 2], dtype=int32)}
    """

    def one(array: Any) -> np.ndarray:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:  # parts of it are another process's
            return np.asarray(multihost_utils.process_allgather(array, tiled=True))
        return np.asarray(array)

    return jax.tree.map(one, tree)


def read_mesh(text: str) -> dict[str, int]:
    """The sizes that a text such as "patch=4,model=2" gives to the axes of a mesh.

    Raises:
        WpjaxError: it is no list of axes and sizes.

    >>> read_mesh("patch=4,model=2")
    {'patch': 4, 'model': 2}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise WpjaxError(f"mesh {text!r}: give sizes of {' and '.join(AXES)}, each once, such as patch=4,model=2")
        sizes[name] = int(size)
    return sizes


def placement_for(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Placement:
    """The placement with a mesh of given sizes.

    Args:
        sizes: sizes of `PATCHES` and `MODEL`. Without the first, patches take all devices that are left; without the
            second, weights are not cut.
        devices: the devices to choose from; None for all. The first of them are used if the mesh needs fewer.

    Raises:
        WpjaxError: the mesh does not divide the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    given = math.prod(sizes.values())
    asked = ",".join(f"{name}={size}" for name, size in sizes.items())
    if len(devices) % given:
        has = f"{len(devices)} device{'s' * (len(devices) != 1)}"
        fitting = ", ".join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        raise WpjaxError(
            f"a mesh of {asked} takes {given} device{'s' * (given != 1)}, which does not divide the {has} here; "
            f"patch times model must be one of {fitting}"
        )
    n = given if PATCHES in sizes else len(devices)
    if jax.process_count() > 1 and n != len(devices):
        raise WpjaxError(
            f"a mesh of {asked} takes {n} of {len(devices)} devices; with several processes it must take all"
        )
    return Placement.on(devices[:n], sizes.get(MODEL, 1))


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
    """How an array with named axes is cut over a mesh.

    Args:
        axes: logical names of the array's axes, such as `models.parameters.PARAMETERS[path].axes`; parameters of all
            layers, stacked, have "layer" in front.
        rules: mesh axis that each logical axis is cut along; axes that are not named are whole on every device.

    Heads are cut along the mesh axis "model":

    >>> tuple(partition(("layer", "d_model", "head", "d_head"), {"head": "model"}))
    (None, None, 'model', None)
    """
    return PartitionSpec(*(rules.get(axis) for axis in axes))
