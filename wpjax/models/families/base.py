"""What a family has to say: how transformers writes its configuration and its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

_ACTIVATIONS = {  # several names of transformers are one function, written in several ways
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """One tensor of a checkpoint, and the leaf (or leaves) of the parameter tree that it holds.

    For example, a Llama query matrix [H Dh, D] becomes a leaf [D, H, Dh]:

        TensorRule("model.layers.{l}.self_attn.q_proj.weight", ("blocks/attn/W_Q",), "(h e) d -> d h e")

    Attributes:
        hf: the tensor's name in the checkpoint; "{l}" stands for the number of the layer, "{x}" for that of a routed
            expert. The tensors of a layer's experts count as one, stacked along a first axis.
        leaves: paths of the leaves in the tree, such as "blocks/attn/W_Q".
        pattern: einops pattern from the tensor's axes to the leaf's; it is read backwards when a checkpoint is saved.
            Axes: d model, h heads, k KV heads, e head width (or p pairs of t = 2 numbers), f neurons, x routed
            experts, w neurons of one, v vocabulary, c context, n leaves. Of several
            leaves, one pattern gives all of them, stacked along a first axis "n"; or there are as many patterns, and
            the tensor holds the leaves one after the other along its first axis.
    """

    hf: str
    leaves: tuple[str, ...]
    pattern: str | tuple[str, ...]

    @property
    def by_expert(self) -> bool:
        """Whether each routed expert has a tensor of its own."""
        return "{x}" in self.hf


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers maps to `ModelConfig` and to the parameter tree.

    Attributes:
        model_type: HF's name of the family, as in config.json.
        architecture: HF's class for language modelling.
        prefix: start of the tensor names of the model without its head. A checkpoint may leave it out.
        fixed: `ModelConfig` field -> the value that all members of the family have.
        fields: HF attribute -> the `ModelConfig` field that it gives.
        derived: `ModelConfig` field -> a function of HF's attributes that gives its value. It is used if no attribute
            gives the field.
        required: HF attribute -> its only value that is implemented.
        ignored: HF attributes that do not change the forward pass.
        tensors: a rule for every tensor. A rule does not apply if the configuration has no such leaf (a bias, say).
        skipped: suffixes of tensors that hold no parameters.
        transposed: suffixes of matrices that checkpoints hold as [in, out] (GPT-2's Conv1D), not as [out, in].
        rotary: whether positions are rotary. If so, HF's `rope_parameters` say how.
        partly_rotary: whether the attribute `partial_rotary_factor` says how much of a head is rotated.
        rotary_by_layer: whether `rope_parameters` has an entry for layers with a sliding window and one for the others.
        rope_ignored: entries of `rope_parameters` that say nothing of rotation.
        rotary_attributes: attributes that say something of rotary positions, older names included. transformers merges
            these into `rope_parameters`.
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
    transposed: tuple[str, ...] = ()
    rotary: bool = True
    partly_rotary: bool = False
    rotary_by_layer: bool = False
    rope_ignored: frozenset[str] = frozenset()
    rotary_attributes: frozenset[str] = frozenset({"rope_parameters", "rope_theta", "rope_scaling"})

    @property
    def attributes(self) -> frozenset[str]:
        """The HF attributes that are understood, besides those of any configuration (`COMMON_IGNORED`)."""
        rotary = self.rotary_attributes if self.rotary else frozenset[str]()
        return frozenset(self.fields) | frozenset(self.required) | self.ignored | rotary


# Attributes of any configuration that say nothing about the forward pass at inference.
COMMON_IGNORED = frozenset(
    "architectures model_type dtype torch_dtype transformers_version _name_or_path _attn_implementation_autoset "
    "use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id initializer_range "
    "return_dict output_hidden_states output_attentions chunk_size_feed_forward problem_type "
    "task_specific_params id2label label2id is_decoder is_llama_config is_encoder_decoder tokenizer_class "
    "attention_dropout transformers.js_config license language tags".split()
)


def sliding_layers(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """Whether each layer has a sliding window, as `layer_types` says (`ModelConfig.sliding`).

    >>> sliding_layers({"layer_types": ["sliding_attention", "full_attention"]})
    (True, False)
    """
    return tuple(kind == "sliding_attention" for kind in hf["layer_types"])


def activation(name: str) -> str | None:
    """Our name of one of HF's activations; None if it is not implemented.

    >>> activation("gelu_new")
    'gelu_tanh'
    """
    return _ACTIVATIONS.get(name)
