"""Gates: how much of each expert's change each component takes, by the experts' scores.

    merged = theta_base + lambda sum_k w_k sum_c g_kc Delta_kc        (docs/method.md, "Merging"; ours)

Delta_kc is what expert k changed of component c: of a head, a KV group, a neuron or a whole module. The gate g_kc comes
from the place of c among the scores of expert k. Where several experts would open the same component, a rule decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from wpjax.components import Component, n_parameters
from wpjax.merging.registry import MergeError
from wpjax.merging.scores import Scores
from wpjax.models.config import ModelConfig

GateKind = Literal["top", "quantile", "score"]
Conflict = Literal["largest", "first", "sum"]


def quantiles(scores: Float[np.ndarray, " C"], sizes: Float[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
    """The place of each score among all, weighted by parameters: the share of the parameters whose scores are lower.

    Half of a component's own parameters count. Of equal scores the first is the higher one.

    Args:
        scores: [C].
        sizes: [C], number of parameters of each component.

    >>> quantiles(np.array([3.0, 1.0, 2.0]), np.array([2.0, 4.0, 2.0])).tolist()
    [0.875, 0.25, 0.625]
    """
    order = np.argsort(-scores, kind="stable")
    above = np.cumsum(sizes[order]) - sizes[order] / 2
    places = np.empty(len(scores))
    places[order] = 1 - above / sizes.sum()
    return places


def opened(scores: Float[np.ndarray, " C"], sizes: Float[np.ndarray, " C"], share: float) -> Float[np.ndarray, " C"]:
    """1 for the best components, whose parameters come nearest to a share of all; else 0. At least one is open.

    >>> opened(np.array([3.0, 1.0, 2.0]), np.array([2.0, 4.0, 2.0]), 0.5).tolist()
    [1.0, 0.0, 1.0]
    """
    gates = np.zeros(len(scores))
    if share > 0:
        order = np.argsort(-scores, kind="stable")
        n_open = 1 + int(np.abs(np.cumsum(sizes[order]) - share * sizes.sum()).argmin())
        gates[order[:n_open]] = 1
    return gates


def component_gates(
    cfg: ModelConfig,
    scores: Sequence[Scores],
    share: Sequence[float],
    *,
    gate: GateKind = "top",
    conflict: Conflict = "largest",
    per_parameter: bool = False,
) -> list[tuple[tuple[Component, ...], Float[np.ndarray, " C"]]]:
    """The gates of all experts.

    Args:
        cfg: the architecture.
        scores: the scores of each of K experts.
        share: of each expert, the share of the parameters of its components that opens.
        gate: what makes a gate of a score:

            - "top": 1 for the best `share` of the parameters, else 0 (`opened`);
            - "quantile": the place among all, from 0 to 1 (`quantiles`);
            - "score": the score itself; so a published file can say any weights.
        conflict: whose change a component takes where the gates of several experts are not 0:

            - "largest": that of the expert with the largest score; of equal ones, the first;
            - "first": that of the first expert of the recipe;
            - "sum": that of all of them.
        per_parameter: whether a score is divided by the component's number of parameters first. The set score is one
            for each parameter already.

    Returns:
        components and their gates, for each expert.

    Raises:
        MergeError: a rule does not exist, or components of two experts overlap without being the same.
    """
    gates = []
    ranked = []
    for of_expert, part in zip(scores, share, strict=True):
        sizes = np.array([n_parameters(cfg, c) for c in of_expert.components], np.float64)
        values = of_expert.values / sizes if per_parameter else of_expert.values
        ranked.append(values)
        if gate == "top":
            gates.append(opened(values, sizes, part))
        else:
            gates.append(quantiles(values, sizes) if gate == "quantile" else np.array(values, np.float64))
    if conflict != "sum":
        _settle(scores, ranked, gates, conflict)
    return [(of_expert.components, g) for of_expert, g in zip(scores, gates, strict=True)]


def _settle(
    scores: Sequence[Scores], ranked: Sequence[np.ndarray], gates: Sequence[np.ndarray], conflict: Conflict
) -> None:
    """Close the gates of all experts but one where several are open."""
    _check_same_kinds(scores)
    takes: dict[Component, tuple[float, int, int]] = {}  # component -> score, expert and place of the one that takes it
    for k, (of_expert, values, own) in enumerate(zip(scores, ranked, gates, strict=True)):
        for i in np.flatnonzero(own).tolist():
            component = of_expert.components[i]
            taken = takes.get(component)
            if taken is None:
                takes[component] = values[i], k, i
            elif conflict == "largest" and values[i] > taken[0]:
                gates[taken[1]][taken[2]] = 0
                takes[component] = values[i], k, i
            else:
                own[i] = 0


def _check_same_kinds(scores: Sequence[Scores]) -> None:
    """Refuse experts with scores of kinds that overlap: a head of one and an attention module of the other."""
    from wpjax.components import KINDS

    owners: dict[str, str] = {}
    for of_expert in scores:
        for kind in dict.fromkeys(c.kind for c in of_expert.components):
            for unit in KINDS[kind].units:
                if owners.setdefault(unit, kind) != kind:
                    raise MergeError(
                        f"one expert has scores of kind {owners[unit]}, another of {kind}, which owns the same weights, "
                        "so that conflicts cannot be told; name the same kinds for both, or conflict: sum"
                    )
