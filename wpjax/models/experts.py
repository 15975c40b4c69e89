"""The products of routed experts, without those of experts that a token does not go to.

All experts at all tokens take E / k times the products that k active experts need. Here the pairs of a token and one of
its experts are sorted by expert, and cut into blocks of one expert each; the last block of an expert is filled up:

    N tokens, E experts, k of them active, blocks of b rows      at most N k / b + E blocks, in place of N E / b

A block takes its expert's weights and makes three products. The numbers are those of the plain way (`MLP.neurons` and
`MLP.out`) up to rounding, and slopes are taken along that one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wpjax.models.config import ModelConfig
from wpjax.models.leaves import project

SMALLEST, LARGEST = 16, 512
"""Rows of a block: fewer do not fill a product, and more save nothing."""


class Weights(NamedTuple):
    """The weights of a layer's experts, as an MLP without biases has them.

    Attributes:
        gate: [D, F], W_gate.
        inner: [D, F], W_in.
        out: [F, D], W_out.
    """

    gate: Float[Array, "D F"]
    inner: Float[Array, "D F"]
    out: Float[Array, "F D"]


def rows_of_block(cfg: ModelConfig, n_tokens: int) -> int | None:
    """Rows of a block, a power of two; None if all experts at all tokens are no slower.

    That is so for few tokens, and where a large share of the experts is active: blocks are taken where they have at
    most half the rows. It is also so on several devices, over which weights may be cut: a block would fetch its own.

    Args:
        cfg: a model with routed experts.
        n_tokens: N.

    >>> cfg = ModelConfig("mixtral", 2, 16, 4, 2, 4, 256, 50, 64, n_experts=8, n_active=2)
    >>> rows_of_block(cfg, 1024), rows_of_block(cfg, 64)
    (128, None)
    """
    share = n_tokens * cfg.n_active / (2 * cfg.n_experts)
    rows = min(LARGEST, 2 ** int(math.log2(max(share, 1))))
    in_blocks = n_tokens * cfg.n_active + cfg.n_experts * rows
    is_worth_it = rows >= SMALLEST and 2 * in_blocks <= n_tokens * cfg.n_experts
    return rows if is_worth_it and jax.device_count() == 1 else None


def routed_products(
    cfg: ModelConfig,
    act: Callable[[Array], Array],
    x: Float[Array, "*n D"],
    routing: Float[Array, "*n E"],
    weights: Weights,
) -> Float[Array, "*n D"]:
    """What the experts of each token write together.

    Args:
        cfg: the model; its MLPs are gated and have no biases.
        act: its activation.
        x: what the MLP reads.
        routing: the weight of each expert, 0 for those that are not active.
        weights: the layer's weights.
    """

    def plain(x: Array, routing: Array, weights: Weights) -> Array:
        return _all_at_all(cfg, act, x, routing, weights)

    @jax.custom_batching.custom_vmap
    def batched(x: Array, routing: Array, weights: Weights) -> Array:
        rows = rows_of_block(cfg, math.prod(x.shape[:-1]))
        return plain(x, routing, weights) if rows is None else _in_blocks(cfg, act, x, routing, weights, rows)

    @batched.def_vmap
    def _(n: int, in_batched: Any, x: Array, routing: Array, weights: Weights) -> tuple[Array, bool]:
        if any(in_batched[2]):  # each row has a layer of its own
            axes = jax.tree.map(lambda is_in: 0 if is_in else None, tuple(in_batched))
            return jax.vmap(plain, axes)(x, routing, weights), True
        rows = (
            a if is_in else jnp.broadcast_to(a, (n, *a.shape))
            for a, is_in in zip((x, routing), in_batched[:2], strict=True)
        )
        return batched(*rows, weights), True  # more tokens of one layer

    @jax.custom_vjp
    def products(x: Array, routing: Array, weights: Weights) -> Array:
        return batched(x, routing, weights)

    products.defvjp(functools.partial(jax.vjp, plain), lambda back, slope: back(slope))
    return products(x, routing, weights)


def _all_at_all(cfg: ModelConfig, act: Callable[[Array], Array], x: Array, routing: Array, weights: Weights) -> Array:
    """All experts at all tokens."""
    expert = jnp.arange(cfg.d_mlp) // cfg.d_expert
    return project(
        _activations(cfg, act, x, weights.gate, weights.inner) * routing[..., expert],
        weights.out,
        splits=cfg.activation_splits,
    )


def _activations(cfg: ModelConfig, act: Callable[[Array], Array], x: Array, gate: Array, inner: Array) -> Array:
    splits = cfg.activation_splits
    return act(project(x, gate, splits=splits)) * project(x, inner, splits=splits)


def _in_blocks(
    cfg: ModelConfig, act: Callable[[Array], Array], x: Array, routing: Array, weights: Weights, rows: int
) -> Array:
    """Each token at its active experts only, in blocks of so many rows."""
    k, f = cfg.n_active, cfg.d_expert
    tokens = x.reshape(-1, x.shape[-1])
    share, chosen = jax.lax.top_k(routing.reshape(len(tokens), -1), k)  # [N, k]
    slot, expert = _slots(chosen.reshape(-1), cfg.n_experts, rows)
    filled = jnp.zeros((len(expert) * rows, x.shape[-1]), x.dtype)
    filled = filled.at[slot].set(jnp.repeat(tokens, k, axis=0), unique_indices=True)

    def block(at: tuple[Array, Array]) -> Array:
        x, expert = at
        gate, inner = (jax.lax.dynamic_slice_in_dim(w, expert * f, f, 1) for w in (weights.gate, weights.inner))
        out = jax.lax.dynamic_slice_in_dim(weights.out, expert * f, f, 0)
        return project(_activations(cfg, act, x, gate, inner), out, splits=cfg.activation_splits)

    written = jax.lax.map(block, (filled.reshape(len(expert), rows, -1), expert)).reshape(filled.shape)
    return (written[slot].reshape(len(tokens), k, -1) * share[..., None]).sum(1).reshape(x.shape)


def _slots(chosen: Int[Array, " P"], n_experts: int, rows: int) -> tuple[Int[Array, " P"], Int[Array, " M"]]:
    """Where each of P pairs of a token and an expert stands among the rows of M blocks, and the expert of each block.

    >>> slot, expert = _slots(jnp.array([2, 0, 2, 2]), 3, 2)  # one block of expert 0, two of expert 2
    >>> slot.tolist(), expert[:3].tolist()
    ([2, 0, 3, 4], [0, 2, 2])
    """
    is_of = jax.nn.one_hot(chosen, n_experts, dtype=jnp.int32)  # [P, E]
    before = ((jnp.cumsum(is_of, axis=0) - is_of) * is_of).sum(1)  # how many of its expert's come before it
    blocks = -(-is_of.sum(0) // rows)
    ends = jnp.cumsum(blocks)
    most = len(chosen) // rows + n_experts
    of_block = jnp.minimum(jnp.searchsorted(ends, jnp.arange(most), side="right"), n_experts - 1)
    return (ends - blocks)[chosen] * rows + before, of_block
