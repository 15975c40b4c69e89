"""What a newcomer waits for, as whole processes: `wpjax --help`, the import of the public API, `wpjax demo`.

python -m experiments.bench.startup --out experiments/bench/startup.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.records import machine, made, table, write

COMMANDS = {
    "`wpjax --help`": (5, ["-m", "wpjax", "--help"]),
    "`import wpjax`, every public name": (5, ["-c", "import wpjax; [getattr(wpjax, name) for name in wpjax.__all__]"]),
    "`wpjax demo`": (1, ["-m", "wpjax", "demo"]),
}
"""Name -> (repeats, arguments of the interpreter)."""


def seconds(arguments: list[str]) -> float:
    """Wall time of one process, in an empty folder and with nothing compiled yet."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment["XDG_CACHE_HOME"] = folder
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True, env=environment)
        return time.perf_counter() - start


def markdown(report: dict[str, Any]) -> str:
    """The medians as a table."""
    return table(["", "seconds"], [[name, f"{row['median']:.1f}"] for name, row in report["seconds"].items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    measured: dict[str, Any] = {}
    for name, (repeats, arguments) in COMMANDS.items():
        runs = [round(seconds(arguments), 2) for _ in range(repeats)]
        measured[name] = {"median": statistics.median(runs), "runs": runs}
    report = {"seconds": measured, **made(), "machine": machine()}
    print(markdown(report))
    write(args.out, report)


if __name__ == "__main__":
    main()
