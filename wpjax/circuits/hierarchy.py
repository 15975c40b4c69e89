"""Sources, aggregators and executors: three roles, told apart by a stated rule (the paper's is not known; ours).

    source       a component whose weights alone move the metric, the anchor say: effect above 0 with q < 0.05, above
                 the noise floor and at least `LEAST` of the largest; the `n_sources` largest of the finest kinds that
                 were swept
    aggregator   a head or an MLP by way of which the sources' effects arrive: with inflow T_u, the sum over sources of
                 T_cu without what they write themselves, the fewest targets that together hold `SHARE` of all positive
                 inflow, at most `n_aggregators`
    executor     a component after the anchor whose weights matter once the anchor's state is given (a sweep with
                 `Anchor.clamp_to`): as a source, of that sweep

T is the supplier -> target matrix (docs/method.md, "Following an effect"): its entries are total effects by way of
what a target writes, not single
edges, and a row sums to its supplier's effect, but for what the slope of a metric that reads logits does not tell.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from wpjax.errors import WpjaxError
from wpjax.methods import methods
from wpjax.methods.metrics import reads_anchor
from wpjax.results.sweep_result import SweepResult

SHARE = 0.8
"""Of all positive inflow, what the aggregators hold together."""

LEAST = 0.02
"""Of the largest effect, what a source has at least."""

SAME = ("base_fingerprint", "expert_fingerprint", "behaviour")
"""Attributes that both sweeps of a hierarchy share."""

FINEST = ("head", "kv_group", "neuron")


class Node(NamedTuple):
    """A component or a target in one role.

    Attributes:
        name: as on the command line.
        layer: of it.
        value: share of the gap: a source's or an executor's effect, an aggregator's inflow.
    """

    name: str
    layer: int
    value: float


class Hierarchy(NamedTuple):
    """Who makes a behaviour's state, by way of whom it arrives, and who turns it into the answer.

    Attributes:
        sources: the largest first.
        aggregators: the largest first.
        executors: the largest first; empty without a sweep of what follows the anchor.
        flow: [S, A], share of the gap by way of each aggregator.
        direct: [S], what each source writes itself.
    """

    sources: tuple[Node, ...]
    aggregators: tuple[Node, ...]
    executors: tuple[Node, ...]
    flow: Float[np.ndarray, "S A"]
    direct: Float[np.ndarray, " S"]


def significant(result: SweepResult, n: int) -> list[int]:
    """Positions of the components that surely have a positive effect, of the finest kinds, the largest first."""
    data = result.dataset
    effect = np.nan_to_num(data["effect"].values, nan=-np.inf)
    kinds = data["kind"].values.astype(str)
    fine = np.isin(kinds, FINEST)
    sure = (effect > 0) & (np.nan_to_num(data["q_value"].values, nan=1.0) < 0.05) & ~data["below_noise_floor"].values
    usable = sure & (fine if fine.any() else True)
    if data.attrs["metric"] == "on_policy":  # what comes after the anchor acts by words alone
        usable &= (data["layer"].values <= data.attrs["metric_layer"]) & ~np.isin(kinds, ("final_norm", "unembed"))
    usable &= effect >= LEAST * max(float(effect[usable].max(initial=0.0)), 0.0)
    return [int(i) for i in np.argsort(-effect, kind="stable") if usable[i]][:n]


def hierarchy(
    result: SweepResult, execution: SweepResult | None = None, *, n_sources: int = 16, n_aggregators: int = 12
) -> Hierarchy:
    """The three roles.

    Args:
        result: a sweep, of an anchor say, components replaced for real.
        execution: a sweep of what follows the anchor, given its state.
        n_sources: of sources and of executors, at most.
        n_aggregators: at most.

    Raises:
        WpjaxError: the result holds no flow or is itself from a given state, or the second is no sweep from a given
            state, or of something else.
    """
    data = result.dataset
    if "flow" not in data:
        followed = ", ".join(method.name for method in methods() if "exact" in method.cells)
        raise WpjaxError(f"this result holds no flow: sweep with a method that replaces components ({followed})")
    if int(data.attrs["given_layer"]) >= 0:
        raise WpjaxError(
            "this result is a sweep from a given state, of executors: give it beside the sweep of its anchor"
        )
    if execution is not None and not reads_anchor(data.attrs["metric"]):
        raise WpjaxError(
            f"executors follow an anchor, and the first result is of the {data.attrs['metric']} metric: give the sweep "
            "of the anchor"
        )
    flow, names = data["flow"].values.astype(np.float64), [str(t) for t in data["target"].values]
    chosen = significant(result, n_sources)
    rows = flow[chosen] if chosen else np.zeros((0, len(names)))
    parts = slice(1, len(names) - ("rest" in names))
    inflow = rows[:, parts].sum(0)
    order = [int(u) for u in np.argsort(-inflow, kind="stable") if inflow[u] > 0]
    total = inflow[order].sum() if order else 0.0
    held = np.cumsum(inflow[order]) if order else np.zeros(0)
    kept = order[: min(n_aggregators, int(np.searchsorted(held, SHARE * total)) + 1)] if order else []
    executors: tuple[Node, ...] = ()
    if execution is not None:
        if int(execution.dataset.attrs.get("given_layer", -1)) < 0:
            raise WpjaxError(
                "the second result is no sweep from a given state: make it with `wpjax sweep --metric kl "
                "--given-anchor ANCHOR`"
            )
        if any(execution.dataset.attrs[n] != data.attrs[n] for n in SAME):
            raise WpjaxError("the second result is of another pair or behaviour; sweep what follows this anchor")
        executors = _nodes(execution, significant(execution, n_sources))
    aggregators = tuple(Node(names[u + 1], int(names[u + 1][1:].split(".")[0]), float(inflow[u])) for u in kept)
    return Hierarchy(_nodes(result, chosen), aggregators, executors, rows[:, [u + 1 for u in kept]], rows[:, 0])


def flow_by_layer(result: SweepResult, kind: str) -> Float[np.ndarray, "L U"]:
    """Flow of one kind's components summed by their layer, to itself and to attention and MLP of every layer.

    Args:
        result: a sweep that holds flow; layers up to the one that its metric reads.
        kind: of the suppliers.

    Returns:
        share of the gap; columns are "self", then attention and MLP of layer 0, of layer 1 and so on. A row sums to
        the effects of its components, but for the `rest` of a metric that reads logits, or on-policy of other words.
    """
    data, n_layers = result.dataset, int(result.dataset.attrs["metric_layer"]) + 1
    targets = [str(t) for t in data["target"].values if t != "rest"]
    columns = [0] + [1 + 2 * int(t[1:].split(".")[0]) + t.endswith("mlp") for t in targets[1:]]
    flow = np.nan_to_num(data["flow"].values[:, : len(targets)].astype(np.float64))
    mine = data["kind"].values == kind
    found = np.zeros((n_layers, 1 + 2 * n_layers))
    for layer in range(n_layers):
        np.add.at(found[layer], columns, flow[mine & (data["layer"].values == layer)].sum(0))
    return found


def _nodes(result: SweepResult, chosen: list[int]) -> tuple[Node, ...]:
    data = result.dataset
    return tuple(
        Node(str(data["name"].values[i]), int(data["layer"].values[i]), float(data["effect"].values[i])) for i in chosen
    )
