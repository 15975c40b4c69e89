"""Several processes that run one program together, by way of `jax.distributed`: a TPU pod slice, GPUs of several hosts.

All processes run the same program on the same inputs, and their devices form one mesh (`runtime.placement`). Process 0
writes; the others follow it:

- What is decided by numbers, say which components a screen chooses, is decided by those of process 0 (`Together`).
- Every process shows now and then that it lives, in the key-value store of JAX's coordinator. If one is silent for
  `SILENCE` seconds, the others end with one line. JAX would end them too, later, and with a hundred lines.
- A process that ends with an error says so there, and the others end with its exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, NoReturn

import numpy as np

from wpjax.errors import WpjaxError
from wpjax.runtime import interrupts
from wpjax.runtime.shards import what_differs

PATIENCE = 300.0
"""Seconds that a process waits for all others at the beginning."""

SILENCE = 30.0
"""Seconds without a sign of life after which a process is taken for dead."""

BEAT = 1.0
"""Seconds between two signs of life."""

DIED = 137
"""Exit code of the others after a process died, as if all had been killed: launchers start such work again."""

HINTS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "KUBERNETES_SERVICE_HOST", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")
"""Environment variables of places where JAX may find other processes; on a TPU VM libtpu is installed."""


class Member(NamedTuple):
    """Which process this is.

    Attributes:
        rank: its number, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process prints and writes files: the first one does."""
        return self.rank == 0


FATAL = "Terminating process because the JAX distributed service detected fatal errors"
"""How JAX begins what it says as it ends a process that has lost process 0; a hundred lines follow."""

FILTER = f"""
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
for line in sys.stdin.buffer:
    if {FATAL.encode()!r} in line:
        line = sys.argv[1].encode() + b"\\n"
        sys.stdin.close()
    if b"coordination_service" not in line and b"[Gloo] Rank" not in line:
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
    if sys.stdin.closed:
        break
"""
"""A program that passes on what a process says on its error stream, but for that."""


@contextlib.contextmanager
def joined(
    coordinator: str | None = None, n_processes: int | None = None, index: int | None = None
) -> Iterator[Member]:
    """Join the other processes of a command, if there are any, while the body runs.

    Args:
        coordinator: "HOST:PORT" of process 0; None for what JAX finds out by itself: on TPU pod slices, under Slurm and
            Open MPI, in Kubernetes. "none" to be alone.
        n_processes: number of processes; None for what JAX finds out.
        index: number of this process, from 0; likewise.

    Raises:
        WpjaxError: the arguments do not fit each other.

    >>> with joined(coordinator="none") as member:
    ...     member.writes, member.size
    (True, 1)
    """
    if coordinator == "none":
        yield Member()
        return
    given = {"--coordinator": coordinator, "--num-processes": n_processes, "--process-id": index}
    if all(value is None for value in given.values()):
        if not _is_one_of_many():
            yield Member()
            return
    elif None in given.values() and not _is_one_of_many():
        absent = " and ".join(name for name, value in given.items() if value is None)
        raise WpjaxError(f"{absent} missing: no cluster was found that says what it is; name all three")
    if n_processes is not None and index is not None and not 0 <= index < n_processes:
        raise WpjaxError(f"--process-id {index}: the processes of {n_processes} are 0 to {n_processes - 1}")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise WpjaxError(f"--coordinator {coordinator!r} is no address; write HOST:PORT, say 10.0.0.1:8476")
    member = _join(coordinator, n_processes, index)
    if not member.writes:
        _filter_errors(member)
    watch = _Watch(member)
    try:
        yield member
    except BaseException as error:
        watch.leave_with(error)
        raise
    watch.leave()


def _is_one_of_many() -> bool:
    """Whether JAX finds a cluster in which this command runs in several processes."""
    import importlib.util

    if importlib.util.find_spec("libtpu") is None and not any(name in os.environ for name in HINTS):
        return False  # as most often; and JAX, which knows more, takes long to import
    import warnings

    import jax  # it knows the clusters once it is imported
    from jax._src.clusters import ClusterEnv

    del jax
    for cluster in ClusterEnv._cluster_types:
        # Whatever a cluster's own tools raise: then it is none that could be used.
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            if not cluster.opt_in_only_method and cluster.is_env_present():
                return cluster.get_process_count() > 1
    return False


def _join(coordinator: str | None, n_processes: int | None, index: int | None) -> Member:
    """Start JAX's distributed service. If not all processes come, one line, not the hundred of JAX."""
    import jax
    from jax.experimental import multihost_utils

    came = threading.Event()

    def give_up() -> None:
        if not came.wait(PATIENCE):
            where = "the coordinator" if coordinator is None else f"the coordinator {coordinator}"
            lacks = f"not all of {n_processes or 'the'} processes came" if index == 0 else f"{where} does not answer"
            _end(2, f"error: {lacks} within {PATIENCE:g} s; is every process started, and can they reach each other?")

    threading.Thread(target=give_up, daemon=True).start()
    # JAX would take SIGTERM for itself and tell nobody.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, n_processes, index,
            initialization_timeout=int(PATIENCE) + 60,
            heartbeat_timeout_seconds=int(SILENCE) + 60,
            shutdown_timeout_seconds=30,
        )  # fmt: skip
    except (ValueError, TypeError, RuntimeError) as error:
        came.set()
        raise WpjaxError(f"the processes cannot join each other: {' '.join(str(error).split())}") from error
    with _printing_nothing():  # Gloo, which CPUs use, prints what it does where results are printed
        multihost_utils.sync_global_devices("wpjax")
    came.set()
    interrupts.end_abruptly()
    return member_now()


