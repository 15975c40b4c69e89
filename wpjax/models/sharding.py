"""How a model's weights are cut over a mesh, what they take on each device, and which mesh a pair of models needs.

The names of a parameter's axes (`models.parameters`) say how it is cut: heads, KV groups, neurons and the vocabulary
along the mesh axis "model", everything else not at all. An axis whose length is no multiple of that of the mesh stays
whole, as the three KV groups of a small model on two devices.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from wpjax.errors import WpjaxError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, abstract_params
from wpjax.models.parameters import PARAMETERS
from wpjax.runtime.placement import MODEL, Placement, partition, put

RULES: Mapping[str, str] = MappingProxyType(dict.fromkeys(("head", "kv_head", "neuron", "vocab"), MODEL))
"""Logical axis of a parameter -> the mesh axis that it is cut along."""

WORKING_TOKENS = 2048
"""Packed tokens of the prompts of a usual sweep, about: what memory is kept free for when a mesh is chosen."""

MOST_DEVICES = 4096
"""Devices that a mesh is looked for among, to say what would hold a model that does not fit here."""


def spec_of(path: str, shape: tuple[int, ...], n_model: int) -> PartitionSpec:
    """How a leaf is cut among devices.

    Args:
        path: path of the leaf in the parameter tree; leaves under "blocks" are stacked over layers.
        shape: its shape.
        n_model: number of parts along the mesh axis "model".

    Four heads go to two devices, two each; three KV groups stay together:

    >>> tuple(spec_of("blocks/attn/W_Q", (30, 16, 4, 4), 2)), tuple(spec_of("blocks/attn/W_K", (30, 16, 3, 4), 2))
    ((None, None, 'model', None), (None, None, None, None))
    """
    axes = ("layer",) * path.startswith("blocks/") + PARAMETERS[path].axes
    divisible = [axis if n % n_model == 0 else "" for axis, n in zip(axes, shape, strict=True)]
    return partition(divisible, RULES)


def leaf_places(placement: Placement) -> Callable[[str, tuple[int, ...]], NamedSharding] | None:
    """Where each leaf of a model is to stand, from its path and shape; None for the default device.

    Args:
        placement: the devices.
    """
    if placement.n_devices == 1:
        return None

    def where(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(placement.mesh, spec_of(path, shape, placement.n_model))

    return where


def place(placement: Placement, *models: Params) -> tuple[Params, ...]:
    """Parameter trees on the devices of a mesh. Arrays that the trees share are still shared.

    Args:
        placement: the devices.
        models: plain parameter trees, without masks.

    >>> from wpjax.models.decoder import init_params
    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)
    >>> (params,) = place(Placement.single(), init_params(cfg, jax.random.key(0)))
    >>> Placement.of(params).n_devices
    1
    """
    done: dict[int, jax.Array] = {}
    where = leaf_places(placement)

    def moved(path: str, leaf: Any) -> jax.Array:
        """A leaf where it should be. If it stands there, it is not moved."""
        if where is not None:
            return put(leaf, where(path, leaf.shape))
        is_cut = isinstance(getattr(leaf, "sharding", None), NamedSharding)
        return jax.device_put(leaf, placement.mesh.devices.flat[0]) if is_cut else leaf

    def placed(tree: Any, prefix: str = "") -> Any:
        if isinstance(tree, dict):
            return {name: placed(branch, f"{prefix}{name}/") for name, branch in tree.items()}
        if id(tree) not in done:
            done[id(tree)] = moved(prefix[:-1], tree)
        return done[id(tree)]

    return tuple(placed(model) for model in models)


def weight_bytes(cfg: ModelConfig, dtype: Any, n_model: int = 1) -> int:
    """Bytes that the weights of one model take on each device.

    Args:
        cfg: the model.
        dtype: dtype of the weights.
        n_model: number of devices that they are cut among.

    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)
    >>> weight_bytes(cfg, "float32"), weight_bytes(cfg, "float32", n_model=2)
    (25152, 12736)
    """
    total = 0
    for path, leaf in _leaves(abstract_params(cfg)):
        is_cut = MODEL in spec_of(path, leaf.shape, n_model)
        total += math.prod(leaf.shape) // (n_model if is_cut else 1)
    return total * np.dtype(dtype).itemsize


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Paths and leaves of a parameter tree."""
    if not isinstance(tree, dict):
        return [(prefix[:-1], tree)]
    return [leaf for name, branch in tree.items() for leaf in _leaves(branch, f"{prefix}{name}/")]


