"""The interference map of several behaviours of one base: what each one's set does to the others. Data, without JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from wpjax.results.files import read_json
from wpjax.results.words import enumerated
from wpjax.stats import Interval


@dataclasses.dataclass(frozen=True)
class Level:
    """The map for sets of one kind of parts: units (heads, KV groups, neurons), or whole modules.

    Rows are the behaviour whose set it is, columns the behaviour that is looked at; N of them.

    Attributes:
        n_parts: [N], number of units or modules in each set.
        shares: [N], the parameters of each set, as a share of those of all units.
        brings_back: [N][N], the share of the column's behaviour that the base shows with the row's set of the row's
            expert, by the checker on "test" prompts, with its 95 % interval over queries. On the diagonal it is what a
            set does for its own behaviour.
        overlap: [N, N], Jaccard index of the sets that two halves of the "sweep" queries choose: one half for the row's
            behaviour, another for the column's. On the diagonal the behaviour is the same: the ceiling.
        agreement: [N, N], the same for the rank correlation of the scores of all parts.
    """

    n_parts: tuple[int, ...]
    shares: tuple[float, ...]
    brings_back: tuple[tuple[Interval, ...], ...]
    overlap: Float[np.ndarray, "N N"]
    agreement: Float[np.ndarray, "N N"]


@dataclasses.dataclass(frozen=True)
class Interference:
    """What the sets of several behaviours do to one another.

    Attributes:
        behaviours: their names.
        share: the part of the parameters that a set stays within.
        levels: "units" and "modules" -> the map.
        passes: behaviour -> share of answers that pass, of "base" and "expert".
        n_prompts: number of prompts of each behaviour, at most.

    >>> row = (Interval(0.9, 0.8, 1.0), Interval(0.1, 0.0, 0.2))
    >>> one = Level((2, 3), (0.01, 0.02), (row, row), np.eye(2), np.eye(2))
    >>> found = Interference(("a", "b"), 0.02, {"units": one, "modules": one}, {}, 32)
    >>> print(found.summary.splitlines()[0])
    a: its set brings back 90% of a, and 10% [0, 20] of b.
    """

    behaviours: tuple[str, ...]
    share: float
    levels: Mapping[str, Level]
    passes: Mapping[str, Mapping[str, Interval]]
    n_prompts: int

    @property
    def as_json(self) -> dict[str, Any]:
        """All of it as values that JSON can hold; tables are lists of rows."""

        def of_level(level: Level) -> dict[str, Any]:
            return {
                "n_parts": list(level.n_parts),
                "shares": list(level.shares),
                "brings_back": [[cell._asdict() for cell in row] for row in level.brings_back],
                "overlap": level.overlap.tolist(),
                "agreement": level.agreement.tolist(),
            }

        return {
            "what": "interference",
            "behaviours": list(self.behaviours),
            "share": self.share,
            "n_prompts": self.n_prompts,
            "passes": {name: {m: of._asdict() for m, of in two.items()} for name, two in self.passes.items()},
            "levels": {name: of_level(level) for name, level in self.levels.items()},
        }

    @classmethod
    def from_json(cls, path: str | Path) -> Interference:
        """Read a file that `wpjax interference` wrote.

        Raises:
            WpjaxError: there is no such file, it holds no map, or it is damaged.
        """
        return read_json(path, {"interference": cls.of_json}, "interference map", "wpjax interference")

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Interference:
        """The map that JSON holds; an error of Python where it does not hold one."""
        names = tuple(_text(name) for name in content["behaviours"])
        if len(names) < 2 or len(set(names)) < len(names) or list(content["levels"]) != ["units", "modules"]:
            raise ValueError("not two levels of two behaviours or more")
        return cls(
            names,
            _number(content["share"]),
            {name: _level(of, len(names)) for name, of in content["levels"].items()},
            {name: {end: _interval(of) for end, of in two.items()} for name, two in content["passes"].items()},
            int(_number(content["n_prompts"])),
        )

    def rows(self, level: str) -> list[tuple[str, ...]]:
        """The table of a level: for each set its behaviour, number of parts, share of the parameters, and what it
        brings back of each behaviour with the overlap of the two sets.
        """
        of = self.levels[level]
        return [
            (
                name,
                f"{of.n_parts[a]:,}",
                f"{of.shares[a]:.2%}",
                *(
                    f"{back.mean:.0%} [{100 * back.low:.0f}, {100 * back.high:.0f}], {of.overlap[a, b]:.2f}"
                    for b, back in enumerate(of.brings_back[a])
                ),
            )
            for a, name in enumerate(self.behaviours)
        ]

    @property
    def summary(self) -> str:
        """In words: what each set does to the others, and how alike the sets are beside their ceiling."""
        units, lines = self.levels["units"], []
        for a, name in enumerate(self.behaviours):
            others = enumerated(
                [
                    f"{of.mean:.0%} [{100 * of.low:.0f}, {100 * of.high:.0f}] of {other}"
                    for b, (other, of) in enumerate(zip(self.behaviours, units.brings_back[a], strict=True))
                    if b != a
                ]
            )
            lines.append(f"{name}: its set brings back {units.brings_back[a][a].mean:.0%} of {name}, and {others}.")
        for name, level in self.levels.items():
            apart = ~np.eye(len(self.behaviours), dtype=bool)
            pairs = [
                f"{what} {of[apart].mean():.2f} between behaviours, {np.diag(of).mean():.2f} within one"
                for what, of in (("the sets overlap by", level.overlap), ("the ranks agree by", level.agreement))
            ]
            lines.append(f"By {name} {pairs[0]}; {pairs[1]} (means, on halves of the queries).")
        return "\n".join(lines)


def _level(of: Mapping[str, Any], n: int) -> Level:
    """A level of a map of n behaviours."""
    back = tuple(tuple(_interval(cell) for cell in row) for row in of["brings_back"])
    overlap, agreement = (
        np.array([[_number(cell) for cell in row] for row in of[k]]) for k in ("overlap", "agreement")
    )
    parts, shares = tuple(int(_number(k)) for k in of["n_parts"]), tuple(map(_number, of["shares"]))
    if {len(parts), len(shares), len(back), *map(len, back), *overlap.shape, *agreement.shape} != {n}:
        raise ValueError("a table has not as many rows and columns as there are behaviours")
    return Level(parts, shares, back, overlap, agreement)


def _interval(of: Mapping[str, Any]) -> Interval:
    return Interval(**{name: _number(value) for name, value in of.items()})


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value
