"""Sources, aggregators and executors: three roles of components, assigned by rules (ours; the paper's are not known).

    source       A component whose weights alone move the metric, such as the anchor. Its effect is above 0 with
                 q < 0.05, above the noise floor, and at least `MIN_EFFECT` of the largest effect. The `n_sources`
                 largest are taken, of the finest kinds that were swept.
    aggregator   A later head or MLP by way of which the sources' effects arrive. The inflow of target u is the sum of
                 T_cu over all sources c. The fewest targets are taken that together hold `INFLOW_SHARE` of all positive
                 inflow, at most `n_aggregators`. What sources write themselves is no inflow.
    executor     A component after the anchor whose weights matter once the anchor's state is given. The rule is that of
                 sources, in a sweep whose metric is held by `Anchor.clamp_to`.

T is the matrix of suppliers (rows) and targets (columns); docs/method.md, "Following an effect". T_cu is the total
effect of c by way of what u writes. It is not the strength of one edge. A row sums to the effect of its supplier. For a
metric that reads logits the column "rest" belongs to the sum: the part that the slope does not tell.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from wpjax.errors import WpjaxError
from wpjax.methods import methods
from wpjax.methods.metrics import reads_anchor
from wpjax.results.sweep_result import SweepResult

INFLOW_SHARE = 0.8
"""Share of all positive inflow that the aggregators hold together."""

MIN_EFFECT = 0.02
"""Smallest effect of a source, as a share of the largest effect."""

MUST_AGREE = ("base_fingerprint", "expert_fingerprint", "behaviour")
"""Attributes that must be equal in both sweeps of a hierarchy."""

FINEST = ("head", "kv_group", "neuron")
"""Kinds that roles are given to. Other kinds have roles only if none of these was swept."""


class Node(NamedTuple):
    """A component or a target in one role.

    Attributes:
        name: name of the component, such as L3.head.5.
        layer: 0-based layer of the component.
        value: effect of a source or an executor, or inflow of an aggregator, as a share of the gap.
    """

    name: str
    layer: int
    value: float


class Hierarchy(NamedTuple):
    """The components that make a behaviour's state, those by which it arrives, and those that act on it.

    S is the number of sources and A the number of aggregators. Nodes are in order of value, the largest first.

    Attributes:
        sources: sources.
        aggregators: aggregators.
        executors: executors; empty without a sweep that is given the anchor's state.
        flow: [S, A], effect of each source by way of each aggregator, as a share of the gap.
        direct: [S], effect of what each source writes itself, as a share of the gap.
    """

    sources: tuple[Node, ...]
    aggregators: tuple[Node, ...]
    executors: tuple[Node, ...]
    flow: Float[np.ndarray, "S A"]
    direct: Float[np.ndarray, " S"]


def significant(result: SweepResult, n: int) -> list[int]:
    """Positions of the components that surely have a positive effect, the largest first.

    The rule is that of sources, in the module's docstring.

    Args:
        result: a sweep that replaced components for real.
        n: number of positions, at most.
    """
    data = result.dataset
    effect = np.nan_to_num(data["effect"].values, nan=-np.inf)
    kinds = data["kind"].values.astype(str)
    fine = np.isin(kinds, FINEST)
    # A component without a q-value (NaN) was not replaced, so it is never sure.
    sure = (effect > 0) & (np.nan_to_num(data["q_value"].values, nan=1.0) < 0.05) & ~data["below_noise_floor"].values
    usable = sure & (fine if fine.any() else True)
    if data.attrs["metric"] == "on_policy":  # components after the anchor act only by changing the words: no sources
        usable &= (data["layer"].values <= data.attrs["metric_layer"]) & ~np.isin(kinds, ("final_norm", "unembed"))
    usable &= effect >= MIN_EFFECT * max(float(effect[usable].max(initial=0.0)), 0.0)
    return [int(i) for i in np.argsort(-effect, kind="stable") if usable[i]][:n]


def hierarchy(
    result: SweepResult, execution: SweepResult | None = None, *, n_sources: int = 16, n_aggregators: int = 12
) -> Hierarchy:
    """Assign the three roles from the results of one or two sweeps.

    Args:
        result: a sweep that replaced components for real; of an anchor, if `execution` is given.
        execution: a sweep of components after that anchor, with its state given; None for no executors.
        n_sources: number of sources, and of executors, at most.
        n_aggregators: number of aggregators, at most.

    Raises:
        WpjaxError: the result holds no flow, or is itself of a given state; or `execution` is not of a given state, or
            is of another pair or behaviour; or it is given, and the result is not of an anchor.
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
    parts = slice(
        1, len(names) - ("rest" in names)
    )  # heads and MLPs, without "self" at the front and "rest" at the end
    inflow = rows[:, parts].sum(0)
    order = [int(u) for u in np.argsort(-inflow, kind="stable") if inflow[u] > 0]
    total = inflow[order].sum() if order else 0.0
    held = np.cumsum(inflow[order]) if order else np.zeros(0)
    # Targets by falling inflow: take them until they hold `INFLOW_SHARE` of it.
    taken = order[: min(n_aggregators, int(np.searchsorted(held, INFLOW_SHARE * total)) + 1)] if order else []
    executors: tuple[Node, ...] = ()
    if execution is not None:
        if int(execution.dataset.attrs.get("given_layer", -1)) < 0:
            raise WpjaxError(
                "the second result is no sweep from a given state: make it with `wpjax sweep --metric kl "
                "--given-anchor ANCHOR`"
            )
        if any(execution.dataset.attrs[n] != data.attrs[n] for n in MUST_AGREE):
            raise WpjaxError("the second result is of another pair or behaviour; sweep what follows this anchor")
        executors = _nodes(execution, significant(execution, n_sources))
    aggregators = tuple(Node(names[u + 1], int(names[u + 1][1:].split(".")[0]), float(inflow[u])) for u in taken)
    return Hierarchy(_nodes(result, chosen), aggregators, executors, rows[:, [u + 1 for u in taken]], rows[:, 0])


