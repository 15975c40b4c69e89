"""The GPT-NeoX family, Pythia among it.

Attention and MLP stand side by side on the same stream. A part of each head is rotated. Queries, keys and values are
fused head by head.
"""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family, TensorRule

_LAYER = "gpt_neox.layers.{l}"
_QKV = ("blocks/attn/{}_Q", "blocks/attn/{}_K", "blocks/attn/{}_V")
_NORMS = {
    f"{_LAYER}.input_layernorm": "blocks/norm_attn",
    f"{_LAYER}.post_attention_layernorm": "blocks/norm_mlp",
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
            f"{_LAYER}.attention.query_key_value.weight",
            tuple(path.format("W") for path in _QKV),
            "(h n e) d -> n d h e",
        ),
        TensorRule(
            f"{_LAYER}.attention.query_key_value.bias",
            tuple(path.format("b") for path in _QKV),
            "(h n e) -> n h e",
        ),
        TensorRule(f"{_LAYER}.attention.dense.weight", ("blocks/attn/W_O",), "d (h e) -> h e d"),
        TensorRule(f"{_LAYER}.attention.dense.bias", ("blocks/attn/b_O",), "d -> d"),
        TensorRule(f"{_LAYER}.mlp.dense_h_to_4h.weight", ("blocks/mlp/W_in",), "f d -> d f"),
        TensorRule(f"{_LAYER}.mlp.dense_h_to_4h.bias", ("blocks/mlp/b_in",), "f -> f"),
        TensorRule(f"{_LAYER}.mlp.dense_4h_to_h.weight", ("blocks/mlp/W_out",), "d f -> f d"),
        TensorRule(f"{_LAYER}.mlp.dense_4h_to_h.bias", ("blocks/mlp/b_out",), "d -> d"),
        *(TensorRule(f"{hf}.weight", (f"{ours}/scale",), "d -> d") for hf, ours in _NORMS.items()),
        *(TensorRule(f"{hf}.bias", (f"{ours}/bias",), "d -> d") for hf, ours in _NORMS.items()),
        TensorRule("embed_out.weight", ("unembed/W_U",), "v d -> d v"),
    ),
    skipped=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    partly_rotary=True,
    rotary_attributes=frozenset({"rope_parameters", "rope_scaling", "rotary_emb_base", "rotary_pct"}),
)
