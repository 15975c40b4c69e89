"""Figures of a sweep: functions `draw_...` draw a result into axes, `make_...` return whole figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wpjax.circuits.hierarchy import flow_by_layer, hierarchy
from wpjax.columns import effect_estimates, title_of
from wpjax.results.sweep_result import SweepResult

# Colours of kinds, and matplotlib settings that all figures share.
COLOURS = {
    "head": "#2b6cb0",
    "kv_group": "#2c9c91",
    "neuron": "#d9772b",
    "routed_expert": "#e0a458",
    "router": "#7a8b3c",
    "attn": "#5a67a8",
    "mlp": "#b8862b",
    "layer": "#6b7280",
    "norm": "#9b5fa5",
    "embed": "#b04a5a",
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.fonttype": "none",
    "svg.hashsalt": "wpjax",
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a name with a dollar sign is not mathematics
}
GREY = "#6b7280"


def _values(result: SweepResult, kinds: Sequence[str]) -> tuple[np.ndarray, str]:
    """The best number known of every component's effect, [C], and a label for the axis that shows some kinds."""
    data, values = result.dataset, result.best()
    exact = np.isfinite(data["effect"].values[np.isin(data["kind"].values, kinds)])
    shown = next((name for name in effect_estimates() if name in data), result.ranking)
    if not exact.all():
        return values, f"share of gap ({'exact or ' if exact.any() else ''}{title_of(shown)})"
    return values, "share of gap recovered"


def draw_heads(result: SweepResult, axes: Axes, kind: str = "head") -> None:
    """Draw the effect of every head (or KV group) as a map of layers by indices, white at zero."""
    data, (values, label) = result.dataset, _values(result, [kind])
    mine = data["kind"].values == kind
    layers, index = data["layer"].values[mine], data["index"].values[mine]
    grid = np.full((layers.max() + 1, index.max() + 1), np.nan)  # what was not swept stays blank
    grid[layers, index] = values[mine]
    scale = max(float(np.nanmax(np.abs(grid))), 1e-9)
    image = axes.imshow(grid, aspect="auto", origin="lower", cmap="RdBu_r", norm=TwoSlopeNorm(0, -scale, scale))
    axes.set(xlabel=kind.replace("kv_group", "KV group"), ylabel="layer")
    axes.set_title("Heads" if kind == "head" else "KV groups")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)


def draw_neurons(result: SweepResult, axes: Axes) -> None:
    """Draw the effect of every neuron by layer, and name the strongest."""
    data, (values, label) = result.dataset, _values(result, ["neuron"])
    mine = data["kind"].values == "neuron"
    layers, effects = data["layer"].values[mine], values[mine]
    x = layers + np.random.default_rng(0).uniform(-0.35, 0.35, layers.size)  # side by side, so that dots are seen
    axes.axhline(0, color=GREY, lw=0.6)
    axes.scatter(x, effects, s=6, color=COLOURS["neuron"], alpha=0.55, lw=0, rasterized=True)
    names = data["name"].values[mine]
    for i in _apart(layers / max(layers.max(), 1), effects / max(np.ptp(effects), 1e-30), np.argsort(-effects)[:8]):
        left = layers[i] > layers.max() / 2  # names stay inside the axes
        axes.annotate(
            str(names[i]),
            (x[i], effects[i]),
            xytext=(-4 if left else 4, 2),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=7,
            color="#333",
        )
    axes.set(xlabel="layer", ylabel=label)
    axes.set_title("Neurons")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _apart(x: np.ndarray, y: np.ndarray, order: np.ndarray, n: int = 5) -> list[int]:
    """Choose points whose labels do not overlap: the first n in order that keep apart from those chosen before.

    Args:
        x: [N], positions in units of the width of the axes.
        y: [N], positions in units of their height.
        order: indices of points, the most important first.
        n: most points to choose.

    Returns:
        indices of the points: any two are half a width apart, or a line of text.
    """
    chosen: list[int] = []
    for i in order:
        if len(chosen) < n and all(abs(x[i] - x[j]) > 0.5 or abs(y[i] - y[j]) > 0.045 for j in chosen):
            chosen.append(int(i))
    return chosen


