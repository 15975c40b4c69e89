"""What a family says: how transformers writes its configuration and its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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
        derived: `ModelConfig` field -> its value from HF's attributes, where none of them says it outright.
        required: HF attributes and the only values implemented.
        ignored: HF attributes that do not change the forward pass.
        tensors: rules for every tensor; a rule whose leaf the configuration lacks (a bias, say) does not apply.
        skipped: suffixes of tensors that hold no parameters.
        rotary: whether positions are rotary, read from HF's `rope_parameters`.
        partly_rotary: whether a `partial_rotary_factor` says how much of a head is rotated.
        rotary_attributes: older names of what `rope_parameters` says, which transformers merges into it.
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
    partly_rotary: bool = False
    rotary_attributes: frozenset[str] = frozenset({"rope_parameters", "rope_theta", "rope_scaling"})


# Attributes of any configuration that say nothing about the forward pass at inference.
COMMON_IGNORED = frozenset(
    "architectures model_type dtype torch_dtype transformers_version _name_or_path _attn_implementation_autoset "
    "use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id initializer_range "
    "return_dict output_hidden_states output_attentions chunk_size_feed_forward problem_type "
    "task_specific_params id2label label2id is_decoder is_llama_config is_encoder_decoder tokenizer_class "
    "attention_dropout transformers.js_config license language tags".split()
)


def activation(name: str) -> str | None:
    """Our name of an HF activation, or None if it is not implemented."""
    return _ACTIVATIONS.get(name)
