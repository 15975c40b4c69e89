r"""All benchmarks but that of the large shape, one after the other, each in a process of its own, and their tables.

    python -m experiments.smollm2.fetch --out work/smollm2
    python -m experiments.bench --base work/smollm2/base --expert work/smollm2/english_capital --out experiments/bench

Nothing else should run meanwhile: it takes the better part of an hour on two cores. Each result is written as JSON in
the folder, in place of an earlier one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="HF folder of the larger pair")
    parser.add_argument("--expert", required=True, help="HF folder")
    parser.add_argument("--behaviour", default="english_capital")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    args = parser.parse_args()
    pair = ["--base", args.base, "--expert", args.expert, "--behaviour", args.behaviour]
    runs = {
        "startup": ["startup"],
        "heads": ["heads", *pair, "--n-prompts", "4", "--every", "2"],
        "engine.smollm2": ["engine", *pair, "--n-prompts", "8", "--per-layer", "8", "--pair-only"],
        "engine.tiny": ["engine", "--n-prompts", "16", "--per-layer", "100000"],
        "profile.smollm2": ["profile", *pair, "--n-prompts", "8", "--per-layer", "8", "--layers", "2,12"],
        "profile.tiny": ["profile", "--n-prompts", "16"],
    }
    for name, (module, *options) in runs.items():
        print(f"\n{name}\n", flush=True)
        command = [sys.executable, "-m", f"experiments.bench.{module}", *options]
        subprocess.run([*command, "--out", str(args.out / f"{name}.json")], check=True)


if __name__ == "__main__":
    main()
