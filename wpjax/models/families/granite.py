"""The Granite family (its dense models): Llama with four factors, of embedded tokens, scores, the stream and logits."""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family
from wpjax.models.families.llama import FIELDS, TENSORS

GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "gated": True}),
    fields=MappingProxyType(
        {
            **FIELDS,
            "attention_bias": "qkv_bias",
            "mlp_bias": "mlp_bias",
            "embedding_multiplier": "embed_scale",
            "attention_multiplier": "attn_scale",
            "residual_multiplier": "resid_scale",
        }
    ),
    derived=MappingProxyType(
        {
            "d_head": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
            "out_bias": lambda hf: hf["attention_bias"],
            "logit_scale": lambda hf: 1 / hf["logits_scaling"],
        }
    ),
    required=MappingProxyType({}),
    ignored=frozenset({"logits_scaling"}),
    tensors=TENSORS,
    skipped=("rotary_emb.inv_freq",),
)
