"""Behaviours: prompts with and without an instruction, checkers of answers, and rewrites that make training targets."""

from wpjax.behaviours.checkers import Checker, loose, parse_checker, strict
from wpjax.behaviours.lookup import BUILT_IN, behaviour
from wpjax.behaviours.prompts import Behaviour, PromptBatch, PromptPair, Tokens, encode_texts, prompt_ids
from wpjax.behaviours.templates import TEMPLATE_DATE, render

__all__ = [
    "BUILT_IN",
    "TEMPLATE_DATE",
    "Behaviour",
    "Checker",
    "PromptBatch",
    "PromptPair",
    "Tokens",
    "behaviour",
    "encode_texts",
    "loose",
    "parse_checker",
    "prompt_ids",
    "render",
    "strict",
]
