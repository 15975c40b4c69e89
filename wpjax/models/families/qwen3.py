"""The Qwen3 family (its dense models): Llama with norms of queries and keys."""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family, TensorRule, sliding_layers
from wpjax.models.families.llama import FIELDS, TENSORS

QK_NORMS = (
    TensorRule("model.layers.{l}.self_attn.q_norm.weight", ("blocks/attn/norm_q/scale",), "e -> e"),
    TensorRule("model.layers.{l}.self_attn.k_norm.weight", ("blocks/attn/norm_k/scale",), "e -> e"),
)
"""Rules for the norms of queries and keys."""

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "gated": True, "qk_norm": True}),
    fields=MappingProxyType({**FIELDS, "attention_bias": "qkv_bias", "sliding_window": "window"}),
    derived=MappingProxyType({"out_bias": lambda hf: hf["attention_bias"], "sliding": sliding_layers}),
    required=MappingProxyType({}),
    # transformers makes `layer_types` of these, and drops the window if it is not used.
    ignored=frozenset({"layer_types", "use_sliding_window", "max_window_layers"}),
    tensors=(*TENSORS, *QK_NORMS),
)
