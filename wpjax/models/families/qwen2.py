"""The Qwen2 family, Qwen2.5 included: Llama with biases of queries, keys and values."""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family, sliding_layers
from wpjax.models.families.llama import FIELDS, TENSORS

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "gated": True, "qkv_bias": True}),
    fields=MappingProxyType({**FIELDS, "sliding_window": "window"}),
    derived=MappingProxyType(
        {"d_head": lambda hf: hf["hidden_size"] // hf["num_attention_heads"], "sliding": sliding_layers}
    ),
    required=MappingProxyType({}),
    # transformers makes `layer_types` of these, and drops the window if it is not used.
    ignored=frozenset({"layer_types", "use_sliding_window", "max_window_layers"}),
    tensors=TENSORS,
    skipped=("rotary_emb.inv_freq",),
)
