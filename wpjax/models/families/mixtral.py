"""The Mixtral family (arXiv 2401.04088): Mistral with routed experts, whose weights add up to 1."""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family
from wpjax.models.families.experts import EXPERT_FIELDS, EXPERT_IGNORED, routed_mlp, width_of_all
from wpjax.models.families.llama import ENDS, PRE_NORMS, split_attention

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "gated": True, "norm_routing": True}),
    fields=MappingProxyType({**EXPERT_FIELDS, "sliding_window": "window", "num_local_experts": "n_experts"}),
    derived=MappingProxyType(
        {
            "d_head": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
            "d_mlp": width_of_all("num_local_experts", "intermediate_size"),
            "sliding": lambda hf: (True,) * hf["num_hidden_layers"],
        }
    ),
    required=MappingProxyType({}),
    ignored=EXPERT_IGNORED | {"intermediate_size", "router_jitter_noise"},  # noise is for training
    tensors=(
        *ENDS,
        *split_attention("model.layers.{l}"),
        *routed_mlp("block_sparse_moe", "w1", "w3", "w2"),
        *PRE_NORMS,
    ),
    skipped=("rotary_emb.inv_freq",),
)
