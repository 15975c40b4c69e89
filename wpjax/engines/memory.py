"""What sweeps take of a device's memory, estimated, and how many patches run together."""

from __future__ import annotations

import math

import jax

from wpjax.engines.packing import Packing
from wpjax.models.config import ModelConfig

CPU_BUDGET, CPU_TOKENS = 16 * 2**20, 1280
"""Bytes of the rows that run together on a CPU, or so many tokens if these are more: these fill a product. Beyond twice
that, what no longer fits a cache slows down all between the products.
"""

STREAMS = 3
"""Residual streams that a row takes while others run: before a layer, after it, and as it entered."""


def bytes_of_row(cfg: ModelConfig, n_tokens: int, n_keys: int, n_copied: int = 0) -> int:
    """Estimate of the temporary memory of one forward pass: the widest layer's activations, float32.

    Args:
        cfg: the model.
        n_tokens: that are computed.
        n_keys: that each token is compared with.
        n_copied: tokens whose keys and values are laid out again.
    """
    attention = cfg.d_head * (2 * cfg.n_heads + 2 * cfg.n_kv_heads) + 2 * cfg.n_heads * n_keys
    copied = 2 * n_copied * cfg.n_kv_heads * cfg.d_head
    return 4 * (n_tokens * (4 * cfg.d_model + max(attention, 3 * cfg.d_mlp)) + copied)


def bytes_per_row(cfg: ModelConfig, packing: Packing) -> int:
    """Estimate of the temporary memory of one patch on packed prompts."""
    n_copied = packing.n_keys * (len(packing.packed.segments) + len(packing.bin))
    return bytes_of_row(cfg, packing.n_tokens, packing.n_keys, n_copied)


def rows_together(row_bytes: int, n_tokens: int) -> int | None:
    """How many rows of so many bytes and tokens a CPU should take through a layer together, up to twice as many at
    most; None on an accelerator, where more are better.
    """
    if jax.default_backend() != "cpu":
        return None
    return math.ceil(max(CPU_BUDGET / row_bytes, CPU_TOKENS / n_tokens))


def groups(cfg: ModelConfig, packing: Packing, n_rows: int) -> tuple[int, int]:
    """Into how many groups the rows of a program are divided, and how many run together; the last may be filled up."""
    n = max(1, n_rows // (rows_together(bytes_per_row(cfg, packing), packing.n_tokens) or n_rows))
    return n, math.ceil(n_rows / n)


def bytes_of_rows(cfg: ModelConfig, packing: Packing, n_rows: int) -> int:
    """Estimate of the temporary memory of a program of so many patches on a device."""
    _, together = groups(cfg, packing, n_rows)
    waiting = 4 * STREAMS * packing.n_tokens * cfg.d_model
    return together * bytes_per_row(cfg, packing) + (n_rows - together) * waiting


def device_budget() -> int | None:
    """Bytes for temporary memory on a device, a third of what is free; None where JAX does not say: on CPUs."""
    found = [device.memory_stats() for device in jax.local_devices()]
    free = [stats["bytes_limit"] - stats["bytes_in_use"] for stats in found if stats and "bytes_limit" in stats]
    return int(min(free)) // 3 if free else None
