"""A behaviour: prompts with and without an instruction, and a checker of answers; and how prompts become tokens."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Int

from wpjax.behaviours.checkers import Checker
from wpjax.behaviours.rewrites import Rewrite
from wpjax.behaviours.templates import render, template_date
from wpjax.errors import BehaviourError

Split = Literal["fit", "sweep", "test", "all"]
SPLITS: tuple[Split, ...] = ("fit", "sweep", "test")
"""Thirds of the queries: to fit anchors and experts, to measure effects, to evaluate. "all" has all of them."""

Division = Literal["thirds", "none"]
"""How the queries of a behaviour are divided: in thirds, or not at all, so that all of them serve every purpose."""

MIN_PROMPTS = 4
"""Fewest prompts of an experiment. With fewer, an interval means nothing."""

MIN_QUERIES = 12
"""Fewest queries of a behaviour that is divided in thirds: four for each split."""


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

    def widened(self, most: int) -> Tokens:
        """The same prompts with a width that is a multiple of 8, so that sets of prompts share compiled programs.

        Args:
            most: the largest width, such as the context of a model. Prompts are never cut.

        >>> Tokens(np.array([[5, 6, 7]]), np.array([3])).widened(64).ids.shape
        (1, 8)
        """
        ids = np.asarray(self.ids)
        more = max(min(-(-ids.shape[1] // 8) * 8, most) - ids.shape[1], 0)
        return Tokens(np.pad(ids, ((0, 0), (0, more))), self.lengths)

    @property
    def n_shared(self) -> int:
        """Number of tokens that all prompts begin with, such as those of a chat template.

        >>> Tokens(np.array([[5, 6, 7], [5, 6, 0]]), np.array([3, 2])).n_shared
        2
        """
        ids = np.asarray(self.ids)[:, : int(np.min(self.lengths))]
        differs = (ids != ids[:1]).any(0)
        return int(differs.argmax()) if differs.any() else len(differs)


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """B pairs of prompts as tokens.

    Attributes:
        behaviour: name of the behaviour.
        split: "fit", "sweep" or "test"; "all" if the behaviour is not divided.
        with_instruction: tokens of the prompts with the instruction, [B, T].
        without: tokens of the same queries alone, [B, T'].
        texts: the prompts with the instruction exactly as the model reads them, with the chat template.
        pairs: the pairs that the tokens were made from.
        template_date: the date that the chat template wrote into the prompts (YYYY-MM-DD); empty if it wrote none.

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
    template_date: str = ""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def queries(self) -> Int[np.ndarray, " B"]:
        """[B], index of each prompt's query. Queries are the unit of resampling.

        Prompts of the same tokens are one query's, whatever their text: the model cannot tell them apart.
        """
        queries = np.array([p.query for p in self.pairs])
        first: dict[bytes, int] = {}  # tokens of a prompt -> the first prompt that has them
        for i, (ids, n) in enumerate(zip(*map(np.asarray, self.with_instruction), strict=True)):
            same = first.setdefault(ids[:n].tobytes(), i)
            queries[queries == queries[i]] = queries[same]
        return queries

    def take(self, rows: Int[np.ndarray, " n"]) -> PromptBatch:
        """Some of the pairs, in this order; the tokens keep their width."""
        with_, without = (Tokens(t.ids[rows], t.lengths[rows]) for t in (self.with_instruction, self.without))
        texts, pairs = tuple(self.texts[i] for i in rows.tolist()), tuple(self.pairs[i] for i in rows.tolist())
        return dataclasses.replace(self, with_instruction=with_, without=without, texts=texts, pairs=pairs)

    def check_fits(self, n_ctx: int, d_vocab: int, longer: str = "") -> None:
        """Refuse prompts that a model cannot take.

        Args:
            n_ctx: context of the model, in tokens.
            d_vocab: size of its vocabulary.
            longer: what else helps against prompts that are too long, as the end of the error.

        Raises:
            BehaviourError: a prompt is longer than the context, or a token id is outside the vocabulary.
        """
        for tokens in (self.with_instruction, self.without):
            longest = int(np.argmax(tokens.lengths))
            if tokens.lengths[longest] > n_ctx:
                text = self.pairs[longest].with_instruction
                raise BehaviourError(
                    f"{self.behaviour}: prompt {longest + 1} ({text[:40]!r}...) has {tokens.lengths[longest]} tokens, "
                    f"the model takes {n_ctx}; shorten it{longer}"
                )
            if tokens.ids.max() >= d_vocab:
                raise BehaviourError(
                    f"{self.behaviour}: token id {tokens.ids.max()} is outside the model's vocabulary of {d_vocab}: a "
                    "model has no row for a token that a prompt or the chat template holds; give it one "
                    "(resize_token_embeddings), or take a tokenizer without it"
                )


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """Something that a prompt can ask for, and a checker can recognise in the answer.

    Attributes:
        name: name, as on the command line.
        pairs: all pairs of prompts.
        checker: function that tells whether an answer follows the instruction.
        rewrite: function that makes a plain answer follow the instruction, or None.
        division: "thirds", or "none" if all prompts serve fitting, sweeping and testing. Then the figures are of these
            prompts, and say little of others.
        checker_name: the checker as users name it (see `parse_checker`); empty if it has no name, or if there is none.

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
    division: Division = "thirds"
    checker_name: str = ""

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

        Each split has a third of the queries. Which ones depends on the number of queries alone. If the behaviour is
        not divided, each split has all of them.

        Args:
            split: "fit" for anchors and for training experts, "sweep" for effects, "test" for evaluation; "all" for
                all queries.
            n_prompts: number of pairs, at most; None for all.

        Raises:
            BehaviourError: there is no such split.
        """
        if split not in (*SPLITS, "all"):
            raise BehaviourError(f"unknown split {split!r}; splits: {', '.join(SPLITS)}, all")
        # Always the same shuffle, so that no query is ever in two splits.
        queries = sorted({p.query for p in self.pairs})
        random.Random(0).shuffle(queries)
        whole = split == "all" or self.division == "none"
        of_split = queries if whole else queries[SPLITS.index(split) :: len(SPLITS)]
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
            split: "fit", "sweep", "test" or "all"; see `select`.
            n_prompts: number of prompts, at most; None for all.

        Raises:
            BehaviourError: there is no such split, `n_prompts` is below `MIN_PROMPTS`, or a prompt has no tokens or
                holds the character U+0000.
        """
        if n_prompts is not None and n_prompts < MIN_PROMPTS:
            raise BehaviourError(
                f"{n_prompts} prompts are too few to measure an effect; ask for at least {MIN_PROMPTS}"
            )
        pairs = self.select(split, n_prompts)
        texts = [render(tokenizer, p.with_instruction) for p in pairs]
        for text in texts:
            if "\0" in text:  # netCDF cannot store it
                raise BehaviourError(f"{self.name}: the prompt {text[:40]!r} holds the character U+0000; remove it")
        return PromptBatch(
            behaviour=self.name,
            split=split if self.division == "thirds" else "all",
            with_instruction=encode_texts(tokenizer, texts),
            without=encode_texts(tokenizer, [render(tokenizer, p.without) for p in pairs]),
            texts=tuple(texts),
            pairs=pairs,
            template_date=template_date(tokenizer),
        )


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> Tokens:
    """Texts from `render` as token ids, padded on the right with 0.

    Without a chat template the tokenizer opens each text with its special tokens (say, a begin token), unless the text
    begins with them already. It never closes one: the answer has yet to come.

    Args:
        tokenizer: the tokenizer that rendered them.
        texts: B texts.

    Raises:
        BehaviourError: a text has no tokens.
    """
    # A template writes the special tokens itself.
    templated = bool(getattr(tokenizer, "chat_template", None))
    rows = [prompt_ids(tokenizer, text, templated) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise BehaviourError(f"the prompt {text!r} has no tokens; remove it")
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return Tokens(ids, lengths)


def prompt_ids(tokenizer: Any, text: str, templated: bool) -> list[int]:
    """The tokens of one text, as `encode_texts` makes them.

    Args:
        tokenizer: a tokenizer of the library transformers.
        text: the text.
        templated: whether it comes from a chat template, which writes the special tokens itself.
    """
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if templated:
        return plain
    full: list[int] = tokenizer(text)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if plain and full[start : start + len(plain)] == plain:
            opening = full[:start]
            return plain if plain[:start] == opening else opening + plain
    return full
