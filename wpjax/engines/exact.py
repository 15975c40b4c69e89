"""Exact sweeps: every component of a list replaced for real, in chunks of one shape a kind."""

from __future__ import annotations

import functools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from wpjax.components import KINDS, Component
from wpjax.engines.contributions import Run, Side
from wpjax.engines.memory import bytes_of_rows, bytes_per_row, device_budget, groups, rows_together
from wpjax.engines.packing import Packing
from wpjax.engines.replay import Replayed, replay
from wpjax.errors import WpjaxError
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import TokensUnchanged
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.runtime.placement import Placement

K = TypeVar("K")
T = TypeVar("T")

MAX_IN_FLIGHT = 4
"""Chunks that run, or have run and wait for their results to be fetched."""

MOST_GROUPS = 8
"""Groups of rows (`memory.groups`) of a chunk on a CPU, at most: a layer's weights are fetched once for all of them."""


class Chunk(NamedTuple):
    """Components of one kind and layer that run together; fewer than the program's rows are filled up."""

    kind: str
    layer: int
    components: tuple[Component, ...]


class Plan(NamedTuple):
    """How a sweep is cut up.

    Attributes:
        rows: components a program of each kind takes at once; lowered where the device runs out of memory.
        chunks: all chunks in order.
        takes: estimate of the bytes that a chunk of so many components takes on a device.
        budget: bytes a chunk may take there.
        placement: the devices that share the rows of a chunk.
    """

    rows: dict[str, int]
    chunks: tuple[Chunk, ...]
    takes: Callable[[int], int]
    budget: int
    placement: Placement

    def with_chunks(self, chunks: Iterable[Chunk]) -> Plan:
        """Other chunks at the same size; `rows` stays one and the same."""
        return self._replace(chunks=tuple(chunks))

    def __str__(self) -> str:
        n = max(self.rows.values(), default=0)
        used = self.takes(math.ceil(n / self.placement.n_devices)) if n else 0
        return f"up to {n} at once (about {used / 2**20:,.0f} of {self.budget / 2**20:,.0f} MiB a device)"


def make_plan(
    cfg: ModelConfig,
    components: Iterable[Component],
    packing: Packing,
    budget: int | None = None,
    most_rows: int | None = None,
    placement: Placement | None = None,
) -> Plan:
    """Group components by kind and layer, and choose the rows of each kind's program.

    The rows are the number that wastes least on filling up, among those that fit the budget and divide evenly among
    the devices.

    Args:
        cfg: the model.
        components: what to sweep; the order within a kind is kept.
        packing: of the prompts.
        budget: bytes for a chunk's activations on a device; None to choose from the device.
        most_rows: of a chunk on a device, at most.
        placement: the devices; None for one.
    """
    takes = functools.partial(bytes_of_rows, cfg, packing)
    together = rows_together(bytes_per_row(cfg, packing), packing.n_tokens)
    if together is not None:
        most_rows = min(MOST_GROUPS * together, most_rows or MOST_GROUPS * together)
    budget = budget or device_budget() or takes(MOST_GROUPS * (together or 1))
    placement = Placement.single() if placement is None else placement
    n_devices = placement.n_devices
    rows: dict[str, int] = {}
    components = list(components)
    for kind, members in _grouped(components, lambda c: c.kind):
        counts = [len(some) for _, some in _grouped(members, lambda c: c.layer)]
        largest = math.ceil(max(counts) / n_devices)
        shares = [p for p in range(1, min(largest, most_rows or largest) + 1) if takes(p) <= budget] or [1]
        # A chunk costs its rows, filled or not, and about two rows' worth of what is not shared between chunks.
        cost = {
            p: sum(math.ceil(n / (p * n_devices)) for n in counts) * (math.prod(groups(cfg, packing, p)) + 2)
            for p in shares
        }
        rows[kind] = n_devices * min(cost, key=lambda p: (cost[p], p))
    return Plan(rows, cut(components, rows), takes, budget, placement)


