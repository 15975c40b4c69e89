"""The text models of Gemma 3 (arXiv 2503.19786).

They differ from Gemma 2 in three points. Queries and keys are normed, and scores are not bounded. Five of six layers
have a sliding window. These turn queries and keys by a rotary embedding of their own.
"""

from __future__ import annotations

from types import MappingProxyType

from wpjax.models.families.base import Family
from wpjax.models.families.gemma2 import GEMMA_DERIVED, GEMMA_FIELDS, GEMMA_IGNORED, GEMMA_TENSORS
from wpjax.models.families.qwen3 import QK_NORMS

GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    prefix="model.",
    fixed=MappingProxyType({"norm": "rms", "norm_offset": 1.0, "post_norm": True, "gated": True, "qk_norm": True}),
    fields=GEMMA_FIELDS,
    derived=GEMMA_DERIVED,
    # transformers declares a bound on scores here, but does not apply it.
    required=MappingProxyType({"use_bidirectional_attention": False, "attn_logit_softcapping": None}),
    # transformers makes `layer_types` of the pattern.
    ignored=GEMMA_IGNORED | {"sliding_window_pattern", "_sliding_window_pattern"},
    tensors=(*GEMMA_TENSORS, *QK_NORMS),
    rotary_by_layer=True,
    rotary_attributes=frozenset({"rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq"}),
)
