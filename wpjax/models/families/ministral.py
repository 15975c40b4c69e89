"""The Ministral families.

Ministral is Mistral with a sliding window in some layers only, as `layer_types` says. Ministral 3 has a window in all
layers or in none, and its queries grow with their position, beyond the context that rotary positions were made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

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


def _growth(hf: Mapping[str, Any]) -> tuple[float, int]:
    """`ModelConfig.query_growth`, which transformers keeps beside the numbers of rotary positions."""
    rope = hf["rope_parameters"]
    return 0.0 + rope["llama_4_scaling_beta"], 0 + rope["original_max_position_embeddings"]  # numbers, or a TypeError


MINISTRAL3 = Family(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "gated": True}),
    fields=MappingProxyType({**FIELDS, "sliding_window": "window"}),
    derived=MappingProxyType(
        {"sliding": lambda hf: (True,) * hf["num_hidden_layers"], "query_growth": _growth},
    ),
    required=MappingProxyType({}),
    ignored=frozenset(),
    tensors=TENSORS,
    # The context is said twice; the growth is read above.
    rope_ignored=frozenset({"max_position_embeddings", "llama_4_scaling_beta"}),
)
