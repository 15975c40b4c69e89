"""The Qwen3 family's models with routed experts (arXiv 2505.09388), where every layer has them."""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family
from wpjax.models.families.experts import EXPERT_FIELDS, EXPERT_IGNORED, ROUTED_LLAMA, width_of_all
from wpjax.models.families.qwen3 import QK_NORMS

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "gated": True, "qk_norm": True}),
    fields=MappingProxyType(
        {
            **EXPERT_FIELDS,
            "num_local_experts": "n_experts",  # transformers moves `num_experts` there
            "norm_topk_prob": "norm_routing",
            "attention_bias": "qkv_bias",
            "sliding_window": "window",
        }
    ),
    derived=MappingProxyType(
        {
            "d_head": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
            "d_mlp": width_of_all("num_local_experts", "moe_intermediate_size"),
            "out_bias": lambda hf: hf["attention_bias"],
            "sliding": lambda hf: (True,) * hf["num_hidden_layers"],
        }
    ),
    # Layers of another kind among them, with a dense MLP of `intermediate_size` neurons: no published model has any.
    required=MappingProxyType({"decoder_sparse_step": 1, "mlp_only_layers": []}),
    ignored=EXPERT_IGNORED
    | {"num_experts", "moe_intermediate_size", "intermediate_size", "use_sliding_window", "max_window_layers"},
    tensors=(*ROUTED_LLAMA, *QK_NORMS),
)
