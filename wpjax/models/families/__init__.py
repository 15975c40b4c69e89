"""Families as data: how transformers writes each one's configuration and tensors.

A new family is one file here with a `Family`, and its name in the list below, if its arithmetic is one `ModelConfig`
can say. A program that brings its own calls `register`.
"""

from __future__ import annotations

from wpjax.models.families.base import COMMON_IGNORED, Family, TensorRule, activation
from wpjax.models.families.gpt2 import GPT2
from wpjax.models.families.llama import LLAMA

FAMILIES: dict[str, Family] = {}
"""Every family, by the `model_type` of its configurations."""


def register(family: Family) -> None:
    """Make checkpoints of a family readable."""
    FAMILIES[family.model_type] = family


for _family in (LLAMA, GPT2):
    register(_family)

__all__ = ["COMMON_IGNORED", "FAMILIES", "Family", "TensorRule", "activation", "register"]
