r"""An exact sweep of neurons at the shape of a model too large to come by here, with random weights made on the device.

    python -m experiments.bench.shape llama-3.1-8b --dtype bfloat16 --out experiments/bench/shape.llama-3.1-8b.gpu.json

Half of every prompt is the same for all. Neurons of some layers are swept, layer by layer, since a patch costs what
comes after it; the time of all neurons up to the layer that is read follows from the operations that they need
(docs/method.md, "Counting operations") at the rate that was reached.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from experiments.bench.measure import ceiling, medians, operations, peak_bytes
from experiments.bench.scaling import random_sweep, small
from experiments.records import machine, made, table, write
from wpjax import enumerate_components
from wpjax.components import Component
from wpjax.models.config import ModelConfig, Rope

SHAPES = {
    "tiny": small(),
    "smollm2-135m": ModelConfig("llama", 30, 576, 9, 3, 64, 1536, 49152, 2048, tied=True),
    "llama-3.1-8b": ModelConfig("llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, rope=Rope(500_000.0)),
}


def measure(cfg: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Time and share of the ceiling by layer, memory, and what all neurons would take."""
    last = 3 * cfg.n_layers // 4
    engine = random_sweep(cfg, args.prompts, args.tokens, last, jnp.dtype(args.dtype), n_shared=args.tokens // 2)

    def needed(components: list[Component]) -> float:
        return operations(cfg, engine.packing, last, components)

    chosen: dict[int, list[Component]] = {}
    for layer in (i * last // args.layers for i in range(args.layers)):  # each with something left to run after it
        chosen[layer] = enumerate_components(cfg, ["neuron"], [layer])[: args.neurons]
    took = medians({str(layer): functools.partial(engine, some) for layer, some in chosen.items()}, args.repeats)
    peak = peak_bytes()  # before the ceiling takes memory of its own
    top = ceiling(jnp.dtype(args.dtype))
    layers = {}
    for layer, some in chosen.items():
        seconds = took[str(layer)]
        layers[str(layer)] = {"seconds": seconds, "operations": needed(some), "share": needed(some) / seconds / top}
    every = enumerate_components(cfg, ["neuron"], range(last + 1))
    total, counted = sum(took.values()), sum(needed(some) for some in chosen.values())
    memory = engine.memory(chosen[0])
    return {
        "read_after": last,
        "packed": engine.packing.n_tokens,
        "neurons": len(chosen[0]),
        "layers": layers,
        "ceiling": top,
        "share": counted / total / top,
        "memory": memory,
        "peak_bytes": peak or memory["arguments"] + memory["temporaries"] + memory["output"],
        "peak_of": "device" if peak else "program",
        "every": len(every),
        "every_seconds": total * needed(every) / counted,
    }


def markdown(found: dict[str, Any]) -> str:
    """One line a layer that was swept, what all of them would take, and memory."""
    memory = found["memory"]
    rows = [
        [f"{found['neurons']:,} neurons of layer {n}", f"{row['seconds']:.2f} s", f"{row['share']:.2f} of the ceiling"]
        for n, row in found["layers"].items()
    ]
    rate = f"{found['share']:.2f} of the ceiling of {found['ceiling'] / 1e12:,.2f} · 10¹² operations a second"
    whole = f"all {found['every']:,} neurons of layers 0 to {found['read_after']}, at that rate"
    rows += [
        [whole, f"{found['every_seconds'] / 60:,.1f} min", rate],
        [f"memory, {memory['rows']:,} neurons in a program", "",
         f"{found['peak_bytes'] / 2**20:,.0f} MiB, by the {found['peak_of']}; both models are "
         f"{memory['weights'] / 2**20:,.0f}"],
    ]  # fmt: skip
    name = f"{found['shape']}, {found['dtype']}, {found['prompts']} prompts of {found['tokens']} tokens"
    return table([f"{name} ({found['packed']:,} packed)", "time", "that is"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="of each prompt")
    parser.add_argument("--layers", type=int, default=3, help="how many layers are swept, evenly spaced")
    parser.add_argument("--neurons", type=int, default=256, help="of each of them")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {"shape": args.shape, "prompts": args.prompts, "tokens": args.tokens, "dtype": args.dtype}
    found |= measure(SHAPES[args.shape], args) | {"machine": machine(), **made()}
    print(markdown(found))
    write(args.out, found)


if __name__ == "__main__":
    main()
