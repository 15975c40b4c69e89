"""Two families that the package does not have, added as data: the worked example of CONTRIBUTING.

Gemma 2 norms what attention and MLP write as well, bounds its scores and logits, and scales its embedding. GPT-NeoX
runs attention and MLP side by side on the same stream, and rotates a part of each head. Nothing else in the package
knows of them; importing this module registers both.
"""

from types import MappingProxyType

from wpjax.models.families import Family, TensorRule, register
from wpjax.models.families.llama import gated_mlp, split_attention

_LAYER = "model.layers.{l}"

GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "norm_offset": 1.0, "post_norm": True, "gated": True}),
    fields=MappingProxyType(
        {
            "num_hidden_layers": "n_layers",
            "hidden_size": "d_model",
            "num_attention_heads": "n_heads",
            "num_key_value_heads": "n_kv_heads",
            "head_dim": "d_head",
            "intermediate_size": "d_mlp",
            "vocab_size": "d_vocab",
            "rms_norm_eps": "norm_eps",
            "hidden_activation": "act",
            "attention_bias": "qkv_bias",
            "attn_logit_softcapping": "attn_softcap",
            "final_logit_softcapping": "logit_softcap",
            "tie_word_embeddings": "tied",
        }
    ),
    derived=MappingProxyType(
        {
            "out_bias": lambda hf: hf["attention_bias"],
            "attn_scale": lambda hf: hf["query_pre_attn_scalar"] ** -0.5,
            "embed_scale": lambda hf: hf["hidden_size"] ** 0.5,
            # Within a window of attention all layers see everything before them.
            "n_ctx": lambda hf: min(hf["max_position_embeddings"], hf["sliding_window"]),
        }
    ),
    required=MappingProxyType({"use_bidirectional_attention": None}),
    ignored=frozenset({"query_pre_attn_scalar", "max_position_embeddings", "sliding_window", "layer_types"}),
    tensors=(
        TensorRule("model.embed_tokens.weight", ("embed/W_E",), "v d -> v d"),
        *split_attention(_LAYER),
        *gated_mlp(_LAYER),
        TensorRule(f"{_LAYER}.input_layernorm.weight", ("blocks/norm_attn/scale",), "d -> d"),
        TensorRule(f"{_LAYER}.post_attention_layernorm.weight", ("blocks/norm_attn_out/scale",), "d -> d"),
        TensorRule(f"{_LAYER}.pre_feedforward_layernorm.weight", ("blocks/norm_mlp/scale",), "d -> d"),
        TensorRule(f"{_LAYER}.post_feedforward_layernorm.weight", ("blocks/norm_mlp_out/scale",), "d -> d"),
        TensorRule("model.norm.weight", ("final_norm/scale",), "d -> d"),
        TensorRule("lm_head.weight", ("unembed/W_U",), "v d -> d v"),
    ),
)

_NEOX_LAYER = "gpt_neox.layers.{l}"
_QKV = ("blocks/attn/{}_Q", "blocks/attn/{}_K", "blocks/attn/{}_V")
_NORMS = {
    f"{_NEOX_LAYER}.input_layernorm": "blocks/norm_attn",
    f"{_NEOX_LAYER}.post_attention_layernorm": "blocks/norm_mlp",
    "gpt_neox.final_layer_norm": "final_norm",
}

GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    fixed=MappingProxyType({"norm": "layer", "gated": False, "mlp_bias": True}),
    fields=MappingProxyType(
        {
            "num_hidden_layers": "n_layers",
            "hidden_size": "d_model",
            "num_attention_heads": "n_heads",
            "intermediate_size": "d_mlp",
            "vocab_size": "d_vocab",
            "max_position_embeddings": "n_ctx",
            "layer_norm_eps": "norm_eps",
            "hidden_act": "act",
            "use_parallel_residual": "parallel",
            "attention_bias": "qkv_bias",
            "tie_word_embeddings": "tied",
        }
    ),
    derived=MappingProxyType(
        {
            "out_bias": lambda hf: hf["attention_bias"],
            "n_kv_heads": lambda hf: hf["num_attention_heads"],
            "d_head": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
        }
    ),
    required=MappingProxyType({}),
    ignored=frozenset({"hidden_dropout", "classifier_dropout"}),
    tensors=(
        TensorRule("gpt_neox.embed_in.weight", ("embed/W_E",), "v d -> v d"),
        TensorRule(
            f"{_NEOX_LAYER}.attention.query_key_value.weight",
            tuple(path.format("W") for path in _QKV),
            "(h n e) d -> n d h e",
        ),
        TensorRule(
            f"{_NEOX_LAYER}.attention.query_key_value.bias",
            tuple(path.format("b") for path in _QKV),
            "(h n e) -> n h e",
        ),
        TensorRule(f"{_NEOX_LAYER}.attention.dense.weight", ("blocks/attn/W_O",), "d (h e) -> h e d"),
        TensorRule(f"{_NEOX_LAYER}.attention.dense.bias", ("blocks/attn/b_O",), "d -> d"),
        TensorRule(f"{_NEOX_LAYER}.mlp.dense_h_to_4h.weight", ("blocks/mlp/W_in",), "f d -> d f"),
        TensorRule(f"{_NEOX_LAYER}.mlp.dense_h_to_4h.bias", ("blocks/mlp/b_in",), "f -> f"),
        TensorRule(f"{_NEOX_LAYER}.mlp.dense_4h_to_h.weight", ("blocks/mlp/W_out",), "d f -> f d"),
        TensorRule(f"{_NEOX_LAYER}.mlp.dense_4h_to_h.bias", ("blocks/mlp/b_out",), "d -> d"),
        *(TensorRule(f"{hf}.weight", (f"{ours}/scale",), "d -> d") for hf, ours in _NORMS.items()),
        *(TensorRule(f"{hf}.bias", (f"{ours}/bias",), "d -> d") for hf, ours in _NORMS.items()),
        TensorRule("embed_out.weight", ("unembed/W_U",), "v d -> d v"),
    ),
    partly_rotary=True,
    rotary_attributes=frozenset({"rope_parameters", "rope_scaling", "rotary_emb_base", "rotary_pct"}),
)

register(GEMMA2)
register(GPT_NEOX)
