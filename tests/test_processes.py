"""Processes that work together: two real ones find what one finds; one that dies, fails or differs ends the other."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from wpjax import SweepConfig, run_study
from wpjax.errors import WpjaxError
from wpjax.results.curves import Curves
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime import interrupts, processes
from wpjax.runtime.processes import Together, agree, joined

SAVED = Path(__file__).parent / "data" / "schema4"
ANCHOR = str(SAVED / "title.anchor.safetensors")
NAMES = ("L1.head.0", "L1.head.3", "L2.head.0", "L4.head.2")
SWEEP = [
    "--base=tiny:base", "--expert=tiny:expert", "--behaviour=tiny:title", f"--anchor={ANCHOR}", "--n-prompts=4",
    "--top=2", "--stratum=1", f"--components={','.join(NAMES)}", "--no-set-score", "--answers=0",
]  # fmt: skip


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(command, folder):
    """Run a command in two processes, as Slurm starts them; both succeed. What each said: output and errors."""
    port = str(free_port())
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "JAX_COORDINATOR_PORT": port}
    running = []
    for i in (0, 1):
        env = {**os.environ, **slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        run = [sys.executable, "-m", "wpjax", *command]
        running.append(subprocess.Popen(run, env=env, cwd=folder, text=True, **pipes))
    said = [process.communicate(timeout=900) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    return said


def test_two_processes_find_what_one_finds(tmp_path, wpjax):
    """Process 0 writes and prints, the other is silent; both leave nothing else."""
    said = together(["sweep", *SWEEP, "--out=r.nc"], tmp_path)
    assert "wrote r.nc" in said[0][0]
    assert said[1] == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["r.nc"]
    two = SweepResult.from_netcdf(tmp_path / "r.nc").dataset
    config = SweepConfig(
        "tiny:base", "tiny:expert", "tiny:title", tmp_path / "one.nc", anchor=Path(ANCHOR), n_prompts=4, top=2,
        stratum=1, set_score=False, answers=0, components=NAMES,
    )  # fmt: skip
    one = run_study(config).result.dataset
    np.testing.assert_array_equal(two["name"], one["name"])
    np.testing.assert_array_equal(two["exact"], one["exact"])
    for name in ("effect", "screen", "coverage_joint"):  # shares of the gap
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=5e-6, err_msg=name)
    for name in ("delta", "gap"):
        near = 5e-6 * one.attrs["gap_mean"]
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=near, err_msg=name)
    answers = ["--points=2", "--n-random=1", "--n-prompts=8", "--max-new-tokens=16", "--by=effect"]
    said = together(["validate", "r.nc", *answers, "--out=two.curves.nc"], tmp_path)
    assert "wrote two.curves.nc" in said[0][0]
    assert said[1] == ("", "")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    code, _, err = wpjax("validate", tmp_path / "r.nc", *answers, "--out", tmp_path / "one.curves.nc")
    assert code == 0, err
    two, one = (Curves.from_netcdf(tmp_path / f"{name}.curves.nc").dataset for name in ("two", "one"))
    for name in ("strict", "loose", "n_components"):  # which answers pass
        np.testing.assert_array_equal(two[name], one[name])
    for name in ("decision", "kl", "response", "anchor"):
        gap = float(abs(one[f"end_{name}"][1] - one[f"end_{name}"][0]).mean())
        np.testing.assert_allclose(two[f"score_{name}"], one[f"score_{name}"], rtol=0, atol=5e-6 * gap, err_msg=name)


def ended(body, members=(0, 1)):
    """Run a function of a process's number in two processes; of each, its exit code and what it said."""
    address, children = f"127.0.0.1:{free_port()}", {}
    for i in members:
        reading, writing = os.pipe()
        if not (child := os.fork()):
            os.dup2(writing, 2)
            code = 0
            try:
                with joined(address, 2, i):
                    body(i)
            except WpjaxError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                code = 2
            os._exit(code)
        os.close(writing)
        children[child] = reading
    found = []
    for child, reading in children.items():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with os.fdopen(reading) as said:
            found.append([code, said.read().replace(address, "HOST:PORT")])
    return found


