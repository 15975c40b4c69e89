"""The OLMo 3 family: OLMo 2 with a sliding window in three of four layers. Only the others scale rotary positions."""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family, sliding_layers
from wpjax.models.families.olmo2 import OLMO2_DERIVED, OLMO2_FIELDS, OLMO2_FIXED, OLMO2_TENSORS

OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    prefix="model.",
    fixed=OLMO2_FIXED,
    fields=MappingProxyType({**OLMO2_FIELDS, "sliding_window": "window"}),
    derived=MappingProxyType({**OLMO2_DERIVED, "sliding": sliding_layers}),
    required=MappingProxyType({}),
    ignored=frozenset({"layer_types"}),
    tensors=OLMO2_TENSORS,
    rotary_by_layer=True,
)
