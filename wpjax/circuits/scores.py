"""Scores of edges and of nodes, by which circuits are chosen: the best of them stay live, the others are ablated."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from wpjax.circuits.nodes import Graph, NodeKind
from wpjax.errors import WpjaxError

ARROW = "->"
"""Stands between the two ends of an edge in its name: embed->L3.head.5.q."""

Level = Literal["nodes", "edges"]
"""What a circuit is a set of."""


@dataclasses.dataclass(frozen=True)
class Scores(abc.ABC):
    """A score for every member that a circuit could have, and for every prompt.

    Attributes:
        graph: nodes and edges of the model.
        by_prompt: [B, ...], in the units of the metric: its change if the member carries what it carries in the
            corrupted run. So members that help the answer have negative scores. 0 for what is no member.
        method: how they were made.
    """

    graph: Graph
    by_prompt: Float[np.ndarray, "B ..."]
    method: str

    level: ClassVar[Level]

    @property
    @abc.abstractmethod
    def members(self) -> Bool[np.ndarray, "..."]:
        """Which entries of a prompt's scores are members."""

    @abc.abstractmethod
    def name(self, i: int) -> str:
        """Name of the member that is number i of a prompt's scores, counted flat."""

    @abc.abstractmethod
    def live(self, chosen: Bool[np.ndarray, "..."]) -> Bool[np.ndarray, "S R"]:
        """Which edges are live if the chosen members are the circuit."""

    @property
    def n_members(self) -> int:
        """Number of members."""
        return int(self.members.sum())

    @property
    def mean(self) -> Float[np.ndarray, "..."]:
        """Mean over prompts."""
        return np.asarray(self.by_prompt.mean(0))

    def ranking(
        self, *, absolute: bool = True, scores: Float[np.ndarray, "..."] | None = None
    ) -> Int[np.ndarray, " M"]:
        """Numbers of all members, counted flat, those that the answer needs most first.

        Args:
            absolute: whether members are ranked by the size of their score. If not, by how much their patch lowers the
                metric (signed): those that work against the answer come last.
            scores: scores to rank by; None for the mean.
        """
        mean = self.mean if scores is None else scores
        value = np.abs(mean) if absolute else -mean
        order = np.argsort(-value, axis=None, kind="stable")
        return order[self.members.ravel()[order]]

    def top(self, n: int, *, absolute: bool = True) -> Bool[np.ndarray, "..."]:
        """The n best members, as a mask of a prompt's scores."""
        chosen = np.zeros(self.members.size, bool)
        chosen[self.ranking(absolute=absolute)[:n]] = True
        return chosen.reshape(self.members.shape)

    def listed(self, n: int, *, absolute: bool = True) -> list[tuple[str, float]]:
        """Names and mean scores of the n best members."""
        mean = self.mean.ravel()
        return [(self.name(int(i)), float(mean[i])) for i in self.ranking(absolute=absolute)[:n]]

    def stability(self, n: int, *, absolute: bool = True, resamples: int = 100, seed: int = 0) -> tuple[float, ...]:
        """How far the n best members depend on which prompts there were: bootstrap Jaccard overlap.

        Prompts are drawn anew with replacement, and the n best by them are compared with the n best by all:
        Jaccard = number in both / number in either.

        Returns:
            mean, and the limits between which 95 % of the draws lie.

        Raises:
            WpjaxError: the scores are not by prompt: learned masks have one score for all.
        """
        if len(self.by_prompt) < 2:
            raise WpjaxError(f"{self.method}: one score for all prompts, so prompts cannot be drawn anew")
        rng, own = np.random.default_rng(seed), self.top(n, absolute=absolute).ravel()
        overlaps = []
        for _ in range(resamples):
            # A draw as weights of the prompts: their mean is a product, and no copy of the scores.
            weight = rng.multinomial(len(self.by_prompt), np.full(len(self.by_prompt), 1 / len(self.by_prompt)))
            drawn = np.tensordot(weight / len(self.by_prompt), self.by_prompt, 1)
            both = int(own[self.ranking(absolute=absolute, scores=drawn)[:n]].sum())
            overlaps.append(both / (2 * int(own.sum()) - both))
        return float(np.mean(overlaps)), *(float(x) for x in np.quantile(overlaps, [0.025, 0.975]))


@dataclasses.dataclass(frozen=True)
class EdgeScores(Scores):
    """Scores of edges; `by_prompt` is [B, S, R]."""

    level: ClassVar[Level] = "edges"

    @property
    def members(self) -> Bool[np.ndarray, "S R"]:
        """Where there is an edge."""
        return self.graph.exists

    def name(self, i: int) -> str:
        """Its sender and its receiver: embed->L3.head.5.q."""
        s, r = divmod(i, len(self.graph.receivers))
        return f"{self.graph.senders[s].name}{ARROW}{self.graph.receivers[r].name}"

    def live(self, chosen: Bool[np.ndarray, "S R"]) -> Bool[np.ndarray, "S R"]:
        """The chosen edges."""
        return chosen & self.graph.exists

    def nodes(self, ablates: tuple[NodeKind, ...] = ("head", "mlp")) -> NodeScores:
        """Scores of whole senders: the sum of their edges' scores.

        By the chain rule that is <write(corrupted) - write(clean), dF/dwrite>: attribution patching of nodes (AtP,
        arXiv 2403.00745).

        Args:
            ablates: kinds of nodes that are members (see `Circuit.ablates`).
        """
        return NodeScores(self.graph, np.asarray(self.by_prompt.sum(-1)), self.method, ablates)


@dataclasses.dataclass(frozen=True)
class NodeScores(Scores):
    """Scores of senders; `by_prompt` is [B, S].

    Attributes:
        ablates: kinds of nodes that are members; the others always stay live.
    """

    ablates: tuple[NodeKind, ...] = ("head", "mlp")

    level: ClassVar[Level] = "nodes"

    @property
    def members(self) -> Bool[np.ndarray, " S"]:
        """The senders of the kinds that are ablated."""
        return np.array([s.kind in self.ablates for s in self.graph.senders])

    def name(self, i: int) -> str:
        """Its name: L3.head.5."""
        return self.graph.senders[i].name

    def live(self, chosen: Bool[np.ndarray, " S"]) -> Bool[np.ndarray, "S R"]:
        """All edges of the chosen nodes, and of those that are never ablated."""
        return self.graph.exists & (chosen | ~self.members)[:, None]