def draw_depth(result: SweepResult, axes: Axes) -> None:
    """Draw sums of single effects by layer and kind: positive effects stacked above zero, negative ones below."""
    data, (values, _), kinds = result.dataset, _values(result, []), in_layers(result)
    n_layers = int(data["layer"].values.max()) + 1
    axes.axhline(0, color=GREY, lw=0.6)
    base = {1: np.zeros(n_layers), -1: np.zeros(n_layers)}  # by sign: where the next bar of each layer begins
    for kind in kinds:
        mine = (data["kind"].values == kind) & (data["layer"].values >= 0)
        for sign in (1, -1):
            chosen = mine & (np.sign(values) == sign)
            sums = np.bincount(data["layer"].values[chosen], values[chosen], n_layers)
            label = kind if sign == 1 else None
            axes.bar(
                np.arange(n_layers), sums, bottom=base[sign], color=COLOURS.get(kind, GREY), width=0.8, label=label
            )
            base[sign] += sums
    axes.set(xlabel="layer", ylabel="sum of single effects")
    axes.set_title("Depth")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=7)


def draw_top(result: SweepResult, axes: Axes, n: int = 20) -> None:
    """Draw the n components of largest effect, with their intervals."""
    rows = result.top(n)[::-1]  # bars are drawn from the bottom up
    kinds = dict(zip(result.dataset["name"].values, result.dataset["kind"].values, strict=True))
    y = np.arange(len(rows))
    effect = np.array([r.effect for r in rows])
    colours = [COLOURS.get(str(kinds[r.name]), GREY) for r in rows]
    axes.barh(y, effect, color=colours, height=0.7)
    low, high = (np.array([getattr(r, f) for r in rows]) for f in ("ci_low", "ci_high"))
    bars = np.clip([effect - low, high - effect], 0, None)  # an effect outside its interval has no bar on that side
    axes.errorbar(effect, y, xerr=bars, fmt="none", ecolor="#222", elinewidth=0.8)
    axes.set_yticks(y, [r.name for r in rows], fontsize=7)
    axes.axvline(0, color=GREY, lw=0.6)
    axes.set(xlabel="share of gap recovered alone (95 % interval)")
    axes.set_title("Highest effects")


def draw_plane(result: SweepResult, axes: Axes) -> None:
    """Draw every component of the 2x2: what its weights do (source) against what it relays, coloured by layer."""
    data = result.dataset
    known = np.isfinite(data["source"].values)
    source, relay, layers = (data[name].values[known] for name in ("source", "relay", "layer"))
    names = data["name"].values[known].astype(str)
    for draw in (axes.axhline, axes.axvline):
        draw(0, color=GREY, lw=0.6)
    points = axes.scatter(source, relay, c=layers, s=14, cmap="viridis", lw=0, alpha=0.85)
    span = [max(np.ptp(values), 1e-30) for values in (source, relay)]
    far = np.argsort(-np.hypot(source / span[0], relay / span[1]))[:12]
    for i in _apart(source / span[0] * 2, relay / span[1], far, n=8):
        left = source[i] > source.min() + span[0] / 2  # names stay inside the axes
        axes.annotate(
            names[i],
            (source[i], relay[i]),
            xytext=(-4 if left else 4, 2),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=7,
            color="#333",
        )
    axes.set(xlabel="source: share of gap by its weights", ylabel="relay: by its input")
    axes.set_title("Sources and relays")
    bar = axes.figure.colorbar(points, ax=axes, shrink=0.85, pad=0.02)
    bar.set_label("layer")
    bar.outline.set_visible(False)


def draw_coverage(result: SweepResult, axes: Axes) -> None:
    """Draw what each kind recovers as one patch, beside the sum of its single effects."""
    data = result.dataset
    kinds = [str(k) for k in data["swept_kind"].values]
    y = np.arange(len(kinds))[::-1]
    axes.barh(y + 0.2, data["coverage_joint"].values, 0.36, color=[COLOURS.get(k, GREY) for k in kinds], label="joint")
    axes.barh(y - 0.2, data["coverage_sum"].values, 0.36, color="#c9ced6", label="sum of single effects")
    axes.set_yticks(y, [f"{k} ({n})" for k, n in zip(kinds, data["n_components"].values, strict=True)])
    axes.axvline(0, color=GREY, lw=0.6)
    axes.axvline(1, color=GREY, lw=0.6, ls=":")
    axes.set(xlabel="share of gap recovered")
    axes.set_title(f"Coverage: {data.attrs['coverage']:.0%} by all together")
    axes.legend(frameon=False, fontsize=7, loc="best")


