"""The GPT-2 family. Its checkpoints hold matrices as [in, out], and queries, keys and values in one tensor."""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family, TensorRule

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    fixed=MappingProxyType({"norm": "layer", "gated": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True}),
    fields=MappingProxyType(
        {
            "n_layer": "n_layers",
            "n_embd": "d_model",
            "n_head": "n_heads",
            "n_inner": "d_mlp",
            "vocab_size": "d_vocab",
            "n_positions": "n_ctx",
            "layer_norm_epsilon": "norm_eps",
            "activation_function": "act",
            "tie_word_embeddings": "tied",
        }
    ),
    derived=MappingProxyType(
        {
            "d_mlp": lambda hf: 4 * hf["n_embd"],
            "n_kv_heads": lambda hf: hf["n_head"],
            "d_head": lambda hf: hf["n_embd"] // hf["n_head"],
        }
    ),
    required=MappingProxyType(
        {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        }
    ),
    ignored=frozenset(
        "n_ctx resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj summary_activation "
        "summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn gradient_checkpointing".split()
    ),
    tensors=(
        TensorRule("transformer.wte.weight", ("embed/W_E",), "v d -> v d"),
        TensorRule("transformer.wpe.weight", ("embed/W_pos",), "c d -> c d"),
        TensorRule("transformer.h.{l}.ln_1.weight", ("blocks/norm_attn/scale",), "d -> d"),
        TensorRule("transformer.h.{l}.ln_1.bias", ("blocks/norm_attn/bias",), "d -> d"),
        TensorRule(
            "transformer.h.{l}.attn.c_attn.weight",
            ("blocks/attn/W_Q", "blocks/attn/W_K", "blocks/attn/W_V"),
            "d (n h e) -> n d h e",
        ),
        TensorRule(
            "transformer.h.{l}.attn.c_attn.bias",
            ("blocks/attn/b_Q", "blocks/attn/b_K", "blocks/attn/b_V"),
            "(n h e) -> n h e",
        ),
        TensorRule("transformer.h.{l}.attn.c_proj.weight", ("blocks/attn/W_O",), "(h e) d -> h e d"),
        TensorRule("transformer.h.{l}.attn.c_proj.bias", ("blocks/attn/b_O",), "d -> d"),
        TensorRule("transformer.h.{l}.ln_2.weight", ("blocks/norm_mlp/scale",), "d -> d"),
        TensorRule("transformer.h.{l}.ln_2.bias", ("blocks/norm_mlp/bias",), "d -> d"),
        TensorRule("transformer.h.{l}.mlp.c_fc.weight", ("blocks/mlp/W_in",), "d f -> d f"),
        TensorRule("transformer.h.{l}.mlp.c_fc.bias", ("blocks/mlp/b_in",), "f -> f"),
        TensorRule("transformer.h.{l}.mlp.c_proj.weight", ("blocks/mlp/W_out",), "f d -> f d"),
        TensorRule("transformer.h.{l}.mlp.c_proj.bias", ("blocks/mlp/b_out",), "d -> d"),
        TensorRule("transformer.ln_f.weight", ("final_norm/scale",), "d -> d"),
        TensorRule("transformer.ln_f.bias", ("final_norm/bias",), "d -> d"),
        TensorRule("lm_head.weight", ("unembed/W_U",), "v d -> d v"),
    ),
    skipped=(".attn.bias", ".attn.masked_bias"),
    transposed=(".c_attn.weight", ".c_proj.weight", ".c_fc.weight"),
    rotary=False,
)
