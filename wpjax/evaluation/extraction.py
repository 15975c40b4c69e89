"""What `extract` finds: a set of components, what it brings back, what it does besides, and that in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from wpjax.components import Component
from wpjax.evaluation.harm import Harm
from wpjax.results.words import KIND_NAMES, counted, enumerated
from wpjax.stats import Interval


class TriedSet(NamedTuple):
    """A set that the search tried.

    Attributes:
        stage: "ranking" for the first components of the ranking, "dropping" for what is left without some blocks.
        n_components: number of components.
        n_parameters: number of weights that they own.
        share: the same as a share of all components of these kinds.
        recovery: on the prompts that it answered, with its 95 % interval over queries; NaN if base and expert do not
            differ on them.
        n_prompts: number of prompts that it answered. The others were left out once it could not reach the goal.
        reaches: whether it reaches the goal.
        divergence: KL(base || patched) on a few prompts without the instruction, in nats a token; NaN for sets that
            were only tried, and not taken, in the second stage.
    """

    stage: str
    n_components: int
    n_parameters: int
    share: float
    recovery: Interval
    n_prompts: int
    reaches: bool
    divergence: float


@dataclasses.dataclass(frozen=True)
class Extraction:
    """A set of components that carries a behaviour, and what was measured of it.

    Attributes:
        behaviour: name of the behaviour.
        components: the components, the best first.
        n_parameters: number of weights that they own.
        share: the same as a share of all components of these kinds in the model.
        kinds: the kinds that the ranking has.
        ranked_by: name of the ranking.
        goal: the recovery that was searched for; None if the size was given.
        tried: the sets of the search, in order.
        searched_on: name of the prompts that the search read, and their number; None if the size was given.
        measured_on: name of the prompts that everything below was measured on, and their number.
        n_queries: number of different queries among these.
        passes: share of answers that pass, with its 95 % interval: of "base", "patched", "expert", "complement"
            (everything but the set), and "random 1" and so on (as many parameters).
        recovery: the recovery of all of them but base and expert.
        harm: what the patch does besides.
    """

    behaviour: str
    components: tuple[Component, ...]
    n_parameters: int
    share: float
    kinds: tuple[str, ...]
    ranked_by: str
    goal: float | None
    tried: tuple[TriedSet, ...]
    searched_on: tuple[str, int] | None
    measured_on: tuple[str, int]
    n_queries: int
    passes: Mapping[str, Interval]
    recovery: Mapping[str, Interval]
    harm: Harm

    @property
    def measured(self) -> dict[str, Any]:
        """What was measured, as values that JSON can hold; a patch file keeps it."""
        harm = self.harm
        return {
            "recovery": _plain(self.recovery),
            "passes": _plain(self.passes),
            "goal": self.goal,
            "share": self.share,
            "n_parameters": self.n_parameters,
            "searched_on": None if self.searched_on is None else list(self.searched_on),
            "measured_on": list(self.measured_on),
            "divergence": _plain(harm.divergence),
            "perplexity": None
            if harm.perplexity is None
            else {**harm.perplexity._asdict(), "models": dict(harm.perplexity.models)}
            | {"ratio": harm.perplexity.ratio._asdict()},
            "others": {
                name: {"passes": _plain(o.passes), "change": o.change._asdict(), "n_prompts": o.n_prompts}
                for name, o in harm.others.items()
            },
        }

    @property
    def summary(self) -> str:
        """In words: the set, what it brings back, the controls, and its price."""
        parts = (self._brought_back(), self._goal_met(), *self._controls(), *self._price())
        return " ".join(part for part in parts if part)

    def _brought_back(self) -> str:
        split, n = self.measured_on
        unseen = self.searched_on is not None and self.searched_on[0] != split
        rates = {name: f"{passes.mean:.0%}" for name, passes in self.passes.items()}
        brings, them = ("brings", "it") if len(self.components) == 1 else ("bring", "them")
        kinds = enumerated([KIND_NAMES[kind] for kind in self.kinds])
        return (
            f"{counted(c.kind for c in self.components)} ({self.share:.2%} of the parameters of {kinds}) {brings} back "
            f"{bounded(self.recovery['patched'])} of {self.behaviour}: of the {n} {split} prompts"
            f"{', which no set was chosen by' if unseen else ''}, the base passes the checker on {rates['base']}, with "
            f"{them} on {rates['patched']}, the expert on {rates['expert']}."
        )

    def _goal_met(self) -> str:
        """What the held-out prompts say of the goal; and what an interval without width does not say."""
        back, told = self.recovery["patched"], []
        if self.goal is not None and back.high < self.goal:
            told.append(
                f"The goal of {self.goal:.0%} is missed there: the search was lucky with its own prompts; give it more "
                "(--n-prompts), or ask for more."
            )
        elif self.goal is not None:
            where = "below" if back.low >= self.goal else "within"
            told.append(f"The goal of {self.goal:.0%} is {where} that interval.")
        if back.low == back.high:
            most = 1 - 0.05 ** (1 / self.n_queries)
            told.append(
                f"(All prompts agree, so the interval has no width; with {self.n_queries} queries, up to {most:.0%} of "
                "others may be different.)"
            )
        return " ".join(told)

    def _controls(self) -> list[str]:
        told = []
        if "complement" in self.recovery:
            told.append(f"All other components of these kinds bring back {bounded(self.recovery['complement'])}.")
        random = [of.mean for name, of in self.recovery.items() if name.startswith("random")]
        if random:
            told.append(f"Random components of as many parameters bring back {np.mean(random):.0%}.")
        return told

    def _price(self) -> list[str]:
        patched, expert = self.harm.divergence["patched"], self.harm.divergence["expert"]
        told = [
            f"Without the instruction the patched base moves {patched.mean:.3g} [{patched.low:.3g}, "
            f"{patched.high:.3g}] nats a token away from the base, the expert {expert.mean:.3g}."
        ]
        if self.harm.perplexity is not None:
            models, ratio = self.harm.perplexity.models, self.harm.perplexity.ratio
            told.append(
                f"The perplexity of the text goes from {models['base']:.4g} to {models['patched']:.4g} "
                f"({ratio.mean - 1:+.1%} [{100 * (ratio.low - 1):+.1f}, {100 * (ratio.high - 1):+.1f}]), the "
                f"expert's is {models['expert']:.4g}."
            )
        for name, of in self.harm.others.items():
            told.append(
                f"{name}: the base passes on {of.passes['base'].mean:.0%}, patched on {of.passes['patched'].mean:.0%} "
                f"({bounded(of.change, '+')})."
            )
        return told


def bounded(of: Interval, sign: str = "") -> str:
    """A share with its interval, in per cent: 91% [80, 97]; empty if there is none.

    >>> bounded(Interval(0.905, 0.8, 0.97)), bounded(Interval(0.02, -0.01, 0.05), sign="+")
    ('90% [80, 97]', '+2% [-1, +5]')
    """
    if np.isnan(of.mean):
        return ""
    return f"{of.mean:{sign}.0%} [{100 * of.low:{sign}.0f}, {100 * of.high:{sign}.0f}]"


def _plain(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: of._asdict() for name, of in intervals.items()}