def cut(components: Iterable[Component], rows: Mapping[str, int]) -> tuple[Chunk, ...]:
    """Chunks of components, in the order of their kinds and layers, for programs of given rows."""
    return tuple(
        Chunk(kind, layer, tuple(some[i : i + rows[kind]]))
        for kind, members in _grouped(components, lambda c: c.kind)
        for layer, some in _grouped(members, lambda c: c.layer)
        for i in range(0, len(some), rows[kind])
    )


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> Iterator[tuple[K, list[T]]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    yield from groups.items()


class Changes(NamedTuple):
    """What a chunk's patches do.

    Attributes:
        chunk: which components.
        delta: [n, B], change of the metric.
        flow: [n, U], by way of which target, mean over prompts (see `replay.Replayed`); None if it is not followed.
    """

    chunk: Chunk
    delta: Float[np.ndarray, "n B"]
    flow: Float[np.ndarray, "n U"] | None


def rounding_step(cfg: ModelConfig, params: Params) -> float:
    """The relative step in which activations meet the weights: of their dtype, or of so many numbers of it."""
    dtype = params["embed"]["W_E"].dtype
    return float(jnp.finfo(dtype).eps) ** (cfg.activation_splits if dtype == jnp.bfloat16 else 1)


def beside_the_host(host: Params, metric: Metric) -> bool:
    """Whether patches are compared with the host in their own program, not with its own run.

    Rounding depends on a batch's shape, in bfloat16 and on an accelerator far more than in float32 on a CPU. Counts are
    compared with the host's own.
    """
    is_rounded = host["embed"]["W_E"].dtype == jnp.bfloat16 or jax.default_backend() != "cpu"
    return is_rounded and not isinstance(metric.readout, TokensUnchanged)


def exact_changes(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    runs: tuple[Run, Run | None],
    metric: Metric,
    packing: Packing,
    plan: Plan,
    *,
    weights: Side = "donor",
    inputs: Side = "host",
    jitter_seed: int | None = None,
) -> Iterator[Changes]:
    """The change of the metric by each component of a plan, chunk by chunk.

    Where the device runs out of memory, the sweep goes on with half as many components at once. No buffer is donated: a
    chunk returns a few numbers a patch, and everything it takes is taken again by the next.

    Args:
        cfg: the model.
        host: parameters that receive the patches.
        donor: parameters that the components come from.
        runs: the host's run on the metric's tokens (`run_packed`), and the donor's where its input is asked for.
        metric: what is measured.
        packing: of its prompts.
        plan: from `make_plan`.
        weights: whose weights a component takes.
        inputs: whose input it sees.
        jitter_seed: for a sham, the seed of the rounding steps by which the residual stream is moved; None for patches.
    """
    with_reference = beside_the_host(host, metric)
    if not plan.chunks:
        return
    placement = plan.placement
    shared = placement.whole((host, donor, runs, metric, packing))
    rows = plan.rows
    step = 0.0 if jitter_seed is None else rounding_step(cfg, host)

    def dispatch(chunk: Chunk) -> list[Replayed]:
        return [part(chunk, first) for first in range(0, len(chunk.components), rows[chunk.kind])]

    def part(chunk: Chunk, first: int) -> Replayed:
        size = rows[chunk.kind]
        index = [c.index for c in chunk.components[first : first + size]]
        index += index[-1:] * (size - len(index))
        # Seeded by what the chunk is, so that a sweep that was interrupted draws the same.
        seed = (jitter_seed or 0, list(KINDS).index(chunk.kind), chunk.layer + 1, chunk.components[first].index)
        seeds = np.random.SeedSequence(seed).generate_state(size)
        split = [placement.split(a) for a in (np.asarray(index, np.int32), seeds)]
        where, moved = placement.whole((jnp.asarray(max(chunk.layer, 0)), jnp.asarray(step, jnp.float32)))
        options = {"weights": weights, "inputs": inputs, "with_reference": with_reference}
        if placement.n_devices == 1:
            return replay(cfg, chunk.kind, *shared, where, moved, *split, **options)
        return divided_replay(placement, cfg, chunk.kind, **options)(*shared, where, moved, *split)

    def collect(chunk: Chunk, made: list[Replayed]) -> Changes:
        changes = [np.asarray(change, np.float64) for change, _ in made]
        flow = [np.asarray(flow, np.float64) for _, flow in made if flow is not None]
        n = len(chunk.components)
        return Changes(chunk, np.concatenate(changes)[:n], np.concatenate(flow)[:n] if flow else None)

    def halve(kind: str, error: Exception) -> None:
        share = rows[kind] // placement.n_devices
        if share == 1:
            raise WpjaxError(
                f"out of memory with one {kind} patch on {len(metric)} prompts at once; use fewer or shorter prompts, "
                "or bfloat16x2"
            ) from error
        rows[kind] = (share + 1) // 2 * placement.n_devices
        warnings.warn(f"out of memory: {kind} patches go on {rows[kind]} at a time", stacklevel=3)

    waiting, flying = deque(plan.chunks), deque[tuple[Chunk, list[Replayed]]]()
    most, alone = MAX_IN_FLIGHT, False
    while waiting or flying:
        more = bool(waiting) and len(flying) < (1 if alone else most)
        try:
            if more:
                flying.append((waiting[0], dispatch(waiting[0])))
                waiting.popleft()
                continue
            changes = collect(*flying[0])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            alone = len(flying) + more > 1
            if not alone:
                halve((flying[0][0] if flying else waiting[0]).kind, error)
            waiting.extendleft(chunk for chunk, _ in reversed(flying))
            flying.clear()
            continue
        if alone:  # it fits, but not beside others
            most, alone = max(1, most // 2), False
            warnings.warn(f"out of memory: chunks go on {most} at a time", stacklevel=2)
        flying.popleft()
        yield changes


@functools.cache
def divided_replay(placement: Placement, cfg: ModelConfig, kind: str, **options: Any) -> Callable[..., Replayed]:
    """`replay` with the patches divided among devices, a program of what it takes after `cfg` and `kind`.

    Args:
        placement: the devices.
        cfg: the model.
        kind: of the components.
        options: of `replay`: `weights`, `inputs` and `with_reference`.

    Returns:
        a compiled function of host, donor, runs, metric, packing, layer and step, of which each device has a copy, and
        of the components' indices and seeds, which are divided: their number must be a multiple of the devices.
    """
    return jax.jit(placement.divide(functools.partial(replay, cfg, kind, **options), 7, 2))


def sham_plan(plan: Plan, layers_per_kind: int = 4) -> Plan:
    """A few chunks of each kind, spread over the layers, to run with the host as its own donor."""
    chosen: list[Chunk] = []
    for _, chunks in _grouped(plan.chunks, lambda chunk: chunk.kind):
        firsts = list({chunk.layer: chunk for chunk in reversed(chunks)}.values())[::-1]
        at = np.unique(np.linspace(0, len(firsts) - 1, layers_per_kind).round().astype(int))
        chosen += [firsts[i] for i in at]
    return plan.with_chunks(chosen)
