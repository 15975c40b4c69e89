"""The Llama family: Llama, and models with its `model_type` (SmolLM2, TinyLlama, Yi, ...)."""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family, TensorRule


def gated_mlp(layer: str) -> tuple[TensorRule, ...]:
    """Rules for a gated MLP, named as in Llama and its relatives.

    Args:
        layer: prefix of a layer's tensors, such as "model.layers.{l}".
    """
    names = {"gate_proj": "gate", "up_proj": "in"}
    return (
        *(
            TensorRule(f"{layer}.mlp.{hf}.weight", (f"blocks/mlp/W_{ours}",), "f d -> d f")
            for hf, ours in names.items()
        ),
        *(TensorRule(f"{layer}.mlp.{hf}.bias", (f"blocks/mlp/b_{ours}",), "f -> f") for hf, ours in names.items()),
        TensorRule(f"{layer}.mlp.down_proj.weight", ("blocks/mlp/W_out",), "d f -> f d"),
        TensorRule(f"{layer}.mlp.down_proj.bias", ("blocks/mlp/b_out",), "d -> d"),
    )


def split_attention(layer: str) -> tuple[TensorRule, ...]:
    """Rules for attention with one tensor each for queries, keys and values, named as in Llama and its relatives.

    Args:
        layer: prefix of a layer's tensors, such as "model.layers.{l}".
    """
    heads = {"q_proj": ("Q", "h"), "k_proj": ("K", "k"), "v_proj": ("V", "k")}
    return (
        *(
            TensorRule(f"{layer}.self_attn.{hf}.weight", (f"blocks/attn/W_{ours}",), f"({n} e) d -> d {n} e")
            for hf, (ours, n) in heads.items()
        ),
        *(
            TensorRule(f"{layer}.self_attn.{hf}.bias", (f"blocks/attn/b_{ours}",), f"({n} e) -> {n} e")
            for hf, (ours, n) in heads.items()
        ),
        TensorRule(f"{layer}.self_attn.o_proj.weight", ("blocks/attn/W_O",), "d (h e) -> h e d"),
        TensorRule(f"{layer}.self_attn.o_proj.bias", ("blocks/attn/b_O",), "d -> d"),
    )


ENDS = (
    TensorRule("model.embed_tokens.weight", ("embed/W_E",), "v d -> v d"),
    TensorRule("model.norm.weight", ("final_norm/scale",), "d -> d"),
    TensorRule("lm_head.weight", ("unembed/W_U",), "v d -> d v"),
)
"""Rules for what stands before and after the layers, named as in Llama and its relatives."""

PRE_NORMS = (
    TensorRule("model.layers.{l}.input_layernorm.weight", ("blocks/norm_attn/scale",), "d -> d"),
    TensorRule("model.layers.{l}.post_attention_layernorm.weight", ("blocks/norm_mlp/scale",), "d -> d"),
)
"""Rules for the norms of a layer, in families without post-norms."""

TENSORS = (*ENDS, *split_attention("model.layers.{l}"), *gated_mlp("model.layers.{l}"), *PRE_NORMS)

FIELDS = MappingProxyType(
    {
        "num_hidden_layers": "n_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "head_dim": "d_head",
        "intermediate_size": "d_mlp",
        "vocab_size": "d_vocab",
        "max_position_embeddings": "n_ctx",
        "rms_norm_eps": "norm_eps",
        "hidden_act": "act",
        "tie_word_embeddings": "tied",
    }
)
"""HF attribute -> `ModelConfig` field, for the attributes that Llama shares with its relatives."""

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "gated": True}),
    fields=MappingProxyType({**FIELDS, "attention_bias": "qkv_bias", "mlp_bias": "mlp_bias"}),
    derived=MappingProxyType({"out_bias": lambda hf: hf["attention_bias"]}),
    required=MappingProxyType({"rope_interleaved": False}),
    ignored=frozenset({"pretraining_tp"}),  # how pretraining was split; the products are the same
    tensors=TENSORS,
    skipped=("rotary_emb.inv_freq",),
)