@contextlib.contextmanager
def _printing_nothing() -> Iterator[None]:
    """Drop what libraries print on the standard output meanwhile."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def member_now() -> Member:
    """Which process this is. Unlike `jax.process_index`, this asks no device, and does not import JAX."""
    if "jax" not in sys.modules:
        return Member()  # nobody has joined
    from jax._src.distributed import global_state

    return Member(global_state.process_id, global_state.num_processes)


def _filter_errors(member: Member) -> None:
    """Let a small process pass on the error stream, so that the death of process 0 is one line.

    JAX notices that death at once, and ends this process from a thread that Python cannot reach.
    """
    line = f"error: process 0 of {member.size} died"
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", FILTER, line], stdin=subprocess.PIPE)
    assert child.stdin is not None
    sys.stderr.flush()
    os.dup2(child.stdin.fileno(), 2)


class _Watch:
    """Shows that this process lives, and looks after the others, in a thread of its own."""

    def __init__(self, member: Member):
        self.member = member
        self.client = _client()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _others(self, what: str) -> dict[int, str]:
        """What the others have said: number of a process -> its text."""
        entries = self.client.key_value_dir_get(f"wpjax/{what}/")
        said = {int(key.rpartition("/")[2]): text for key, text in entries}
        return {index: text for index, text in said.items() if index != self.member.rank}

    def _say(self, what: str, text: str) -> None:
        self.client.key_value_set(f"wpjax/{what}/{self.member.rank}", text, allow_overwrite=True)

    def _run(self) -> None:
        beats, heard = dict[int, str](), dict.fromkeys(range(self.member.size), time.monotonic())
        n = 0
        while not self._over.wait(BEAT):
            try:
                n += 1
                self._say("beat", str(n))
                now, ended = time.monotonic(), self._others("end")
                for index, beat in self._others("beat").items():
                    if beats.get(index) != beat:
                        beats[index], heard[index] = beat, now
                for index, text in ended.items():
                    self._follow(index, text)
            except Exception:  # the coordinator is gone, and process 0 with it
                if not self._over.is_set():
                    self._end_after(0)
            for index, last in heard.items():
                if index not in (self.member.rank, *ended) and now - last > SILENCE and not self._over.is_set():
                    self._end_after(index)

    def _follow(self, index: int, text: str) -> None:
        """End as another process ended, if that was with an error."""
        code, _, message = text.partition(" ")
        if int(code) and not self._over.is_set():
            with contextlib.suppress(Exception):
                self._say("end", text)
            self._linger()
            _end(int(code), f"process {index} of {self.member.size} ended: {message}")

    def _linger(self) -> None:
        """Let the others go first: with process 0 they lose the coordinator, and JAX would end them its own way."""
        if self.member.writes:
            time.sleep(3 * BEAT)

    def _end_after(self, index: int) -> NoReturn:
        self._linger()
        kept = "; ".join(interrupts.how_to_go_on())
        _end(DIED, f"error: process {index} of {self.member.size} died{'; ' if kept else ''}{kept}")

    def leave_with(self, error: BaseException) -> None:
        """Tell the others that this process ends with an error, and give them time to hear it."""
        if not isinstance(error, WpjaxError | KeyboardInterrupt | SystemExit | MemoryError):
            # Perhaps a process died, and what failed is the line to it: then the watch finds out, and ends this one.
            time.sleep(3 * BEAT + (SILENCE if type(error).__name__ == "JaxRuntimeError" else 0.0))
        code = 2 if isinstance(error, WpjaxError) else 1
        if isinstance(error, KeyboardInterrupt):
            code = interrupts.exit_code()
        message = " ".join(str(error).split()) or type(error).__name__
        self._over.set()
        with contextlib.suppress(Exception):
            self._say("end", f"{code} {interrupts.account() if isinstance(error, KeyboardInterrupt) else message}")
            self._wait_for(range(self.member.size), 5 * BEAT)

    def leave(self) -> None:
        """Wait for process 0 to be done, then for all others."""
        if not self.member.writes:
            self._wait_for([0], float("inf"))
        self._say("end", "0 ")
        self._wait_for(range(self.member.size), SILENCE)
        self._over.set()
        self._thread.join()
        import jax

        jax.distributed.shutdown()

    def _wait_for(self, members: range | list[int], seconds: float) -> None:
        """Wait until some processes have ended."""
        end = time.monotonic() + seconds
        while not {*members} - {self.member.rank} <= {*self._others("end")} and time.monotonic() < end:
            interrupts.check()
            time.sleep(BEAT / 5)


def _client() -> Any:
    """JAX's client of the coordinator."""
    from jax._src.distributed import global_state

    return global_state.client


