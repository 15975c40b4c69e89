r"""All benchmarks, one after the other, each in a process of its own, their tables, and what was aimed at.

    python -m experiments.smollm2.fetch --out work/smollm2
    python -m experiments.bench --base work/smollm2/base --expert work/smollm2/english_capital --out experiments/bench

Nothing else should run meanwhile: it takes about an hour on two cores. Each result is written as JSON in the folder,
in place of an earlier one. Where JAX finds a GPU, its results stand beside those of a CPU, as `heads.gpu.json` and so
on: those that depend on the device, and the large shape if it fits.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from experiments.bench import goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="HF folder of the larger pair")
    parser.add_argument("--expert", required=True, help="HF folder")
    parser.add_argument("--behaviour", default="english_capital")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    args = parser.parse_args()
    pair = ["--base", args.base, "--expert", args.expert, "--behaviour", args.behaviour]
    platform, memory = device()
    runs = on_cpu(pair) if platform == "cpu" else on_accelerator(pair, platform, memory)
    failed = []
    for name, (module, *options) in runs.items():
        print(f"\n{name}\n", flush=True)
        command = [sys.executable, "-m", f"experiments.bench.{module}", *options]
        if subprocess.run([*command, "--out", str(args.out / f"{name}.json")]).returncode:
            failed.append(name)
    print(f"\ngoals\n\n{goals.markdown(args.out)}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def device() -> tuple[str, int]:
    """Platform and bytes of JAX's first device; asked in a process of its own, which would keep the memory."""
    ask = "import jax; d = jax.devices()[0]; print(d.platform, (d.memory_stats() or {}).get('bytes_limit', 0))"
    platform, memory = subprocess.check_output([sys.executable, "-c", ask], text=True).split()[-2:]
    return platform, int(memory)


def on_cpu(pair: list[str]) -> dict[str, list[str]]:
    """Name -> module and options."""
    return {
        "startup": ["startup", *pair],
        "heads": ["heads", *pair, "--n-prompts", "4", "--every", "2"],
        "engine.smollm2": ["engine", *pair, "--n-prompts", "8", "--per-layer", "24", "--pair-only"],
        "engine.tiny": ["engine", "--n-prompts", "16", "--per-layer", "100000"],
        "profile.smollm2": ["profile", *pair, "--n-prompts", "8", "--per-layer", "24"],
        "profile.tiny": ["profile", "--n-prompts", "16"],
        "profile.sets": ["profile", "--of", "sets", "--n-prompts", "16"],
        "profile.screens": ["profile", "--of", "screens", *pair, "--n-prompts", "32"],
        "relax.smollm2": ["relax", *pair],
        "relax.tiny": ["relax", "--restarts", "4"],
        "shape.tiny": ["shape", "tiny", "--neurons", "128"],
        "shape.smollm2-135m": ["shape", "smollm2-135m", "--neurons", "48"],
    }


def on_accelerator(pair: list[str], platform: str, memory: int) -> dict[str, list[str]]:
    """Name -> module and options, sized for what such a device can take."""
    engine = ["engine", *pair, "--n-prompts", "16", "--per-layer", "100000", "--pair-only", "--dtype", "bfloat16"]
    runs = {"engine.smollm2": engine, "shape.smollm2-135m": ["shape", "smollm2-135m", "--dtype", "bfloat16"]}
    if memory >= LARGE:
        runs["shape.llama-3.1-8b"] = ["shape", "llama-3.1-8b", "--dtype", "bfloat16"]
    if platform == "gpu":
        runs["heads"] = ["heads", *pair, "--n-prompts", "16"]
    return {f"{name}.{platform}": run for name, run in runs.items()}


LARGE = 48 * 2**30
"""Bytes that two models of 8 billion parameters in bfloat16 and a sweep's activations take."""


if __name__ == "__main__":
    main()
