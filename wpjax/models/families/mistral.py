"""The Mistral family: Llama with a sliding window in every layer, in some of its models."""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family
from wpjax.models.families.llama import FIELDS, TENSORS

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "gated": True}),
    fields=MappingProxyType({**FIELDS, "sliding_window": "window"}),
    derived=MappingProxyType({"sliding": lambda hf: (True,) * hf["num_hidden_layers"]}),
    required=MappingProxyType({}),
    ignored=frozenset(),
    tensors=TENSORS,
    skipped=("rotary_emb.inv_freq",),
)
