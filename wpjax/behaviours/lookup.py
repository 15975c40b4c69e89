"""Behaviours by name: those that come with the package, and files of the user."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from wpjax.behaviours.checkers import CHECKERS
from wpjax.behaviours.jsonl import from_file
from wpjax.behaviours.prompts import Behaviour, Division, PromptPair
from wpjax.behaviours.rewrites import REWRITES
from wpjax.errors import BehaviourError, nearest


def behaviour(name: str | Path, checker: str | None = None, split: Division = "thirds") -> Behaviour:
    """A behaviour by its name, or from a file of the user.

    Args:
        name: one of three:

            - a name in `BUILT_IN`;
            - `tiny:` and such a name: the same behaviour in the language of the embedded models;
            - a path that ends in `.jsonl`. A line is {"with": ..., "without": ...} or
              {"prompt": ..., "instruction": ...}, with optional "args" (for the checker) and "response" (an answer to
              train on). At least 12 queries are needed; lines that share a prompt are phrasings of one.
        checker: checker for a file: a built-in name, `regex:...`, `contains:...` or `module:function`, whose module is
            imported and run (see `parse_checker`).
        split: "thirds": a third of the queries fits anchors and experts, a third is swept, a third is for tests.
            "none": all of them serve all three, for files of few prompts (at least 4); results are marked.

    Raises:
        BehaviourError: the name is unknown, or a line cannot be used; the message has its number.

    >>> import wpjax as wp
    >>> task = wp.behaviour("english_capital")
    >>> print(task.pairs[0].without)
    How do bees make honey?
    >>> task.checker("THEY DRY NECTAR.", {})
    True
    """
    name = str(name)
    if name.endswith(".jsonl"):
        return from_file(Path(name), checker, split)
    if checker is not None:
        raise BehaviourError(f"{name} has its own checker; --checker goes with a .jsonl file")
    base = name.removeprefix("tiny:")
    instructions = json.loads(_data("behaviours/instructions.json"))
    if base not in instructions:
        raise BehaviourError(
            f"unknown behaviour {name!r}{nearest(base, BUILT_IN)}; built in: {', '.join(BUILT_IN)}; or a path ending "
            "in .jsonl"
        )
    queries = _data("assets/tiny/queries.txt" if base != name else "behaviours/queries.txt").splitlines()
    pairs = tuple(
        PromptPair(p["text"].replace("{query}", query), query, i, p.get("args", {}))
        for i, query in enumerate(queries)
        for p in instructions[base]
    )
    return Behaviour(name, pairs, CHECKERS[base], REWRITES[base], split, base)


def _data(name: str) -> str:
    """Text of a file of the package."""
    return (resources.files("wpjax") / name).read_text(encoding="utf-8")


BUILT_IN: tuple[str, ...] = tuple(REWRITES)
"""Names of the behaviours that come with the package."""