def _end(code: int, line: str) -> NoReturn:
    """End this process at once, with a line: what the main thread waits for may never come."""
    with contextlib.suppress(Exception):
        print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr, flush=True)
    os._exit(code)


def agree(what: str, ours: Mapping[str, Any]) -> None:
    """Refuse to go on if this process works on other things than process 0. Alone, nothing happens.

    Args:
        what: what is compared, one word.
        ours: names and values that JSON can hold or `str` can name.

    Raises:
        WpjaxError: names what differs.

    >>> agree("arguments", {"seed": 0})  # alone
    """
    client, index = _client(), member_now().rank
    if client is None:
        return
    text = json.dumps(dict(ours), sort_keys=True, default=str)
    if index == 0:
        client.key_value_set(f"wpjax/agree/{what}", text)
        return
    theirs = json.loads(client.blocking_key_value_get(f"wpjax/agree/{what}", int(1000 * PATIENCE)))
    differs = what_differs(theirs, json.loads(text))
    if differs:
        raise WpjaxError(
            f"process {index} was started with {differs.replace(' there', ' in process 0')}; start all processes with "
            "the same command"
        )


def of_process_0(array: np.ndarray | None) -> np.ndarray:
    """An array as process 0 has it. All processes must call this, in the same order.

    Args:
        array: that of this process; process 0 must have one.

    >>> of_process_0(np.arange(3)).tolist()  # alone
    [0, 1, 2]
    """
    import jax
    from jax.experimental.multihost_utils import broadcast_one_to_all

    if jax.process_count() == 1:
        assert array is not None
        return array
    header = np.zeros(256, np.uint8)  # dtype and shape, as text
    if array is not None:
        text = json.dumps([array.dtype.str, *array.shape]).encode()
        header[: len(text)] = np.frombuffer(text, np.uint8)
    dtype, *shape = json.loads(bytes(np.asarray(broadcast_one_to_all(header))).rstrip(b"\0"))
    n_bytes = int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))
    # As bytes: JAX would make float32 of float64.
    data = np.zeros(n_bytes, np.uint8)
    if array is not None and array.nbytes == n_bytes:
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    if not n_bytes:
        return np.zeros(shape, dtype)
    return np.frombuffer(np.asarray(broadcast_one_to_all(data)).tobytes(), dtype).reshape(shape).copy()


class Together(MutableMapping[str, np.ndarray]):
    """Finished parts of work that several processes do together: all have them in memory, process 0 on the disk, too.

    Args:
        files: the parts on the disk, in process 0; None in the others, or if nothing is kept.
    """

    def __init__(self, files: MutableMapping[str, np.ndarray] | None):
        self.files = files
        keys = json.dumps(sorted(files) if files is not None else []).encode()
        names = json.loads(of_process_0(np.frombuffer(keys, np.uint8)).tobytes())
        self._parts = {key: of_process_0(None if files is None else files[key]) for key in names}

    def agreed(self, array: np.ndarray) -> np.ndarray:
        """An array that every process has made: that of process 0 counts."""
        return of_process_0(np.asarray(array))

    def discard(self) -> None:
        """Delete what is on the disk, once the output is written."""
        if self.files is not None and hasattr(self.files, "discard"):
            self.files.discard()

    def __getitem__(self, key: str) -> np.ndarray:
        return self._parts[key]

    def __setitem__(self, key: str, value: np.ndarray) -> None:
        self._parts[key] = np.asarray(value)
        if self.files is not None:
            self.files[key] = value

    def __delitem__(self, key: str) -> None:
        del self._parts[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


@contextlib.contextmanager
def together(
    opened: Callable[[], AbstractContextManager[MutableMapping[str, np.ndarray]]],
) -> Iterator[MutableMapping[str, np.ndarray]]:
    """Finished parts for one process or several: only the first one opens them on the disk.

    Args:
        opened: a function that opens them.
    """
    member = member_now()
    if member.size == 1:
        with opened() as alone:
            yield alone
    elif member.writes:
        with opened() as files:
            yield Together(files)
    else:
        yield Together(None)
