"""A behaviour: prompts with and without an instruction, and a checker of answers; and how prompts become tokens."""

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
"""Thirds of the queries: to fit anchors and experts, to measure effects, to evaluate."""

MIN_PROMPTS = 4
"""Fewest prompts of an experiment. With fewer, an interval means nothing."""

MIN_QUERIES = 12
"""Fewest queries of a behaviour: four for each split."""


@dataclasses.dataclass(frozen=True)
class PromptPair:
    """One query with the instruction, and the same query without it.

    Attributes:
        with_instruction: text of the user, with the instruction.
        without: text of the user, the query alone.
        query: index of the query. Pairs of one query are not independent, so they are always in one split.
        args: arguments of the instruction, for the checker.
        response: an answer that follows the instruction, to train on; None if the user gave none.
    """

    with_instruction: str
    without: str
    query: int
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    response: str | None = None


class Tokens(NamedTuple):
    """Token ids padded on the right.

    Attributes:
        ids: [B, T] int32, token ids; 0 after the end of a prompt.
        lengths: [B] int32, number of tokens of each prompt.

    >>> import numpy as np
    >>> from wpjax.behaviours import Tokens
    >>> Tokens(np.array([[5, 6, 7], [8, 9, 0]]), np.array([3, 2])).last.tolist()
    [2, 1]
    """

    ids: Int[np.ndarray | Array, "B T"]
    lengths: Int[np.ndarray | Array, " B"]

    @property
    def last(self) -> Int[np.ndarray | Array, " B"]:
        """Position of each prompt's last token."""
        return self.lengths - 1


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """B pairs of prompts as tokens.

    Attributes:
        behaviour: name of the behaviour.
        split: "fit", "sweep" or "test".
        with_instruction: tokens of the prompts with the instruction, [B, T].
        without: tokens of the same queries alone, [B, T'].
        texts: the prompts with the instruction exactly as the model reads them, with the chat template.
        pairs: the pairs that the tokens were made from.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> batch = task.encode(pair.tokenizer, n_prompts=8)
    >>> len(batch), batch.split, batch.with_instruction.ids.shape
    (8, 'sweep', (8, 23))
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
        """[B], index of each prompt's query. Queries are the unit of resampling."""
        return np.array([p.query for p in self.pairs])

    def check_fits(self, n_ctx: int, d_vocab: int) -> None:
        """Refuse prompts that a model cannot take.

        Args:
            n_ctx: context of the model, in tokens.
            d_vocab: size of its vocabulary.

        Raises:
            BehaviourError: a prompt is longer than the context, or a token id is outside the vocabulary.
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
    """Something that a prompt can ask for, and a checker can recognise in the answer.

    Attributes:
        name: name, as on the command line.
        pairs: all pairs of prompts.
        checker: function that tells whether an answer follows the instruction.
        rewrite: function that makes a plain answer follow the instruction, or None.

    >>> import wpjax as wp
    >>> from wpjax.behaviours import PromptPair
    >>> pairs = tuple(PromptPair(f"Question {i}? Shout!", f"Question {i}?", i) for i in range(12))
    >>> shouting = wp.Behaviour("shouting", pairs, lambda text, args: text.isupper())
    >>> len(shouting.select("test"))
    4
    """

    name: str
    pairs: tuple[PromptPair, ...]
    checker: Checker
    rewrite: Rewrite | None = None

    def check_checker(self) -> None:
        """Call the checker once with each prompt's arguments, so that a faulty one fails before anything long begins.

        Raises:
            BehaviourError: there is no checker, or it raises an error.
        """
        # Equal arguments are tried once. Their JSON tells them apart, as a mapping cannot be a key.
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
        """Pairs of one split. Every query comes once before any query comes twice.

        Each split has a third of the queries. Which ones depends on the number of queries alone.

        Args:
            split: "fit" for anchors and for training experts, "sweep" for effects, "test" for evaluation.
            n_prompts: number of pairs, at most; None for all.

        Raises:
            BehaviourError: there is no such split.
        """
        if split not in SPLITS:
            raise BehaviourError(f"unknown split {split!r}; splits: {', '.join(SPLITS)}")
        # Always the same shuffle, so that no query is ever in two splits.
        queries = sorted({p.query for p in self.pairs})
        random.Random(0).shuffle(queries)
        of_split = queries[SPLITS.index(split) :: len(SPLITS)]
        groups = {q: [p for p in self.pairs if p.query == q] for q in of_split}
        # Query i begins with its i-th phrasing, so that a few prompts already have every phrasing.
        chosen = [
            groups[q][(i + turn) % len(groups[q])]
            for turn in range(max(map(len, groups.values())))
            for i, q in enumerate(of_split)
            if turn < len(groups[q])
        ]
        return tuple(chosen[:n_prompts])

    def encode(self, tokenizer: Any, split: Split = "sweep", n_prompts: int | None = 64) -> PromptBatch:
        """Prompts of one split as tokens. If the tokenizer has a chat template, they go through it.

        Args:
            tokenizer: a tokenizer of the library transformers.
            split: "fit", "sweep" or "test"; see `select`.
            n_prompts: number of prompts, at most; None for all.

        Raises:
            BehaviourError: there is no such split, `n_prompts` is below `MIN_PROMPTS`, or a prompt has no tokens.
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
    """The text that the model reads for one message of a user.

    It is the chat template, filled in up to where the answer begins. Without a template it is the message itself.

    Args:
        tokenizer: a tokenizer of the library transformers.
        text: the message.

    Raises:
        CheckpointError: the chat template fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        return text
    message = [{"role": "user", "content": text}]
    try:
        rendered = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        rendered.encode("utf-8")  # fails on lone surrogates, which no tokenizer takes
        return rendered
    except Exception as error:  # a template is a program and may raise anything
        raise CheckpointError(
            f"{tokenizer.name_or_path}: the chat template fails ({type(error).__name__}: {error}); correct it, or "
            "remove it to use the prompts as they are"
        ) from error


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> Tokens:
    """Texts from `render` as token ids, padded on the right with 0.

    Args:
        tokenizer: the tokenizer that rendered them.
        texts: B texts.

    Raises:
        BehaviourError: a text has no tokens.
    """
    # A template writes the special tokens itself.
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
    """A behaviour by its name, or from a file of the user.

    Args:
        name: one of three:

            - a name in `BUILT_IN`;
            - `tiny:` and such a name: the same behaviour in the language of the embedded models;
            - a path that ends in `.jsonl`. A line is {"with": ..., "without": ...} or
              {"prompt": ..., "instruction": ...}, with optional "args" (for the checker) and "response" (an answer to
              train on).
        checker: checker for a file: a built-in name, `regex:...`, `contains:...` or `module:function`.

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
    """Text of a file of the package."""
    return (resources.files("wpjax") / name).read_text(encoding="utf-8")


