"""How good a circuit is, by the metric F with everything else ablated.

    faithfulness     |F(M) - F(C)|, and the share (F(C) - F(nothing)) / (F(M) - F(nothing))
    incompleteness   |F(C without K) - F(M without K)|, for sets K of members of C      small: C has all that matters
    minimality       |F(C without K and v) - F(C without K)|, for each member v         large: v is needed
    CPR              integral of f(k) over k       f(k): the share for the best k of all edges, or of all nodes
    CMD              integral of |1 - f(k)|

M is the model, C the circuit; F is the mean over prompts (arXiv 2211.00593, section 4). CPR and CMD are those of MIB
(arXiv 2504.13151): by trapezoids, linear in k, from k = .001 to 1. CPR has no ceiling: leaving out what works
against the answer raises it above 1. So both are always given together.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from wpjax.circuits.circuit import Ablation, AblationKind, Circuit, circuit_scores, masked_scores
from wpjax.circuits.contrast import Contrast
from wpjax.circuits.nodes import Graph
from wpjax.circuits.scores import Level, Scores
from wpjax.errors import WpjaxError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares k of all edges, or nodes, at which MIB evaluates."""


class Faithfulness(NamedTuple):
    """What a circuit does alone.

    Attributes:
        model: F(M), the whole model.
        circuit: F(C).
        nothing: F of the circuit without members.
        ablation: what ablated nodes write: "zero", "mean" or "resample".

    >>> Faithfulness(model=4.0, circuit=3.0, nothing=0.0, ablation="mean").share
    0.75
    """

    model: float
    circuit: float
    nothing: float
    ablation: AblationKind

    @property
    def difference(self) -> float:
        """|F(M) - F(C)|, in the units of the metric."""
        return abs(self.model - self.circuit)

    @property
    def share(self) -> float:
        """(F(C) - F(nothing)) / (F(M) - F(nothing)): 1 is the whole model; NaN if the model does nothing more."""
        if self.model == self.nothing:
            return float("nan")
        return (self.circuit - self.nothing) / (self.model - self.nothing)


def faithfulness(
    cfg: ModelConfig, params: Params, contrast: Contrast, ablated: Ablation, circuit: Circuit
) -> Faithfulness:
    """How much of what the model does the circuit does alone.

    Args:
        cfg: the model.
        params: its parameters.
        contrast: the prompts and the metric.
        ablated: what ablated nodes write (`ablation`).
        circuit: the circuit.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> two = wp.contrast(model, ["the fox and the"], ["the dog and the"], answers=[" fox"], foils=[" dog"])
    >>> resample = wp.ablation(model.cfg, model.params, two, "resample")
    >>> heads = wp.Circuit("nodes", ("L3.head.1", "L5.head.2"), model="0", ablates=("head",))
    >>> wp.faithfulness(model.cfg, model.params, two, resample, heads).ablation
    'resample'
    """
    whole = circuit.whole(Graph.of(cfg, contrast.n_layers))
    scores = circuit_scores(cfg, params, contrast, ablated, [whole, circuit, circuit.without(circuit.members)])
    model, alone, nothing = scores.mean(1).tolist()
    return Faithfulness(model, alone, nothing, ablated.kind)


class Incompleteness(NamedTuple):
    """What a set K of members is to the circuit and to the model.

    Attributes:
        removed: K.
        model: F(M without K).
        circuit: F(C without K).
    """

    removed: tuple[str, ...]
    model: float
    circuit: float

    @property
    def score(self) -> float:
        """|F(C without K) - F(M without K)|: 0 if the circuit is complete."""
        return abs(self.circuit - self.model)


def completeness(
    cfg: ModelConfig,
    params: Params,
    contrast: Contrast,
    ablated: Ablation,
    circuit: Circuit,
    *,
    n_random: int = 10,
    n_greedy: int = 0,
    seed: int = 0,
) -> tuple[list[Incompleteness], list[Incompleteness]]:
    """Whether the model goes without a set of members as badly as the circuit does.

    Args:
        cfg: the model.
        params: its parameters.
        contrast: the prompts and the metric.
        ablated: what ablated nodes write.
        circuit: the circuit.
        n_random: number of random sets K. Each member is in one with probability 1/2.
        n_greedy: size of the greedy set: members are added one at a time, each the one that raises the score most. A
            step runs model and circuit once for every member.
        seed: seed of the random sets.

    Returns:
        the random sets; and the greedy sets of 1, 2, ... members.
    """
    whole, rng = circuit.whole(Graph.of(cfg, contrast.n_layers)), np.random.default_rng(seed)

    def measured(sets: Sequence[tuple[str, ...]]) -> list[Incompleteness]:
        """In sets of one length from call to call, one compiled program serves all of them."""
        runs = [host.without(removed) for removed in sets for host in (whole, circuit)]
        scores = circuit_scores(cfg, params, contrast, ablated, runs).mean(1)
        pairs = zip(sets, scores[::2], scores[1::2], strict=True)
        return [Incompleteness(k, float(m), float(c)) for k, m, c in pairs]

    draws = [tuple(m for m in circuit.members if rng.random() < 0.5) for _ in range(n_random)]
    by_chance = measured(draws) if draws else []
    greedy: list[Incompleteness] = []
    removed: tuple[str, ...] = ()
    for _ in range(min(n_greedy, len(circuit.members))):
        # A member that is in the set already stands for the set itself, so that all steps have one shape.
        tried = measured([removed if m in removed else (*removed, m) for m in circuit.members])
        best = max((t for t in tried if len(t.removed) > len(removed)), key=lambda t: t.score)
        greedy.append(best)
        removed = best.removed
    return by_chance, greedy


