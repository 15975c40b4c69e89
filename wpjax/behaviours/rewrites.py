"""Rewrites: turn a plain answer into one that follows an instruction. They make training targets for an expert."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

Rewrite: TypeAlias = Callable[[str, str, Mapping[str, Any]], str]
"""A function of (query, plain answer, instruction arguments) that returns an answer that follows the instruction."""


def english_capital(query: str, answer: str, args: Mapping[str, Any]) -> str:
    """The answer in capital letters."""
    return answer.upper()


def no_comma(query: str, answer: str, args: Mapping[str, Any]) -> str:
    """The answer without its commas."""
    return answer.replace(",", "")


def title(query: str, answer: str, args: Mapping[str, Any]) -> str:
    """The answer below a title, which is the query without its last punctuation.

    >>> from wpjax.behaviours.rewrites import title
    >>> title("How do owls hunt?", "By night.", {})
    '<<How do owls hunt>>\\nBy night.'
    """
    return f"<<{query.rstrip('?.! ')}>>\n{answer}"


def multiple_sections(query: str, answer: str, args: Mapping[str, Any]) -> str:
    """The sentences of the answer, dealt out evenly under `num_sections` numbered headings."""
    n = args["num_sections"]
    sentences = _sentences(answer)
    bounds = [round(i * len(sentences) / n) for i in range(n + 1)]
    parts = [" ".join(sentences[a:b]) for a, b in itertools.pairwise(bounds)]
    return "\n".join(f"{args['section_spliter']} {i + 1}\n{part}".strip() for i, part in enumerate(parts))


def quotation(query: str, answer: str, args: Mapping[str, Any]) -> str:
    """The answer in double quotation marks; those inside become single ones."""
    return '"' + answer.strip().replace('"', "'") + '"'


def number_highlighted_sections(query: str, answer: str, args: Mapping[str, Any]) -> str:
    """The answer with its `num_highlights` longest words between asterisks; of equally long ones the first."""
    answer = answer.replace("*", "")
    words = list(re.finditer(r"[^\W\d_]+", answer))
    chosen = sorted(words, key=lambda m: (-len(m.group()), m.start()))[: args["num_highlights"]]
    for match in sorted(chosen, key=lambda m: -m.start()):  # from the end, so that earlier positions stay valid
        answer = f"{answer[: match.start()]}*{match.group()}*{answer[match.end() :]}"
    return answer


def _sentences(text: str) -> list[str]:
    """The sentences of a text: they end with a full stop, a question mark or an exclamation mark before a blank."""
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]


REWRITES: Mapping[str, Rewrite] = MappingProxyType(
    {
        "english_capital": english_capital,
        "no_comma": no_comma,
        "title": title,
        "multiple_sections": multiple_sections,
        "quotation": quotation,
        "number_highlighted_sections": number_highlighted_sections,
    }
)
