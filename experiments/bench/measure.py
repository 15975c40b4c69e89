"""What benchmarks of the engine share: timing, the ceiling, the count of operations
(docs/method.md, "Counting operations"), one exact sweep.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from wpjax.components import Component
from wpjax.engines.exact import beside_the_host, exact_changes
from wpjax.engines.memory import bytes_of_rows
from wpjax.engines.operations import of_patches
from wpjax.engines.packing import Packing, pack
from wpjax.engines.plan import Plan, make_plan
from wpjax.engines.replay import replay, run_packed
from wpjax.metrics.metric import Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.runtime.placement import Placement


def seconds(run: Callable[[], Any]) -> float:
    """How long something takes, result included."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def medians(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of several things that run alternately, after one run each that does not count."""
    for run in runs.values():
        run()
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            took[name].append(seconds(run))
    return {name: statistics.median(times) for name, times in took.items()}


def ceiling(dtype: Any, repeats: int = 5) -> float:
    """Operations a second of the best of some large products."""
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    best = 0.0
    for n in (1024, 2048, 4096, *(() if jax.default_backend() == "cpu" else (8192, 16384))):
        a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
        product(a, a).block_until_ready()
        best = max(best, 2 * n**3 / min(seconds(functools.partial(product, a, a)) for _ in range(repeats)))
    return best


def operations(cfg: ModelConfig, packing: Packing, last: int, components: Iterable[Component]) -> float:
    """Floating-point operations of the weights' products that the exact effects of some heads or neurons need."""
    return of_patches(cfg, packing.n_tokens - packing.n_empty, last, components)


class Sweep:
    """The exact changes of some components of one pair, metric and packing."""

    def __init__(self, cfg: ModelConfig, base: Params, expert: Params, metric: Metric):
        self.cfg, self.base, self.expert, self.metric = cfg, base, expert, metric
        self.packing = pack(metric)
        self.run = run_packed(cfg, base, metric, self.packing)

    def __call__(self, components: list[Component]) -> np.ndarray:
        """Changes [C, B]."""
        args = (self.cfg, self.base, self.expert, (self.run, None), self.metric, self.packing, self.plan(components))
        return np.concatenate([part.delta for part in exact_changes(*args)])

    def plan(self, components: list[Component]) -> Plan:
        """How the sweep of some components is cut up, over all devices of this process."""
        return make_plan(self.cfg, components, self.packing, placement=Placement.on())

    def program(self, components: list[Component]) -> jax.stages.Compiled:
        """What the sweep of some components of one kind runs, chunk by chunk."""
        (kind,) = {c.kind for c in components}
        rows = self.plan(components).rows[kind]
        models = self.cfg, kind, self.base, self.expert, (self.run, None), self.metric, self.packing
        patches = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.uint32)
        with_reference, step = beside_the_host(self.base, self.metric), jnp.asarray(0.0, jnp.float32)
        return replay.lower(*models, jnp.asarray(0), step, *patches, with_reference=with_reference).compile()

    def memory(self, components: list[Component]) -> dict[str, int]:
        """Bytes that this program needs, what the planner takes its temporary arrays for, and those of the models.

        Arguments are what it uses of them: the layers, of both models.
        """
        needs, (rows,) = self.program(components).memory_analysis(), self.plan(components).rows.values()
        assert needs is not None
        return {
            "rows": rows,
            "arguments": needs.argument_size_in_bytes,
            "temporaries": needs.temp_size_in_bytes,
            "output": needs.output_size_in_bytes,
            "planned": bytes_of_rows(self.cfg, self.packing, rows),
            "weights": sum(leaf.nbytes for model in (self.base, self.expert) for leaf in jax.tree.leaves(model)),
        }


def peak_bytes() -> int | None:
    """The most that was in use of the first device since this process began; None where JAX does not say: on CPUs."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """Seconds of everything that is compiled meanwhile, copies and the like included."""
    found: list[float] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