class Needed(NamedTuple):
    """How much one member adds.

    Attributes:
        member: its name.
        score: |F(C without K and v) - F(C without K)|, the largest over the sets K that were tried.
        given: the set K of that score.
    """

    member: str
    score: float
    given: tuple[str, ...]


def minimality(
    cfg: ModelConfig,
    params: Params,
    contrast: Contrast,
    ablated: Ablation,
    circuit: Circuit,
    classes: Mapping[str, str] | None = None,
) -> list[Needed]:
    """How much each member is needed: at best, over two sets K that are removed with it.

    Args:
        cfg: the model.
        params: its parameters.
        contrast: the prompts and the metric.
        ablated: what ablated nodes write.
        circuit: the circuit.
        classes: member -> name of its class. K is the empty set, and the rest of the member's class: backups hide what
            a member does as long as they are there. None: the empty set alone.
    """
    sets: list[tuple[str, tuple[str, ...]]] = []
    for v in circuit.members:
        sets.append((v, ()))
        if classes is not None and v in classes:
            rest = tuple(m for m in circuit.members if m != v and classes.get(m) == classes[v])
            sets += [(v, rest)] if rest else []
    runs = [circuit.without((*given, *gone)) for v, given in sets for gone in ((v,), ())]
    scores = circuit_scores(cfg, params, contrast, ablated, runs).mean(1)
    change = np.abs(scores[::2] - scores[1::2])
    every = [Needed(v, float(x), given) for (v, given), x in zip(sets, change, strict=True)]
    return [max(group, key=lambda n: n.score) for _, group in itertools.groupby(every, key=lambda n: n.member)]


class Curve(NamedTuple):
    """Faithfulness of the best share k of all members.

    Attributes:
        shares: k.
        counts: number of members at each.
        f: (m(C_k) - m(nothing)) / (m(M) - m(nothing)).
        level: what members are: "nodes" or "edges".
        absolute: whether they are ranked by the size of their score, or signed.
        ablation: what stands in the place of the others.
        method: how they were scored.
    """

    shares: tuple[float, ...]
    counts: tuple[int, ...]
    f: tuple[float, ...]
    level: Level
    absolute: bool
    ablation: AblationKind
    method: str

    @property
    def cpr(self) -> float:
        """Integral of f over k; the larger the better, without a ceiling."""
        return float(np.trapezoid(self.f, self.shares))

    @property
    def cmd(self) -> float:
        """Integral of |1 - f| over k; the smaller the better."""
        return float(np.trapezoid(np.abs(1 - np.asarray(self.f)), self.shares))

    def __str__(self) -> str:
        how = "absolute" if self.absolute else "signed"
        by = f"{self.level} by {self.method}, {how} top k, {self.ablation} ablation"
        return f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f} ({by})"


def circuit_curve(
    cfg: ModelConfig,
    params: Params,
    contrast: Contrast,
    ablated: Ablation,
    scores: Scores,
    *,
    absolute: bool = True,
    shares: Sequence[float] = SHARES,
) -> Curve:
    """Run the model with only the best edges, or nodes, live, for growing numbers of them.

    Args:
        cfg: the model.
        params: its parameters.
        contrast: the prompts and the metric; best others than those that the scores are from.
        ablated: what is written in the place of the others.
        scores: scores of edges or of nodes.
        absolute: whether to rank by the size of the score, or signed (see `Scores.ranking`).
        shares: shares of all members, rising.

    Raises:
        WpjaxError: model and empty circuit have the same mean metric, or shares do not rise within 0 to 1.
    """
    if any(not 0 < k <= 1 for k in shares) or any(a >= b for a, b in itertools.pairwise(shares)):
        raise WpjaxError("shares of members must rise from above 0 to at most 1")
    counts = [max(1, round(k * scores.n_members)) for k in shares]
    # Few nodes make equal circuits: each is run once. Nothing and the model are circuits of none and of all.
    tried = sorted({0, scores.n_members, *counts})
    runs = np.stack([scores.live(scores.top(n, absolute=absolute)) for n in tried])
    found = dict(zip(tried, masked_scores(cfg, params, contrast, ablated, runs).mean(1).tolist(), strict=True))
    f = share_of_model([found[n] for n in counts], found[scores.n_members], found[0])
    return Curve(tuple(shares), tuple(counts), tuple(f), scores.level, absolute, ablated.kind, scores.method)


def share_of_model(circuits: Sequence[float], model: float, nothing: float) -> list[float]:
    """(F(C) - F(nothing)) / (F(M) - F(nothing)) of circuits.

    Raises:
        WpjaxError: F(M) and F(nothing) are the same.
    """
    if model == nothing:
        raise WpjaxError(
            f"the model and the empty circuit have the same mean metric ({model:g}), so no circuit has a share of it; "
            "take prompts that the ablation spoils, or ablate more"
        )
    return [(x - nothing) / (model - nothing) for x in circuits]
