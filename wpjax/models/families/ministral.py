"""The Ministral family: Mistral with a sliding window in some layers only, as `layer_types` says."""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family, sliding_layers
from wpjax.models.families.llama import FIELDS, TENSORS

MINISTRAL = Family(
    model_type="ministral",
    architecture="MinistralForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "gated": True}),
    fields=MappingProxyType({**FIELDS, "sliding_window": "window"}),
    derived=MappingProxyType(
        {"d_head": lambda hf: hf["hidden_size"] // hf["num_attention_heads"], "sliding": sliding_layers}
    ),
    required=MappingProxyType({}),
    ignored=frozenset({"layer_types"}),
    tensors=TENSORS,
)