def all_endings():
    """Every way in which two processes may end, in children of one process that has imported everything."""
    processes.BEAT, processes.SILENCE, processes.PATIENCE = 0.2, 20.0, 300.0
    kept = "finished parts are kept: go on with --resume"

    def dies(which):
        def body(i):
            interrupts.leave(Path.cwd(), kept)
            if i == which:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)

        return body

    def fails(which):
        def body(i):
            if i == which:
                raise WpjaxError("no such model")
            time.sleep(600)

        return body

    def differs(i):
        agree("arguments", {"seed": i, "top": 3})
        time.sleep(600)

    def agrees(i):
        agree("arguments", {"seed": 0})

    found = {
        "agrees": ended(agrees), "1 dies": ended(dies(1)), "0 dies": ended(dies(0)), "1 fails": ended(fails(1)),
        "0 fails": ended(fails(0)), "differs": ended(differs),
    }  # fmt: skip
    processes.PATIENCE = 2.0
    found |= {"only 0": ended(agrees, [0]), "only 1": ended(agrees, [1])}
    print(json.dumps(found))


def test_one_that_dies_fails_or_differs_ends_the_other_with_a_line(tmp_path):
    code = "from tests.test_processes import *; all_endings()"
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    kept = "finished parts are kept: go on with --resume"
    assert found["agrees"] == [[0, ""], [0, ""]]
    assert found["1 dies"] == [[137, f"error: process 1 of 2 died; {kept}\n"], [-9, ""]]
    assert found["0 dies"][0] == [-9, ""]
    code, said = found["0 dies"][1]
    assert (code in (137, -signal.SIGABRT), said.startswith("error: process 0 of 2 died"), said.count("\n")) == (
        True, True, 1,
    )  # fmt: skip
    assert found["1 fails"] == [[2, "process 1 of 2 ended: no such model\n"], [2, "error: no such model\n"]]
    assert found["0 fails"] == [[2, "error: no such model\n"], [2, "process 0 of 2 ended: no such model\n"]]
    differs = (
        "process 1 was started with other settings (seed: 0 in process 0, 1 here); start all processes with the same "
        "command\n"
    )
    assert found["differs"] == [[2, f"process 1 of 2 ended: {differs}"], [2, f"error: {differs}"]]
    wait = "within 2 s; is every process started, and can they reach each other?\n"
    assert found["only 0"] == [[2, f"error: not all of 2 processes came {wait}"]]
    assert found["only 1"] == [[2, f"error: the coordinator HOST:PORT does not answer {wait}"]]


def test_arguments_that_do_not_fit_are_refused_before_anything_is_started(monkeypatch):
    for name in processes.HINTS:
        monkeypatch.delenv(name, raising=False)
    for arguments, says in (
        (("localhost:1", None, None), "--num-processes and --process-id missing: no cluster was found"),
        ((None, 2, None), "--coordinator and --process-id missing"),
        (("localhost:1", 2, 2), "--process-id 2: the processes of 2 are 0 to 1"),
        (("localhost", 2, 1), "--coordinator 'localhost' is no address; write HOST:PORT"),
    ):
        with pytest.raises(WpjaxError, match=says), joined(*arguments):
            pass
    # One task of Slurm, a pod of Kubernetes that is no job: alone.
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    for name, value in (("JOB_ID", "7"), ("STEP_NODELIST", "n"), ("NTASKS", "1"), ("PROCID", "0"), ("LOCALID", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with joined() as member:
        assert (member.size, member.writes) == (1, True)
    assert jax.process_count() == 1


def test_parts_of_several_processes_are_kept_in_memory_and_written_by_the_first():
    files = {"a": np.arange(3.0)}
    done = Together(files)
    done["b"] = np.ones(2)
    assert sorted(done) == sorted(files) == ["a", "b"]
    np.testing.assert_array_equal(done["a"], files["a"])
    with contextlib.suppress(KeyError):
        del done["b"]
    assert len(done) == 1
