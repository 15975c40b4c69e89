"""Kill a sweep with kill -9 at random moments, go on each time, and compare with a sweep that was left alone.

    python -m experiments.machines.kills --out experiments/machines/kills.json

Half of the kills are of one process with `--resume`, half of the parts of a farm. A child process is killed some time
after it opened, made, linked, renamed or deleted its n-th file of the finished parts; n and the time are random. All
children are forks of one process that has imported everything and computed nothing, and share compiled programs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from experiments.records import made
from wpjax.runtime.files import atomic_output

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.link"}

MOST_EVENTS = 60
"""Operations on files of finished parts before a kill, at most; a whole sweep makes some hundred."""

SWEEP = [
    "sweep", "--base=tiny:base", "--expert=tiny:expert", "--behaviour=tiny:title", "--causal=skip", "--n-prompts=4",
    "--components=L1.head.0,L1.head.3,L1.head.6,L2.head.0,L2.head.1,L3.head.4,L4.head.2,L4.head.5", "--method=exact",
    "--memory-mb=4", "--no-set-score", "--answers=0",
]  # fmt: skip


def run(arguments: list[str], events: int | None = None, seconds: float = 0.0) -> str:
    """Run a command in a child.

    Args:
        arguments: of `wpjax`.
        events: operations on files of finished parts after which it is killed; None to leave it alone.
        seconds: how long after the last of them it is killed.

    Returns:
        "killed at FILE", or "" if the command ended by itself.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        if events is not None:
            _die_after(events, seconds, writing)
        sys.argv = ["wpjax", *arguments]
        from wpjax.cli import main

        main()
    os.close(writing)
    with os.fdopen(reading) as said:
        where = said.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGKILL:
        return f"killed at {where}"
    if code:
        raise SystemExit(f"wpjax {' '.join(arguments)} ended with {code}")
    return ""


def _die_after(events: int, seconds: float, writing: int) -> None:
    left = [events]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if ".r.nc." not in path and "/parts" not in path:
            return
        left[0] -= 1
        if left[0] == 0:
            os.write(writing, f"{event} of {Path(path).name}, {seconds:.2f} s later".encode())
            if seconds:
                threading.Timer(seconds, die).start()
            else:
                die()

    sys.addaudithook(hook)


def chain(mode: str, seed: int, kills: int, folder: Path) -> list[dict[str, str]]:
    """Kill one sweep, or its parts, again and again, then let it end.

    Args:
        mode: "one process" or "farm".
        seed: seed of the moments.
        kills: how often.
        folder: where to work; the result is r.nc.

    Returns:
        mode and moment of each kill.
    """
    rng, killed, n_started = random.Random(seed), list[dict[str, str]](), 0
    folder.mkdir()
    os.chdir(folder)
    parts = [[f"--part={i}/2", f"--shards={folder / 'parts'}"] for i in (1, 2)]
    while len(killed) < kills:
        more = ["--out=r.nc", "--resume"] if mode == "one process" else parts[n_started % 2]
        where = run([*SWEEP, *more], rng.randrange(1, MOST_EVENTS), rng.choice([0, 0, rng.random()]))
        n_started += 1
        if where:
            killed.append({"mode": mode, "where": where})
            print(mode, seed, where, flush=True)
        else:  # it was faster: begin anew
            (folder / "r.nc").unlink(missing_ok=True)
            shutil.rmtree(folder / "parts", ignore_errors=True)
    if mode == "one process":
        run([*SWEEP, "--out=r.nc", "--resume"])
    else:
        for more in parts:
            run([*SWEEP, *more])
        run(["collect", str(folder / "parts"), "--out=r.nc"])
    return killed


def main() -> None:
    """Run the kills and write what came of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=5, help="of each chain")
    parser.add_argument("--chains", type=int, default=2, help="of each mode, side by side")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    folder = Path(tempfile.mkdtemp())
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "c"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    import xarray as xr

    import wpjax.cli.sweep
    import wpjax.study  # noqa: F401
    from wpjax.results.sweep_result import SweepResult

    def dataset(path: Path) -> xr.Dataset:
        found = SweepResult.from_netcdf(path).dataset
        return found.drop_attrs(deep=False).assign_attrs(
            {name: value for name, value in found.attrs.items() if name not in ("date", "wall_time_s")}
        )

    chains = [(mode, seed) for mode in ("one process", "farm") for seed in range(options.chains)]
    children = {}
    for k, (mode, seed) in enumerate(chains):
        if not (child := os.fork()):
            killed = chain(mode, seed, options.kills, folder / str(k))
            (folder / f"{k}.json").write_text(json.dumps(killed))
            os._exit(0)
        children[child] = k
    run([*SWEEP, f"--out={folder / 'whole.nc'}"])
    records = []
    for child, k in children.items():
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise SystemExit(f"chain {k} failed")
        records += json.loads((folder / f"{k}.json").read_text())
        xr.testing.assert_identical(dataset(folder / str(k) / "r.nc"), dataset(folder / "whole.nc"))
    with atomic_output(options.out, overwrite=True) as temporary:
        temporary.write_text(json.dumps({"made": made(), "kills": records, "same": True}, indent=1) + "\n")


if __name__ == "__main__":
    main()
