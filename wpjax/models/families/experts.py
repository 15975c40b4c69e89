"""What families with routed experts share: the rules for their MLPs, and how transformers writes the number of neurons.

In memory, and in files that keep its layout, transformers holds the experts of a layer in tensors of three axes
(`checkpoints.fused_experts`). Published files have one tensor for each expert, and these rules are about those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from wpjax.models.families.base import TensorRule
from wpjax.models.families.llama import ENDS, FIELDS, PRE_NORMS, split_attention

_LAYER = "model.layers.{l}"

EXPERT_FIELDS: Mapping[str, str] = MappingProxyType(
    {hf: ours for hf, ours in FIELDS.items() if hf != "intermediate_size"} | {"num_experts_per_tok": "n_active"}
)
"""HF attribute -> `ModelConfig` field. `intermediate_size` is not among them: it is that of one expert, or of none."""

EXPERT_IGNORED = frozenset({"output_router_logits", "router_aux_loss_coef"})
"""Attributes that matter in training alone."""


def width_of_all(experts: str, width: str) -> Callable[[Mapping[str, Any]], int]:
    """The number of neurons of all experts of a layer (`ModelConfig.d_mlp`) from HF's attributes.

    Args:
        experts: the attribute that says how many experts there are.
        width: the attribute that says how many neurons one has.

    >>> width_of_all("num_experts", "intermediate_size")({"num_experts": 64, "intermediate_size": 1024})
    65536
    """
    return lambda hf: hf[experts] * hf[width]


def routed_mlp(module: str, gate: str, up: str, down: str) -> tuple[TensorRule, ...]:
    """Rules for a layer's router and its experts.

    Args:
        module: name of the MLP in a layer, such as "mlp".
        gate: name of an expert's W_gate, such as "gate_proj".
        up: name of its W_in.
        down: name of its W_out.
    """
    one = f"{_LAYER}.{module}.experts.{{x}}"
    return (
        TensorRule(f"{_LAYER}.{module}.gate.weight", ("blocks/mlp/W_router",), "x d -> d x"),
        TensorRule(f"{one}.{gate}.weight", ("blocks/mlp/W_gate",), "x w d -> d (x w)"),
        TensorRule(f"{one}.{up}.weight", ("blocks/mlp/W_in",), "x w d -> d (x w)"),
        TensorRule(f"{one}.{down}.weight", ("blocks/mlp/W_out",), "x d w -> (x w) d"),
    )


ROUTED_LLAMA = (*ENDS, *split_attention(_LAYER), *routed_mlp("mlp", "gate_proj", "up_proj", "down_proj"), *PRE_NORMS)
"""Rules for Llama's tensors with experts in place of its MLP, named as in Qwen3-MoE and OLMoE."""
