"""The Phi-3 family, Phi-4-mini included.

Its checkpoints hold queries, keys and values in one tensor, and gate and input weights of the MLP in another. The
window is that of Mistral. Some models rotate a part of each head.
"""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family, TensorRule
from wpjax.models.families.llama import ENDS, FIELDS, PRE_NORMS

_LAYER = "model.layers.{l}"

PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "gated": True}),
    fields=MappingProxyType({**FIELDS, "sliding_window": "window"}),
    derived=MappingProxyType(
        {
            "d_head": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
            "sliding": lambda hf: (True,) * hf["num_hidden_layers"],
        }
    ),
    required=MappingProxyType({}),
    ignored=frozenset({"resid_pdrop", "embd_pdrop"}),
    tensors=(
        *ENDS,
        *PRE_NORMS,
        TensorRule(
            f"{_LAYER}.self_attn.qkv_proj.weight",
            ("blocks/attn/W_Q", "blocks/attn/W_K", "blocks/attn/W_V"),
            ("(h e) d -> d h e", "(k e) d -> d k e", "(k e) d -> d k e"),
        ),
        TensorRule(f"{_LAYER}.self_attn.o_proj.weight", ("blocks/attn/W_O",), "d (h e) -> h e d"),
        TensorRule(
            f"{_LAYER}.mlp.gate_up_proj.weight",
            ("blocks/mlp/W_gate", "blocks/mlp/W_in"),
            ("f d -> d f", "f d -> d f"),
        ),
        TensorRule(f"{_LAYER}.mlp.down_proj.weight", ("blocks/mlp/W_out",), "d f -> f d"),
    ),
    skipped=("rotary_emb.inv_freq",),
    partly_rotary=True,
    rotary_attributes=frozenset(
        {
            "rope_parameters",
            "rope_theta",
            "rope_scaling",
            "partial_rotary_factor",
            "original_max_position_embeddings",
        }
    ),
)
