"""Anchors, effects by replay, sweeps by hand, counts of programs, faults and the command line, for several files."""

import contextlib
import dataclasses
import os
import resource
import signal
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from wpjax import cli
from wpjax.engines.exact import exact_changes
from wpjax.engines.packing import pack
from wpjax.engines.plan import make_plan
from wpjax.engines.replay import run_packed
from wpjax.metrics.anchor import Anchor
from wpjax.results.curves import Curves
from wpjax.results.interference import Interference, Level
from wpjax.results.sweep_result import SweepResult
from wpjax.stats import Interval


def run_cli(*arguments) -> str | int | None:
    """Exit code of the command line, run in this process."""
    before = sys.argv
    sys.argv = ["wpjax", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as left:
            cli.main()
    finally:
        sys.argv = before
    return left.value.code


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


SWEPT = {
    "behaviour": "tiny:title", "base": "tiny:base", "expert": "tiny:expert", "metric": "anchor", "metric_layer": 3,
    "given_layer": -1, "n_layers": 4, "n_prompts": 8, "n_queries": 8, "split": "sweep", "noise_floor": 1e-6,
    "gap_mean": 2.0, "gap_low": 1.0, "gap_high": 3.0, "method": "exact", "anchor_acceptance": "accepted",
    "base_fingerprint": "b", "expert_fingerprint": "e", "date": "today", "what": "sweep",
}  # fmt: skip
"""Attributes of a sweep that nobody made."""


def sweep_by_hand(effects, kinds=None, layers=None, coverage=None, names=None, **attrs) -> SweepResult:
    """The result of a sweep in which every component was replaced and had these effects; no model is behind it."""
    effects = np.asarray(effects, float)
    n = len(effects)
    kinds = np.array(["neuron"] * n if kinds is None else kinds, object)
    layers = np.arange(n) % 4 if layers is None else np.asarray(layers)
    if names is None:
        names = [f"L{layer}.{kind}.{i}" for i, (kind, layer) in enumerate(zip(kinds, layers, strict=True))]
    swept = list(dict.fromkeys(kinds.tolist()))
    joint = float(effects.sum()) if coverage is None else coverage
    columns = {
        "effect": effects,
        "ci_low": effects - 0.01,
        "ci_high": effects + 0.01,
        "delta_norm": np.ones(n),
        "q_value": np.where(effects > 0, 0, 1.0),
        "below_noise_floor": np.abs(effects) < 1e-6,
        "exact": np.isfinite(effects),
    }
    coords = {
        "name": ("component", np.array(names, object)),
        "kind": ("component", kinds),
        "layer": ("component", layers),
        "swept_kind": ("swept_kind", np.array(swept, object)),
        "prompt": ("prompt", np.array(["one", "two"], object)),
    }
    variables = {name: ("component", values) for name, values in columns.items()}
    variables["coverage_joint"] = ("swept_kind", [joint] * len(swept))
    return SweepResult(xr.Dataset(variables, coords, {**SWEPT, "coverage": joint, **attrs}))


def curves_by_hand(rankings=("effect", "random 1"), **attrs) -> Curves:
    """Curves of two rankings, with two sets each, on four prompts; nobody answered them."""
    dims, rng = ("direction", "ranking", "point", "prompt"), np.random.default_rng(0)
    ends = (("end", "prompt"), np.array([[0.0] * 4, [1.0] * 4]))
    return Curves(
        xr.Dataset(
            {
                "n_components": (("ranking", "point"), [[1, 2], [1, 2]]),
                "n_parameters": (("ranking", "point"), [[10, 1000], [10, 1000]]),
                "query": ("prompt", [0, 1, 2, 3]),
                **{name: (dims, rng.random((2, 2, 2, 4)) < 0.5) for name in ("strict", "loose")},
                "score_kl": (dims, rng.random((2, 2, 2, 4))),
                **{f"end_{name}": ends for name in ("strict", "loose", "kl")},
            },
            {
                "direction": ["restore", "knockout"],
                "ranking": ("ranking", np.array(rankings, object)),
                "end": ["base", "expert"],
            },
            {"what": "curves", "schema": 1, "seed": 0, "behaviour": "b", "base": "x", "expert": "y", **attrs},
        )
    )


def map_by_hand(*names) -> Interference:
    """An interference map of some behaviours: numbers that tell cells apart."""
    n = len(names)
    back = tuple(tuple(Interval(0.1 * (n * a + b), 0.05, 0.95) for b in range(n)) for a in range(n))
    level = Level((7,) * n, (0.0123,) * n, back, np.eye(n) / 2, np.eye(n) / 4)
    modules = dataclasses.replace(level, n_parts=(1,) * n)
    passes = {name: {end: Interval(0.5, 0.4, 0.6) for end in ("base", "expert")} for name in names}
    return Interference(names, 0.02, {"units": level, "modules": modules}, passes, 32)


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


FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}


def in_child(action):
    """Run a function in a child process; the child's exit code, or minus the number of the signal that ended it."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(n, action):
    """Run a function in a child that is killed before its n-th operation on a file; whether it came so far."""

    def run():
        left = [n]

        def hook(event, arguments):
            if event in FILE_EVENTS:
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

        sys.addaudithook(hook)
        action()

    code = in_child(run)
    assert code in (0, -signal.SIGKILL)
    return code != 0


@contextlib.contextmanager
def files_of_at_most(n_bytes):
    """As on a full disk: every write beyond so many bytes of a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
