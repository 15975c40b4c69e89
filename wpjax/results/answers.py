"""Answers to read: what base, patched model and expert say to a few held-out prompts, side by side in a result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float

from wpjax.results.files import has_form

ANSWERERS = ("base", "patched", "expert")
"""Who answers: the base, the base with the best components of the expert, and the expert."""

_FORMS = {
    "answerer": (("answerer",), "OTU"),
    "answer": (("answerer", "shown"), "OTU"),
    "answer_passes": (("answerer", "shown"), "f"),
    "answer_prompt": (("shown",), "OTU"),
}


class Answers(NamedTuple):
    """Answers of three models to the same held-out prompts.

    Attributes:
        prompts: what the user says, with the instruction.
        texts: the answers of each of `ANSWERERS`, in the order of the prompts.
        passes: [3, N], 1 where the checker accepts the answer and 0 where it does not; NaN if there is no checker.
        n_components: number of the expert's components in the patched base.
        by: name of the ranking that these components lead.
        tried: numbers of components that were tried before, and with which fewer answers passed.
        share: the part of the parameters that the patched components own, of all that were ranked; NaN if not known.
        max_new_tokens: length of these answers, at most; 0 if not known. It is not stored with them.

    >>> answers = Answers(("Hi! Shout.",), (("hello",), ("HELLO",), ("HELLO",)), np.array([[0.0], [1.0], [1.0]]), 3,
    ...                   "effect")
    >>> answers.rows(0)
    [('base', False, 'hello'), ('base + 3', True, 'HELLO'), ('expert', True, 'HELLO')]
    >>> Answers.of(answers.added_to(xr.Dataset())).texts == answers.texts
    True
    """

    prompts: Sequence[str]
    texts: Sequence[Sequence[str]]
    passes: Float[np.ndarray, "3 N"]
    n_components: int
    by: str
    tried: Sequence[int] = ()
    share: float = float("nan")
    max_new_tokens: int = 0

    @property
    def about(self) -> str:
        """Whose answers these are, in words."""
        components = "component" if self.n_components == 1 else "components"
        size = "" if np.isnan(self.share) else f", {self.share:.1%} of the parameters that were ranked"
        told = f"Of the base, of the base with the {self.n_components:,} best {components} of the expert "
        told += f"(by {self.by}{size}), and of the expert."
        if self.tried:
            told += f" With the best {', '.join(f'{n:,}' for n in self.tried)} too few of these answers passed."
        return told

    def rows(self, i: int) -> list[tuple[str, bool | None, str]]:
        """For prompt i: who answers, whether the checker accepts it (None without a checker), and the answer."""
        names = ("base", f"base + {self.n_components:,}", "expert")
        verdicts = [None if np.isnan(value) else bool(value) for value in self.passes[:, i]]
        return [(name, ok, texts[i]) for name, ok, texts in zip(names, verdicts, self.texts, strict=True)]

    def added_to(self, dataset: xr.Dataset) -> xr.Dataset:
        """A dataset of a result, with the answers in it."""
        texts = [[_storable(text) for text in of_one] for of_one in self.texts]
        variables = {
            "answer": (("answerer", "shown"), np.array(texts, dtype=object)),
            "answer_passes": (("answerer", "shown"), np.asarray(self.passes, np.float32)),
            "answer_prompt": ("shown", np.array([_storable(prompt) for prompt in self.prompts], dtype=object)),
        }
        attributes = {
            "answers_n_components": int(self.n_components),
            "answers_by": self.by,
            "answers_tried": json.dumps([int(n) for n in self.tried]),
            "answers_share": float(self.share),
        }
        coords = {"answerer": np.array(ANSWERERS, dtype=object)}
        return dataset.assign(variables).assign_coords(coords).assign_attrs(attributes)

    @classmethod
    def of(cls, dataset: xr.Dataset) -> Answers | None:
        """The answers in a dataset of a result; None if it has none."""
        if "answer" not in dataset or damage_of_answers(dataset):
            return None
        prompts = tuple(map(str, dataset["answer_prompt"].values))
        texts = tuple(tuple(map(str, row)) for row in dataset["answer"].values)
        passes = dataset["answer_passes"].values.astype(np.float64)
        n, by = int(dataset.attrs["answers_n_components"]), str(dataset.attrs["answers_by"])
        tried, share = tuple(_numbers(dataset.attrs.get("answers_tried"))), dataset.attrs.get("answers_share")
        share = float(share) if isinstance(share, float | np.floating) else float("nan")
        return cls(prompts, texts, passes, n, by, tried, share)


def _numbers(text: Any) -> list[int]:
    """Whole numbers from JSON; empty if the text is something else."""
    try:
        numbers = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return []
    return [n for n in numbers if isinstance(n, int)] if isinstance(numbers, list) else []


def _storable(text: str) -> str:
    """A text without NUL, which the text type of HDF5 cannot hold."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def damage_of_answers(data: xr.Dataset) -> list[str]:
    """Names of what the answers in a dataset lack, or have in another form; empty if they are whole, or not there."""
    if not any(name in data for name in _FORMS):
        return []
    wrong = [name for name, (dims, kinds) in _FORMS.items() if not has_form(data, name, dims, kinds)]
    if not wrong and tuple(map(str, data["answerer"].values)) != ANSWERERS:
        wrong.append("answerer")
    if not isinstance(data.attrs.get("answers_n_components"), int | np.integer):
        wrong.append("answers_n_components")
    if not isinstance(data.attrs.get("answers_by"), str):
        wrong.append("answers_by")
    return wrong
