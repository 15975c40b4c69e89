"""The StarCoder2 family (arXiv 2402.19173): Llama with LayerNorms, biases and a plain MLP."""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family, TensorRule
from wpjax.models.families.llama import ENDS, FIELDS, PRE_NORMS, split_attention

_LAYER = "model.layers.{l}"

STARCODER2 = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "layer", "gated": False}),
    fields=MappingProxyType(
        {
            **{hf: ours for hf, ours in FIELDS.items() if ours != "norm_eps"},
            "norm_epsilon": "norm_eps",
            "use_bias": "qkv_bias",
            "sliding_window": "window",
        }
    ),
    derived=MappingProxyType(
        {
            "out_bias": lambda hf: hf["use_bias"],
            "mlp_bias": lambda hf: hf["use_bias"],
            "d_head": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
            "sliding": lambda hf: (True,) * hf["num_hidden_layers"],
        }
    ),
    required=MappingProxyType({}),
    ignored=frozenset({"residual_dropout", "embedding_dropout"}),
    tensors=(
        *ENDS,
        *split_attention(_LAYER),
        *PRE_NORMS,
        TensorRule(f"{_LAYER}.input_layernorm.bias", ("blocks/norm_attn/bias",), "d -> d"),
        TensorRule(f"{_LAYER}.post_attention_layernorm.bias", ("blocks/norm_mlp/bias",), "d -> d"),
        TensorRule("model.norm.bias", ("final_norm/bias",), "d -> d"),
        TensorRule(f"{_LAYER}.mlp.c_fc.weight", ("blocks/mlp/W_in",), "f d -> d f"),
        TensorRule(f"{_LAYER}.mlp.c_fc.bias", ("blocks/mlp/b_in",), "f -> f"),
        TensorRule(f"{_LAYER}.mlp.c_proj.weight", ("blocks/mlp/W_out",), "d f -> f d"),
        TensorRule(f"{_LAYER}.mlp.c_proj.bias", ("blocks/mlp/b_out",), "d -> d"),
    ),
)
