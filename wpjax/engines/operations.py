"""Counting operations: the floating-point operations of the weights' products that work needs
(docs/method.md, "Counting operations").

A product of a [T, n] by a [n, m] matrix is 2 T n m operations. Attention, norms and the like are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable

from wpjax.components import KINDS, Component
from wpjax.models.config import ModelConfig


def of_mlp(cfg: ModelConfig) -> float:
    """Operations of one token in the MLP of a layer; of routed experts, in the active ones and the router.

    >>> import dataclasses
    >>> dense = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)
    >>> of_mlp(dense), of_mlp(dataclasses.replace(dense, n_experts=4, n_active=1))  # 2 * 16 * (3 * 8 + 4)
    (3072, 896)
    """
    matrices = 3 if cfg.gated else 2
    if cfg.n_experts:
        return 2 * cfg.d_model * (matrices * cfg.n_active * cfg.d_expert + cfg.n_experts)
    return 2 * matrices * cfg.d_model * cfg.d_mlp


def of_keys(cfg: ModelConfig) -> float:
    """Operations of the keys and values of one token in a layer."""
    return 2 * 2 * cfg.d_model * cfg.n_kv_heads * cfg.d_head


def of_layer(cfg: ModelConfig) -> float:
    """Operations of one token in a layer.

    >>> of_layer(ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64))  # 2 * 16 * (3 * 32 + 2 * 2 * 4 + 2 * 4 * 4)
    4608
    """
    return of_mlp(cfg) + of_keys(cfg) + 2 * 2 * cfg.d_model * cfg.n_heads * cfg.d_head


def of_logits(cfg: ModelConfig) -> float:
    """Operations of the logits after one token."""
    return 2 * cfg.d_model * cfg.d_vocab


def of_patches(cfg: ModelConfig, n_tokens: int, last: int, components: Iterable[Component]) -> float:
    """Operations that the exact effects of some components need.

    A component of layer l needs what is left of layer l after it, the layers l + 1 to last - 1, and the keys and values
    of layer `last`, which is read at few tokens.

    Args:
        cfg: the model.
        n_tokens: packed tokens of the prompts, without the slots that only fill up.
        last: the layer that the metric reads.
        components: the components.
    """
    # After the component itself, in its own layer. Neurons are added to the stream at once; norms are said too large.
    rest = {"neuron": 0.0, "routed_expert": 0.0, **dict.fromkeys(("head", "kv_group", "mlp", "router"), of_mlp(cfg))}
    total = 0.0
    for c in components:
        own = rest.get(c.kind, of_layer(cfg)) if KINDS[c.kind].in_layer and c.layer < last else 0.0
        whole = max(0, last - c.layer - 1) * of_layer(cfg)
        total += n_tokens * (own + whole + (of_keys(cfg) if c.layer < last else 0.0))
    return total
