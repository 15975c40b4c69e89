"""Anchors, effects by suffix replay, and counts of programs, that several test files need."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from wpjax.engines.exact import exact_changes
from wpjax.engines.packing import pack
from wpjax.engines.plan import make_plan
from wpjax.engines.replay import run_packed
from wpjax.metrics.anchor import Anchor


def make_anchor(pair, layer) -> Anchor:
    """A random unit direction in the stream after a layer of the pair's models; the same one every time."""
    return make_anchor_of(pair.cfg, layer)


def make_anchor_of(cfg, layer) -> Anchor:
    """As `make_anchor`, for models of which there is only the configuration."""
    v = np.random.default_rng(0).standard_normal(cfg.d_model).astype(np.float32)
    return Anchor(jnp.asarray(v / np.linalg.norm(v)), layer)


def exact(pair, batch, anchor, components, budget=None, donor=None, jitter_seed=None, plan=None):
    """Changes [C, B] by suffix replay, in the order of `components`; `anchor` may be any metric."""
    metric = anchor.metric_along(batch) if isinstance(anchor, Anchor) else anchor
    packing = pack(metric)
    plan = make_plan(pair.cfg, components, packing, budget) if plan is None else plan
    runs = run_packed(pair.cfg, pair.base, metric, packing), None
    donor = pair.expert if donor is None else donor
    found = {}
    args = (pair.cfg, pair.base, donor, runs, metric, packing, plan)
    for chunk, delta, _ in exact_changes(*args, jitter_seed=jitter_seed):
        found |= dict(zip(chunk.components, delta, strict=True))
    return np.stack([found[c] for c in components])


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
    """Names of the functions that are compiled meanwhile, one for each program; one kept on disk counts too."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **about: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about["fun_name"]).removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
