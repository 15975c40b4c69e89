"""What grows with what: time, memory and compilation of exact sweeps of small models with random weights.

Memory is what the compiled program says that it needs, which is the same every time. `experiments.bench.engine` runs
this; on its own it times one sweep on the devices that it finds.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.measure import Sweep, compilations, medians, operations
from wpjax import enumerate_components
from wpjax.behaviours import Tokens
from wpjax.components import Component
from wpjax.engines.replay import replay
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import Projection
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import init_params

DEPTHS = (4, 8, 16)
WIDTHS = (128, 256, 512)
PATCHES = (512, 1024, 2048)
DEVICES = (1, 2)
KINDS = ("head", "kv_group", "neuron")


def random_sweep(
    cfg: ModelConfig,
    n_prompts: int = 8,
    n_tokens: int = 24,
    last: int | None = None,
    dtype: Any = jnp.float32,
    n_shared: int = 0,
) -> Sweep:
    """A pair of random weights, and a direction after layer `last` (or the last one) on random prompts.

    All prompts begin with the same `n_shared` tokens.
    """
    make = jax.jit(lambda key: init_params(cfg, key, dtype))  # compiled once for both
    base, expert = (make(jax.random.key(seed)) for seed in (0, 1))
    ids = np.random.default_rng(0).integers(0, cfg.d_vocab, (n_prompts, n_tokens)).astype(np.int32)
    ids[:, :n_shared] = ids[0, :n_shared]
    at, weight = jnp.full((n_prompts, 1), n_tokens - 1), jnp.ones((n_prompts, 1))
    along, tokens = Projection(jnp.ones(cfg.d_model) / cfg.d_model**0.5), Tokens(ids, np.full(n_prompts, n_tokens))
    last = cfg.n_layers - 1 if last is None else last
    return Sweep(cfg, base, expert, Metric(tokens, at, weight, along, last, "anchor"))


def small(n_layers: int = 8, width: int = 128) -> ModelConfig:
    """The shape of the embedded models, at any depth and width."""
    return ModelConfig("llama", n_layers, width, width // 16, width // 32, 16, width * 5 // 2, 1408, 64)


def spread(cfg: ModelConfig, n: int) -> list[Component]:
    """So many neurons, the same number in every layer."""
    return [c for c in enumerate_components(cfg, ["neuron"]) if c.index < n // cfg.n_layers]


def doublings(repeats: int) -> dict[str, Any]:
    """Time and operations of an exact sweep when one thing at a time is doubled, as ratios to those without."""
    cases: dict[str, tuple[int, dict[str, int], int]] = {
        "as it is": (8, {}, 512),
        "patches": (8, {}, 1024),
        "prompts": (8, {"n_prompts": 16}, 512),
        "tokens": (8, {"n_tokens": 48}, 512),
        "layers": (16, {}, 512),
    }
    runs: dict[str, Callable[[], Any]] = {}
    needed = {}
    for name, (depth, sizes, n) in cases.items():
        engine = random_sweep(small(depth), **sizes)
        components = spread(engine.cfg, n)
        runs[name] = functools.partial(engine, components)
        needed[name] = operations(engine.cfg, engine.packing, engine.metric.layer, components)
    took = medians(runs, repeats)

    def ratios(of: dict[str, float]) -> dict[str, float]:
        return {name: value / of["as it is"] for name, value in of.items() if name != "as it is"}

    return {"seconds": took, "operations": needed, "ratio": ratios(took), "operations_ratio": ratios(needed)}


def compilation() -> dict[str, Any]:
    """Programs that an exact sweep of three kinds adds, and the seconds that all its compilation takes, by depth."""
    found = {}
    for depth in DEPTHS:
        engine = random_sweep(small(depth))
        components = [c for c in enumerate_components(engine.cfg, KINDS) if c.index < 8]
        before = replay._cache_size()  # type: ignore[attr-defined]
        with compilations() as compiled:
            engine(components)
        programs = replay._cache_size() - before  # type: ignore[attr-defined]
        found[str(depth)] = {"kinds": len(KINDS), "programs": programs, "seconds": sum(compiled)}
    return found


def memory() -> dict[str, dict[str, Any]]:
    """What the program of an exact sweep needs, by number of patches, depth and width."""

    def needs(n_patches: int, n_layers: int = 8, width: int = 128) -> dict[str, int]:
        engine = random_sweep(small(n_layers, width))
        return engine.memory(spread(engine.cfg, n_patches))

    return {
        "memory": {str(n): needs(n) for n in PATCHES},
        "memory_by_depth": {str(n): needs(64 * n, n_layers=n) for n in DEPTHS},
        "memory_by_width": {str(n): needs(512, width=n) for n in WIDTHS},
    }


def alone(repeats: int) -> float:
    """Median seconds of an exact sweep on all devices of this process."""
    engine = random_sweep(small())
    return medians({"sweep": functools.partial(engine, spread(engine.cfg, max(PATCHES)))}, repeats)["sweep"]


def apart(n_devices: int, repeats: int) -> float:
    """`alone` in a fresh process, a CPU divided into so many devices."""
    command = [sys.executable, "-m", "experiments.bench.scaling", "--repeats", str(repeats)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n_devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return float(subprocess.check_output(command, text=True, env=env).splitlines()[-1])


def by_devices(repeats: int) -> dict[str, float]:
    """Time by number of devices, which take turns."""
    times = [{n: apart(n, repeats) for n in DEVICES} for _ in range(repeats)]
    return {str(n): statistics.median(took[n] for took in times) for n in DEVICES}


def measure(repeats: int) -> dict[str, Any]:
    """All of this."""
    return {"scaling": doublings(repeats), "compilation": compilation(), **memory(), "devices": by_devices(repeats)}


def rows(report: dict[str, Any]) -> list[list[str]]:
    """One line a question."""
    found = [
        [f"compiling an exact sweep of three kinds, {depth} layers", f"{c['seconds']:.1f} s",
         f"{c['programs']} programs of patches"]
        for depth, c in report["compilation"].items()
    ]  # fmt: skip
    scaling = report["scaling"]
    found += [
        [f"exact sweep with twice the {name}", f"{scaling['seconds'][name]:.2f} s",
         f"{ratio:.2f} times, for {scaling['operations_ratio'][name]:.2f} times the operations"]
        for name, ratio in scaling["ratio"].items()
    ]  # fmt: skip
    for key, of in (("memory", "{:,} patches"), ("memory_by_depth", "64 patches a layer, {} layers"),
                    ("memory_by_width", "512 patches, width {}")):  # fmt: skip
        found += [["memory of the program, " + of.format(int(n)), "", _needs(m)] for n, m in report[key].items()]
    found += [[f"exact sweep, the CPU's cores as {n} device{'s' * (n != '1')}", f"{t:.2f} s", ""]
              for n, t in report["devices"].items()]  # fmt: skip
    return found


def _needs(needed: dict[str, int]) -> str:
    size = {name: f"{n / 2**20:,.1f}" for name, n in needed.items()}
    return (
        f"temporaries {size['temporaries']} MiB, planned {size['planned']} for {needed['rows']} at once; arguments "
        f"{size['arguments']}; output {needed['output'] / 2**10:,.0f} KiB; both models {size['weights']} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    print(alone(parser.parse_args().repeats))


if __name__ == "__main__":
    main()
