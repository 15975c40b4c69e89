"""Compile the programs of a sweep for TPUs ahead of time: what they take on a device, and what they exchange.

No TPU is needed, but its compiler: the package libtpu, in the version that `pip install 'jax[tpu]'` takes for this JAX.
It is large, so install it into an environment of its own:

    python -m experiments.tpu.compile --model llama-3.1-8b --slice v5e-8 --out experiments/tpu/programs.json

compiles the four programs for one slice of a topology, and adds them to the file. `--markdown FILE` prints its table.

    exact patches   one chunk of neurons, replaced one by one
    screen          first-order effects of all heads, KV groups and neurons
    nested mask     a step of a learned mask
    answers         prompts are read and continued

Weights are bfloat16, activations two bfloat16 numbers each (`--dtype bfloat16x2`). There are 32 prompts of 64 tokens,
which begin with 16 common ones, and 32 new tokens. The metric reads two thirds of the way up, that of the mask the
last layer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # the compiler asks a server about the TPU that is not there
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several may compile at a time: none of them uses a TPU

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.records import table, write
from experiments.tpu.collectives import collectives
from wpjax.behaviours import Tokens
from wpjax.components import Component, enumerate_components
from wpjax.engines.contributions import HostWrites, Run
from wpjax.engines.packing import pack, shared_tokens
from wpjax.engines.plan import make_plan
from wpjax.engines.replay import replay
from wpjax.estimators.kind_slopes import linearised_by_kind
from wpjax.metrics.metric import PROMPTS_AT_ONCE, Metric, on_prompts
from wpjax.metrics.readouts import LogProb, Projection
from wpjax.models.config import ModelConfig, Rope
from wpjax.models.decoder import abstract_params
from wpjax.models.generate import continue_some
from wpjax.models.sharding import fewest_parts, spec_of, weight_bytes
from wpjax.models.sites import Site
from wpjax.relax.gates import Gates
from wpjax.relax.learn import RelaxConfig, State, adam, take_steps
from wpjax.relax.objectives import Recover
from wpjax.relax.parametrisations import Nested
from wpjax.runtime.placement import PATCHES, WHOLE, Placement, divided

GIB = 2**30
N_PROMPTS, N_TOKENS, N_SHARED, N_NEW = 32, 64, 16, 32
ROPE = Rope(500_000.0, "llama3", (("factor", 8.0), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0),
                                  ("original_max_position_embeddings", 8192.0)))  # fmt: skip
MODELS = MappingProxyType(
    {
        "llama-3.1-8b": ModelConfig("llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, rope=ROPE),
        "llama-3.1-70b": ModelConfig("llama", 80, 8192, 64, 8, 128, 28672, 128256, 8192, rope=ROPE),
    }
)


class Slice(NamedTuple):
    """Some chips of one generation.

    Attributes:
        topology: what the compiler calls it.
        memory: bytes of a chip, by the vendor's pages.
    """

    topology: str
    memory: int


SLICES: Mapping[str, Slice] = MappingProxyType(
    {
        "v5e-8": Slice("v5e:2x4", 16 * GIB),
        "v5e-64": Slice("v5e:8x8", 16 * GIB),
        "v5p-16": Slice("v5p:2x2x2", 95 * GIB),
        "v6e-8": Slice("v6e:2x4", 32 * GIB),
        "v6e-64": Slice("v6e:8x8", 32 * GIB),
    }
)
"""Slices by the names of the cloud's consoles; of v5p these count cores, two a chip."""

PROGRAMS = ("exact patches", "screen", "nested mask", "answers")


