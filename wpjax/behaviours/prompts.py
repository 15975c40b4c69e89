"""A behaviour: prompts with and without an instruction, a checker of the answer, and how they become tokens."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Int

from wpjax.behaviours.checkers import CHECKERS, Checker, parse_checker
from wpjax.behaviours.rewrites import REWRITES, Rewrite
from wpjax.errors import BehaviourError, CheckpointError

Split = Literal["fit", "sweep", "test"]
SPLITS: tuple[Split, ...] = ("fit", "sweep", "test")
MIN_PROMPTS = 4
"""Fewest prompts of an experiment: below, no interval means anything."""

MIN_QUERIES = 12
"""Fewest queries of a behaviour: four a split."""


@dataclasses.dataclass(frozen=True)
class PromptPair:
    """One query with and without the instruction.

    Attributes:
        with_instruction: what the user says, instruction included.
        without: the same query alone.
        query: index of the query; pairs of one query are not independent and stay in one split.
        args: the instruction's arguments, for the checker.
        response: a response that follows the instruction, if the user gave one.
    """

    with_instruction: str
    without: str
    query: int
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    response: str | None = None


class Tokens(NamedTuple):
    """Token ids padded on the right.

    Attributes:
        ids: [B, T] int32.
        lengths: [B] int32, tokens of each prompt.
    """

    ids: Int[np.ndarray | Array, "B T"]
    lengths: Int[np.ndarray | Array, " B"]

    @property
    def last(self) -> Int[np.ndarray | Array, " B"]:
        """Position of each prompt's last token."""
        return self.lengths - 1


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Paired prompts as tokens.

    Attributes:
        behaviour: name of the behaviour.
        split: which part of its queries.
        with_instruction: tokens of the prompts with the instruction, [B, T].
        without: tokens of the same queries alone, [B, T'].
        texts: the prompts with the instruction exactly as the model is given them, template included.
        pairs: what they were made from.
    """

    behaviour: str
    split: str
    with_instruction: Tokens
    without: Tokens
    texts: tuple[str, ...]
    pairs: tuple[PromptPair, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def queries(self) -> Int[np.ndarray, " B"]:
        """Index of each prompt's query, the unit of resampling."""
        return np.array([p.query for p in self.pairs])

    def check_fits(self, n_ctx: int, d_vocab: int) -> None:
        """Refuse prompts that the model cannot take.

        Raises:
            BehaviourError: a prompt longer than the context, or a token id outside the vocabulary.
        """
        for tokens in (self.with_instruction, self.without):
            longest = int(np.argmax(tokens.lengths))
            if tokens.lengths[longest] > n_ctx:
                text = self.pairs[longest].with_instruction
                raise BehaviourError(
                    f"{self.behaviour}: prompt {longest + 1} ({text[:40]!r}...) has {tokens.lengths[longest]} tokens, "
                    f"the model takes {n_ctx}; shorten it"
                )
            if tokens.ids.max() >= d_vocab:
                raise BehaviourError(
                    f"{self.behaviour}: token id {tokens.ids.max()} is outside the model's vocabulary of {d_vocab}; "
                    "the tokenizer belongs to another model"
                )


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """Something a prompt can ask for and a checker can recognise.

    Attributes:
        name: as on the command line.
        pairs: all prompt pairs.
        checker: whether an answer follows the instruction.
        rewrite: makes a plain answer follow it, or None.
    """

    name: str
    pairs: tuple[PromptPair, ...]
    checker: Checker
    rewrite: Rewrite | None = None

    def check_checker(self) -> None:
        """Try the checker once with each prompt's arguments, before anything long depends on it.

        Raises:
            BehaviourError: there is no checker, or it fails.
        """
        for args in {json.dumps(p.args, sort_keys=True): p.args for p in self.pairs}.values():
            try:
                self.checker("A line of text.", args)
            except BehaviourError:
                raise
            except Exception as error:  # whatever a user's function raises
                raise BehaviourError(
                    f"{self.name}: the checker fails with args {dict(args)} ({type(error).__name__}: {error}); every "
                    'line needs the "args" that it reads'
                ) from error

    def select(self, split: Split, n_prompts: int | None = None) -> tuple[PromptPair, ...]:
        """The first pairs of one split, every query once before any query twice.

        Queries are dealt to the splits in thirds, in an order that depends on their number alone.

        Args:
            split: "fit" for anchors and for training experts, "sweep" for effects, "test" for evaluation.
            n_prompts: at most this many; None for all.

        Raises:
            BehaviourError: an unknown split.
        """
        if split not in SPLITS:
            raise BehaviourError(f"unknown split {split!r}; splits: {', '.join(SPLITS)}")
        queries = sorted({p.query for p in self.pairs})
        random.Random(0).shuffle(queries)
        mine = queries[SPLITS.index(split) :: len(SPLITS)]
        groups = {q: [p for p in self.pairs if p.query == q] for q in mine}
        # Query i starts at its i-th phrasing, so that few prompts already meet every phrasing.
        chosen = [
            groups[q][(i + turn) % len(groups[q])]
            for turn in range(max(map(len, groups.values())))
            for i, q in enumerate(mine)
            if turn < len(groups[q])
        ]
        return tuple(chosen[:n_prompts])

    def encode(self, tokenizer: Any, split: Split = "sweep", n_prompts: int | None = 64) -> PromptBatch:
        """Prompts of one split as tokens, through the tokenizer's chat template if it has one.

        Args:
            tokenizer: of transformers.
            split: as in `select`.
            n_prompts: at most this many.

        Raises:
            BehaviourError: an unknown split, too few prompts, or one without tokens.
        """
        if n_prompts is not None and n_prompts < MIN_PROMPTS:
            raise BehaviourError(
                f"{n_prompts} prompts are too few to measure an effect; ask for at least {MIN_PROMPTS}"
            )
        pairs = self.select(split, n_prompts)
        texts = [render(tokenizer, p.with_instruction) for p in pairs]
        return PromptBatch(
            behaviour=self.name,
            split=split,
            with_instruction=encode_texts(tokenizer, texts),
            without=encode_texts(tokenizer, [render(tokenizer, p.without) for p in pairs]),
            texts=tuple(texts),
            pairs=pairs,
        )


def render(tokenizer: Any, text: str) -> str:
    """What the model is given for one user message: the chat template up to the answer, or the text itself.

    Raises:
        CheckpointError: the chat template fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        return text
    message = [{"role": "user", "content": text}]
    try:
        rendered = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        rendered.encode("utf-8")  # no lone surrogates
        return rendered
    except Exception as error:  # a template is a program: it raises what it likes
        raise CheckpointError(
            f"{tokenizer.name_or_path}: the chat template fails ({type(error).__name__}: {error}); correct it, or "
            "remove it to use the prompts as they are"
        ) from error


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> Tokens:
    """Rendered texts as token ids, padded on the right.

    Raises:
        BehaviourError: a text without any token.
    """
    templated = bool(getattr(tokenizer, "chat_template", None))
    rows = [tokenizer(text, add_special_tokens=not templated)["input_ids"] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise BehaviourError(f"the prompt {text!r} has no tokens; remove it")
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return Tokens(ids, lengths)


def behaviour(name: str | Path, checker: str | None = None) -> Behaviour:
    """A behaviour by name, or from a JSONL file of the user's.

    Args:
        name: one of `BUILT_IN`; `tiny:` and one of them for the embedded pair's own language; or a path ending in
            `.jsonl` whose lines are {"with": ..., "without": ...} or {"prompt": ..., "instruction": ...}, with
            optional "args" (for the checker) and "response" (an answer to train on).
        checker: for a file: a built-in checker's name, `regex:...`, `contains:...` or `module:function`.

    Raises:
        BehaviourError: an unknown name, or a line that cannot be used, by number.
    """
    name = str(name)
    if name.endswith(".jsonl"):
        return _from_file(Path(name), checker)
    if checker is not None:
        raise BehaviourError(f"{name} has its own checker; --checker goes with a .jsonl file")
    base = name.removeprefix("tiny:")
    instructions = json.loads(_data("behaviours/instructions.json"))
    if base not in instructions:
        raise BehaviourError(f"unknown behaviour {name!r}; built in: {', '.join(BUILT_IN)}; or a path ending in .jsonl")
    queries = _data("assets/tiny/queries.txt" if base != name else "behaviours/queries.txt").splitlines()
    pairs = tuple(
        PromptPair(p["text"].replace("{query}", query), query, i, p.get("args", {}))
        for i, query in enumerate(queries)
        for p in instructions[base]
    )
    return Behaviour(name, pairs, CHECKERS[base], REWRITES[base])


def _data(name: str) -> str:
    return (resources.files("wpjax") / name).read_text(encoding="utf-8")


BUILT_IN: tuple[str, ...] = tuple(REWRITES)


def _from_file(path: Path, checker: str | None) -> Behaviour:
    try:
        # Only newlines end a line: JSON allows Unicode's other separators inside a string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise BehaviourError(f"{path}: cannot be read ({error})") from error
    queries: dict[str, int] = {}
    pairs = [_parse_line(path, i + 1, line, queries) for i, line in enumerate(lines) if line.strip()]
    if len(queries) < MIN_QUERIES:
        raise BehaviourError(
            f"{path}: {len(queries)} different quer{'y' if len(queries) == 1 else 'ies'}, at least {MIN_QUERIES} are "
            "needed to fit an anchor, sweep and test on different ones"
        )
    return Behaviour(path.stem, tuple(pairs), parse_checker(checker) if checker else _no_checker)


def _parse_line(path: Path, number: int, line: str, queries: dict[str, int]) -> PromptPair:
    where = f"{path}, line {number}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BehaviourError(f"{where}: not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise BehaviourError(f"{where}: expected a JSON object")
    keys = set(entry) - {"args", "response"}
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
    return PromptPair(with_, without, queries.setdefault(without, len(queries)), args, response)


def _is_text(value: Any) -> bool:
    """A string without lone surrogates, which JSON can say and no tokenizer takes."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def _no_checker(text: str, args: Mapping[str, Any]) -> bool:
    raise BehaviourError(
        "this behaviour comes from a file without a checker, which judges generated answers; pass --checker, e.g. "
        "'regex:^[A-Z ]+$' (or --causal skip, to take an anchor untested)"
    )
