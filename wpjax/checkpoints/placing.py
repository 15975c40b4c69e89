"""From the tensors of a checkpoint to arrays on devices, one leaf at a time.

The layers of a leaf are written, one after the other, into the memory that is uploaded: cut, turned and cast on the
way, a few rows at a time. What one device is to hold is made once, however many devices hold it. So a process needs, in
its own memory, at most the part of one leaf that its devices hold. A CPU device takes that memory over, and nothing is
copied.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from wpjax.errors import CheckpointError

Place: TypeAlias = Callable[[str, tuple[int, ...]], Sharding]
"""Where a leaf is to stand: from its path, such as "blocks/attn/W_Q", and its whole shape to a sharding."""

_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
"""Dtype -> the bits of its exponent. All of them are set in NaN and in infinity, and in nothing else."""

_TURNED_ROWS = 16
"""Rows of a tensor that are turned together. Both what is read and what is written then stay in the caches."""

_PIECE = 2**17
"""Numbers that are checked and cast together, while they are in the caches."""

_LARGE = 2**20
"""Numbers of a tensor from which on several threads copy it."""

_THREADS = min(8, os.cpu_count() or 1)

_ALIGNED = 64
"""JAX takes memory over on a CPU if it begins at a multiple of so many bytes."""


class Layer(NamedTuple):
    """One layer of a leaf, or a whole leaf that has no layers.

    Attributes:
        name: HF name of the tensor, for messages.
        value: its numbers in the leaf's layout; a view of a file, as a rule.
    """

    name: str
    value: np.ndarray


class _Block(NamedTuple):
    """What some devices hold of a leaf.

    Attributes:
        spans: where each of its axes begins and ends in the whole leaf.
        devices: the devices.
        values: its numbers, in memory that JAX may take over.
    """

    spans: tuple[tuple[int, int], ...]
    devices: list[jax.Device]
    values: np.ndarray


def put_leaf(
    shape: tuple[int, ...],
    dtype: np.dtype,
    layers: Iterable[Layer],
    sharding: Sharding | None = None,
    where: str | None = None,
    twin: jax.Array | None = None,
) -> jax.Array:
    """A leaf on devices.

    Args:
        shape: the whole leaf's.
        dtype: the leaf's; numbers of other dtypes are cast.
        layers: its layers in their order, each of `shape[1:]`; or one value of the whole `shape`.
        sharding: where it is to stand; None for the default device. A process makes only what its own devices hold.
        where: the file or folder, for messages; None to let NaN and infinity pass.
        twin: a leaf that may hold the same numbers. If it holds the very same bytes at the same place, it is returned.

    Raises:
        CheckpointError: a number is NaN or infinite, or no float.

    >>> values = np.arange(6, dtype=np.float32).reshape(2, 3)
    >>> leaf = put_leaf((2, 3), np.dtype("float32"), [Layer("a", row) for row in values])
    >>> bool((leaf == values).all())
    True
    >>> put_leaf((2, 3), np.dtype("float32"), [Layer("b", values)], twin=leaf) is leaf
    True
    """
    gc.collect(0)  # JAX lets go here of the memory of arrays that are gone
    blocks = _blocks(shape, dtype, sharding)
    for number, (name, value) in enumerate(layers):
        is_stacked = value.ndim < len(shape)
        for block in blocks:
            spans, values = block.spans, block.values
            if is_stacked:
                (start, stop), *rest = spans
                if not start <= number < stop:
                    continue
                spans, values = tuple(rest), values[number - start]
            _copy(value[tuple(slice(*span) for span in spans)], values, where, name)
    if twin is not None and _is_twin(twin, shape, dtype, sharding, blocks):
        return twin
    if sharding is None:
        leaf = jax.device_put(blocks[0].values)
    else:
        arrays = [jax.device_put(block.values, device) for block in blocks for device in block.devices]
        leaf = jax.make_array_from_single_device_arrays(shape, sharding, arrays, dtype=dtype)
    # Until it has arrived, its memory here cannot be freed, and the next leaf would add its own.
    return jax.block_until_ready(leaf)


def _blocks(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None) -> list[_Block]:
    """The parts of a leaf that devices of this process hold, each once."""
    whole = tuple((0, n) for n in shape)
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    if sharding is None:
        devices[whole] = []
    else:
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            spans = tuple(part.indices(n)[:2] for part, n in zip(index or (), shape, strict=True))
            devices.setdefault(spans, []).append(device)
    return [
        _Block(spans, on, _aligned(tuple(stop - start for start, stop in spans), dtype))
        for spans, on in devices.items()
    ]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory of some shape that begins where JAX wants it to."""
    n = math.prod(shape) * dtype.itemsize
    raw = np.empty(n + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + n].view(dtype).reshape(shape)