class Shapes:
    """Arguments of the programs, as shapes with places on a mesh; nothing is allocated."""

    def __init__(self, cfg: ModelConfig, placement: Placement):
        self.cfg, self.placement = cfg, placement

    def on(self, tree: Any, spec: PartitionSpec = WHOLE) -> Any:
        """Arrays, or shapes of arrays, as shapes that stand on the mesh."""
        sharding = NamedSharding(self.placement.mesh, spec)

        def one(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=sharding)

        return jax.tree.map(one, tree)

    def divided(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        """An array whose leading axis is divided."""
        return self.on(jax.ShapeDtypeStruct(shape, dtype), PartitionSpec(PATCHES))

    def params(self) -> Any:
        """A model's weights in bfloat16, cut over the mesh."""

        def placed(tree: Any, prefix: str = "") -> Any:
            if isinstance(tree, dict):
                return {name: placed(branch, f"{prefix}{name}/") for name, branch in tree.items()}
            spec = spec_of(prefix[:-1], tree.shape, self.placement.n_model)
            return self.on(jax.ShapeDtypeStruct(tree.shape, jnp.bfloat16), spec)

        return placed(abstract_params(self.cfg))

    def run(self, metric: Metric, n_tokens: int) -> Run:
        """What a sweep keeps of a model's own run."""
        cfg, (n_prompts, n_read), n_layers = self.cfg, metric.at.shape, metric.layer + 1

        def array(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        stream = array(n_layers, 1, n_tokens, cfg.d_model)
        written = HostWrites(array(n_layers, n_prompts, n_read, cfg.n_heads, cfg.d_head), array(n_layers, n_prompts))
        slope = array(n_prompts, n_read, cfg.d_model)
        return Run(stream, array(n_prompts), slope, written, {Site.RESID_POST: stream})


def prompts(vocabulary: int) -> Tokens:
    """Random prompts of one length, which begin alike."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (N_PROMPTS, N_TOKENS)).astype(np.int32)
    ids[:, :N_SHARED] = ids[0, :N_SHARED]
    return Tokens(ids, np.full(N_PROMPTS, N_TOKENS, np.int32))


def anchor_metric(cfg: ModelConfig) -> Metric:
    """A direction at the last prompt token, two thirds of the way up."""
    at, weight = jnp.full((N_PROMPTS, 1), N_TOKENS - 1), jnp.ones((N_PROMPTS, 1))
    direction = Projection(jnp.zeros(cfg.d_model))
    return Metric(prompts(cfg.d_vocab), at, weight, direction, 2 * cfg.n_layers // 3, "anchor")


def exact_patches(shapes: Shapes, memory: int) -> tuple[Any, tuple, dict[str, float]]:
    """A chunk of single neurons; its size is what the planner takes for the memory that the weights leave."""
    cfg, placement, metric = shapes.cfg, shapes.placement, anchor_metric(shapes.cfg)
    packing = pack(metric)
    left = memory - 2 * weight_bytes(cfg, jnp.bfloat16, placement.n_model)
    components = [Component("neuron", 0, i) for i in range(cfg.d_mlp)]
    plan = make_plan(cfg, components, packing, left // 3, placement=placement)
    rows = plan.rows["neuron"]
    options = {"weights": "donor", "inputs": "host", "with_reference": True}
    program = divided(placement, replay, (cfg, "neuron"), 7, 2, **options)
    run = shapes.on(shapes.run(metric, packing.n_tokens))
    scalars = shapes.on((jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)))
    args = (shapes.params(), shapes.params(), (run, None), shapes.on(metric), shapes.on(packing), *scalars)
    split = shapes.divided(rows), shapes.divided(rows, dtype=jnp.uint32)
    share = rows // placement.n_patch
    return program, (*args, *split), {"rows": share, "planned_temporary": plan.bytes_for(share)}


def screen(shapes: Shapes, memory: int) -> tuple[Any, tuple, dict[str, float]]:
    """First-order effects of every component of the finest kinds, on as many prompts as run at once."""
    metric = anchor_metric(shapes.cfg)
    options = {"kinds": ("head", "kv_group", "neuron"), "weights": "donor", "inputs": "host"}
    options["n_shared"] = shared_tokens(metric)  # type: ignore[assignment]
    static = linearised_by_kind, shapes.cfg
    program = divided(shapes.placement, on_prompts, static, 3, 1, 2, **options)
    rows = shapes.divided(PROMPTS_AT_ONCE * shapes.placement.n_patch)
    return program, (shapes.on(metric), shapes.params(), shapes.params(), rows), {"rows": PROMPTS_AT_ONCE}


def nested_mask(shapes: Shapes, memory: int) -> tuple[Any, tuple, dict[str, float]]:
    """One step of a learned mask over heads, KV groups and MLPs, on eight prompts with answers."""
    cfg, tokens = shapes.cfg, prompts(shapes.cfg.d_vocab)
    at = jnp.tile(jnp.arange(N_TOKENS - N_NEW, N_TOKENS), (N_PROMPTS, 1))
    readout = LogProb(jnp.zeros(at.shape, jnp.int32))
    metric = Metric(tokens, at, jnp.ones(at.shape) / N_NEW, readout, cfg.n_layers - 1, "response")
    reached = jnp.zeros(N_PROMPTS)
    objective = Recover(cfg, shapes.params(), shapes.params(), shapes.on(metric), shapes.on(reached), 8)
    gates = Gates.of(cfg, enumerate_components(cfg, ("head", "kv_group", "mlp")))
    optimiser, numbers = adam(RelaxConfig()), jnp.zeros(len(gates))
    first = State(numbers, optimiser.init(numbers), jnp.zeros((), jnp.int32))
    states = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), first)
    keys = jax.eval_shape(lambda: jnp.stack([jax.random.key(0)]))
    args = shapes.on(states), objective, shapes.on(gates), keys

    class Program:
        """`take_steps` with its static arguments."""

        def lower(self, *args: Any) -> Any:
            options = {"parametrisation": Nested(), "optimiser": optimiser, "n_steps": 1}
            return take_steps.lower(*args, **options)  # type: ignore[attr-defined]

    return Program(), args, {"rows": 8}


def answers(shapes: Shapes, memory: int) -> tuple[Any, tuple, dict[str, float]]:
    """Prompts are read and continued, 32 on each row of devices."""
    cfg, n = shapes.cfg, N_PROMPTS * shapes.placement.n_patch
    program = divided(shapes.placement, continue_some, (cfg, N_NEW), 3, 3)
    stop = shapes.on(jax.ShapeDtypeStruct((2,), jnp.int32))
    split = shapes.divided(n, N_TOKENS), shapes.divided(n), shapes.divided(n)
    return program, (shapes.params(), stop, (), *split), {"rows": N_PROMPTS}


MAKERS: Mapping[str, Callable[[Shapes, int], tuple[Any, tuple, dict[str, float]]]] = MappingProxyType(
    dict(zip(PROGRAMS, (exact_patches, screen, nested_mask, answers), strict=True))
)


def measure(model: str, name: str, programs: tuple[str, ...] = PROGRAMS) -> dict[str, Any]:
    """Compile some programs of a model for a slice.

    Args:
        model: a key of `MODELS`.
        name: a key of `SLICES`.
        programs: names of the programs.
    """
    from jax.experimental import topologies

    cfg = dataclasses.replace(MODELS[model], activation_splits=2)
    devices: Any = topologies.get_topology_desc(SLICES[name].topology, platform="tpu").devices
    memory = SLICES[name].memory
    n_model = fewest_parts(cfg, jnp.bfloat16, len(devices), memory)
    found: dict[str, Any] = {
        "model": model, "slice": name, "chip": devices[0].device_kind, "n_chips": len(devices), "memory": memory,
        "jax": jax.__version__, "programs": {},
    }  # fmt: skip
    if n_model is None:
        return {**found, "mesh": "none", "why": "no mesh of these chips holds both models"}
    placement = Placement.on(devices, n_model)
    found |= {"mesh": str(placement), "weights": 2 * weight_bytes(cfg, jnp.bfloat16, n_model)}
    for program in programs:
        found["programs"][program] = compiled(Shapes(cfg, placement), program, memory)
    return found


def compiled(shapes: Shapes, name: str, memory: int) -> dict[str, Any]:
    """What one program takes and exchanges; or why it cannot be compiled."""
    with mock.patch.object(jax, "default_backend", return_value="tpu"):  # programs are made for where they will run
        made, args, about = MAKERS[name](shapes, memory)
        began = time.perf_counter()
        try:
            lowered = made.lower(*args)
            traced = time.perf_counter()
            program = lowered.compile()
        except Exception as error:  # of the compiler: what it says is a result
            return {**about, "error": " ".join(str(error).split())[:300]}
    needs = program.memory_analysis()
    exchanged = collectives(program.as_text(), shapes.placement.mesh.shape)
    return {
        **about,
        "trace_seconds": round(traced - began, 1),
        "compile_seconds": round(time.perf_counter() - traced, 1),
        "arguments": needs.argument_size_in_bytes,
        "temporary": needs.temp_size_in_bytes,
        "output": needs.output_size_in_bytes,
        "collectives": [[*key, n] for key, n in sorted(exchanged.items())],
    }


def markdown(report: dict[str, Any]) -> str:
    """The table of the programs; it says so where one could not be compiled."""
    rows = []
    for run in report["runs"]:
        head, memory = [f"{run['model']}, {run['slice']}, {run['mesh']}"], gib(run["memory"])
        if run["mesh"] == "none":
            rows.append([*head, run["why"], "", "", "", memory, "", ""])
        for name, found in run["programs"].items():
            what = f"{name}, {found['rows']} at once"
            if "error" in found:
                rows.append([*head, what, "", "", "", memory, f"not compiled: {found['error']}", ""])
                continue
            planned = gib(found["planned_temporary"]) if "planned_temporary" in found else ""
            exchanged = ", ".join(f"{n} {op} along {axes or 'none'}" for op, axes, n in found["collectives"]) or "none"
            sizes = [gib(found["arguments"]), gib(found["temporary"]), planned, memory]
            rows.append([*head, what, *sizes, exchanged, f"{found['compile_seconds']:.0f} s"])
    columns = ["model, slice, mesh", "program", "arguments", "temporary", "planned", "of", "collectives", "compile"]
    return table(columns, rows)


def gib(n: float) -> str:
    """Bytes in GiB, to three digits."""
    return f"{n / GIB:.2f}" if n < 10 * GIB else f"{n / GIB:.1f}"


def add(report: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The report with a run; of one that is there already, its programs are added or replaced."""
    runs = {(old["model"], old["slice"]): old for old in report.get("runs", [])}
    old = runs.get((run["model"], run["slice"]), {"programs": {}})
    programs = {**old["programs"], **run["programs"]}
    run = {**run, "programs": {name: programs[name] for name in PROGRAMS if name in programs}}
    runs[run["model"], run["slice"]] = run
    order = [(model, name) for model in MODELS for name in SLICES]
    return {"runs": [runs[key] for key in order if key in runs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="llama-3.1-8b")
    parser.add_argument("--slice", choices=list(SLICES), default="v5e-8")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--out", type=Path, default=Path("experiments/tpu/programs.json"))
    parser.add_argument("--markdown", type=Path, help="print the table of this file, and compile nothing")
    options = parser.parse_args()
    if options.markdown is not None:
        print(markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))
        return
    for program in options.programs:  # each is kept as soon as it is there
        run = measure(options.model, options.slice, (program,))
        before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
        write(options.out, add(before, run))
        print(markdown(add({}, run)))


if __name__ == "__main__":
    main()
