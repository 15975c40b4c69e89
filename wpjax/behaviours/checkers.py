"""Checkers: whether a generated text follows an instruction.

The six constraints are IFEval's (arXiv 2311.07911), with its definitions: strict on the text as it is, loose on
any of eight variants of it. A blank text always fails.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from wpjax.errors import BehaviourError

Checker: TypeAlias = Callable[[str, Mapping[str, Any]], bool]
"""(text, instruction arguments) -> whether the text follows the instruction."""


def no_comma(text: str, args: Mapping[str, Any]) -> bool:
    """No comma anywhere."""
    return "," not in text


def title(text: str, args: Mapping[str, Any]) -> bool:
    """A non-blank title between double angular brackets on one line."""
    return any(t.lstrip("<").rstrip(">").strip() for t in re.findall(r"<<[^\n]+>>", text))


def multiple_sections(text: str, args: Mapping[str, Any]) -> bool:
    """At least `num_sections` headings made of `section_spliter` and a number."""
    heading = r"\s?" + args["section_spliter"].strip() + r"\s?\d+\s?"
    return len(re.split(heading, text)) - 1 >= args["num_sections"]


def quotation(text: str, args: Mapping[str, Any]) -> bool:
    """The stripped text starts and ends with a straight double quotation mark."""
    text = text.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


def number_highlighted_sections(text: str, args: Mapping[str, Any]) -> bool:
    """At least `num_highlights` non-blank *spans*; a **span** counts by both of IFEval's patterns."""
    single = [h.strip("*").strip() for h in re.findall(r"\*[^\n\*]*\*", text)]
    double = [h.removeprefix("**").removesuffix("**").strip() for h in re.findall(r"\*\*[^\n\*]*\*\*", text)]
    return sum(map(bool, single + double)) >= args["num_highlights"]


def english_capital(text: str, args: Mapping[str, Any]) -> bool:
    """All letters are capitals.

    IFEval's own checker also asks langdetect for English, which on short upper-case text is mostly wrong;
    `english_capital_official` does that.
    """
    return text.isupper()


def english_capital_official(text: str, args: Mapping[str, Any]) -> bool:
    """IFEval's definition: all capitals, and langdetect (seeded here) says English.

    Raises:
        BehaviourError: the `ifeval` extra is not installed.
    """
    if not text.isupper():
        return False
    try:
        import langdetect
    except ImportError as error:
        raise BehaviourError("the official english_capital needs langdetect: pip install 'wpjax[ifeval]'") from error
    langdetect.DetectorFactory.seed = 0
    try:
        return bool(langdetect.detect(text) == "en")
    except langdetect.LangDetectException:
        return True  # as IFEval counts it


CHECKERS: Mapping[str, Checker] = MappingProxyType(
    {
        "english_capital": english_capital,
        "no_comma": no_comma,
        "title": title,
        "multiple_sections": multiple_sections,
        "quotation": quotation,
        "number_highlighted_sections": number_highlighted_sections,
        "english_capital_official": english_capital_official,
    }
)


def strict(checker: Checker, text: str, args: Mapping[str, Any]) -> bool:
    """Whether the text as it is follows the instruction."""
    return bool(text.strip()) and checker(text, args)


def loose(checker: Checker, text: str, args: Mapping[str, Any]) -> bool:
    """Whether any of IFEval's eight variants does: without first line, last line or both, each with and without *."""
    lines = text.split("\n")
    cuts = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(strict(checker, variant, args) for cut in cuts for variant in (cut, cut.replace("*", "")))


def parse_checker(spec: str) -> Checker:
    """A checker from its name or from `regex:PATTERN`, `contains:TEXT` or `module:function`.

    Raises:
        BehaviourError: an unknown name, a pattern that does not compile, a function that cannot be imported.
    """
    if spec in CHECKERS:
        return CHECKERS[spec]
    how, _, what = spec.partition(":")
    if how == "regex" and what:
        try:
            pattern = re.compile(what)
        except (re.error, RecursionError, OverflowError) as error:
            raise BehaviourError(f"checker {spec!r}: not a regular expression ({error})") from error
        return lambda text, args: pattern.search(text) is not None
    if how == "contains" and what:
        return lambda text, args: what in text
    if how and what:
        try:
            function = getattr(importlib.import_module(how), what)
        except (Exception, SystemExit) as error:  # whatever the module does when it is imported
            reason = f"{type(error).__name__}: {error}"
            raise BehaviourError(f"checker {spec!r}: cannot be imported ({reason}); correct the module") from error
        return functools.partial(_call, spec, function)
    raise BehaviourError(
        f"unknown checker {spec!r}; use one of {', '.join(CHECKERS)}, or regex:..., contains:..., module:function"
    )


def _call(spec: str, function: Callable[[str], Any], text: str, args: Mapping[str, Any]) -> bool:
    """A user's function as a checker."""
    try:
        return bool(function(text))
    except (Exception, SystemExit) as error:  # whatever it raises
        reason = f"{type(error).__name__}: {error}"
        raise BehaviourError(f"checker {spec!r} fails on the text {text[:40]!r} ({reason}); correct it") from error
