"""The OLMoE family (arXiv 2409.02060): routed experts, and norms of queries and keys over all heads."""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family
from wpjax.models.families.experts import EXPERT_FIELDS, EXPERT_IGNORED, ROUTED_LLAMA, width_of_all
from wpjax.models.families.olmo2 import JOINT_QK_NORMS, OLMO2_DERIVED

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "gated": True, "joint_qk_norm": True}),
    fields=MappingProxyType(
        {
            **EXPERT_FIELDS,
            "num_experts": "n_experts",
            "norm_topk_prob": "norm_routing",
            "attention_bias": "qkv_bias",
            "clip_qkv": "qkv_clip",
        }
    ),
    derived=MappingProxyType({**OLMO2_DERIVED, "d_mlp": width_of_all("num_experts", "intermediate_size")}),
    required=MappingProxyType({}),
    ignored=EXPERT_IGNORED | {"intermediate_size"},
    tensors=(*ROUTED_LLAMA, *JOINT_QK_NORMS),
)
