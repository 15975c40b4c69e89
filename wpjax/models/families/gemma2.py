"""The Gemma 2 family (arXiv 2408.00118).

Attention and MLP read a normed stream, and what they write is normed as well. Scores and logits are bounded, embedded
tokens are scaled, and every other layer has a sliding window.
"""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family, TensorRule, sliding_layers
from wpjax.models.families.llama import ENDS, FIELDS, gated_mlp, split_attention

_LAYER = "model.layers.{l}"
_NORMS = {
    "input_layernorm": "norm_attn",
    "post_attention_layernorm": "norm_attn_out",
    "pre_feedforward_layernorm": "norm_mlp",
    "post_feedforward_layernorm": "norm_mlp_out",
}

GEMMA_FIELDS = MappingProxyType(
    {
        **{hf: ours for hf, ours in FIELDS.items() if ours != "act"},
        "hidden_activation": "act",
        "attention_bias": "qkv_bias",
        "final_logit_softcapping": "logit_softcap",
        "sliding_window": "window",
    }
)
"""HF attribute -> `ModelConfig` field, in Gemma 2 and 3."""

GEMMA_DERIVED = MappingProxyType(
    {
        "out_bias": lambda hf: hf["attention_bias"],
        "attn_scale": lambda hf: hf["query_pre_attn_scalar"] ** -0.5,
        "embed_scale": lambda hf: hf["hidden_size"] ** 0.5,
        "sliding": sliding_layers,
    }
)
"""`ModelConfig` field -> its value, in Gemma 2 and 3."""

# `hidden_act` is an older name that transformers does not read; the others say how Google's own code runs the model.
GEMMA_IGNORED = frozenset({"query_pre_attn_scalar", "layer_types", "hidden_act", "cache_implementation"})

GEMMA_TENSORS = (
    *ENDS,
    *split_attention(_LAYER),
    *gated_mlp(_LAYER),
    *(TensorRule(f"{_LAYER}.{hf}.weight", (f"blocks/{ours}/scale",), "d -> d") for hf, ours in _NORMS.items()),
)
"""Rules for the tensors that Gemma 2 and 3 share."""

GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "norm_offset": 1.0, "post_norm": True, "gated": True}),
    fields=MappingProxyType({**GEMMA_FIELDS, "attn_logit_softcapping": "attn_softcap"}),
    derived=GEMMA_DERIVED,
    required=MappingProxyType({"use_bidirectional_attention": False}),
    ignored=GEMMA_IGNORED,
    tensors=GEMMA_TENSORS,
)
