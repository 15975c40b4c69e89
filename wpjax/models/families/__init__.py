"""Families of models, as data: how transformers writes the configuration and the tensors of each.

A new family is one file here with a `Family`, and its name in the list below. That is all if `ModelConfig` can describe
its arithmetic. A program with a family of its own calls `register`.
"""

from __future__ import annotations

from wpjax.models.families.base import COMMON_IGNORED, Family, TensorRule, activation
from wpjax.models.families.cohere import COHERE, COHERE2
from wpjax.models.families.gemma2 import GEMMA2
from wpjax.models.families.gemma3 import GEMMA3
from wpjax.models.families.gpt2 import GPT2
from wpjax.models.families.gpt_neox import GPT_NEOX
from wpjax.models.families.granite import GRANITE
from wpjax.models.families.llama import LLAMA
from wpjax.models.families.ministral import MINISTRAL, MINISTRAL3
from wpjax.models.families.mistral import MISTRAL
from wpjax.models.families.mixtral import MIXTRAL
from wpjax.models.families.olmo2 import OLMO2
from wpjax.models.families.olmo3 import OLMO3
from wpjax.models.families.olmoe import OLMOE
from wpjax.models.families.phi3 import PHI3
from wpjax.models.families.qwen2 import QWEN2
from wpjax.models.families.qwen3 import QWEN3
from wpjax.models.families.qwen3_moe import QWEN3_MOE
from wpjax.models.families.smollm3 import SMOLLM3
from wpjax.models.families.starcoder2 import STARCODER2

FAMILIES: dict[str, Family] = {}
"""Every family by its `model_type`, as config.json names it."""


def register(family: Family) -> None:
    """Add a family, so that its checkpoints can be read. A family of the same `model_type` is replaced."""
    FAMILIES[family.model_type] = family


for _family in (
    LLAMA,
    GPT2,
    GPT_NEOX,
    MISTRAL,
    MINISTRAL,
    MINISTRAL3,
    QWEN2,
    QWEN3,
    GEMMA2,
    GEMMA3,
    PHI3,
    OLMO2,
    OLMO3,
    GRANITE,
    SMOLLM3,
    STARCODER2,
    COHERE,
    COHERE2,
    MIXTRAL,
    QWEN3_MOE,
    OLMOE,
):
    register(_family)

__all__ = ["COMMON_IGNORED", "FAMILIES", "Family", "TensorRule", "activation", "register"]
