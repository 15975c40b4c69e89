r"""A TIES merge by `wpjax merge` and by mergekit's command, as whole processes: time and memory.

    python -m experiments.bench.merging --base work/smollm2/base --expert work/smollm2/lora_english_capital \
        --expert work/smollm2/lora_quotation --out experiments/bench/merging.json

Both read the same recipe and write the same model, one after the other, in turns. How many weights differ is in the
result: where several changes are equally large at the threshold, mergekit's sort keeps any of them, ours the first.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from experiments.records import machine, made, table, write

OURS, THEIRS, PLAN = "wpjax merge", "mergekit-yaml", "wpjax merge --dry-run"


def run(command: list[str], folder: Path) -> dict[str, float]:
    """One process: seconds of wall and of CPU, and the most memory that it held, in MiB."""
    start = time.perf_counter()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)}: failed\n{(folder / 'log').read_text(errors='replace')[-2000:]}")
    return {
        "seconds": round(seconds, 2),
        "CPU seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "MiB": round(usage.ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)),
    }


def commands(recipe: Path, folder: Path, i: int) -> dict[str, list[str]]:
    """Name -> the command of the i-th run."""
    return {
        OURS: [sys.executable, "-m", "wpjax", "merge", str(recipe), "--out", str(folder / f"ours{i}")],
        THEIRS: [sys.executable, "-m", "mergekit.scripts.run_yaml", str(recipe), str(folder / f"theirs{i}")],
        PLAN: [sys.executable, "-m", "wpjax", "merge", str(recipe), "--dry-run"],
    }


def difference(one: Path, other: Path) -> dict[str, float]:
    """How far the weights of two model folders are apart: how many by more than 1e-6, of how many, and the most."""
    most, n_apart, n = 0.0, 0, 0
    with safe_open(one / "model.safetensors", "np") as ours:
        for file in sorted(other.glob("*.safetensors")):
            with safe_open(file, "np") as theirs:
                for name in theirs.keys():  # noqa: SIM118  (not a mapping)
                    a, b = (np.asarray(source.get_tensor(name), np.float32) for source in (ours, theirs))
                    apart = np.abs(a - b)
                    most, n = max(most, float(apart.max())), n + apart.size
                    n_apart += int((apart > 1e-6).sum())
    return {"apart": n_apart, "of": n, "most": most}


def sizes(base: Path) -> tuple[float, float]:
    """MiB of a model in float32, and of its largest tensor."""
    with safe_open(base / "model.safetensors", "np") as file:
        numbers = [int(np.prod(file.get_slice(name).get_shape())) for name in file.keys()]  # noqa: SIM118
    return 4 * sum(numbers) / 2**20, 4 * max(numbers) / 2**20


def measure(base: Path, experts: list[Path], density: float, repeats: int) -> dict[str, Any]:
    """Both commands in turns, in new folders."""
    parameters = {"weight": round(1 / len(experts), 3), "density": density}
    recipe = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(expert), "parameters": parameters} for expert in experts],
        "dtype": "float32",
    }
    runs: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: [], PLAN: []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "merge.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        for i in range(repeats):
            for name, command in commands(path, folder, i).items():
                runs[name].append(run(command, folder))
        apart = difference(folder / "ours0", folder / "theirs0")
    model, tensor = sizes(base)
    medians = {name: {what: statistics.median(r[what] for r in of) for what in of[0]} for name, of in runs.items()}
    return {
        "experts": len(experts),
        "density": density,
        "repeats": repeats,
        "medians": medians,
        "runs": runs,
        "speed_up": round(medians[THEIRS]["seconds"] / medians[OURS]["seconds"], 2),
        "speed_up_cpu": round(medians[THEIRS]["CPU seconds"] / medians[OURS]["CPU seconds"], 2),
        "difference": apart,
        "tensors_MiB": medians[OURS]["MiB"] - medians[PLAN]["MiB"],
        "base_MiB": round(model),
        "largest_tensor_MiB": round(tensor),
        "mergekit": importlib.metadata.version("mergekit"),
    }


def markdown(report: dict[str, Any]) -> str:
    """The medians as a table, and what they say."""
    rows = [
        [
            f"`{name}`",
            *(f"{figures[what]:,.{digits}f}" for what, digits in (("seconds", 1), ("CPU seconds", 1), ("MiB", 0))),
        ]
        for name, figures in report["medians"].items()
    ]
    limit = report["base_MiB"] + report["experts"] * report["largest_tensor_MiB"]
    apart = report["difference"]
    return "\n\n".join(
        [
            table([f"TIES, {report['experts']} experts", "seconds", "CPU seconds", "MiB at most"], rows),
            f"{report['speed_up']:.1f} times as fast as mergekit {report['mergekit']} ({report['speed_up_cpu']:.1f} "
            f"times in CPU time). Merging takes {report['tensors_MiB']:,.0f} MiB more than planning it; the base and a "
            f"tensor of each expert would be {limit:,.0f}. Of {apart['of']:,} weights {apart['apart']:,} differ by "
            "more than 1e-6.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="HF folder with one model.safetensors")
    parser.add_argument("--expert", type=Path, required=True, action="append", help="HF folder; repeat it for more")
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    experts = [expert.absolute() for expert in args.expert]
    report = measure(args.base.absolute(), experts, args.density, args.repeats)
    report |= {**made(), "machine": machine()}
    print(markdown(report))
    write(args.out, report)


if __name__ == "__main__":
    main()
