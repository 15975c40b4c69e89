"""The interference map of several behaviours of one base: what each one's set does to the others. Data, without JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

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
        share: the part of the parameters that a set may have.
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
