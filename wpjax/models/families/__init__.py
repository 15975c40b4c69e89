"""Families of models, as data: how transformers writes the configuration and the tensors of each.

A new family is one file here with a `Family`, and its name in the list below. That is all if `ModelConfig` can describe
its arithmetic. A program with a family of its own calls `register`.
"""

from __future__ import annotations

from wpjax.models.families.base import COMMON_IGNORED, Family, TensorRule, activation
from wpjax.models.families.gpt2 import GPT2
from wpjax.models.families.llama import LLAMA

FAMILIES: dict[str, Family] = {}
"""Every family by its `model_type`, as config.json names it."""


def register(family: Family) -> None:
    """Add a family, so that its checkpoints can be read. A family of the same `model_type` is replaced."""
    FAMILIES[family.model_type] = family


for _family in (LLAMA, GPT2):
    register(_family)

__all__ = ["COMMON_IGNORED", "FAMILIES", "Family", "TensorRule", "activation", "register"]
