"""Exact sweeps: every component of a list is replaced for real.

`engines.plan` cuts components into chunks; `exact_changes` runs them, and goes on with less at once where memory runs
out.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from wpjax.components import KINDS
from wpjax.engines.contributions import Run, Side
from wpjax.engines.packing import Packing
from wpjax.engines.plan import Chunk, Plan
from wpjax.engines.replay import Replayed, replay
from wpjax.errors import WpjaxError
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import TokensUnchanged
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.runtime.placement import fetch

MAX_IN_FLIGHT = 4
"""Chunks in flight at most: sent to the device, with results that are not fetched yet."""


class Changes(NamedTuple):
    """What the patches of a chunk do.

    Attributes:
        chunk: the n components.
        delta: [n, B], change of the metric of each prompt.
        flow: [n, U], the part of it that arrives by way of each target, mean over prompts (see `replay.Replayed`).
            None: the flow is not followed.
    """

    chunk: Chunk
    delta: Float[np.ndarray, "n B"]
    flow: Float[np.ndarray, "n U"] | None


def rounding_step(cfg: ModelConfig, params: Params) -> float:
    """The relative rounding step of activations where they meet the weights.

    It is the machine epsilon of the weights' dtype; for bfloat16x2, where two numbers make up an activation, its
    square.
    """
    dtype = params["embed"]["W_E"].dtype
    return float(jnp.finfo(dtype).eps) ** (cfg.activation_splits if dtype == jnp.bfloat16 else 1)


def beside_the_host(host: Params, metric: Metric) -> bool:
    """Whether each program of patches must run the host as one more row, to take changes from.

    Rounding depends on the shape of a batch. In float32 on a CPU that is too little to matter, so the host's own run
    serves all programs. In bfloat16 or on an accelerator it matters. Counts of unchanged words
    (`TokensUnchanged`) are compared with the host's own run everywhere.
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
    """How much each component of a plan changes the metric, chunk by chunk, in the plan's order.

    If the device runs out of memory, a warning says so and the sweep goes on with half as many components at once.

    Args:
        cfg: the model.
        host: parameters that receive the patches.
        donor: parameters that the components come from.
        runs: the packed runs (`run_packed`) of the host and, if `inputs` is "donor", of the donor.
        metric: what is measured.
        packing: the packing of the metric's prompts.
        plan: chunks, from `make_plan`.
        weights: whose weights a component takes.
        inputs: whose input it sees.
        jitter_seed: seed of a sham, which moves the residual stream by one rounding step up or down at random; None
            for patches.

    Raises:
        WpjaxError: a single patch does not fit into memory.

    >>> import jax
    >>> from wpjax.behaviours import Tokens
    >>> from wpjax.components import Component
    >>> from wpjax.engines.packing import pack
    >>> from wpjax.engines.plan import make_plan
    >>> from wpjax.engines.reference import reference_changes
    >>> from wpjax.engines.replay import run_packed
    >>> from wpjax.metrics.readouts import Projection
    >>> from wpjax.models.decoder import init_params
    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 2 layers, D = 16, 4 heads, 2 KV groups
    >>> host = init_params(cfg, jax.random.key(0))
    >>> donor = jax.tree.map(lambda w: 1.5 * w, host)
    >>> tokens, last = Tokens(jnp.arange(8).reshape(2, 4), jnp.array([4, 4])), jnp.full((2, 1), 3)
    >>> metric = Metric(tokens, last, jnp.ones((2, 1)), Projection(jnp.ones(16) / 4), 1, "anchor")  # reads layer 1
    >>> heads, packing = [Component("head", 0, i) for i in range(4)], pack(metric)
    >>> runs, plan = (run_packed(cfg, host, metric, packing), None), make_plan(cfg, heads, packing)
    >>> fast = np.concatenate([part.delta for part in exact_changes(cfg, host, donor, runs, metric, packing, plan)])
    >>> fast.shape, bool(np.allclose(fast, reference_changes(cfg, host, donor, heads, metric), atol=1e-5))
    ((4, 2), True)
    """
    with_reference = beside_the_host(host, metric)
    if not plan.chunks:
        return
    placement = plan.placement
    shared = placement.replicate((host, donor, runs, metric, packing))
    rows = plan.rows
    step = 0.0 if jitter_seed is None else rounding_step(cfg, host)

    def dispatch(chunk: Chunk) -> list[Replayed]:
        """Start a chunk, in one part; in several once `rows` was lowered."""
        return [part(chunk, first) for first in range(0, len(chunk.components), rows[chunk.kind])]

    # No buffer is donated to these programs: a part returns a few numbers a patch, and the next part needs every
    # argument again.
    def part(chunk: Chunk, first: int) -> Replayed:
        size = rows[chunk.kind]
        index = [c.index for c in chunk.components[first : first + size]]
        index += index[-1:] * (size - len(index))  # filled up; `collect` cuts it off
        # Seeds depend on the chunk alone, not on what ran before, so that a sweep that was interrupted draws the same.
        seed = (jitter_seed or 0, list(KINDS).index(chunk.kind), chunk.layer + 1, chunk.components[first].index)
        seeds = np.random.SeedSequence(seed).generate_state(size)
        split = jnp.asarray(np.asarray(index, np.int32)), jnp.asarray(seeds)
        layer_and_step = jnp.asarray(max(chunk.layer, 0)), jnp.asarray(step, jnp.float32)
        options: dict[str, Any] = {"weights": weights, "inputs": inputs, "with_reference": with_reference}
        return placement.call(replay, (cfg, chunk.kind), (*shared, *layer_and_step), split, **options)

    def collect(chunk: Chunk, parts: list[Replayed]) -> Changes:
        """Fetch the results of a chunk; this waits until they are there."""
        found: list[Replayed] = fetch(parts)
        changes = [change.astype(np.float64) for change, _ in found]
        flow = [flow.astype(np.float64) for _, flow in found if flow is not None]
        n = len(chunk.components)
        return Changes(chunk, np.concatenate(changes)[:n], np.concatenate(flow)[:n] if flow else None)

    def halve(kind: str, error: Exception) -> None:
        """Halve the rows of a kind's program."""
        share = rows[kind] // placement.n_patch
        if share == 1:
            raise WpjaxError(
                f"out of memory with one {kind} patch on {len(metric)} prompts at once; use fewer or shorter prompts, "
                "or bfloat16x2"
            ) from error
        rows[kind] = (share + 1) // 2 * placement.n_patch
        warnings.warn(f"out of memory: {kind} patches go on {rows[kind]} at a time", stacklevel=3)

    # Chunks go from `waiting` to `flying` to the caller, always in order. If memory runs out while several fly, the
    # first of them is tried alone. If it fails alone as well, its rows are halved. If not, fewer fly from then on.
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
            if "RESOURCE_EXHAUSTED" not in str(error) or jax.process_count() > 1:  # the others would not know
                raise
            alone = len(flying) + more > 1
            if not alone:
                halve((flying[0][0] if flying else waiting[0]).kind, error)
            waiting.extendleft(chunk for chunk, _ in reversed(flying))  # all of them run again
            flying.clear()
            continue
        if alone:  # it fits alone, but did not fit beside others
            most, alone = max(1, most // 2), False
            warnings.warn(f"out of memory: chunks go on {most} at a time", stacklevel=2)
        flying.popleft()
        yield changes