def _copy(source: np.ndarray, target: np.ndarray, where: str | None, name: str) -> None:
    """Copy numbers, with their check and their cast, in pieces along the axis that is the slowest in the source."""
    if source.ndim == 0 or source.size == 0:
        target[...] = source
        return
    axis = int(np.argmax(source.strides))
    is_turned = target.strides[axis] < max(target.strides)
    rows, places = np.moveaxis(source, axis, 0), np.moveaxis(_bits(target), axis, 0)
    step = max(1, _PIECE // rows[0].size)
    together = _TURNED_ROWS if is_turned else step

    def copy(span: range) -> None:
        for start in range(span.start, span.stop, step):
            piece = rows[start : min(start + step, span.stop)]
            if where is not None:
                finite_floats(where, name, piece)
            if piece.dtype != target.dtype:
                piece = np.ascontiguousarray(piece).astype(target.dtype)
            for first in range(0, len(piece), together):
                some = piece[first : first + together]
                places[start + first : start + first + len(some)] = _bits(some)

    if source.size < _LARGE:
        copy(range(len(rows)))
        return
    share = step * math.ceil(len(rows) / (step * _THREADS))
    with ThreadPoolExecutor(_THREADS) as pool:  # NumPy lets other threads run while it copies, and while it reads
        list(pool.map(copy, (range(start, min(start + share, len(rows))) for start in range(0, len(rows), share))))


def _bits(values: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers: NumPy copies these faster than bfloat16, and compares NaN as well."""
    return values.view(f"u{values.dtype.itemsize}")


def finite_floats(where: str, name: str, tensor: np.ndarray) -> np.ndarray:
    """The tensor, if it holds finite floats.

    Args:
        where: the file or folder, for messages.
        name: name of the tensor, for messages.
        tensor: the tensor as it was read.

    Raises:
        CheckpointError: it does not.

    >>> finite_floats("model", "w", np.ones(2, np.float32)).dtype
    dtype('float32')
    """
    if tensor.dtype.name not in _EXPONENTS:
        raise CheckpointError(
            f"{where}: tensor {name} has dtype {tensor.dtype.name}; only {', '.join(_EXPONENTS)} can be read, "
            "so dequantise the checkpoint first"
        )
    values = tensor
    if tensor.dtype == np.float64:
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
            values = tensor.astype(np.float32)
    # With the sign as the highest bit: as signed integers the positive ones among NaN and infinity are the largest of
    # all numbers, and as unsigned integers the negative ones are. So nothing is copied, and nothing is masked.
    bits, exponent = _bits(values), _EXPONENTS[values.dtype.name]
    sign = 1 << (8 * values.dtype.itemsize - 1)
    signed = bits.view(bits.dtype.name.removeprefix("u"))
    if values.size and (signed.max() >= exponent or bits.max() >= sign + exponent):
        raise CheckpointError(f"{where}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
    return tensor


def _is_twin(
    twin: jax.Array, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None, blocks: list[_Block]
) -> bool:
    """Whether a leaf holds what was made for devices, bit for bit, at the same place.

    All processes give the same answer, so that they go on with the same arrays.
    """
    if twin.shape != shape or twin.dtype != dtype:
        return False
    if len(twin.devices()) > 1 if sharding is None else not twin.sharding.is_equivalent_to(sharding, len(shape)):
        return False
    there = {shard.device: shard.data for shard in twin.addressable_shards}
    same = all(_same_bytes(block.values, there[(block.devices or list(there))[0]]) for block in blocks)
    if jax.process_count() > 1:
        same = bool(multihost_utils.process_allgather(np.array(same)).all())
    return same


def _same_bytes(ours: np.ndarray, theirs: jax.Array) -> bool:
    """Whether an array on one device holds the same bytes. In most trained models the first piece says no."""
    if ours.shape != theirs.shape:
        return False
    start = 0
    for piece in host_pieces(theirs):
        if not np.array_equal(_bits(ours[start : start + len(piece)]), _bits(piece)):
            return False
        start += len(piece)
    return True


def host_pieces(leaf: Any) -> Iterator[np.ndarray]:
    """An array's numbers in host memory, some rows after the other."""
    step = max(1, 4 * _PIECE // max(1, math.prod(leaf.shape[1:])))
    for start in range(0, len(leaf), step):
        yield host_rows(leaf, start, min(start + step, len(leaf)))


def host_rows(leaf: Any, start: int, stop: int) -> np.ndarray:
    """Rows of an array in host memory, those that other processes hold included.

    To ask for the whole array would keep a copy of it: JAX holds what it once gave for as long as the array lives.

    Args:
        leaf: the array, JAX's or NumPy's.
        start: its first row.
        stop: the row after the last. All processes ask for the same rows.

    >>> host_rows(jax.numpy.arange(5), 1, 3).tolist()
    [1, 2]
    """
    if not isinstance(leaf, jax.Array) or [device.platform for device in leaf.devices()] == ["cpu"]:
        return np.asarray(leaf)[start:stop]  # where it is; nothing is copied
    rows = jax.lax.dynamic_slice_in_dim(leaf, start, stop - start)
    return np.asarray(rows) if rows.is_fully_addressable else multihost_utils.process_allgather(rows, tiled=True)
