"""Families as data: how HF writes each one's configuration and tensors.

A new family is a new `Family` entry here, if its arithmetic is one `ModelConfig` can say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """One HF tensor, and the leaf (or leaves) of the parameter tree that it holds.

    Attributes:
        hf: HF name; "{l}" stands for the layer index.
        leaves: paths in the tree, "/"-separated. With several, `pattern` yields them stacked on a first axis "n".
        pattern: einops pattern from HF's axes to ours, over the names d h k f v c (k KV heads) and e (head width);
            read backwards when saving.
    """

    hf: str
    leaves: tuple[str, ...]
    pattern: str


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers maps to `ModelConfig` and to the parameter tree.

    Attributes:
        model_type: HF's name.
        architecture: HF's class for language modelling.
        prefix: in front of every tensor name of the base model; may be absent in a checkpoint.
        fixed: `ModelConfig` fields that all members share.
        fields: HF attribute -> `ModelConfig` field.
        derived: `ModelConfig` field -> its value from the others, where HF's configuration leaves it unsaid.
        required: HF attributes and the only values implemented.
        ignored: HF attributes that do not change the forward pass.
        tensors: rules for every tensor; a rule whose leaf the configuration lacks (a bias, say) does not apply.
        skipped: suffixes of tensors that hold no parameters.
        rotary: whether positions are rotary, read from HF's `rope_parameters`.
    """

    model_type: str
    architecture: str
    prefix: str
    fixed: Mapping[str, Any]
    fields: Mapping[str, str]
    derived: Mapping[str, Callable[[Mapping[str, Any]], Any]]
    required: Mapping[str, Any]
    ignored: frozenset[str]
    tensors: tuple[TensorRule, ...]
    skipped: tuple[str, ...] = ()
    rotary: bool = True


# Attributes of any configuration that say nothing about the forward pass at inference.
COMMON_IGNORED = frozenset(
    "architectures model_type dtype torch_dtype transformers_version _name_or_path _attn_implementation_autoset "
    "use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id initializer_range "
    "return_dict output_hidden_states output_attentions chunk_size_feed_forward problem_type "
    "task_specific_params id2label label2id is_decoder is_llama_config is_encoder_decoder tokenizer_class "
    "attention_dropout transformers.js_config license language tags".split()
)


def _gated_mlp(layer: str) -> tuple[TensorRule, ...]:
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


def _split_attention(layer: str) -> tuple[TensorRule, ...]:
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


_LLAMA_TENSORS = (
    TensorRule("model.embed_tokens.weight", ("embed/W_E",), "v d -> v d"),
    *_split_attention("model.layers.{l}"),
    *_gated_mlp("model.layers.{l}"),
    TensorRule("model.layers.{l}.input_layernorm.weight", ("blocks/norm_attn/scale",), "d -> d"),
    TensorRule("model.layers.{l}.post_attention_layernorm.weight", ("blocks/norm_mlp/scale",), "d -> d"),
    TensorRule("model.norm.weight", ("final_norm/scale",), "d -> d"),
    TensorRule("lm_head.weight", ("unembed/W_U",), "v d -> d v"),
)

_LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "gated": True}),
    fields=MappingProxyType(
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
            "attention_bias": "qkv_bias",
            "mlp_bias": "mlp_bias",
            "tie_word_embeddings": "tied",
        }
    ),
    derived=MappingProxyType({"out_bias": lambda v: v["qkv_bias"]}),
    required=MappingProxyType({"pretraining_tp": 1, "rope_interleaved": False}),
    ignored=frozenset(),
    tensors=_LLAMA_TENSORS,
    skipped=("rotary_emb.inv_freq",),
)

_GPT2 = Family(
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
            "d_mlp": lambda v: 4 * v["d_model"],
            "n_kv_heads": lambda v: v["n_heads"],
            "d_head": lambda v: v["d_model"] // v["n_heads"],
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
    rotary=False,
)

FAMILIES: Mapping[str, Family] = MappingProxyType({f.model_type: f for f in (_LLAMA, _GPT2)})


def activation(name: str) -> str | None:
    """Our name of an HF activation, or None if it is not implemented."""
    return _ACTIVATIONS.get(name)
