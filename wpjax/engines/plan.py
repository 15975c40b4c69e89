"""The plan of an exact sweep: how components are cut into chunks, and how many of them fit into memory.

A chunk holds some components of one kind and layer. They run in one program. All chunks of a kind have one shape, so a
kind needs one compiled program.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from wpjax.components import Component
from wpjax.engines.memory import bytes_of_rows, bytes_per_row, device_budget, groups, rows_together
from wpjax.engines.packing import Packing
from wpjax.models.config import ModelConfig
from wpjax.runtime.farm import is_shared, made
from wpjax.runtime.placement import Placement

K = TypeVar("K")


T = TypeVar("T")


MOST_GROUPS = 8
"""Groups of rows (`memory.groups`) of a chunk on a CPU, at most. They share one fetch of each layer's weights."""


class Chunk(NamedTuple):
    """Components of one kind and layer that run together. If they are fewer than the program's rows, it is filled up.

    Attributes:
        kind: kind of all components.
        layer: layer of all components; `MODEL_LAYER` for kinds outside the layers.
        components: the components.
    """

    kind: str
    layer: int
    components: tuple[Component, ...]


class Plan(NamedTuple):
    """How a sweep is cut into chunks.

    Attributes:
        rows: kind -> number of components that its program takes at once. It is lowered, in place, if the device runs
            out of memory.
        chunks: all chunks, in order.
        bytes_for: number of components on a device -> bytes that they take there, estimated.
        budget: bytes that a chunk may take on a device.
        placement: the devices that share the rows of a chunk.
    """

    rows: dict[str, int]
    chunks: tuple[Chunk, ...]
    bytes_for: Callable[[int], int]
    budget: int
    placement: Placement

    def with_chunks(self, chunks: Iterable[Chunk]) -> Plan:
        """A plan of other chunks. It shares the dict `rows`, so that a size lowered by one holds for the other."""
        return self._replace(chunks=tuple(chunks))

    def __str__(self) -> str:
        n = max(self.rows.values(), default=0)
        used = self.bytes_for(math.ceil(n / self.placement.n_patch)) if n else 0
        return f"up to {n} at once (about {used / 2**20:,.0f} of {self.budget / 2**20:,.0f} MiB a device)"


def make_plan(
    cfg: ModelConfig,
    components: Iterable[Component],
    packing: Packing,
    budget: int | None = None,
    most_rows: int | None = None,
    placement: Placement | None = None,
) -> Plan:
    """Group components by kind and layer, and choose how many run at once.

    Of the numbers that fit the budget and divide evenly among the devices, the one is taken that costs least: few
    chunks, and few rows that only fill up.

    Args:
        cfg: the model.
        components: what to sweep. The order within a kind and layer is kept.
        packing: the packing of the prompts.
        budget: bytes for a chunk's activations on a device; None to choose from the device.
        most_rows: rows of a chunk on a device, at most; None for no limit.
        placement: the devices; None for one.
    """
    placement = Placement.single() if placement is None else placement
    bytes_for = functools.partial(bytes_of_rows, cfg, packing, n_model=placement.n_model)
    together = rows_together(bytes_per_row(cfg, packing), packing.n_tokens)
    if together is not None:
        most_rows = min(MOST_GROUPS * together, most_rows or MOST_GROUPS * together)
    budget = budget or device_budget() or bytes_for(MOST_GROUPS * (together or 1))
    n_devices = placement.n_patch
    rows: dict[str, int] = {}
    components = list(components)
    for kind, members in _grouped(components, lambda c: c.kind):
        counts = [len(in_layer) for _, in_layer in _grouped(members, lambda c: c.layer)]
        largest = math.ceil(max(counts) / n_devices)
        shares = [p for p in range(1, min(largest, most_rows or largest) + 1) if bytes_for(p) <= budget] or [1]
        # Rows on a device -> cost of all chunks. A chunk costs all its rows, filled up or not, and about two rows more
        # for the work that every chunk does anew.
        cost = {
            p: sum(math.ceil(n / (p * n_devices)) for n in counts) * (math.prod(groups(cfg, packing, p)) + 2)
            for p in shares
        }
        rows[kind] = n_devices * min(cost, key=lambda p: (cost[p], p))
    return Plan(rows, cut(components, rows), bytes_for, budget, placement)


