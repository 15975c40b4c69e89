"""Components, the parts of a model that are patched: their kinds, their names, and which weights each one owns.

Every parameter belongs to exactly one *unit*. A unit is the finest piece that can be patched on its own. Heads and
neurons are those of arXiv 2604.13694; the other units are ours, so that all parameters are covered:

    head[l, h]         W_Q[:, h, :]  W_O[h, :, :]  b_Q[h, :]
    kv_group[l, k]     W_K[:, k, :]  W_V[:, k, :]  b_K[k, :]  b_V[k, :]
    neuron[l, f]       W_gate[:, f]  W_in[:, f]  W_out[f, :]  b_gate[f]  b_in[f]
    attn_bias[l]       b_O, shared by all heads
    qk_norm[l]         the norms of queries and keys, shared by all heads
    mlp_bias[l]        b_out, shared by all neurons
    router[l]          W_router, of models with routed experts
    q_direction[l, i]  s[i]  u[:, i]  v[i, :] of the change of W_Q, where it is divided (`directions.by_directions`);
                       likewise k, v, o, gate, up, down
    norm_attn[l]  norm_mlp[l]  norm_attn_out[l]  norm_mlp_out[l]  embed  unembed  final_norm

Units with a second index have *channels*: the heads, KV groups, neurons or directions of a layer.

A component is a set of units or of their channels. To add a kind of component, add an entry to `KINDS`; if it owns
leaves that no unit has yet, add these to `models.parameters`. Names, masks, patches and exact sweeps follow from the
two tables.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Real

from wpjax.checkpoints.convert import flatten
from wpjax.errors import ComponentError, nearest
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import abstract_params
from wpjax.models.parameters import MATRICES, PARAMETERS


class Owner(NamedTuple):
    """Who owns a leaf of the parameter tree.

    Attributes:
        unit: the unit.
        axis: the axis of the unit's channels in one layer's leaf; None if the unit has no channels.
    """

    unit: str
    axis: int | None = None


LEAVES: Mapping[str, Owner] = MappingProxyType({path: Owner(p.unit, p.channel_axis) for path, p in PARAMETERS.items()})
"""Path of a leaf, such as "blocks/attn/W_Q" -> its owner."""


class Kind(NamedTuple):
    """A kind of component.

    Attributes:
        units: the units that its components open.
        opens: how they divide the units among them.

            - "channel": component i of a layer opens channel i of the one unit, as a head does.
            - "block": component i of a layer opens the i-th of E equal blocks of channels of the one unit, as a routed
              expert does.
            - "all": a layer (or the model) has one component, which opens all units, as an MLP does.
            - "part": component i of a layer opens the i-th unit and is named `parts[i]`, as a norm is.
            - "piece": component i of a layer opens channel i // n of unit i % n, for the n units, and is named by the
              part and the channel, as a direction is.
        parts: names of the parts; empty unless `opens` is "part" or "piece".
        in_layer: true if its components belong to a layer, false if they belong to the model.
    """

    units: tuple[str, ...]
    opens: Literal["channel", "block", "all", "part", "piece"] = "all"
    parts: tuple[str, ...] = ()
    in_layer: bool = True


_ATTN = ("head", "kv_group", "attn_bias", "qk_norm")
_MLP = ("neuron", "mlp_bias", "router")
_NORM = ("norm_attn", "norm_mlp", "norm_attn_out", "norm_mlp_out")

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "head": Kind(("head",), "channel"),
        "kv_group": Kind(("kv_group",), "channel"),
        "neuron": Kind(("neuron",), "channel"),
        "routed_expert": Kind(("neuron",), "block"),
        "router": Kind(("router",)),
        "attn": Kind(_ATTN),
        "mlp": Kind(_MLP),
        "layer": Kind((*_ATTN, *_MLP, *_NORM)),
        "norm": Kind(_NORM, "part", ("attn", "mlp", "attn_out", "mlp_out")),
        "embed": Kind(("embed",), in_layer=False),
        "unembed": Kind(("unembed",), in_layer=False),
        "final_norm": Kind(("final_norm",), in_layer=False),
        "delta_direction": Kind(tuple(f"{module}_direction" for module in MATRICES), "piece", tuple(MATRICES)),
    }
)
"""Every kind of component, by name."""

MODEL_LAYER = -1
"""`Component.layer` of components that belong to the model, not to a layer."""


@dataclasses.dataclass(frozen=True, order=True)
class Component:
    """One component.

    Attributes:
        kind: its kind, a key of `KINDS`.
        layer: 0-based number of its layer; `MODEL_LAYER` if it belongs to the model.
        index: its number among the components of its kind in that layer, from 0 on.

    >>> Component("head", 3, 5).name, Component("mlp", 3).name, Component("norm", 3, 0).name
    ('L3.head.5', 'L3.mlp', 'L3.norm.attn')
    >>> Component("delta_direction", 3, 7).name  # the second direction (7 // 7) of the first of seven modules (7 % 7)
    'L3.delta_direction.q.1'
    """

    kind: str
    layer: int = MODEL_LAYER
    index: int = 0

    @property
    def name(self) -> str:
        """Its name, as on the command line: `L3.head.5`, `L3.norm.attn`, `L3.mlp`, `L3` (a layer), `embed`."""
        kind = KINDS[self.kind]
        if not kind.in_layer:
            return self.kind
        if kind.opens == "piece":
            suffix = f".{kind.parts[self.index % len(kind.parts)]}.{self.index // len(kind.parts)}"
        else:
            suffix = "" if kind.opens == "all" else f".{kind.parts[self.index] if kind.parts else self.index}"
        return f"L{self.layer}" if self.kind == "layer" else f"L{self.layer}.{self.kind}{suffix}"


def unit_names() -> tuple[str, ...]:
    """The names of all units that any model has, in the order of `LEAVES`."""
    return tuple(dict.fromkeys(owner.unit for owner in LEAVES.values()))


@functools.cache
def unit_shapes(cfg: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of each unit's mask in a model.

    It is [L, n] for units with n channels a layer, [L] for other units of layers, and [] for units of the model.

    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 2 layers, 4 heads
    >>> unit_shapes(cfg)["head"], unit_shapes(cfg)["norm_attn"], unit_shapes(cfg)["embed"]
    ((2, 4), (2,), ())
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in flatten(abstract_params(cfg)).items():
        unit, axis = LEAVES[path]
        stacked = path.startswith("blocks/")
        layers = (cfg.n_layers,) if stacked else ()
        shapes[unit] = layers if axis is None else (*layers, leaf.shape[axis + stacked])
    return MappingProxyType(shapes)


@functools.cache
def indices(cfg: ModelConfig, kind: str) -> Sequence[int]:
    """The indices of the components of a kind in one layer (or in the model, for a kind outside the layers).

    They are not always 0 to n - 1. A model that has norms only after its modules has only the last of `Kind.parts`.
    Layers may differ in the number of their directions: these are the indices that some layer has (`exists`).
    """
    entry, shapes = KINDS[kind], unit_shapes(cfg)
    if not set(entry.units) & set(shapes):
        return ()  # the unembedding of a tied model
    if entry.opens == "block":
        return range(cfg.n_experts)
    if entry.opens == "channel":
        return range(shapes[entry.units[0]][-1])  # not a tuple: whether a neuron is in it is asked thousands of times
    if entry.opens == "piece":
        n, channels = len(entry.units), {unit: shapes[unit][-1] for unit in entry.units if unit in shapes}
        most = n * max(channels.values())
        return tuple(i for i in range(most) if i // n < channels.get(entry.units[i % n], 0))
    return tuple(i for i, unit in enumerate(entry.units) if unit in shapes) if entry.opens == "part" else (0,)


def exists(cfg: ModelConfig, component: Component) -> bool:
    """Whether a layer has the component of an index that another layer of the model has (`indices`)."""
    kind = KINDS[component.kind]
    if kind.opens != "piece":
        return True
    part, channel = component.index % len(kind.parts), component.index // len(kind.parts)
    return channel < cfg.n_directions(kind.parts[part])[component.layer]


def count(cfg: ModelConfig, kind: str) -> int:
    """Number of components of a kind in one layer (or in the model, for a kind outside the layers)."""
    return len(indices(cfg, kind))


def count_in(cfg: ModelConfig, kind: str, layers: Iterable[int]) -> int:
    """Number of components of a kind in some layers (or in the model, for a kind outside the layers)."""
    entry = KINDS[kind]
    if entry.opens == "piece":  # layers may differ in it
        return sum(numbers[layer] for layer in layers for module, numbers in cfg.directions if module in entry.parts)
    return count(cfg, kind) * (len(list(layers)) if entry.in_layer else 1)


def enumerate_components(
    cfg: ModelConfig, kinds: Iterable[str], layers: Sequence[int] | None = None
) -> list[Component]:
    """All components of some kinds, kind by kind, in order of layer and index.

    Args:
        cfg: the model.
        kinds: names of kinds, keys of `KINDS`.
        layers: numbers of the layers; None for all. Components outside the layers are always listed.

    Raises:
        ComponentError: a kind does not exist.

    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 2 layers, 2 KV groups
    >>> [c.name for c in enumerate_components(cfg, ["kv_group", "embed"])]
    ['L0.kv_group.0', 'L0.kv_group.1', 'L1.kv_group.0', 'L1.kv_group.1', 'embed']
    """
    components: list[Component] = []
    for kind in kinds:
        check_kind(kind)
        in_layer = KINDS[kind].in_layer
        for layer in (range(cfg.n_layers) if layers is None else layers) if in_layer else [MODEL_LAYER]:
            components += [Component(kind, layer, i) for i in indices(cfg, kind)]
    return [c for c in components if exists(cfg, c)] if cfg.directions else components


def units_of(component: Component) -> tuple[str, ...]:
    """The units that a component opens, in whole or one channel of each. Not every model has all of these units."""
    kind = KINDS[component.kind]
    if kind.opens == "piece":
        return (kind.units[component.index % len(kind.units)],)
    return kind.units[component.index : component.index + 1] if kind.opens == "part" else kind.units


@functools.cache
def n_parameters(cfg: ModelConfig, component: Component) -> int:
    """The number of weights that a component owns.

    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # D = 16, heads of width 4
    >>> n_parameters(cfg, Component("head", 0, 0))  # 16 x 4 of W_Q and 4 x 16 of W_O
    128
    """
    kind, units, total = KINDS[component.kind], units_of(component), 0
    for path, leaf in flatten(abstract_params(cfg)).items():
        unit, axis = LEAVES[path]
        if unit in units:
            shape = leaf.shape[1:] if path.startswith("blocks/") else leaf.shape
            n = math.prod(shape)
            parts = {"block": cfg.n_experts}.get(kind.opens, 1)
            if axis is not None and kind.opens in ("channel", "piece"):
                parts = shape[axis]
            total += n // parts
    return total


def n_within(sizes: Real[np.ndarray, " C"], budget: float) -> int:
    """How many components that lead a ranking stay together within a budget of parameters.

    All that asks for "the best within a share of the parameters" counts by this rule: the ranking is taken from its
    start as long as it fits, and what does not fit ends it, even if smaller components come after.

    Args:
        sizes: [C], number of parameters of each component, the best first.
        budget: number of parameters, perhaps computed from a share, so that it is off by a rounding.

    Returns:
        a number from 0 to C.

    >>> n_within(np.array([10, 1, 1, 30]), 11.9), n_within(np.array([10, 1, 1, 30]), 9)
    (2, 0)
    """
    return int(np.searchsorted(np.cumsum(sizes), budget * (1 + 1e-9), side="right"))


def best_within(
    scores: Real[np.ndarray, " C"], sizes: Real[np.ndarray, " C"], budget: float, least: int = 0
) -> Bool[np.ndarray, " C"]:
    """Which components lead a ranking and stay within a budget of parameters (`n_within`).

    Args:
        scores: [C], the larger the better; of equal ones the first counts.
        sizes: [C], number of parameters of each component.
        budget: number of parameters.
        least: number of components that are taken even if they are too large.

    >>> best_within(np.array([3.0, 1.0, 2.0]), np.array([2, 4, 2]), 4).tolist()
    [True, False, True]
    """
    order = np.argsort(-scores, kind="stable")
    chosen = np.zeros(len(order), bool)
    chosen[order[: max(n_within(sizes[order], budget), least)]] = True
    return chosen


def check_kind(kind: str) -> None:
    """Refuse a kind that does not exist.

    Raises:
        ComponentError: there is no such kind; the message names the most similar one.
    """
    if kind not in KINDS:
        raise ComponentError(f"unknown component kind {kind!r}{nearest(kind, KINDS)}; kinds: {', '.join(KINDS)}")


WITH_DIRECTIONS = ("delta_direction", "norm", "router", "embed", "unembed", "final_norm")
"""Kinds that can be swept together with directions: they own no matrix that is divided."""


def gated_kinds(is_divided: bool) -> tuple[str, ...]:
    """The kinds whose gates are learned unless others are named: the finest that own matrices.

    Args:
        is_divided: whether the pair is divided into directions.
    """
    return ("delta_direction",) if is_divided else ("head", "kv_group", "neuron")


def check_with_directions(kinds: Iterable[str], is_divided: bool = False) -> None:
    """Refuse kinds beside directions, or in a divided pair, that own the same matrices.

    Where a change is divided, a head or a neuron owns only what the directions leave over.

    Args:
        kinds: names of kinds.
        is_divided: whether the pair is divided, even if directions are not among the kinds.

    Raises:
        ComponentError: names such a kind.
    """
    kinds = tuple(kinds)
    others = [kind for kind in kinds if kind not in WITH_DIRECTIONS]
    if (is_divided or "delta_direction" in kinds) and others:
        raise ComponentError(
            f"delta_direction and {others[0]} own the same matrices: sweep them one after the other; beside directions "
            f"there may be {', '.join(WITH_DIRECTIONS[1:])}"
        )


def none_of(kinds: Iterable[str]) -> ComponentError:
    """The error that a model has no component of any of some kinds."""
    return ComponentError(
        f"nothing to sweep: this model has no {', '.join(kinds)}; `wpjax inspect` lists the kinds that it has"
    )


def parse_component(cfg: ModelConfig, name: str) -> Component:
    """The component that has a name such as `L3.head.5`.

    Raises:
        ComponentError: the model has no such component; the message says why.

    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)
    >>> parse_component(cfg, "L1.head.3")
    Component(kind='head', layer=1, index=3)
    """
    component = _parse(name)
    if component is None:
        raise ComponentError(
            f"{name!r} is not a component name; names look like L3.head.5, L3.kv_group.1, L3.neuron.1023, "
            "L3.attn, L3.mlp, L3, L3.norm.attn, L3.delta_direction.q.0, embed, unembed, final_norm"
        )
    existing = indices(cfg, component.kind)
    if component.layer >= cfg.n_layers:
        raise ComponentError(f"{name}: the model has layers L0 to L{cfg.n_layers - 1}")
    if not existing:
        why = {
            "unembed": "its unembedding is tied to embed, so patch embed",
            "delta_direction": "a pair has directions once it is divided: wpjax sweep --kinds delta_direction, or "
            "wp.by_directions(pair)",
        }
        raise ComponentError(f"{name}: this model has none; {why.get(component.kind, 'see wpjax inspect')}")
    if component.index not in existing or not exists(cfg, component):
        parts = KINDS[component.kind].parts
        if KINDS[component.kind].opens == "piece":
            part = parts[component.index % len(parts)]
            n = (cfg.n_directions(part) or (0,) * cfg.n_layers)[component.layer]
            has = f"{n} direction{'s' * (n != 1)}, from 0 on" if n else "no direction: the expert did not change it"
            raise ComponentError(f"{name}: {part} of L{component.layer} has {has}")
        has = ", ".join(parts[i] for i in existing) if parts else f"0 to {existing[-1]}"
        raise ComponentError(f"{name}: a layer of this model has {component.kind} {has}")
    return component


def _parse(name: str) -> Component | None:
    """The component of a well-formed name, whether or not a model has it; None for other names."""
    if name in KINDS and not KINDS[name].in_layer:
        return Component(name)
    head, *rest = name.split(".")
    if head[:1] != "L" or not _is_index(head[1:]):
        return None
    layer = int(head[1:])
    if not rest:
        return Component("layer", layer)
    kind = KINDS.get(rest[0])
    if kind is None or not kind.in_layer or rest[0] == "layer":
        return None
    if kind.opens == "all":
        return Component(rest[0], layer) if len(rest) == 1 else None
    if kind.opens == "piece":
        is_name = len(rest) == 3 and rest[1] in kind.parts and _is_index(rest[2])
        index = int(rest[2]) * len(kind.parts) + kind.parts.index(rest[1]) if is_name else 0
        return Component(rest[0], layer, index) if is_name else None
    if len(rest) != 2:
        return None
    if kind.opens == "part":
        return Component(rest[0], layer, kind.parts.index(rest[1])) if rest[1] in kind.parts else None
    return Component(rest[0], layer, int(rest[1])) if _is_index(rest[1]) else None


def _is_index(text: str) -> bool:
    """Whether a text is a number from 0 on. Leading zeros are refused, so that a component has one name only."""
    return text.isascii() and text.isdigit() and (text == "0" or text[0] != "0") and len(text) < 10


def unit_positions(cfg: ModelConfig, component: Component) -> dict[str, np.ndarray]:
    """The entries of each unit's mask that a component opens: unit -> positions in the flattened mask."""
    kind, shapes, positions = KINDS[component.kind], unit_shapes(cfg), {}
    for unit in units_of(component):
        if unit not in shapes:
            continue
        shape = shapes[unit]
        width = math.prod(shape[1:]) if kind.in_layer else math.prod(shape)  # entries of one layer
        start = component.layer * width if kind.in_layer else 0
        if kind.opens in ("channel", "piece"):
            opened = np.array([component.index if kind.opens == "channel" else component.index // len(kind.units)])
        elif kind.opens == "block":
            opened = component.index * (width // cfg.n_experts) + np.arange(width // cfg.n_experts)
        else:
            opened = np.arange(width)
        positions[unit] = start + opened
    return positions


def open_units(cfg: ModelConfig, components: Iterable[Component | str]) -> dict[str, np.ndarray]:
    """The mask that opens a set of components.

    Args:
        cfg: the model.
        components: components or their names.

    Returns:
        unit -> boolean array of its shape (`unit_shapes`), for all units of the model.

    Raises:
        ComponentError: a name is not a component of this model.

    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 2 layers, 4 heads
    >>> open_units(cfg, ["L1.head.2"])["head"].astype(int).tolist()
    [[0, 0, 0, 0], [0, 0, 1, 0]]
    """
    units = {unit: np.zeros(shape, bool) for unit, shape in unit_shapes(cfg).items()}
    for item in components:
        component = parse_component(cfg, item if isinstance(item, str) else item.name)
        for unit, at in unit_positions(cfg, component).items():
            units[unit].reshape(-1)[at] = True
    return units