def row_numbers(cfg: ModelConfig, n_keys: int, n_model: int = 1) -> float:
    """Numbers that a token of one forward pass takes on a device while a layer runs, estimated.

    Args:
        cfg: the model.
        n_keys: number of keys that the token is compared with.
        n_model: number of devices that the weights are cut among.
    """
    # Queries and outputs, keys and values, scores and probabilities. Attention and MLP take turns.
    heads = n_model if cfg.n_heads % n_model == 0 else 1
    groups = n_model if cfg.n_kv_heads % n_model == 0 else 1
    attention = (2 * cfg.d_head + 2 * n_keys) * cfg.n_heads / heads + 2 * cfg.d_head * cfg.n_kv_heads / groups
    return 4 * cfg.d_model + max(attention, 3 * cfg.d_mlp / (n_model if cfg.d_mlp % n_model == 0 else 1))


def working_bytes(cfg: ModelConfig, n_model: int = 1) -> int:
    """Bytes beside the weights that a sweep of usual prompts needs on each device, estimated.

    These are the stream before and after every layer of base and expert, and one patch.
    """
    kept = 2 * 2 * cfg.n_layers * cfg.d_model
    return int(4 * WORKING_TOKENS * (kept + row_numbers(cfg, WORKING_TOKENS // 32, n_model)))


def memory_of(device: jax.Device) -> int:
    """Bytes of memory of a device; of a CPU its share of the machine's, if it is divided into several devices."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.local_devices())


def choose_placement(cfg: ModelConfig, dtype: Any, n_models: int = 2) -> Placement:
    """The mesh for a pair of models: of all devices, and with weights that are cut as little as their memory allows.

    Args:
        cfg: the architecture of both models.
        dtype: dtype of the weights.
        n_models: how many models must fit at least: 1 where the second shares most of its weights with the first.

    Raises:
        WpjaxError: no mesh of these devices holds the models, and what a sweep needs beside them.

    >>> choose_placement(ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64), "float32").n_model  # it is small
    1
    """
    devices = jax.devices()
    memory = min(memory_of(device) for device in devices if device.process_index == jax.process_index())
    n_model = fewest_parts(cfg, dtype, len(devices), memory)
    if n_model is None and needed_bytes(cfg, dtype, len(devices), n_models) <= memory:
        n_model = len(devices)
    if n_model is None:
        raise WpjaxError(_too_large(cfg, dtype, memory, len(devices), n_models))
    return Placement.on(devices, n_model)


def fewest_parts(cfg: ModelConfig, dtype: Any, n_devices: int, memory: int) -> int | None:
    """The fewest parts to cut weights into, so that a sweep of a pair fits; None if none are enough.

    Args:
        cfg: the architecture of both models.
        dtype: dtype of the weights.
        n_devices: number of devices; the parts divide it.
        memory: bytes of each device.
    """
    whole = (n for n in range(1, n_devices + 1) if n_devices % n == 0)
    return next((n for n in whole if needed_bytes(cfg, dtype, n) <= memory), None)


def needed_bytes(cfg: ModelConfig, dtype: Any, n_model: int, n_models: int = 2) -> int:
    """Bytes on each device that a sweep of a pair needs, estimated."""
    return n_models * weight_bytes(cfg, dtype, n_model) + working_bytes(cfg, n_model)


def _too_large(cfg: ModelConfig, dtype: Any, memory: int, n_devices: int, n_models: int) -> str:
    """What is too large, and what would hold it, in words."""
    GiB = 2**30

    def holds(dtype: Any) -> int | None:
        sizes = [2**i for i in range(MOST_DEVICES.bit_length())]
        return next((n for n in sizes if needed_bytes(cfg, dtype, n, n_models) <= memory), None)

    half = np.dtype(dtype).itemsize > 2
    ways = [(holds(dtype), ""), *([(holds("uint16"), " with --dtype bfloat16x2")] if half else [])]
    would = [f"a mesh of model={n}{how}" for n, how in ways if n is not None]
    largest = f"cut among {n_devices} devices, " if n_devices > 1 else ""
    return (
        f"base and expert take {n_models * weight_bytes(cfg, dtype) / GiB:,.1f} GiB; {largest}they and the sweep need "
        f"{needed_bytes(cfg, dtype, n_devices, n_models) / GiB:,.1f} GiB a device, and a device has "
        f"{memory / GiB:,.1f}; "
        + (f"{' or '.join(would)} of such devices would hold them" if would else "devices with more memory are needed")
        + "; --mesh tries it all the same"
    )


@functools.cache
def described(placement: Placement, cfg: ModelConfig, dtype: Any, how: str) -> str:
    """A mesh in words, for the plan of a run.

    Args:
        placement: the mesh.
        cfg: the architecture of the models.
        dtype: dtype of the weights.
        how: where the mesh comes from, in words.
    """
    devices = placement.mesh.devices.flatten()
    here = placement.mesh.local_devices[0]  # the memory of another process's is not known
    need = needed_bytes(cfg, dtype, placement.n_model) / 2**30
    has = memory_of(here) / 2**30
    return (
        f"mesh {placement} of {len(devices)} {here.device_kind} device{'s' * (len(devices) != 1)}, {how}: about "
        f"{need:,.2f} of {has:,.2f} GiB a device for both models and the sweep"
    )
