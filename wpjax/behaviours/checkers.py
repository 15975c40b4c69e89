"""Checkers: tell whether a generated text follows an instruction.

The six constraints and their definitions are IFEval's (arXiv 2311.07911). The strict check is of the text as it is. The
loose check passes if any of eight variants of the text does. A blank text always fails.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from wpjax.behaviours.limits import TimeIsUp, time_limit
from wpjax.errors import BehaviourError

PATTERN_SECONDS = 2.0
"""How long a regular expression may search one text. Some patterns would go on for centuries."""

FUNCTION_SECONDS = 60.0
"""How long a function of the user may take for one text."""

Checker: TypeAlias = Callable[[str, Mapping[str, Any]], bool]
"""A function of (text, instruction arguments) that returns whether the text follows the instruction."""


def no_comma(text: str, args: Mapping[str, Any]) -> bool:
    """The text has no comma."""
    return "," not in text


def title(text: str, args: Mapping[str, Any]) -> bool:
    """The text has a title that is not blank, in double angular brackets on one line."""
    return any(t.lstrip("<").rstrip(">").strip() for t in re.findall(r"<<[^\n]+>>", text))


def multiple_sections(text: str, args: Mapping[str, Any]) -> bool:
    """The text has at least `num_sections` headings made of `section_spliter` (IFEval's spelling) and a number."""
    heading = r"\s?" + args["section_spliter"].strip() + r"\s?\d+\s?"
    with _in_time(f"section_spliter {args['section_spliter']!r}", text):
        return len(re.split(heading, text)) - 1 >= args["num_sections"]


def quotation(text: str, args: Mapping[str, Any]) -> bool:
    """Without blanks at its ends, the text starts and ends with a straight double quotation mark."""
    text = text.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


def number_highlighted_sections(text: str, args: Mapping[str, Any]) -> bool:
    """The text has at least `num_highlights` *spans* that are not blank; IFEval counts a **span** by both patterns."""
    single = [h.strip("*").strip() for h in re.findall(r"\*[^\n\*]*\*", text)]
    double = [h.removeprefix("**").removesuffix("**").strip() for h in re.findall(r"\*\*[^\n\*]*\*\*", text)]
    return sum(map(bool, single + double)) >= args["num_highlights"]


def english_capital(text: str, args: Mapping[str, Any]) -> bool:
    """All letters are capitals, and there is a letter.

    IFEval's own checker also asks langdetect whether the text is English. On short upper-case text the answer is mostly
    wrong, so it is left out here. `english_capital_official` asks.
    """
    return text.isupper()


def english_capital_official(text: str, args: Mapping[str, Any]) -> bool:
    """IFEval's definition: all letters are capitals, and langdetect says that the text is English.

    langdetect is random; it is seeded here.

    Raises:
        BehaviourError: langdetect is not installed; the extra `ifeval` has it.
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
        return True  # IFEval counts a text whose language cannot be told as passed


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


"""Built-in checkers by name."""


def strict(checker: Checker, text: str, args: Mapping[str, Any]) -> bool:
    """Whether the text as it is follows the instruction; a blank text does not.

    Args:
        checker: the checker.
        text: answer of a model.
        args: arguments of the instruction.

    >>> from wpjax.behaviours import parse_checker, strict
    >>> strict(parse_checker("no_comma"), "Yes, of course.", {})
    False
    """
    return bool(text.strip()) and checker(text, args)


def loose(checker: Checker, text: str, args: Mapping[str, Any]) -> bool:
    """Whether any of IFEval's eight variants of the text follows the instruction.

    They are the text without its first line, its last line, both or neither, each with and without its asterisks.

    Args:
        checker: the checker.
        text: answer of a model.
        args: arguments of the instruction.

    >>> from wpjax.behaviours import loose, parse_checker
    >>> loose(parse_checker("english_capital"), "Here you are:\\nOWLS HUNT AT NIGHT.", {})
    True
    """
    lines = text.split("\n")
    cuts = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(strict(checker, variant, args) for cut in cuts for variant in (cut, cut.replace("*", "")))


def parse_checker(spec: str) -> Checker:
    """A checker from the text by which users name it.

    Args:
        spec: name of a built-in checker; or `regex:PATTERN`, a pattern that must occur in the text; or `contains:TEXT`;
            or `module:function`, a function of the text that returns true or false. The module may be installed, or
            lie in the working directory. **Its code is run**, with all your rights: name only what you trust.

    Raises:
        BehaviourError: the name is unknown, the pattern does not compile, or the function cannot be imported. The
            checker raises it, too: for a text on which the function fails, or on which function or pattern take
            longer than they may (`FUNCTION_SECONDS`, `PATTERN_SECONDS`).

    >>> from wpjax.behaviours import parse_checker
    >>> parse_checker("regex:^[A-Z ]+$")("OWLS HUNT", {})
    True
    """
    if spec in CHECKERS:
        return CHECKERS[spec]
    how, _, what = spec.partition(":")
    if how == "regex" and what:
        try:
            pattern = re.compile(what)
        except (re.error, RecursionError, OverflowError) as error:
            raise BehaviourError(f"checker {spec!r}: not a regular expression ({error})") from error
        search = functools.partial(_search, spec, pattern)
        for text in _TRIALS:  # a pattern that does not end is better known before the models answer
            search(text, {})
        return search
    if how == "contains" and what:
        return lambda text, args: what in text
    if how and what:
        here = str(Path.cwd())  # an installed command has its own folder there instead
        if here not in sys.path and "" not in sys.path:
            sys.path.append(here)
        try:
            function = getattr(importlib.import_module(how), what)
        except (Exception, SystemExit) as error:  # a user's module may raise anything when it is imported
            reason = f"{type(error).__name__}: {error}"
            raise BehaviourError(f"checker {spec!r}: cannot be imported ({reason}); correct the module") from error
        return functools.partial(_call, spec, function)
    raise BehaviourError(
        f"unknown checker {spec!r}; use one of {', '.join(CHECKERS)}, or regex:..., contains:..., module:function"
    )


_TRIALS = tuple(f"{word * 40}{end}" for word in ("a", "A", "a ", "A ", "word ", "WORD ", "word\n") for end in ("", "!"))
"""Plain texts on which a pattern with nested repeats does not end."""


@contextlib.contextmanager
def _in_time(what: str, text: str) -> Iterator[None]:
    """Stop a search for a pattern that takes too long, with an error."""
    try:
        with time_limit(PATTERN_SECONDS):
            yield
    except TimeIsUp:
        raise BehaviourError(
            f"{what}: no end after {PATTERN_SECONDS:g} s on a text of {len(text)} characters ({text[:40]!r}...); the "
            "pattern has repeats within repeats, such as (a+)+: write it without"
        ) from None


def _search(spec: str, pattern: re.Pattern[str], text: str, args: Mapping[str, Any]) -> bool:
    """Looks for a user's pattern as a checker; `parse_checker` fixes the first two arguments."""
    with _in_time(f"checker {spec!r}", text):
        return pattern.search(text) is not None


def _call(spec: str, function: Callable[[str], Any], text: str, args: Mapping[str, Any]) -> bool:
    """Calls a user's function as a checker; `parse_checker` fixes the first two arguments."""
    try:
        with time_limit(FUNCTION_SECONDS):
            return bool(function(text))
    except TimeIsUp:
        raise BehaviourError(
            f"checker {spec!r}: no end after {FUNCTION_SECONDS:g} s on a text of {len(text)} characters "
            f"({text[:40]!r}...); correct it"
        ) from None
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise BehaviourError(f"checker {spec!r} fails on the text {text[:40]!r} ({reason}); correct it") from error
