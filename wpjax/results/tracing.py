"""What causal tracing found: the probability of each fact's answer, state by state restored. Data, without JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from wpjax.results.files import read_json
from wpjax.results.points import ONE_FACT, in_points, interval_as_json, over_facts
from wpjax.stats import Interval

TRACE = "trace.json"
"""The file that every folder of a trace holds."""

MAPS: Mapping[str, str] = {
    "stream": "one state of the stream",
    "mlp": "MLPs of a window of layers",
    "attn": "attention of a window of layers",
    "severed_mlp": "one state of the stream, MLPs held as corrupted",
    "severed_attn": "one state of the stream, attention held as corrupted",
}
"""Name of a map -> what is restored, in words."""

ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first later token",
    "further tokens",
    "last token",
)
"""What tokens are in a prompt, in its order. The last token of a subject is its last even if it is its only one."""


@dataclasses.dataclass(frozen=True)
class FactTrace:
    """What tracing one fact found; T tokens, L layers.

    Attributes:
        text: the prompt.
        subject: its subject.
        answer: the token whose probability is read after the prompt, as text.
        tokens: [T], what each token of the prompt stands for.
        start: first token of the subject.
        stop: the token after its last.
        clean: probability of the answer.
        corrupted: its mean over the corrupted runs.
        maps: name -> [L, T], the same with a token's state restored at a layer, in the order of `MAPS`.
        replacement: the subject that stands in for this one in the corrupted run; empty if noise corrupts it.
    """

    text: str
    subject: str
    answer: str
    tokens: tuple[str, ...]
    start: int
    stop: int
    clean: float
    corrupted: float
    maps: Mapping[str, Float[np.ndarray, "L T"]]
    replacement: str = ""

    @property
    def total(self) -> float:
        """The total effect of corruption: clean - corrupted."""
        return self.clean - self.corrupted

    def effects(self, name: str) -> Float[np.ndarray, "L T"]:
        """The indirect effects of a map: restored - corrupted."""
        return self.maps[name] - self.corrupted

    @property
    def roles(self) -> list[str]:
        """What each token is, one of `ROLES`; tokens before the subject are left empty."""
        last, found = len(self.tokens) - 1, []
        for i in range(len(self.tokens)):
            if i < self.start:
                role = ""
            elif i < self.stop:
                role = ROLES[2] if i == self.stop - 1 else ROLES[0] if i == self.start else ROLES[1]
            else:
                role = ROLES[5] if i == last else ROLES[3] if i == self.stop else ROLES[4]
            found.append(role)
        return found


@dataclasses.dataclass(frozen=True)
class Average:
    """A map averaged over facts, by what tokens are.

    Attributes:
        roles: [N], the roles that occur.
        mean: [L, N], average indirect effect (AIE).
        low: [L, N], lower ends of its 95 % intervals over facts.
        high: [L, N], upper ends.
    """

    roles: tuple[str, ...]
    mean: Float[np.ndarray, "L N"]
    low: Float[np.ndarray, "L N"]
    high: Float[np.ndarray, "L N"]


@dataclasses.dataclass(frozen=True)
class Tracing:
    """What tracing several facts found.

    Attributes:
        model: name of the model.
        facts: the facts that were traced: those that the model knows.
        n_read: number of facts in the file.
        settings: how it was done, by name: corruption, samples, noise, sigma, window, seed.

    >>> maps = {"stream": np.array([[0.1, 0.5], [0.3, 0.9]])}
    >>> one = FactTrace("Owls hunt at", "Owls", " night", ("Owls", " hunt at"), 0, 1, 0.9, 0.1, maps)
    >>> found = Tracing("m", (one,), 1, {})
    >>> found.ate.mean, found.average("stream").roles
    (0.8, ('last subject token', 'last token'))
    >>> print(found.summary)
    1 of 1 facts traced: the model knows them. Corrupting the subject costs 80.0 points of probability.
    Of the subject, restoring one state of the stream brings most back at the last subject token, layer 1: 20.0 points.
    One fact: no interval.
    """

    model: str
    facts: tuple[FactTrace, ...]
    n_read: int
    settings: Mapping[str, Any]

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of the maps."""
        return tuple(self.facts[0].maps)

    @property
    def ate(self) -> Interval:
        """The average total effect (ATE) of corruption, with its 95 % interval over facts; of one fact it has none."""
        return over_facts([fact.total for fact in self.facts])

    @property
    def cost(self) -> str:
        """In words: what corrupting the subject does to the answer."""
        ate = self.ate
        if ate.mean <= 0:
            does = "raises the answer's probability" if ate.mean < 0 else "changes nothing"
            return f"Corrupting the subject costs no probability: it {does} ({in_points(ate, ' points')})"
        said = f"Corrupting the subject costs {in_points(ate, ' points of probability')}"
        return said + (", which may be chance" if ate.low <= 0 else "")

    def average(self, name: str) -> Average:
        """A map averaged over facts, by what tokens are. Where several tokens of a fact are one thing, their mean.

        What only one fact has, has no interval: its ends are NaN.
        """
        shape = len(next(iter(self.facts[0].maps.values())))
        roles = tuple(role for role in ROLES if any(role in fact.roles for fact in self.facts))
        ends = np.zeros((3, shape, len(roles)))
        for j, role in enumerate(roles):
            rows = [
                fact.effects(name)[:, [at == role for at in fact.roles]].mean(1)
                for fact in self.facts
                if role in fact.roles
            ]
            for layer, values in enumerate(np.transpose(rows)):
                ends[:, layer, j] = over_facts(values.tolist())
        return Average(roles, *ends)

    def peak(self, name: str) -> tuple[int, str, Interval]:
        """Where the average indirect effect of a map is largest at the subject: layer, what token, and the effect.

        At the last token of a prompt, the last layers make the answer: restoring the stream there restores all of it.
        """
        of = self.average(name)
        at_subject = of.mean[:, [role in ROLES[:3] for role in of.roles]]  # the first columns
        layer, role = np.unravel_index(at_subject.argmax(), at_subject.shape)
        ends = (float(a[layer, role]) for a in (of.mean, of.low, of.high))
        return int(layer), of.roles[role], Interval(*ends)

    @property
    def summary(self) -> str:
        """In words: what corruption costs, and where restoring brings most back."""
        lines = [f"{len(self.facts)} of {self.n_read} facts traced: the model knows them. {self.cost}."]
        if self.ate.mean <= 0:
            lines.append("So there is nothing to bring back, and the maps show no recall. Try other facts.")
        for name in self.maps if self.ate.mean > 0 else ():
            layer, role, effect = self.peak(name)
            lines.append(
                f"Of the subject, restoring {MAPS[name]} brings most back at the {role}, layer {layer}: "
                f"{in_points(effect, ' points')}."
                if effect.mean > 0
                else f"Of the subject, restoring {MAPS[name]} brings nothing back."
            )
        if len(self.facts) == 1:
            lines.append(ONE_FACT)
        return "\n".join(lines)

    @property
    def as_json(self) -> dict[str, Any]:
        """All of it as values that JSON can hold; maps are lists of layers."""
        facts: list[dict[str, Any]] = []
        for fact in self.facts:
            entry = {f.name: getattr(fact, f.name) for f in dataclasses.fields(fact)}
            maps = {name: of.tolist() for name, of in fact.maps.items()}
            facts.append({**entry, "tokens": list(fact.tokens), "maps": maps})
        averages = {}
        for name in self.maps:
            of = self.average(name)
            averages[name] = {
                "roles": list(of.roles),
                "mean": np.round(of.mean, 8).tolist(),
                **{end: _or_null(getattr(of, end)) for end in ("low", "high")},
            }
        return {
            "what": "tracing",
            "model": self.model,
            "n_read": self.n_read,
            "settings": dict(self.settings),
            "ate": interval_as_json(self.ate),
            "aie": averages,
            "facts": facts,
        }

    @classmethod
    def from_json(cls, path: str | Path) -> Tracing:
        """Read a trace.json that `wpjax trace` wrote, or the folder that holds it.

        Raises:
            WpjaxError: there is no such file, it holds no trace, or it is damaged.
        """
        path = Path(path)
        path = path / TRACE if path.is_dir() else path
        return read_json(path, {"tracing": cls.of_json}, "trace", "wpjax trace")

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Tracing:
        """The trace that JSON holds; an error of Python where it does not hold one."""
        facts = tuple(_fact(entry) for entry in content["facts"])
        if not facts or len({(tuple(fact.maps), *(len(of) for of in fact.maps.values())) for fact in facts}) != 1:
            raise ValueError("no facts, or facts of several models")
        return cls(str(content["model"]), facts, int(content["n_read"]), dict(content["settings"]))


