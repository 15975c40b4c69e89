"""Behaviours from a file of the user: one pair of prompts on each line, as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wpjax.behaviours.checkers import parse_checker
from wpjax.behaviours.prompts import MIN_PROMPTS, MIN_QUERIES, Behaviour, Division, PromptPair
from wpjax.errors import BehaviourError


def from_file(path: Path, checker: str | None, division: Division = "thirds") -> Behaviour:
    """A behaviour from a JSONL file; its name is that of the file.

    Lines that share a prompt, with the instruction or without it, are phrasings of one query: they are not independent.
    """
    if path.exists() and not path.is_file():  # reading a pipe or a device may never end
        raise BehaviourError(f"{path}: not a regular file; copy its lines to one")
    try:
        # Only newlines end a line: JSON allows Unicode's other separators inside a string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise BehaviourError(f"{path}: cannot be read ({error})") from error
    pairs = _with_queries([_parse_line(path, i + 1, line) for i, line in enumerate(lines) if line.strip()])
    n, least = len({pair.query for pair in pairs}), MIN_QUERIES if division == "thirds" else MIN_PROMPTS
    if n < least:
        found = f"{n} different quer{'y' if n == 1 else 'ies'}"
        why = "to fit an anchor, sweep and test on different ones" if division == "thirds" else "for an interval"
        more = "; or pass --split none (all serve all three)" if MIN_PROMPTS <= n < MIN_QUERIES else ""
        raise BehaviourError(
            f"{path}: {found}, at least {least} are needed {why}; lines that share a prompt count as one{more}"
        )
    judge = parse_checker(checker) if checker else _no_checker
    return Behaviour(path.stem, tuple(pairs), judge, None, division, checker or "")


def _with_queries(pairs: list[PromptPair]) -> list[PromptPair]:
    """The pairs with the index of each one's query: pairs that share a prompt, directly or by others, have the same."""
    groups: dict[tuple[str, str], int] = {}  # a prompt and which side it is of -> index of a pair that stands for it
    stands_for = list(range(len(pairs)))

    def first(i: int) -> int:
        while stands_for[i] != i:
            i = stands_for[i]
        return i

    for i, pair in enumerate(pairs):
        for key in (("with", pair.with_instruction), ("without", pair.without)):
            a, b = sorted((first(i), first(groups.setdefault(key, i))))
            stands_for[b] = a
    index = {root: n for n, root in enumerate(dict.fromkeys(first(i) for i in range(len(pairs))))}
    return [dataclasses.replace(pair, query=index[first(i)]) for i, pair in enumerate(pairs)]


def _parse_line(path: Path, number: int, line: str) -> PromptPair:
    """The pair of one line; its query is not known yet.

    Args:
        path: the file, for messages.
        number: number of the line, from 1.
        line: its text.
    """
    where = f"{path}, line {number}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BehaviourError(f"{where}: not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise BehaviourError(f"{where}: expected a JSON object")
    keys = set(entry) - {"args", "response"}
    if any("\0" in value for value in entry.values() if isinstance(value, str)):
        raise BehaviourError(f"{where}: holds the character U+0000, which a result cannot store; remove it")
    prompts = [entry[key] for key in keys & {"prompt", "instruction", "with", "without"}]
    if not all(_is_text(prompt) and prompt.strip() for prompt in prompts):
        raise BehaviourError(f"{where}: prompts must be text that is not blank")
    if keys == {"prompt", "instruction"}:
        with_, without = f"{entry['prompt']} {entry['instruction']}", entry["prompt"]
    elif keys == {"with", "without"}:
        with_, without = entry["with"], entry["without"]
    else:
        raise BehaviourError(f'{where}: keys must be "with" and "without", or "prompt" and "instruction"; has {keys}')
    args, response = entry.get("args", {}), entry.get("response")
    if with_ == without:
        raise BehaviourError(f"{where}: the prompt is the same with and without the instruction")
    if not isinstance(args, dict) or not (response is None or _is_text(response)):
        raise BehaviourError(f'{where}: "args" must be an object and "response" text')
    return PromptPair(with_, without, 0, args, response)


def _is_text(value: Any) -> bool:
    """Whether a value is a string without lone surrogates. JSON can have them, and no tokenizer takes them."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def _no_checker(text: str, args: Mapping[str, Any]) -> bool:
    """Stands for a checker that the user did not give, until it is needed."""
    raise BehaviourError(
        "this behaviour comes from a file without a checker, which judges generated answers; pass --checker, e.g. "
        "'regex:^[A-Z ]+$' (or --causal skip, to take an anchor untested)"
    )