def flow_by_layer(result: SweepResult, kind: str) -> Float[np.ndarray, "L U"]:
    """The flow of one kind's components, summed over each layer of suppliers and over each module of targets.

    Args:
        result: a sweep that holds flow.
        kind: kind of the suppliers.

    Returns:
        [L, U], shares of the gap. Rows are the layers of suppliers, up to the layer that the metric reads. Columns are
        what suppliers write themselves, then attention and MLP of layer 0, of layer 1 and so on. A row sums to the
        effects of its components. Only the target `rest` is left out: for a metric that reads logits, the part that
        the slope does not tell; on-policy, the effect of saying other words.
    """
    data, n_layers = result.dataset, int(result.dataset.attrs["metric_layer"]) + 1
    targets = [str(t) for t in data["target"].values if t != "rest"]
    # Targets are "self", "L0.head.0", ..., "L0.mlp", ...: all heads of a layer go to one column, its MLP to the next.
    columns = [0] + [1 + 2 * int(t[1:].split(".")[0]) + t.endswith("mlp") for t in targets[1:]]
    flow = np.nan_to_num(data["flow"].values[:, : len(targets)].astype(np.float64))
    of_kind = data["kind"].values == kind
    summed = np.zeros((n_layers, 1 + 2 * n_layers))
    for layer in range(n_layers):
        np.add.at(summed[layer], columns, flow[of_kind & (data["layer"].values == layer)].sum(0))
    return summed


def _nodes(result: SweepResult, chosen: list[int]) -> tuple[Node, ...]:
    """Components at some positions of a result, with their effects."""
    data = result.dataset
    return tuple(
        Node(str(data["name"].values[i]), int(data["layer"].values[i]), float(data["effect"].values[i])) for i in chosen
    )