BUILT_IN: tuple[str, ...] = tuple(REWRITES)
"""Names of the behaviours that come with the package."""


def _from_file(path: Path, checker: str | None) -> Behaviour:
    """A behaviour from a JSONL file; its name is that of the file."""
    try:
        # Only newlines end a line: JSON allows Unicode's other separators inside a string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise BehaviourError(f"{path}: cannot be read ({error})") from error
    # Lines with the same query are phrasings of it and share its index.
    queries: dict[str, int] = {}
    pairs = [_parse_line(path, i + 1, line, queries) for i, line in enumerate(lines) if line.strip()]
    if len(queries) < MIN_QUERIES:
        raise BehaviourError(
            f"{path}: {len(queries)} different quer{'y' if len(queries) == 1 else 'ies'}, at least {MIN_QUERIES} are "
            "needed to fit an anchor, sweep and test on different ones"
        )
    return Behaviour(path.stem, tuple(pairs), parse_checker(checker) if checker else _no_checker)


def _parse_line(path: Path, number: int, line: str, queries: dict[str, int]) -> PromptPair:
    """The pair of one line.

    Args:
        path: the file, for messages.
        number: number of the line, from 1.
        line: its text.
        queries: query -> its index; a new query is added.
    """
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
    """Whether a value is a string without lone surrogates. JSON can have them, and no tokenizer takes them."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def _no_checker(text: str, args: Mapping[str, Any]) -> bool:
    """Stands for a checker that the user did not give, until it is needed."""
    raise BehaviourError(
        "this behaviour comes from a file without a checker, which judges generated answers; pass --checker, e.g. "
        "'regex:^[A-Z ]+$' (or --causal skip, to take an anchor untested)"
    )
