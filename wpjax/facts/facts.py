"""Files of facts, and where the subject of a fact stands among the tokens of a prompt.

A file is JSON Lines, or a JSON list. Three kinds of entries are known, by what they hold:

    {"prompt": "{} is in the city of", "subject": "The Louvre", "target": "Paris"}      ours; see `Fact`
    {"requested_rewrite": {"prompt": ..., "subject": ..., "target_new": ...}, ...}      CounterFact (2202.05262)
    {"prompt": "The Louvre is in the city of", "subject": ..., "attribute": "Paris"}    its "known facts"
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int

from wpjax.behaviours.prompts import prompt_ids
from wpjax.errors import FactError
from wpjax.models.config import ModelConfig

T = TypeVar("T")
R = TypeVar("R")

SLOT = "{}"
"""What stands for the subject in a prompt."""

MOST_TOLD = 5
"""Facts that an error names, at most; of the others it says how many there are."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """A fact: a prompt about a subject, and what completes it.

    Attributes:
        prompt: the prompt, with {} where the subject stands; or with the subject itself, once.
        subject: the subject.
        target: what completes the prompt, as the model knows it; empty: whatever the model says.
        new_target: what is to complete it after an edit; empty if no edit is meant.
        paraphrases: whole prompts that ask the same in other words.
        neighbours: whole prompts about other subjects of which `target` is true, and is to stay so.
        replacement: another subject, of as many tokens, that may stand in for this one; empty: one is looked for.
        generation: whole prompts that the model is to continue freely, for the score of what it then writes.
        references: texts about other subjects of which `new_target` is true; what it writes is compared with them.
        where: where it stands in its file, for messages, such as "line 3".

    Raises:
        FactError: there is no subject, or it does not stand in the prompt exactly once.

    >>> Fact("The Louvre is in", "The Louvre").text, Fact("{} is in", "The Louvre").prompt
    ('The Louvre is in', '{} is in')
    >>> Fact("The Louvre is in", "The Louvre").prompt
    '{} is in'
    """

    prompt: str
    subject: str
    target: str = ""
    new_target: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    replacement: str = ""
    generation: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    where: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        subject = self.subject.strip()
        if not subject:
            raise FactError(f"the prompt {self.prompt!r} has no subject; name what it is about")
        # A prompt with a slot may quote the subject's own words elsewhere; the slot is what counts.
        slot = SLOT if SLOT in self.prompt else subject
        n = self.prompt.count(slot)
        if n != 1:
            found = "does not stand" if n == 0 else f"stands {n} times"
            raise FactError(
                f"{slot!r} {found} in the prompt {self.prompt!r}; write {SLOT} where the subject stands, once"
            )
        object.__setattr__(self, "subject", subject)
        object.__setattr__(self, "prompt", self.prompt.replace(slot, SLOT))

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.about(self.subject)

    def about(self, subject: str) -> str:
        """The prompt with another subject."""
        return self.prompt.replace(SLOT, subject)


def each(items: Iterable[tuple[str, T]], make: Callable[[T], R], what: str = "facts") -> list[R]:
    """Make something of each of several items. All that it cannot be made of are told in one error.

    Args:
        items: where each stands, for the message, and the item.
        make: makes something of an item; a `FactError` if it cannot.
        what: what the items are, in the message.

    Raises:
        FactError: of one item or more.

    >>> each([("line 1", ("{} hunt", "Owls"))], lambda given: Fact(*given).text)
    ['Owls hunt']
    """
    made, wrong, n = list[R](), list[str](), 0
    for where, item in items:
        n += 1
        try:
            made.append(make(item))
        except FactError as error:
            wrong.append(f"{where}: {error}" if where else str(error))
    if wrong:
        more = f"; and {len(wrong) - MOST_TOLD} more" if len(wrong) > MOST_TOLD else ""
        of = f"{len(wrong)} of {n} {what} cannot be used: " if len(wrong) > 1 else ""
        raise FactError(of + "; ".join(wrong[:MOST_TOLD]) + more)
    return made


def each_fact(facts: Sequence[Fact], make: Callable[[Fact], R]) -> list[R]:
    """`each`, of facts."""
    return each(((fact.where, fact) for fact in facts), make)


References = Mapping[tuple[str, str], tuple[str, ...]]
"""Reference texts of CounterFact: number of a relation and of a target -> texts about subjects of which both hold."""


def load_facts(path: str | Path, references: References | None = None) -> list[Fact]:
    """Read a file of facts: JSON Lines, or a JSON list; of our form, CounterFact's, or ROME's known facts.

    Args:
        path: the file.
        references: reference texts for entries of CounterFact (`load_references`).

    Raises:
        FactError: it cannot be read, holds no facts, or some entries are none. The message names these.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "facts.jsonl"
    >>> _ = path.write_text('{"prompt": "{} is in the city of", "subject": "The Louvre", "target": "Paris"}')
    >>> load_facts(path)[0].text
    'The Louvre is in the city of'
    """
    path = Path(path)
    text = _text_of(path, "a .jsonl or .json file of facts")
    is_list = text.lstrip().startswith("[")
    try:
        entries = json.loads(text) if is_list else text.split("\n")
    except (ValueError, RecursionError) as error:
        raise FactError(f"{path}: not JSON ({error}); correct it") from error

    def make(item: tuple[str, Any]) -> Fact:
        where, entry = item
        return _fact(where, entry if is_list else _parsed(entry), references or {})

    named = [(f"{'entry' if is_list else 'line'} {i + 1}", entry) for i, entry in enumerate(entries)]
    try:
        facts = each(((item[0], item) for item in named if is_list or item[1].strip()), make)
    except FactError as error:
        raise FactError(f"{path}, {error}") from error
    if not facts:
        raise FactError(f"{path}: holds no facts; write one on each line")
    return facts


def load_references(path: str | Path) -> References:
    """Read the reference texts of CounterFact, its attribute_snippets.json.

    It is a list of objects with a `relation_id`, a `target_id`, and `samples` that have a `text` each.

    Raises:
        FactError: it cannot be read, or is no such list.
    """
    path = Path(path)
    text = _text_of(path, "the attribute_snippets.json of CounterFact")
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    try:
        for entry in json.loads(text):
            key = str(entry["relation_id"]), str(entry["target_id"])
            found[key] = (*found.get(key, ()), *(str(sample["text"]) for sample in entry["samples"]))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise FactError(
            f"{path}: no list of reference texts ({error!r}); name the attribute_snippets.json of CounterFact, or give "
            'facts "references" of their own'
        ) from error
    return found


def _text_of(path: Path, wanted: str) -> str:
    """The text of a file."""
    if not path.is_file():  # reading a pipe or a device may never end
        raise FactError(f"{path}: no such file; name {wanted}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise FactError(f"{path}: cannot be read ({error}); name a text file in UTF-8") from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FactError(f"not JSON ({error}); write one fact on each line") from error


_FIELDS = {field.name: field.type for field in dataclasses.fields(Fact) if field.name != "where"}
_LISTS = ("paraphrases", "neighbours", "generation", "references")


def _fact(where: str, entry: Any, references: References) -> Fact:
    """The fact of one entry, of any of the three kinds."""
    if not isinstance(entry, Mapping):
        raise FactError("not an object; a fact has at least a prompt and a subject")
    try:
        values = _values(entry, references)
    except (KeyError, TypeError, AttributeError) as error:
        raise FactError(f"an entry of CounterFact or of known facts, but not whole ({error!r})") from error
    for name in ("prompt", "subject"):
        if name not in values:
            raise FactError(f"no {name}; a fact has at least a prompt and a subject")
    for name, value in values.items():
        if name not in _FIELDS:
            raise FactError(f"unknown key {name!r}; there are {', '.join(_FIELDS)}")
        if name in _LISTS and not isinstance(value, list | tuple):
            raise FactError(f"{name} is to be a list of texts")
        for text in value if name in _LISTS else [value]:
            if not isinstance(text, str):
                raise FactError(f"{name} is to be {'a list of texts' if name in _LISTS else 'a text'}")
            if name in _LISTS and not text.strip():
                raise FactError(f"one of the {name} is empty; leave it out")
            if text != text.encode("utf-8", "ignore").decode("utf-8"):
                raise FactError(f"{name} holds half of a character, which no text has; correct it")
    fields: dict[str, Any] = {name: tuple(of) if name in _LISTS else of for name, of in values.items()}
    return Fact(**fields, where=where)


def _values(entry: Mapping[str, Any], references: References) -> dict[str, Any]:
    """The fields of a fact in an entry of any of the three kinds."""
    if "requested_rewrite" in entry:
        wanted = entry["requested_rewrite"]
        new = wanted["target_new"]
        return {
            "prompt": wanted["prompt"],
            "subject": wanted["subject"],
            "target": wanted["target_true"]["str"],
            "new_target": new["str"],
            "paraphrases": entry.get("paraphrase_prompts", []),
            "neighbours": entry.get("neighborhood_prompts", []),
            "generation": entry.get("generation_prompts", []),
            "references": references.get((str(wanted.get("relation_id")), str(new.get("id"))), ()),
        }
    if "attribute" in entry:
        return {"prompt": entry["prompt"], "subject": entry["subject"], "target": entry["attribute"]}
    return dict(entry)


class Located(NamedTuple):
    """A prompt in tokens, with the place of its subject.

    Attributes:
        ids: [T], the tokens.
        start: the first token of the subject.
        stop: the token after its last.
    """

    ids: Int[np.ndarray, " T"]
    start: int
    stop: int


def encode(tokenizer: Any, text: str) -> Int[np.ndarray, " T"]:
    """The tokens of a text, with those that the tokenizer sets before every text, without those that would close it."""
    return np.asarray(prompt_ids(tokenizer, text, False), np.int32) if text else _opening(tokenizer)


def _opening(tokenizer: Any) -> Int[np.ndarray, " T"]:
    """What the tokenizer sets before every text."""
    some = "a"
    plain = tokenizer(some, add_special_tokens=False)["input_ids"]
    whole = prompt_ids(tokenizer, some, False)
    return np.asarray(whole[: len(whole) - len(plain)], np.int32)


def locate(tokenizer: Any, prompt: str, subject: str) -> Located:
    """Find the tokens of a subject in a prompt.

    Args:
        tokenizer: a tokenizer of transformers that knows which characters a token stands for (a fast one).
        prompt: the prompt, with {} where the subject stands, once.
        subject: the subject.

    Raises:
        FactError: a token stands for a part of the subject and for what stands beside it, so that the subject has no
            tokens of its own; or the tokenizer cannot tell.

    >>> import wpjax as wp
    >>> tokenizer = wp.load_model("tiny:base").tokenizer
    >>> found = locate(tokenizer, "Why do {} hunt?", "the owls")
    >>> tokenizer.decode(found.ids[found.start : found.stop])
    ' the owls'
    """
    before, after = prompt.split(SLOT)
    text = before + subject + after
    if not getattr(tokenizer, "is_fast", False):
        raise FactError("this tokenizer does not say which characters a token stands for; use one with tokenizer.json")
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    first, last = len(before), len(before) + len(subject)
    inside = [i for i, (a, b) in enumerate(spans) if a < last and b > first and a < b]
    covered = text[spans[inside[0]][0] : spans[inside[-1]][1]] if inside else ""
    if covered.strip() != subject:  # a token may stand for the blank before a word, too
        raise FactError(
            f"{subject!r} has no tokens of its own in {text!r}: they stand for {covered!r}; name as subject what the "
            "tokenizer keeps together, or set a blank or a mark beside it"
        )
    last_token = max(i for i, (a, b) in enumerate(spans) if a < b)  # what comes after it would close the prompt
    return Located(np.asarray(ids[: last_token + 1], np.int32), inside[0], inside[-1] + 1)


def continued(tokenizer: Any, prompt: str, target: str) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " N"]]:
    """The tokens of a prompt, and those by which a target continues it.

    Args:
        tokenizer: the tokenizer.
        prompt: the whole prompt.
        target: what follows it. A blank is set between, unless the target or the end of the prompt has one.

    Raises:
        FactError: the target is empty, or its beginning changes the tokens of the prompt.

    >>> import wpjax as wp
    >>> tokenizer = wp.load_model("tiny:base").tokenizer
    >>> tokenizer.decode(continued(tokenizer, "How do owls", "hunt")[1])
    ' hunt'
    """
    if not target.strip():
        raise FactError(f"the prompt {prompt!r} has no target; say what is to complete it")
    joined = prompt + ("" if target[0].isspace() or prompt[-1:].isspace() else " ") + target
    ids, whole = encode(tokenizer, prompt), encode(tokenizer, joined)
    if len(whole) <= len(ids) or not np.array_equal(whole[: len(ids)], ids):
        raise FactError(
            f"{joined!r}: the tokens of the prompt change when {target!r} follows; end the prompt elsewhere"
        )
    return ids, whole[len(ids) :]


def check_length(cfg: ModelConfig, n_tokens: int, what: str) -> None:
    """Refuse a prompt that is longer than the model's context.

    Args:
        cfg: the model.
        n_tokens: tokens of the prompt and of what completes it.
        what: the prompt, in the message.

    Raises:
        FactError: it is longer.
    """
    if n_tokens > cfg.n_ctx:
        raise FactError(f"{what}: {n_tokens} tokens, and the context is {cfg.n_ctx}; shorten the prompt")


def pieces(tokenizer: Any, ids: Sequence[int] | Int[np.ndarray, " T"]) -> tuple[str, ...]:
    """What each token stands for, as text.

    >>> import wpjax as wp
    >>> tokenizer = wp.load_model("tiny:base").tokenizer
    >>> pieces(tokenizer, encode(tokenizer, "How do owls hunt?"))[:2]
    ('How', ' do')
    """
    return tuple(tokenizer.decode([int(i)]) for i in ids)


def padded(rows: Sequence[np.ndarray], multiple: int = 8, most: int | None = None) -> Int[np.ndarray, "B T"]:
    """Rows of tokens as one array, padded on the right to a multiple, so that few programs serve all lengths.

    Args:
        rows: tokens of each row.
        multiple: what the length is a multiple of.
        most: the model's context: padding stops there. None for no bound.

    >>> padded([np.array([5, 6], np.int32), np.array([7], np.int32)], multiple=4).tolist()
    [[5, 6, 0, 0], [7, 0, 0, 0]]
    >>> padded([np.array([5, 6], np.int32)], multiple=4, most=3).tolist()
    [[5, 6, 0]]
    """
    longest = max(len(row) for row in rows)
    width = -(-longest // multiple) * multiple
    width = width if most is None else max(longest, min(width, most))
    return np.stack([np.pad(np.asarray(row, np.int32), (0, width - len(row))) for row in rows])
