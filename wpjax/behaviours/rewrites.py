"""Rewrites: turn a plain answer into one that follows an instruction, to make training targets for an expert."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

Rewrite: TypeAlias = Callable[[str, str, Mapping[str, Any]], str]
"""(query, plain answer, instruction arguments) -> an answer that follows the instruction."""


def english_capital(query: str, answer: str, args: Mapping[str, Any]) -> str:
    """Every letter a capital."""
    return answer.upper()


def no_comma(query: str, answer: str, args: Mapping[str, Any]) -> str:
    """Commas left out."""
    return answer.replace(",", "")


def title(query: str, answer: str, args: Mapping[str, Any]) -> str:
    """The subject of the query as a title above the answer."""
    return f"<<{query.rstrip('?.! ')}>>\n{answer}"


def multiple_sections(query: str, answer: str, args: Mapping[str, Any]) -> str:
    """The sentences dealt out evenly under numbered headings."""
    n = args["num_sections"]
    sentences = _sentences(answer)
    bounds = [round(i * len(sentences) / n) for i in range(n + 1)]
    parts = [" ".join(sentences[a:b]) for a, b in itertools.pairwise(bounds)]
    return "\n".join(f"{args['section_spliter']} {i + 1}\n{part}".strip() for i, part in enumerate(parts))


def quotation(query: str, answer: str, args: Mapping[str, Any]) -> str:
    """Between double quotation marks; marks inside become single."""
    return '"' + answer.strip().replace('"', "'") + '"'


def number_highlighted_sections(query: str, answer: str, args: Mapping[str, Any]) -> str:
    """The first of the longest words between asterisks, as many as asked for."""
    answer = answer.replace("*", "")
    words = list(re.finditer(r"[^\W\d_]+", answer))
    chosen = sorted(words, key=lambda m: (-len(m.group()), m.start()))[: args["num_highlights"]]
    for match in sorted(chosen, key=lambda m: -m.start()):
        answer = f"{answer[: match.start()]}*{match.group()}*{answer[match.end() :]}"
    return answer


def _sentences(text: str) -> list[str]:
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