def draw_anchor(result: SweepResult, axes: Axes) -> None:
    """Draw the anchor's diagnostics by layer: the gap, the gap without drift (both with intervals), and the split-half
    cosine.
    """
    data = result.dataset
    layers = np.arange(data.sizes["model_layer"])
    axes.axhline(0, color=GREY, lw=0.6)
    for name, label, colour in (("gap", "gap", GREY), ("specific", "gap without drift", COLOURS["head"])):
        scale = 1 / np.maximum(
            data[f"anchor_{name}_sd"].values, 1e-30
        )  # in standard deviations, so that layers compare
        mean, low, high = (data[f"anchor_{name}{end}"].values * scale for end in ("", "_low", "_high"))
        axes.fill_between(layers, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(layers, mean, color=colour, marker=".", ms=4, label=label)
    axes.axvline(data.attrs["metric_layer"], color="#222", lw=0.8, ls=":")
    axes.set(xlabel="layer", ylabel="expert − base (standard deviations)")
    axes.set_title(f"Anchor: layer {data.attrs['metric_layer']}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=7, loc="best")
    twin = axes.twinx()
    twin.plot(layers, data["anchor_stability"].values, color=COLOURS["neuron"], lw=1)
    twin.set_ylim(min(0.0, float(data["anchor_stability"].min())), 1.02)
    twin.set_ylabel("split-half cosine", color=COLOURS["neuron"])
    twin.spines["right"].set_visible(True)


def draw_flow(result: SweepResult, axes: Axes) -> None:
    """Draw the flow: rows are suppliers by kind and layer, columns are what their effects arrive by way of.

    Columns: the supplier itself, then attention and MLP of each layer.
    """
    kinds, n_layers = in_layers(result), int(result.dataset.attrs["metric_layer"]) + 1
    grid = np.concatenate([flow_by_layer(result, kind) for kind in kinds])
    if not grid.any():
        _say(axes, "No component that was replaced moves the metric,\nso there is no flow to draw.")
        return
    scale = max(float(np.abs(grid).max()), 1e-9)
    image = axes.imshow(grid, aspect="auto", origin="lower", cmap="RdBu_r", norm=TwoSlopeNorm(0, -scale, scale))
    ticks = range(0, n_layers, max(1, n_layers // 12))
    axes.set_xticks([0, *(1.5 + 2 * i for i in ticks)], ["self", *(str(i) for i in ticks)])
    axes.set(xlabel="arrives by way of: itself, then attention and MLP of each layer", ylabel="layer of the source")
    axes.set_title("Flow")
    rows = range(0, n_layers, max(1, n_layers // 6))
    axes.set_yticks([i + k * n_layers for k in range(len(kinds)) for i in rows], [str(i) for i in rows] * len(kinds))
    for k, kind in enumerate(kinds):
        axes.axhline((k + 1) * n_layers - 0.5, color=GREY, lw=0.6)
        axes.text(1.5 + 2 * n_layers - 2, (k + 1) * n_layers - 1, kind, ha="right", va="top", fontsize=7, color="#333")
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    bar.set_label("share of gap")
    bar.outline.set_visible(False)


def draw_hierarchy(result: SweepResult, axes: Axes, execution: SweepResult | None = None) -> None:
    """Draw sources, aggregators, the anchor and executors as a graph, from left to right.

    The width of a line is its share of the gap, next to that of the largest source.
    """
    graph = hierarchy(result, execution)
    if not graph.sources and not graph.executors:
        _say(axes, "No effect is surely above zero (q < 0.05),\nso there are no sources to draw.")
        return
    columns = [graph.sources, graph.aggregators, graph.executors]
    places: list[dict[str, tuple[float, float]]] = []  # of each column: name -> (x, y)
    for x, nodes in zip((0.0, 1.0, 3.0), columns, strict=True):
        ordered = sorted(nodes, key=lambda n: (n.layer, n.name))
        places.append({n.name: (x, (i + 0.5) / len(ordered)) for i, n in enumerate(ordered)})
    anchor, widest = (2.0, 0.5), max([n.value for n in graph.sources] + [1e-9])

    def line(a: tuple[float, float], b: tuple[float, float], value: float) -> None:  # thin ones are left out
        colour = COLOURS["head"] if value >= 0 else COLOURS["embed"]
        width = 6 * min(abs(value) / widest, 1.0)
        if width >= 0.3:
            axes.plot(*zip(a, b, strict=True), color=colour, lw=width, alpha=0.35, solid_capstyle="round", zorder=1)

    for s, source in enumerate(graph.sources):
        for a, aggregator in enumerate(graph.aggregators):
            line(places[0][source.name], places[1][aggregator.name], graph.flow[s, a])
        line(places[0][source.name], anchor, graph.direct[s])
    # An aggregator's inflow sums many sources, and executors are shares of another gap: no line is drawn wider than the
    # largest source.
    for aggregator in graph.aggregators:
        line(places[1][aggregator.name], anchor, aggregator.value * widest / max(widest, aggregator.value))
    for executor in graph.executors:
        line(anchor, places[2][executor.name], widest * executor.value / graph.executors[0].value)
    for nodes, where in zip(columns, places, strict=True):
        for node in nodes:
            x, y = where[node.name]
            box = {"boxstyle": "round,pad=0.25", "fc": "white", "ec": GREY, "lw": 0.6}
            axes.text(x, y, f"{node.name}  {node.value:+.1%}", ha="center", va="center", fontsize=6.5, bbox=box)
    box = {"boxstyle": "round,pad=0.5", "fc": "#fdf3e7", "ec": COLOURS["neuron"]}
    attrs = result.dataset.attrs
    label = f"anchor\nlayer {attrs['metric_layer']}" if attrs["metric"] == "anchor" else str(attrs["metric"])
    axes.text(*anchor, label, ha="center", va="center", fontsize=8, bbox=box)
    titles = [("sources", 0.0), ("aggregators", 1.0)] + ([("executors", 3.0)] if graph.executors else [])
    for title, x in titles:
        axes.text(x, 1.04, title, ha="center", fontweight="bold", fontsize=8)
    axes.set(xlim=(-0.5, 3.5 if graph.executors else 2.5), ylim=(-0.02, 1.1))
    axes.axis("off")


def _say(axes: Axes, why: str) -> None:
    """Write why there is nothing to draw, in place of a blank figure."""
    axes.axis("off")
    axes.text(0.5, 0.5, why, ha="center", va="center", color=GREY, transform=axes.transAxes)


def _has(result: SweepResult, kind: str) -> bool:
    """Whether a kind was swept."""
    return bool((result.dataset["kind"].values == kind).any())


def in_layers(result: SweepResult) -> list[str]:
    """The finest kinds that were swept, among those that stand in layers."""
    return [kind for kind in result.finest_kinds if kind not in ("embed", "unembed", "final_norm")]


def available(
    result: SweepResult, execution: SweepResult | None = None
) -> dict[str, tuple[Callable[[SweepResult, Axes], None], tuple[float, float]]]:
    """The figures that a result has the data for: name -> (function that draws it, size in inches).

    Args:
        result: the sweep.
        execution: a second sweep, with the anchor's state given: its components are the hierarchy's executors.
    """
    result = result.swept
    figures: dict[str, tuple[Callable[[SweepResult, Axes], None], tuple[float, float]]] = {}
    if result.dataset["exact"].values.any():
        figures["top"] = (draw_top, (5.4, 4.2))
    if _has(result, "head"):
        figures["heads"] = (draw_heads, (5.4, 3.8))
    if _has(result, "kv_group"):
        figures["kv_groups"] = (lambda r, axes: draw_heads(r, axes, "kv_group"), (3.6, 3.8))
    if _has(result, "neuron"):
        figures["neurons"] = (draw_neurons, (6.4, 3.8))
    if in_layers(result):
        figures["depth"] = (draw_depth, (5.4, 3.2))
    if "source" in result.dataset and np.isfinite(result.dataset["source"].values).any():
        figures["plane"] = (draw_plane, (5.4, 4.2))
    if "flow" in result.dataset and in_layers(result):
        figures["flow"] = (draw_flow, (6.4, 4.8))
    sources = "flow" in result.dataset and int(result.dataset.attrs["given_layer"]) < 0
    if sources or execution is not None:  # asked for without sources: `hierarchy` raises, and says what is wrong
        figures["hierarchy"] = (lambda r, axes: draw_hierarchy(r, axes, execution), (7.4, 4.6))
    figures["coverage"] = (draw_coverage, (5.0, 2.6))
    if "anchor_gap" in result.dataset:
        figures["anchor"] = (draw_anchor, (5.0, 3.0))
    return figures


def make_figure(result: SweepResult, name: str, execution: SweepResult | None = None) -> Figure:
    """One figure by name, one of `available`.

    Args:
        result: the sweep.
        name: name of the figure.
        execution: a second sweep, with the anchor's state given (see `available`).
    """
    result = result.swept
    draw, size = available(result, execution)[name]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(result, figure.add_subplot())
    return figure


def make_overview(result: SweepResult) -> Figure:
    """The main figures on one sheet: where the behaviour lives, at a glance."""
    result = result.swept
    figures = available(result)
    names = [n for n in ("top", "heads", "neurons", "depth", "coverage", "anchor") if n in figures]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 7.4 if len(names) > 3 else 3.9), layout="constrained")
        grid = figure.subplots(-(-len(names) // 3), 3, squeeze=False).ravel()
        for axes, name in zip(grid, names, strict=False):
            figures[name][0](result, axes)
        for axes in grid[len(names) :]:
            axes.set_visible(False)
        attrs = result.dataset.attrs
        title = f"{attrs['behaviour']}: weights of {attrs['expert']} that carry it into {attrs['base']}"
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure
