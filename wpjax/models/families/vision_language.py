"""Models of images and text whose text tower is of a family here. The rest of them is left out."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

TEXT_TOWERS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "gemma3": MappingProxyType({"gemma3_text": "gemma3_text"}),
        "mistral3": MappingProxyType({"mistral": "mistral", "ministral3": "ministral3"}),
        # Positions of images have three axes. Those of text are equal on all three, which is Qwen2's rotary embedding.
        "qwen2_vl": MappingProxyType({"qwen2_vl_text": "qwen2"}),
        "qwen2_5_vl": MappingProxyType({"qwen2_5_vl_text": "qwen2"}),
    }
)
"""`model_type` of the whole model -> `model_type` of its text tower -> the family that reads it."""

TOWER = "language_model."
"""What the names of the text tower's tensors have more than those of its family, in some versions of transformers."""

LEFT_OUT = ("vision_tower", "multi_modal_projector", "visual")
"""How the names of tensors outside the text tower begin, after a "model." or not."""
