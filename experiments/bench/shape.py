r"""An exact sweep of neurons at the shape of a model too large to come by here, with random weights made on the device.

    python -m experiments.bench.shape llama-3.1-8b --dtype bfloat16 --out experiments/bench/shape.json

Neurons of some layers are swept; the time of all neurons up to the layer that is read follows from the operations that
they need (METHOD's count) at the rate that was reached.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.bench.engine import ceiling, medians, operations, random_sweep, small
from experiments.records import made, table, write
from wpjax import enumerate_components
from wpjax.models.config import ModelConfig, Rope

SHAPES = {
    "tiny": small(),
    "smollm2-135m": ModelConfig("llama", 30, 576, 9, 3, 64, 1536, 49152, 2048, tied=True),
    "llama-3.1-8b": ModelConfig("llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, rope=Rope(500_000.0)),
}


def measure(cfg: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Time, share of the ceiling, and what all neurons would take."""
    last = 3 * cfg.n_layers // 4
    engine = random_sweep(cfg, args.prompts, args.tokens, last, jnp.dtype(args.dtype))
    layers = np.unique(np.linspace(0, last - 1, args.layers).astype(int)).tolist()
    swept = [c for c in enumerate_components(cfg, ["neuron"], layers) if c.index < args.neurons]
    top = ceiling(jnp.dtype(args.dtype))
    seconds = medians({"sweep": functools.partial(engine, swept)}, args.repeats)["sweep"]
    needed = operations(cfg, engine.packing, last, swept)
    every = enumerate_components(cfg, ["neuron"], range(last + 1))
    whole = seconds * operations(cfg, engine.packing, last, every) / needed
    return {"layers": layers, "read_after": last, "swept": len(swept), "seconds": seconds, "operations": needed,
            "ceiling": top, "share": needed / seconds / top, "every": len(every), "every_seconds": whole}  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """One line."""
    columns = ["shape", "prompts × tokens", "neurons swept", "seconds", "share of the ceiling", "all neurons: minutes"]
    row = [f"{found['shape']}, {found['dtype']}", f"{found['prompts']} × {found['tokens']}", f"{found['swept']:,}",
           f"{found['seconds']:.2f}", f"{found['share']:.2f} of {found['ceiling'] / 1e12:,.2f} · 10¹²",
           f"{found['every_seconds'] / 60:.1f} for {found['every']:,}"]  # fmt: skip
    return table(columns, [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="of each prompt")
    parser.add_argument("--layers", type=int, default=2, help="how many layers are swept, evenly spaced")
    parser.add_argument("--neurons", type=int, default=256, help="of each of them")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {"shape": args.shape, "prompts": args.prompts, "tokens": args.tokens, "dtype": args.dtype}
    found |= measure(SHAPES[args.shape], args) | made()
    print(markdown(found))
    write(args.out, found)


if __name__ == "__main__":
    main()
