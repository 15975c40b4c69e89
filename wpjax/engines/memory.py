"""Estimates of the memory that patches take on a device, and how many patches run together."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.experimental import multihost_utils

from wpjax.engines.packing import Packing
from wpjax.models.config import ModelConfig
from wpjax.models.sharding import row_numbers

CPU_BUDGET, CPU_TOKENS = 16 * 2**20, 1280
"""What runs together on a CPU: rows of so many bytes, or of so many tokens, whichever are more rows.

Fewer tokens do not fill a matrix product. With more than twice these bytes the activations no longer fit the cache, and
everything between the products slows down.
"""

STREAMS = 3
"""Copies of the residual stream that a row keeps while other rows run: before a layer, after it, and as it entered."""


def bytes_of_row(cfg: ModelConfig, n_tokens: int, n_keys: int, n_copied: int = 0, n_model: int = 1) -> int:
    """Bytes of temporary memory of one forward pass, estimated: the activations of one layer in float32.

    Args:
        cfg: the model.
        n_tokens: number of tokens that are computed.
        n_keys: number of keys that each token is compared with.
        n_copied: number of tokens whose keys and values are copied into another layout.
        n_model: number of devices that the weights are cut among.

    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)
    >>> bytes_of_row(cfg, n_tokens=10, n_keys=10)
    7680
    """
    groups = n_model if cfg.n_kv_heads % n_model == 0 else 1
    copied = 2 * n_copied * cfg.n_kv_heads * cfg.d_head / groups
    return int(4 * (n_tokens * row_numbers(cfg, n_keys, n_model) + copied))


def bytes_per_row(cfg: ModelConfig, packing: Packing, n_model: int = 1) -> int:
    """Bytes of temporary memory of one patch on packed prompts, estimated."""
    # Each bin has its own copy of the shared keys, and each prompt that of its bin in the layer that is read.
    n_copied = packing.n_keys * (len(packing.packed.segments) + len(packing.bin))
    return bytes_of_row(cfg, packing.n_tokens, packing.n_keys, n_copied, n_model)


def rows_together(row_bytes: int, n_tokens: int) -> int | None:
    """How many rows a CPU should take through a layer together; it should not take more than twice as many.

    Args:
        row_bytes: temporary memory of a row.
        n_tokens: tokens of a row.

    Returns:
        a number of rows; None on an accelerator, where more rows are always better.
    """
    if jax.default_backend() != "cpu":
        return None
    return math.ceil(max(CPU_BUDGET / row_bytes, CPU_TOKENS / n_tokens))


def groups(cfg: ModelConfig, packing: Packing, n_rows: int) -> tuple[int, int]:
    """How the rows of a program are divided into groups that run one after the other.

    Returns:
        (number of groups, rows of each). The last group is filled up if it is not full.
    """
    n = max(1, n_rows // (rows_together(bytes_per_row(cfg, packing), packing.n_tokens) or n_rows))
    return n, math.ceil(n_rows / n)


def bytes_of_rows(cfg: ModelConfig, packing: Packing, n_rows: int, n_model: int = 1) -> int:
    """Bytes of temporary memory of a program with so many patches on one device, estimated."""
    _, together = groups(cfg, packing, n_rows)
    waiting = 4 * STREAMS * packing.n_tokens * cfg.d_model
    return together * bytes_per_row(cfg, packing, n_model) + (n_rows - together) * waiting


def device_budget() -> int | None:
    """Bytes that temporary memory may take: a third of what is free on the fullest device.

    None where JAX does not know, as on CPUs. Processes that work together take the least that any of them has, so that
    they run programs of one shape.
    """
    by_device = [device.memory_stats() for device in jax.local_devices()]
    free = [stats["bytes_limit"] - stats["bytes_in_use"] for stats in by_device if stats and "bytes_limit" in stats]
    if free and jax.process_count() > 1:
        megabytes = np.array(min(free) // 2**20, np.int32)  # JAX would cut off a number of 64 bits
        free = [2**20 * int(n) for n in multihost_utils.process_allgather(megabytes)]
    return int(min(free)) // 3 if free else None
