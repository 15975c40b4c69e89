"""The SmolLM3 family: Llama in which some layers, every fourth in the published model, do not rotate."""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family, sliding_layers
from wpjax.models.families.llama import FIELDS, TENSORS

SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "gated": True}),
    fields=MappingProxyType(
        {**FIELDS, "attention_bias": "qkv_bias", "mlp_bias": "mlp_bias", "sliding_window": "window"}
    ),
    derived=MappingProxyType(
        {
            "d_head": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
            "out_bias": lambda hf: hf["attention_bias"],
            "sliding": sliding_layers,
            "unrotated": lambda hf: tuple(not rotates for rotates in hf["no_rope_layers"][: hf["num_hidden_layers"]]),
        }
    ),
    required=MappingProxyType({}),
    # transformers makes `layer_types` of the window's flag, and `no_rope_layers` of the interval.
    ignored=frozenset({"layer_types", "use_sliding_window", "no_rope_layers", "no_rope_layer_interval"}),
    tensors=TENSORS,
)
