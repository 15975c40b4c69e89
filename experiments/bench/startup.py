r"""What a newcomer waits for, as whole processes, nothing compiled yet: the help, the import, the demo, a sweep.

    python -m experiments.bench.startup --base work/smollm2/base --expert work/smollm2/english_capital \
        --out experiments/bench/startup.json

Of a sweep, with its defaults and with `--quick`, it is measured when it says its first word, its plan and its ranking,
when it ends, and the longest time that it says nothing. Without a pair the sweeps are left out.

And of a quick sweep of the embedded pair, how long JAX compiles, the first time on a machine and the second time, when
the compiled programs are in the user's cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from experiments.records import machine, made, table, write

COMMANDS = {
    "`wpjax --help`": (5, ["-m", "wpjax", "--help"]),
    "`import wpjax`, every public name": (5, ["-c", "import wpjax; [getattr(wpjax, name) for name in wpjax.__all__]"]),
    "`wpjax demo`": (1, ["-m", "wpjax", "demo"]),
}
"""Name -> (repeats, arguments of the interpreter)."""

QUICK = "sweep --base tiny:base --expert tiny:expert --behaviour tiny:title --quick --out r.nc --overwrite"

COUNTED = """
import json, os, sys
from pathlib import Path
from wpjax.cli.compiled import keep_programs
keep_programs()  # before JAX is imported
from experiments.bench.measure import compilations
from wpjax import cli
with compilations() as seconds:
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code
Path(os.environ["COUNTED"]).write_text(json.dumps(sum(seconds)))
"""
"""A program that runs the command line, and writes how long JAX has been compiling."""

SWEEPS = {"`wpjax sweep`": [], "`wpjax sweep --quick`": ["--quick"]}
"""Name -> options beside those that name the pair."""


class Line(NamedTuple):
    """A line that a process printed.

    Attributes:
        seconds: after its start.
        stream: "out" or "err".
        text: the line.
    """

    seconds: float
    stream: str
    text: str


def fresh(folder: str) -> dict[str, str]:
    """The environment of a process for which nothing is compiled yet."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return environment | {"XDG_CACHE_HOME": folder}


def seconds(arguments: list[str]) -> float:
    """Wall time of one process, in an empty folder and with nothing compiled yet."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, *arguments]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, env=fresh(folder))
        return time.perf_counter() - start


def compiling() -> dict[str, float]:
    """Seconds of compilation of one command, the first time and the second time on a machine."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        counted = Path(folder, "counted.json")
        paths = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
        environment = fresh(folder) | {"COUNTED": str(counted), "PYTHONPATH": paths}
        for start in ("first", "second"):
            command = [sys.executable, "-c", COUNTED, *QUICK.split()]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment)
            found[start] = round(json.loads(counted.read_text()), 2)
    return found


def sweep(pair: Sequence[str], options: Sequence[str]) -> dict[str, float]:
    """One sweep of a pair, in an empty folder and with nothing compiled yet: its milestones, and its CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "wpjax", "sweep", *pair, *options, "--out", "r.nc"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=fresh(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stderr is not None
        lines = list(_lines({"out": process.stdout, "err": process.stderr}, start))
        code, end = process.wait(), time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        raise SystemExit(f"{' '.join(command)}: exit code {code}\n" + "\n".join(line.text for line in lines[-20:]))
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return milestones(lines, end) | {"CPU seconds": round(used, 1)}


def _lines(streams: dict[str, IO[str]], start: float) -> Iterator[Line]:
    """The lines of several streams, as they come."""
    coming: queue.Queue[Line | None] = queue.Queue()

    def read(name: str, stream: IO[str]) -> None:
        for text in stream:
            coming.put(Line(time.perf_counter() - start, name, text.rstrip("\n")))
        coming.put(None)

    for name, stream in streams.items():
        threading.Thread(target=read, args=(name, stream), daemon=True).start()
    open_ = len(streams)
    while open_:
        line = coming.get()
        if line is None:
            open_ -= 1
        else:
            yield line


def milestones(lines: Sequence[Line], end: float) -> dict[str, float]:
    """When a sweep said what.

    Args:
        lines: what it printed, in the order of time.
        end: when it ended, in seconds after its start.

    Returns:
        seconds after the start: the first line, the plan, the ranking (the first line of the output) and the end; and
        the longest silence.
    """
    times = [0.0, *(line.seconds for line in lines), end]
    plan = next(line.seconds for line in lines if "the plan" in line.text)
    ranked = next(line.seconds for line in lines if line.stream == "out")
    silence = max(later - earlier for earlier, later in itertools.pairwise(times))
    found = {"first line": times[1], "plan": plan, "ranking": ranked, "end": end, "longest silence": silence}
    return {name: round(value, 2) for name, value in found.items()}


def markdown(report: dict[str, Any]) -> str:
    """The medians as a table, and the milestones of the sweeps as another."""
    rows = [[name, f"{row['median']:.1f}"] for name, row in report["seconds"].items()]
    rows += [[f"compiling, at the {start} start", f"{took:.1f}"] for start, took in report["compiling"].items()]
    first = table(["", "seconds"], rows)
    sweeps = report.get("sweeps", {})
    if not sweeps:
        return first
    names = list(next(iter(sweeps.values())))
    rows = [[of, *(f"{figures[name]:.1f}" for name in names)] for of, figures in sweeps.items()]
    return f"{first}\n\n{table(['seconds', *names], rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="HF folder of the pair that is swept")
    parser.add_argument("--expert", help="HF folder")
    parser.add_argument("--behaviour", default="english_capital")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"seconds": {}, "compiling": compiling()}
    for name, (repeats, arguments) in COMMANDS.items():
        runs = [round(seconds(arguments), 2) for _ in range(repeats)]
        report["seconds"][name] = {"median": statistics.median(runs), "runs": runs}
    if args.base and args.expert:
        folders = [str(Path(path).absolute()) for path in (args.base, args.expert)]  # the sweeps run elsewhere
        pair = ["--base", folders[0], "--expert", folders[1], "--behaviour", args.behaviour]
        report["sweeps"] = {name: sweep(pair, options) for name, options in SWEEPS.items()}
    report |= {**made(), "machine": machine()}
    print(markdown(report))
    write(args.out, report)


if __name__ == "__main__":
    main()
