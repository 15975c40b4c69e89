"""The Cohere families: Command R and Aya 23 (`cohere`), Command R7B and Command A (`cohere2`).

Attention and MLP stand side by side and read the same normed stream. Norms have no biases. Checkpoints hold the two
dimensions of a rotated pair side by side; here they are half a head apart, as in the other families. In Cohere 2 only
layers with a sliding window rotate.
"""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family, TensorRule, sliding_layers
from wpjax.models.families.llama import ENDS, FIELDS, gated_mlp, split_attention

_LAYER = "model.layers.{l}"
_ROTATED = tuple(f"{_LAYER}.self_attn.{name}_proj." for name in "qk")

_FIXED = MappingProxyType({"norm": "layer", "norm_bias": False, "gated": True, "parallel": True, "shared_norm": True})
_FIELDS = MappingProxyType(
    {
        **{hf: ours for hf, ours in FIELDS.items() if ours != "norm_eps"},
        "layer_norm_eps": "norm_eps",
        "attention_bias": "qkv_bias",
        "logit_scale": "logit_scale",
    }
)
_DERIVED = MappingProxyType(
    {
        "d_head": lambda hf: hf["hidden_size"] // hf["num_attention_heads"],
        "out_bias": lambda hf: hf["attention_bias"],
    }
)


def _half_apart(rule: TensorRule) -> TensorRule:
    """The rule of a tensor of queries or keys, of rotated pairs that stand side by side in it."""
    assert isinstance(rule.pattern, str)
    theirs, ours = rule.pattern.split(" -> ")
    return TensorRule(rule.hf, rule.leaves, f"{theirs.replace('e)', 'p t)')} -> {ours.replace('e', '(t p)')}")


_TENSORS = (
    *ENDS,
    *(_half_apart(rule) if rule.hf.startswith(_ROTATED) else rule for rule in split_attention(_LAYER)),
    *gated_mlp(_LAYER),
    TensorRule(f"{_LAYER}.input_layernorm.weight", ("blocks/norm_attn/scale",), "d -> d"),
)

COHERE = Family(
    model_type="cohere",
    architecture="CohereForCausalLM",
    prefix="model.",
    fixed=_FIXED,
    fields=_FIELDS,
    derived=_DERIVED,
    required=MappingProxyType({"use_qk_norm": False}),
    ignored=frozenset(),
    tensors=_TENSORS,
)

COHERE2 = Family(
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    prefix="model.",
    fixed=_FIXED,
    fields=MappingProxyType({**_FIELDS, "sliding_window": "window"}),
    derived=MappingProxyType(
        {
            **_DERIVED,
            "sliding": sliding_layers,
            "unrotated": lambda hf: tuple(not (hf["sliding_window"] and slides) for slides in sliding_layers(hf)),
        }
    ),
    required=MappingProxyType({}),
    # transformers makes `layer_types` of the pattern.
    ignored=frozenset({"layer_types", "sliding_window_pattern"}),
    tensors=_TENSORS,
)