def _or_null(of: Float[np.ndarray, "L N"]) -> list[list[float | None]]:
    """A table as JSON holds it: null for an end that an interval has not."""
    return [[None if math.isnan(value) else round(value, 8) for value in row] for row in of.tolist()]


def _fact(entry: Mapping[str, Any]) -> FactTrace:
    """A fact of a file; an error of Python where it does not hold one."""
    tokens = tuple(str(token) for token in entry["tokens"])
    maps = {name: np.array(entry["maps"][name], float) for name in MAPS if name in entry["maps"]}
    start, stop = int(entry["start"]), int(entry["stop"])
    numbers = [float(entry[name]) for name in ("clean", "corrupted")]
    shapes = {of.shape[1:] for of in maps.values()}
    if shapes != {(len(tokens),)} or not 0 <= start < stop <= len(tokens):
        raise ValueError("a map has not as many columns as there are tokens, or there is no subject")
    if not all(map(math.isfinite, numbers)) or not all(np.isfinite(of).all() for of in maps.values()):
        raise ValueError("a probability is not finite")
    text, subject, answer, replacement = (str(entry[name]) for name in ("text", "subject", "answer", "replacement"))
    return FactTrace(text, subject, answer, tokens, start, stop, numbers[0], numbers[1], maps, replacement)