def cut(components: Iterable[Component], rows: Mapping[str, int]) -> tuple[Chunk, ...]:
    """Cut components into chunks.

    Args:
        components: what to sweep.
        rows: kind -> components of a chunk, at most.

    Returns:
        the chunks, with kinds and layers in the order in which they first appear.

    >>> heads = [Component("head", layer, i) for layer in (0, 1) for i in range(3)]
    >>> [[c.name for c in chunk.components] for chunk in cut(heads, {"head": 2})]
    [['L0.head.0', 'L0.head.1'], ['L0.head.2'], ['L1.head.0', 'L1.head.1'], ['L1.head.2']]
    """
    return tuple(
        Chunk(kind, layer, tuple(in_layer[i : i + rows[kind]]))
        for kind, members in _grouped(components, lambda c: c.kind)
        for layer, in_layer in _grouped(members, lambda c: c.layer)
        for i in range(0, len(in_layer), rows[kind])
    )


def agreed_plan(plan: Plan, components: Sequence[Component], done: MutableMapping[str, np.ndarray]) -> Plan:
    """The plan of all processes that do parts of the same work; alone, the plan as it is.

    How much memory is free is not the same on all machines. So one plan counts for all of them (`farm.made`). Where
    its chunks turn out to be too large, they are run in smaller pieces (`exact_changes`).

    Args:
        plan: the plan of this process, from `make_plan`.
        components: the components that it was made of.
        done: finished parts.
    """
    if not is_shared(done):
        return plan
    names = hashlib.blake2b(" ".join(c.name for c in components).encode(), digest_size=8).hexdigest()
    counts = made(done, f"rows-{names}", lambda: np.array([*plan.rows.values()], np.float64), (len(plan.rows),))
    rows = {kind: int(n) for kind, n in zip(plan.rows, counts, strict=True)}
    return plan._replace(rows=rows, chunks=cut(components, rows))


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> Iterator[tuple[K, list[T]]]:
    """Items by key, in order of first appearance; unlike `itertools.groupby` they need not be sorted."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    yield from groups.items()


def sham_plan(plan: Plan, patches: int = 32, layers: tuple[int, int] = (2, 4)) -> Plan:
    """A part of a plan, for shams: of each kind the first chunk of some layers, spread evenly over the layers.

    Args:
        plan: the plan of a sweep.
        patches: patches of each kind that are enough, and a quarter of the sweep's are: no more layers are taken.
        layers: the fewest and the most layers of each kind.

    >>> heads = [Component("head", layer, i) for layer in range(9) for i in range(8)]
    >>> plan = Plan({"head": 8}, cut(heads, {"head": 8}), lambda n: n, 64, Placement.single())
    >>> [chunk.layer for chunk in sham_plan(plan).chunks]  # a quarter of 72 patches are 18
    [0, 4, 8]
    """
    chosen: list[Chunk] = []
    for _, chunks in _grouped(plan.chunks, lambda chunk: chunk.kind):
        enough = min(patches, sum(len(chunk.components) for chunk in chunks) / 4)
        # The first chunk of each layer, in the order of the layers: of equal keys a dict keeps the last value.
        firsts = list({chunk.layer: chunk for chunk in reversed(chunks)}.values())[::-1]
        size = sum(len(chunk.components) for chunk in firsts) / len(firsts)
        n_layers = min(max(math.ceil(enough / size), layers[0]), layers[1])
        at = np.unique(np.linspace(0, len(firsts) - 1, n_layers).round().astype(int))
        chosen += [firsts[i] for i in at]
    return plan.with_chunks(chosen)
