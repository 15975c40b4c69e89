"""Seconds and memory of loading a checkpoint, beside a plain read of its files.

    python -m experiments.loading.make llama-3.2-1b --out work/1b
    python -m experiments.loading.make llama-3.2-1b --out work/1b-mlp --changed mlp
    python -m experiments.loading.measure work/1b --expert work/1b-mlp --out experiments/loading/1b.json
    python -m experiments.loading.measure work/8b --stream work/8b --cold --rounds 3 --out experiments/loading/8b.json

Each case runs in a process of its own. Memory is anonymous memory (what the process cannot get back from its files),
sampled every millisecond; the arrays of a CPU device are part of it. A *plain read* copies the bytes of all files
into memory that was not touched before. The two take turns, and of each the fastest round counts.

- *whole*: all leaves on one device.
- *cut*: the leaves are cut along heads, neurons and the vocabulary over two virtual devices.
- *pair*: base and expert, which share what is equal.
- *stream*: leaf after leaf, each dropped before the next one: what a host needs whose devices have memory of their own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.records import machine, made, table, write

CASES = ("whole", "cut", "pair", "stream")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def anonymous() -> int:
    """Bytes of anonymous memory of this process: what is resident, less what is mapped from files."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * _PAGE


class Peak:
    """The most anonymous memory that the process had during a block."""

    def __enter__(self) -> Peak:
        self.bytes, self._over = anonymous(), False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds, and seconds of processors, of a call."""
    wall, processors = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processors


def plain_read(folder: Path) -> None:
    """Read all files of a checkpoint into fresh memory, one after the other."""
    import numpy as np

    for path in sorted(folder.glob("*.safetensors")):
        np.fromfile(path, np.uint8)


def forget(folder: Path) -> None:
    """Let the system drop what it has kept of the files, so that they are read from the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def case(name: str, folder: Path, expert: Path | None, rounds: int, cold: bool) -> dict[str, Any]:
    """Measure one case in this process."""
    import jax
    from jax.sharding import Mesh, NamedSharding, Sharding

    from wpjax.checkpoints.checkpoint import load_checkpoint
    from wpjax.checkpoints.convert import leaves_from_hf
    from wpjax.checkpoints.folder import SafetensorsFolder, read_json
    from wpjax.checkpoints.hf_config import parse_config
    from wpjax.models.parameters import PARAMETERS
    from wpjax.pairs import load_model
    from wpjax.runtime.placement import partition

    mesh = Mesh(jax.devices(), ("model",))
    rules = {"head": "model", "kv_head": "model", "neuron": "model", "vocab": "model"}

    def place(path: str, shape: tuple[int, ...]) -> Sharding:
        axes = PARAMETERS[path].axes
        return NamedSharding(mesh, partition(("layer", *axes) if len(axes) < len(shape) else axes, rules))

    def load() -> Any:
        if name == "stream":
            cfg = parse_config(read_json(folder / "config.json"), str(folder))
            for _, leaf in leaves_from_hf(cfg, SafetensorsFolder(folder), "bfloat16"):
                sizes.append(leaf.nbytes)
                del leaf
            return None
        where = place if name == "cut" else None
        base = load_checkpoint(folder, "bfloat16", place=where)
        sizes.extend(leaf.nbytes for leaf in jax.tree.leaves(base.params))
        return base if expert is None else (base, load_checkpoint(expert, "bfloat16", base=base, place=where))

    sizes: list[int] = []
    n_rounds = 1 if name in ("pair", "stream") else rounds
    load_model("tiny:base")  # imports what every load needs, once
    before, reads, loads = anonymous(), [], []
    for round_ in range(n_rounds):
        if cold:
            forget(folder)
        if name in ("whole", "cut"):
            reads.append(seconds(lambda: plain_read(folder)))
        models: list[Any] = []
        if cold:
            forget(folder)
        with Peak() as peak:
            loads.append(seconds(lambda models=models: models.append(load())))  # type: ignore[misc]
            after = anonymous()
        if round_ < n_rounds - 1:
            del models, sizes[:]
            gc.collect()
    found: dict[str, Any] = {"largest": max(sizes), "model": sum(sizes), "stays": after - before}
    found["above"] = peak.bytes - after
    found["peak"] = peak.bytes - before
    found |= {"rounds": n_rounds, "cold": cold, "load": [min(values) for values in zip(*loads, strict=True)]}
    if reads:
        found["read"] = [min(values) for values in zip(*reads, strict=True)]
    return found


def markdown(found: dict[str, Any]) -> str:
    """One row a case."""
    rows = []
    for name, of in found["cases"].items():
        faster = ["", ""]
        if "read" in of:
            faster = [f"{load / read:.2f}" for load, read in zip(of["load"], of["read"], strict=True)]
        gib = [f"{round(of[key] / 2**30, 2) + 0:.2f}" for key in ("model", "largest", "stays", "peak")]
        above = f"{max(of['above'], 0) / of['largest']:.2f}"
        rows.append([f"{of['folder']}, {name}", *gib, above, f"{of['load'][0]:.0f}", *faster])
    columns = ["", "one model, GiB", "largest leaf", "stays", "peak", "above what stays, in largest leaves"]
    return table([*columns, "seconds", "in plain reads", "in their processor time"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--expert", type=Path)
    parser.add_argument("--stream", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="leave out the others")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from what the system keeps of it")
    parser.add_argument("--here", choices=CASES, help="measure this alone, in this process, and print it as JSON")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(case(args.here, args.folder, args.expert, args.rounds, args.cold)))
        return
    cases = {"whole": (args.folder, None), "cut": (args.folder, None)}
    cases |= {"pair": (args.folder, args.expert)} if args.expert else {}
    cases |= {"stream": (args.stream, None)} if args.stream else {}
    found: dict[str, Any] = {"made": made(), "machine": machine(), "cases": {}}
    for name, (folder, expert) in cases.items():
        if name not in args.cases:
            continue
        devices = "--xla_force_host_platform_device_count=2" if name == "cut" else ""
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
        command = [sys.executable, "-m", "experiments.loading.measure", str(folder), "--here", name]
        command += ["--rounds", str(args.rounds)]
        command += ["--expert", str(expert)] if expert else []
        command += ["--cold"] if args.cold else []
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        found["cases"][name] = json.loads(done.stdout) | {"folder": folder.name}
        print(name, found["cases"][name], flush=True)
    print(markdown(found))
    write(args.out, found)


if __name__ == "__main__":
    main()
