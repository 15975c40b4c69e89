"""The OLMo 2 family (arXiv 2501.00656).

Attention and MLP read the stream itself, and what they write is normed. Queries and keys are normed too, over all heads
of a layer together.
"""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family, TensorRule
from wpjax.models.families.llama import ENDS, FIELDS, gated_mlp, split_attention

_LAYER = "model.layers.{l}"

OLMO2_FIXED = MappingProxyType(
    {"norm": "rms", "gated": True, "pre_norm": False, "post_norm": True, "joint_qk_norm": True}
)
"""`ModelConfig` field -> its value, in OLMo 2 and 3."""

OLMO2_FIELDS = MappingProxyType({**FIELDS, "attention_bias": "qkv_bias"})
"""HF attribute -> `ModelConfig` field, in OLMo 2 and 3."""

OLMO2_DERIVED = MappingProxyType(
    {
        "d_head": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
        "out_bias": lambda hf: hf["attention_bias"],
    }
)
"""`ModelConfig` field -> its value, in OLMo 2 and 3."""

JOINT_QK_NORMS = (
    TensorRule(f"{_LAYER}.self_attn.q_norm.weight", ("blocks/attn/joint_norm_q/scale",), "(h e) -> h e"),
    TensorRule(f"{_LAYER}.self_attn.k_norm.weight", ("blocks/attn/joint_norm_k/scale",), "(k e) -> k e"),
)
"""Rules for the norms of queries and keys, over all heads of a layer together."""

OLMO2_TENSORS = (
    *ENDS,
    *split_attention(_LAYER),
    *gated_mlp(_LAYER),
    *JOINT_QK_NORMS,
    TensorRule(f"{_LAYER}.post_attention_layernorm.weight", ("blocks/norm_attn_out/scale",), "d -> d"),
    TensorRule(f"{_LAYER}.post_feedforward_layernorm.weight", ("blocks/norm_mlp_out/scale",), "d -> d"),
)
"""Rules for the tensors that OLMo 2 and 3 share."""

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    prefix="model.",
    fixed=OLMO2_FIXED,
    fields=OLMO2_FIELDS,
    derived=OLMO2_DERIVED,
    required=MappingProxyType({}),
    ignored=frozenset(),
    tensors=OLMO2_TENSORS,
)
