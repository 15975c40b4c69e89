"""A family that the package does not have, added as data: the worked example of CONTRIBUTING.

StableLM is a Llama with LayerNorms that rotates a part of each head. Nothing else in the package knows of it; importing
this module registers it.
"""

from types import MappingProxyType

from wpjax.models.families import Family, TensorRule, register
from wpjax.models.families.llama import FIELDS, TENSORS

_NORMS = {
    "model.layers.{l}.input_layernorm": "blocks/norm_attn",
    "model.layers.{l}.post_attention_layernorm": "blocks/norm_mlp",
    "model.norm": "final_norm",
}

STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "layer", "gated": True}),
    fields=MappingProxyType(
        {
            **{hf: ours for hf, ours in FIELDS.items() if hf not in ("rms_norm_eps", "head_dim")},
            "layer_norm_eps": "norm_eps",
            "use_qkv_bias": "qkv_bias",
        }
    ),
    derived=MappingProxyType({"d_head": lambda hf: hf["hidden_size"] // hf["num_attention_heads"]}),
    required=MappingProxyType({"qk_layernorm": False, "use_parallel_residual": False}),
    ignored=frozenset({"hidden_dropout"}),
    tensors=(*TENSORS, *(TensorRule(f"{hf}.bias", (f"{ours}/bias",), "d -> d") for hf, ours in _NORMS.items())),
    partly_rotary=True,
    rotary_attributes=frozenset({"rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"}),
)

register(STABLELM)
