"""What edits did, by the scores of Meng et al. (`facts.scores` defines them). Data, without JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import hmean

from wpjax.results.files import read_json
from wpjax.results.points import ONE_FACT, in_points, interval_as_json, over_facts
from wpjax.stats import Interval

KINDS: Mapping[str, str] = {"E": "the fact itself", "P": "paraphrases", "N": "neighbours"}
"""First letter of a score -> which prompts it is about."""

WRITTEN = ("GE", "RS")
"""Scores of what is written freely."""

WHEN = ("before", "after")
"""When a model is scored: before and after the edit."""


@dataclasses.dataclass(frozen=True)
class EditScores:
    """Scores of several edits in one layer, each alone.

    Attributes:
        before: kind ("E", "P", "N") -> for each fact with such prompts, P(new) and P(old) of each, [n, 2]; in the model
            as it was. "GE" and "RS" -> for each fact that has them, these two scores, [1].
        after: the same in the edited model.
        failed: facts that could not be edited: where each stands and what it says -> why.
        texts: "before" and "after" -> what was written, for each fact with prompts for it.
        model: name of the model.
        layer: number of the layer.
        recipe: all that the edits can be made again from (`facts.rank_one.recipe`), and the seed.

    >>> half = {kind: (np.array([[0.25, 0.75]]), np.array([[0.5, 0.0]])) for kind in "EPN"}
    >>> scores = EditScores(half, half).table()
    >>> scores["ES"].mean, scores["NS"].mean, scores["EM"].mean, round(scores["S"].mean, 3)
    (0.5, 0.5, 0.0, 0.5)
    """

    before: Mapping[str, tuple[Float[np.ndarray, "..."], ...]]
    after: Mapping[str, tuple[Float[np.ndarray, "..."], ...]]
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, tuple[tuple[str, ...], ...]] = dataclasses.field(default_factory=dict)
    model: str = ""
    layer: int = -1
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def n_facts(self) -> int:
        """Number of facts that were edited."""
        return len(self.after["E"])

    def table(self, when: str = "after") -> dict[str, Interval]:
        """ES, EM, PS, PM, NS, NM, S, GE and RS, with 95 % intervals over facts. What has no prompts is left out.

        S has no interval, and one fact has none: their ends are NaN.

        Args:
            when: "before" or "after".
        """
        found: dict[str, Interval] = {}
        of = getattr(self, when)
        for kind in KINDS:
            if cases := of.get(kind):
                ahead = [(-1 if kind == "N" else 1) * (p[:, 0] - p[:, 1]) for p in cases]
                found[kind + "S"] = over_facts([float((d > 0).mean()) for d in ahead])
                found[kind + "M"] = over_facts([float(d.mean()) for d in ahead])
        if all(name in found for name in ("ES", "PS", "NS")):
            s = float(hmean([found[name].mean for name in ("ES", "PS", "NS")]))
            found["S"] = Interval(s, math.nan, math.nan)
        return found | {kind: over_facts([float(case[0]) for case in of[kind]]) for kind in WRITTEN if of.get(kind)}

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """The table of all scores: name, before, after; shares in per cent, probabilities in points, 100 times GE."""
        before, after = (self.table(when) for when in WHEN)
        return [(name, in_points(before[name]), in_points(of)) for name, of in after.items()]

    @property
    def in_words(self) -> str:
        """How often the new answer wins, and what is to be known beside it (`summary`). A sentence a line."""
        before, after = (self.table(when) for when in WHEN)
        n = self.n_facts
        lines = [f"{n} fact{'s' * (n != 1)}, each edited alone in layer {self.layer} of {self.model}."]
        for kind, what in KINDS.items():
            if (name := f"{kind}S") in after:
                wins = "the old answer stays ahead" if kind == "N" else "the new answer is ahead"
                lines.append(
                    f"On {what}, {wins} on {after[name].mean:.0%} of the prompts ({before[name].mean:.0%} before)."
                )
        return "\n".join([*lines, *self.summary.splitlines()])

    @property
    def summary(self) -> str:
        """What is to be known beside the table: what is missing, and why. A sentence a line; empty if nothing is."""
        lines = [ONE_FACT] if self.n_facts == 1 else []
        lines += [f"Not edited: {where}: {why}" for where, why in self.failed.items()]
        for kind, what in KINDS.items():
            if not self.after.get(kind):
                lines.append(f"No {kind}S and {kind}M: no fact has {what}.")
        if not self.after.get("GE"):
            lines.append("No GE and RS: no fact has prompts for generation, or they were not asked for.")
        elif not self.after.get("RS"):
            lines.append("No RS: no fact has reference texts.")
        return "\n".join(lines)

    @property
    def as_json(self) -> dict[str, Any]:
        """All of it as values that JSON can hold."""

        def table(when: str) -> dict[str, Any]:
            return {name: of.mean if name == "S" else interval_as_json(of) for name, of in self.table(when).items()}

        def numbers(when: str) -> dict[str, Any]:
            return {kind: [p.tolist() for p in cases] for kind, cases in getattr(self, when).items()}

        return {
            "what": "edit scores",
            "model": self.model,
            "layer": self.layer,
            "n_facts": self.n_facts,
            "failed": dict(self.failed),
            **dict(self.recipe),
            **{when: table(when) for when in WHEN},
            "probabilities": {when: numbers(when) for when in WHEN},
            "texts": {when: [list(of) for of in texts] for when, texts in self.texts.items()},
        }

    @classmethod
    def from_json(cls, path: str | Path) -> EditScores:
        """Read scores that `wpjax edit --facts` wrote.

        Raises:
            WpjaxError: there is no such file, it holds no scores, or it is damaged.
        """
        return read_json(path, {"edit scores": cls.of_json}, "scores of edits", "wpjax edit --facts")

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> EditScores:
        """The scores that JSON holds; an error of Python where it does not hold any."""
        of = {
            when: {
                kind: tuple(_numbers(kind, p) for p in cases) for kind, cases in content["probabilities"][when].items()
            }
            for when in WHEN
        }
        if not of["after"].get("E"):
            raise ValueError("no facts")
        texts = {when: tuple(map(tuple, written)) for when, written in content.get("texts", {}).items()}
        known = {"what", "model", "layer", "n_facts", "failed", "probabilities", "texts", *WHEN}
        recipe = {name: value for name, value in content.items() if name not in known}
        failed = {str(where): str(why) for where, why in content.get("failed", {}).items()}
        return cls(of["before"], of["after"], failed, texts, str(content["model"]), int(content["layer"]), recipe)


def _numbers(kind: str, values: Any) -> Float[np.ndarray, "..."]:
    numbers = np.array(values, float)
    if (numbers.shape != (1,) if kind in WRITTEN else numbers.shape[1:] != (2,)) or not np.isfinite(numbers).all():
        raise ValueError(f"{kind} are no finite numbers, two a prompt")
    return numbers
