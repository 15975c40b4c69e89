"""Where a result comes from: what was asked for when it was made, so that later commands need not be told again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from wpjax.errors import ComponentError

_SIDES: tuple[Literal["base", "expert"], ...] = ("base", "expert")


class Origin(NamedTuple):
    """What a sweep was asked for, as its file records it. None: the file does not say.

    Attributes:
        base: source of the base, as the user wrote it.
        expert: source of the expert, likewise.
        behaviour: name of the behaviour, or path of its file. A file that was not written by a study has the name only.
        checker: the checker that the user named; None also where the behaviour has its own.
        split: how queries are divided, "thirds" or "none".
        max_new_tokens: length of an answer, at most.
        dtype: precision of the weights.
        ignore_config: attributes of config.json that were said not to matter.
        tokenizer: whose tokenizer was used, where that was said: "base" or "expert".
        is_divided: whether the pair was divided into directions.
        rank: the number of directions of each matrix that was asked for then; None for the default.

    >>> where = Origin.of({"base": "tiny:base", "expert": "tiny:expert", "behaviour": "tiny:title"})
    >>> where.behaviour, where.checker, where.split
    ('tiny:title', None, 'thirds')
    """

    base: str
    expert: str
    behaviour: str
    checker: str | None = None
    split: str = "thirds"
    max_new_tokens: int | None = None
    dtype: str = "float32"
    ignore_config: tuple[str, ...] = ()
    tokenizer: Literal["base", "expert"] | None = None
    is_divided: bool = False
    rank: int | None = None

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> Origin:
        """Read it from the attributes of a result's dataset."""
        n_new = attributes.get("max_new_tokens")
        return cls(
            str(attributes["base"]),
            str(attributes["expert"]),
            _text(attributes, "behaviour_source") or str(attributes["behaviour"]),
            _text(attributes, "checker"),
            "none" if attributes.get("split") == "all" else "thirds",
            int(n_new) if isinstance(n_new, int | np.integer) and n_new > 0 else None,
            _text(attributes, "dtype") or "float32",
            _names(_text(attributes, "ignore_config")),
            next((side for side in _SIDES if attributes.get("tokenizer") == side), None),
            "directions" in attributes,
            _rank(_text(attributes, "directions")),
        )

    def expect_whole(self, path: str | Path, what: str) -> None:
        """Refuse the result of a sweep of directions, for a command that needs parts of matrices.

        Args:
            path: the file of the result, for messages.
            what: what the command makes, and of what.

        Raises:
            ComponentError: it is one.
        """
        if self.is_divided:
            raise ComponentError(
                f"{path} is a sweep of directions of changes, and {what}; sweep heads, KV groups and neurons for it"
            )

    @property
    def checker_is_code(self) -> bool:
        """Whether the checker is a function of a module. A result file is data: such a checker is not run unasked."""
        how, colon, _ = (self.checker or "").partition(":")
        return bool(colon) and how not in ("regex", "contains")


def asked_for(
    behaviour: str,
    checker: str | None,
    max_new_tokens: int,
    ignore_config: tuple[str, ...],
    tokenizer: str | None = None,
) -> dict[str, str | int]:
    """The attributes by which a result records what `Origin` reads, beside those that every result has."""
    attributes: dict[str, str | int] = {"behaviour_source": behaviour, "max_new_tokens": max_new_tokens}
    if checker is not None:
        attributes["checker"] = checker
    if tokenizer is not None:
        attributes["tokenizer"] = tokenizer
    if ignore_config:
        attributes["ignore_config"] = json.dumps(list(ignore_config))
    return attributes


def _text(attributes: Mapping[str, Any], name: str) -> str | None:
    value = attributes.get(name)
    return value if isinstance(value, str) and value else None


def _rank(text: str | None) -> int | None:
    """The rank in what a result says of its directions; None if there is none, or if it is damaged."""
    try:
        rank = json.loads(text or "{}").get("rank")
    except (ValueError, RecursionError, AttributeError):
        return None
    return rank if isinstance(rank, int) and rank > 0 else None


def _names(text: str | None) -> tuple[str, ...]:
    """A list of names from JSON; empty if there is none, or if it is damaged."""
    try:
        names = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return ()
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()
