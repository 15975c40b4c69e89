"""Rotary position embedding (arXiv 2104.09864) in the half-split layout of HF checkpoints."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.models.config import ModelConfig, Rope
from wpjax.models.ops import linear
from wpjax.models.secant import Value


def frequencies(rope: Rope, d_head: int) -> tuple[np.ndarray, float]:
    """The frequency of each pair of dimensions that is rotated, and a factor on cosine and sine.

    The variants follow HF's `modeling_rope_utils`, for sequences that fit into the context (`ModelConfig.n_ctx`):

    - linear: positions are divided by `factor`;
    - dynamic: nothing changes up to `n_ctx`;
    - llama3: low frequencies are divided by `factor`, with a smooth passage to high ones;
    - yarn: arXiv 2309.00071;
    - longrope: arXiv 2402.13753. Its short factors hold up to the original context, to which the reader of config.json
      sets `n_ctx`; its long ones (`Rope.is_long`) for all sequences that are longer.

    Args:
        rope: the embedding.
        d_head: width of a head.

    Returns:
        (frequencies in radians a token, one for each pair; factor on cosine and sine).

    >>> print(frequencies(Rope(), d_head=4)[0])  # two pairs
    [1.   0.01]
    """
    opt: dict[str, Any] = dict(rope.options)
    d = int(d_head * rope.fraction)
    wavelength = np.float32(rope.theta) ** (np.arange(0, d, 2, dtype=np.float32) / np.float32(d))
    inv_freq = (np.float32(1.0) / wavelength).astype(np.float32)
    if rope.scaling in ("default", "dynamic"):
        return inv_freq, 1.0
    if rope.scaling == "linear":
        return inv_freq / np.float32(opt["factor"]), 1.0
    if rope.scaling == "llama3":
        return _llama3(inv_freq, opt), 1.0
    if rope.scaling == "yarn":
        return _yarn(rope.theta, inv_freq, opt)
    return _longrope(wavelength, opt, rope.is_long)


def _llama3(inv_freq: np.ndarray, opt: dict[str, Any]) -> np.ndarray:
    """Frequencies of Llama 3.1: high ones as they are, low ones divided by `factor`, between these a mix."""
    n_ctx, factor = opt["original_max_position_embeddings"], opt["factor"]
    low, high = opt["low_freq_factor"], opt["high_freq_factor"]
    turns = n_ctx * inv_freq / (2 * math.pi)  # rotations within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - smooth) * inv_freq / factor + smooth * inv_freq).astype(np.float32)


def _yarn(theta: float, inv_freq: np.ndarray, opt: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Frequencies and scale of YaRN (arXiv 2309.00071)."""
    n_ctx = opt["original_max_position_embeddings"]
    factor = opt["factor"]
    d = 2 * len(inv_freq)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale = opt.get("attention_factor")
    if scale is None:
        both = opt.get("mscale") and opt.get("mscale_all_dim")
        scale = mscale(opt["mscale"]) / mscale(opt["mscale_all_dim"]) if both else mscale(1.0)

    def dim_with(rotations: float) -> float:  # the (fractional) pair that turns so many times within the context
        return (d * math.log(n_ctx / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dim_with(opt.get("beta_fast") or 32), dim_with(opt.get("beta_slow") or 1)
    if opt.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001  # as in transformers: no division by 0
    interpolated = np.clip((np.arange(d // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    mixed = inv_freq / factor * interpolated + inv_freq * (1 - interpolated)
    return mixed.astype(np.float32), float(scale)


def _longrope(wavelength: np.ndarray, opt: dict[str, Any], is_long: bool) -> tuple[np.ndarray, float]:
    """Frequencies and scale of LongRoPE (arXiv 2402.13753), with its short or its long factors."""
    n_ctx, factor = opt["original_max_position_embeddings"], opt["factor"]
    scale = opt.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(n_ctx))
    stretch = np.asarray(opt["long_factor" if is_long else "short_factor"], np.float32)
    return (1.0 / (stretch * wavelength)).astype(np.float32), float(scale)


def rotate(
    cfg: ModelConfig, x: Float[Value, "B T N Dh"], positions: Int[Array, "#B T"], layer: Int[Array, ""] | int
) -> Float[Value, "B T N Dh"]:
    """Turn each pair (i, i + d/2) of a head's first d dimensions by the angle position * frequency.

    d is the width of the head unless `Rope.fraction` is less than 1.

    Args:
        cfg: the model.
        x: queries or keys, of N heads.
        positions: positions of the tokens in their prompts.
        layer: number of the layer; it may be traced. Layers with a sliding window turn by `cfg.local_rope`, if there
            is one; those in `cfg.unrotated` do not turn.

    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)
    >>> x = jnp.ones((1, 2, 1, 4))
    >>> bool((rotate(cfg, x, jnp.array([[0, 1]]), 0)[0, 0] == x[0, 0]).all())  # nothing turns at position 0
    True
    """
    assert cfg.rope is not None
    inv_freq: Any
    scale: Any
    inv_freq, scale = frequencies(cfg.rope, cfg.d_head)
    if cfg.local_rope is not None:
        is_local = jnp.asarray(cfg.sliding)[layer]
        local_freq, local_scale = frequencies(cfg.local_rope, cfg.d_head)
        inv_freq, scale = jnp.where(is_local, local_freq, inv_freq), jnp.where(is_local, local_scale, scale)
    if any(cfg.unrotated):
        stays = jnp.asarray(cfg.unrotated)[layer]
        inv_freq, scale = jnp.where(stays, 0.0, inv_freq), jnp.where(stays, 1.0, scale)
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(inv_freq)
    cos = (jnp.cos(angle) * scale)[:, :, None, :]
    sin = (jnp.sin(angle) * scale)[:, :, None, :]
    half = len(inv_freq)

    def turned(x: Array) -> Array:
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        pairs = [a * cos - b * sin, b * cos + a * sin]
        return jnp.concatenate([*pairs, rest] if rest.shape[-1] else pairs, axis=-1)

    return linear(turned, x)
