"""Gates: how much of each expert's change each component takes, by the experts' scores.

    merged = theta_base + lambda sum_k w_k sum_c g_kc Delta_kc        (docs/merging.md; ours)

Delta_kc is what expert k changed of component c: of a head, a KV group, a neuron or a whole module. The gate g_kc comes
from the place of c among the scores of expert k. Where several experts would open the same component, a rule decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from wpjax.checkpoints.convert import hf_tensor
from wpjax.components import KINDS, Component, best_within, n_parameters
from wpjax.errors import nearest
from wpjax.merging.recipe import layer_of
from wpjax.merging.registry import MergeError
from wpjax.merging.scores import Owners, Scores, read_scores, scores_of, spread, unit_numbers
from wpjax.models.config import ModelConfig
from wpjax.results.sweep_result import SweepResult

if TYPE_CHECKING:
    from wpjax.merging.plan import Plan

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

            - "top": 1 for the best components within `share` of the parameters, as `wpjax extract --share` takes them,
              but at least one if `share` is above 0; else 0;
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
            gates.append(best_within(values, sizes, part * sizes.sum(), least=int(part > 0)).astype(np.float64))
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
    owners: dict[str, str] = {}
    for of_expert in scores:
        for kind in dict.fromkeys(c.kind for c in of_expert.components):
            for unit in KINDS[kind].units:
                if owners.setdefault(unit, kind) != kind:
                    raise MergeError(
                        f"one expert has scores of kind {owners[unit]}, another of {kind}, which owns the same "
                        "weights, so that conflicts cannot be told; name the same kinds for both, or conflict: sum"
                    )


def prepare(plan: Plan) -> Callable[[str], dict[str, Any]]:
    """What `score_gated` needs before the first tensor: the gates of all experts, as numbers of tensors.

    Returns:
        function from the name of a tensor to the argument `gates` of `score_gated`.

    Raises:
        MergeError: scores cannot be read, or are of another model.
    """
    cfg, recipe = plan.host.cfg, plan.recipe
    kinds = plan.preparation("kinds")
    chosen = None if kinds is None else tuple(kind.strip() for kind in kinds.split(","))
    for kind in chosen or ():
        if kind not in KINDS:
            raise MergeError(f"unknown kind {kind!r} of components{nearest(kind, KINDS)}; there are {', '.join(KINDS)}")
    scores = [
        read_any(path, cfg, by, chosen)
        for path, by in zip(plan.preparation("scores"), plan.preparation("by"), strict=True)
    ]
    for k, of_expert in enumerate(scores):
        check_changes(plan, k, of_expert)
    control = plan.preparation("control")
    if control == "random":
        rng = np.random.default_rng(recipe.seed)
        scores = [dataclasses.replace(s, values=rng.random(len(s.values))) for s in scores]
    elif control == "delta":
        scores = _by_change(plan, scores)
    gates = component_gates(
        cfg,
        scores,
        plan.preparation("share"),
        gate=plan.preparation("gate"),
        conflict=plan.preparation("conflict"),
        per_parameter=plan.preparation("per_parameter"),
    )
    rest = plan.preparation("rest")
    leaves = [spread(cfg, unit_numbers(cfg, components, own, rest)) for components, own in gates]
    return lambda name: {"gates": lambda k: hf_tensor(cfg, leaves[k], name)}


def check_changes(plan: Plan, k: int, scores: Scores) -> None:
    """Refuse scores of another pair of models: what the expert changed in one layer must be what the sweep measured.

    The layer is that of the best component.

    Raises:
        MergeError: names a component, and both norms of its change.
    """
    if scores.changes is None:
        return
    layer = scores.components[int(np.argmax(scores.values))].layer
    cfg, squares = plan.host.cfg, np.zeros(len(scores.components))
    owners = Owners(cfg, scores.components)
    for name in plan.host.names:
        if layer_of(name) == (None if layer < 0 else layer):
            base = plan.base_tensor(name, plan.host.read(name))
            squares += owners.sums(name, np.square(plan.expert_tensor(k, name, base) - base))
    there = [i for i, c in enumerate(scores.components) if c.layer == layer]
    found, measured = np.sqrt(squares[there]), scores.changes[there]
    off = np.abs(found - measured) > _OFF * np.maximum(found, measured) + 1e-12
    if np.mean(off) > 0.5:
        i = int(np.argmax(np.abs(found - measured)))
        raise MergeError(
            f"the scores of {plan.experts[k].source} are of other models: what it changed of "
            f"{scores.components[there[i]].name} has the norm {found[i]:.3g}, and the sweep says {measured[i]:.3g}; "
            "name the result of this base and this expert"
        )


_OFF = 0.02
"""How far apart two norms of one change may be: a base may be stored in another precision."""


def read_any(path: str, cfg: ModelConfig, by: str | None, kinds: Sequence[str] | None) -> Scores:
    """Scores from a result of `wpjax sweep` (.nc), or from a file of published scores (.safetensors).

    Args:
        path: the file.
        cfg: the architecture of the models.
        by: name of a ranking of a result; None for its `set_ranking`.
        kinds: kinds of components; None for the finest of a result, or those that a file names.

    Raises:
        MergeError: it is neither, or `by` is given for published scores.
    """
    if path.endswith(".nc"):
        return scores_of(cfg, SweepResult.from_netcdf(path), by, kinds)
    if not path.endswith(".safetensors"):
        raise MergeError(f"scores: {path} is neither a result (.nc) nor published scores (.safetensors); name one")
    if by is not None:
        raise MergeError(f"by: {path} holds one ranking only; remove by")
    return read_scores(path, cfg, kinds)


def _by_change(plan: Plan, scores: Sequence[Scores]) -> list[Scores]:
    """The same components with the mean squared change of their weights as scores; it reads all tensors."""
    cfg = plan.host.cfg
    owners = [Owners(cfg, of_expert.components) for of_expert in scores]
    squares = [np.zeros(len(of_expert.components)) for of_expert in scores]
    for name, base, experts in plan.tensors():
        for k, expert in enumerate(experts):
            squares[k] += owners[k].sums(name, np.square(expert - base))
    sizes = [np.array([n_parameters(cfg, c) for c in of_expert.components]) for of_expert in scores]
    return [dataclasses.replace(s, values=x / n) for s, x, n in zip(scores, squares, sizes, strict=True)]
