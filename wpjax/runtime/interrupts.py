"""Ctrl-C and termination: a signal sets a flag, and work looks at the flag where it reports its progress.

An exception that a signal handler raises may come up anywhere, also inside a callback of JAX's garbage collection that
swallows it. So the handler only takes a note, and `check` raises `KeyboardInterrupt` at the next piece of progress. If
none comes soon, say because a long program is being compiled, a thread of its own ends the process. That is safe at any
time, since files are published whole (`runtime.files`) and finished parts stay (`runtime.shards`).

What this process has left on the disk is noted here too, so that an interrupted command can say what exists and how to
go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

GRACE = 3.0
"""Seconds that work has to notice a signal, before the process is ended."""

_received: list[int] = []  # number of the signal that came, if one did
_left: dict[Path, str] = {}  # what this process has left on the disk -> how to go on with it; "" for a whole file
_abruptly: list[None] = []  # not empty if the process is to end without tearing down what it has loaded
_busy: list[None] = []  # one entry for each piece of work that is not to be cut off


def check() -> None:
    """Raise `KeyboardInterrupt` if a signal came that asks this process to end. Long work calls this now and then.

    >>> check()  # nothing came
    """
    if _received:
        raise KeyboardInterrupt


def came() -> bool:
    """Whether a signal came that asks this process to end."""
    return bool(_received)


def exit_code() -> int:
    """Exit code after the signal that came, as shells have it: 128 and its number; 130, Ctrl-C, if none was noted."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def end_abruptly() -> None:
    """From now on, the command ends without tearing down what it has loaded: JAX would wait for other processes."""
    _abruptly.append(None)


def ends_abruptly() -> bool:
    """Whether `end_abruptly` was called."""
    return bool(_abruptly)


def leave(path: Path, how: str = "") -> None:
    """Note something that stays on the disk if the process ends now.

    Args:
        path: a file that is whole, or a folder of finished parts.
        how: of a folder, what to say of it; empty for a whole file.
    """
    _left[path.absolute()] = how


def forget(path: Path) -> None:
    """Take back a note, as what it names was removed."""
    _left.pop(path.absolute(), None)


def written() -> list[str]:
    """Names of the files and folders that the process has written, as short as they can be."""
    return [_short(path) for path, how in _left.items() if not how and path.exists()]


def how_to_go_on() -> list[str]:
    """What to say of the finished parts that the process has left on the disk; each sentence once."""
    return list(dict.fromkeys(how for path, how in _left.items() if how and path.exists()))


def account() -> str:
    """What the process has left on the disk, and how to go on; for the message of an interrupted command.

    >>> with listening(print):
    ...     print(account())
    interrupted; nothing was written
    """
    said = [f"written and whole: {', '.join(written())}"] if written() else []
    said += how_to_go_on()
    what = "terminated" if _received and _received[0] != signal.SIGINT else "interrupted"
    return f"{what}; {'; '.join(said) or 'nothing was written'}"


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """While this lasts, the process is not ended for a first signal: a file is being put in its place."""
    _busy.append(None)
    try:
        yield
    finally:
        _busy.pop()


@contextlib.contextmanager
def listening(say: Callable[[], None]) -> Iterator[None]:
    """Take note of Ctrl-C and of requests to terminate while the body runs.

    A second signal ends the process at once. A signal that this process was told to ignore is still ignored, and so
    are all of them outside the main thread, where Python lets nobody listen.

    Args:
        say: called before the process is ended without the body's help; it says what was left. It is called from
            another thread.
    """
    global _received
    # A list of this call's own: a thread of an earlier one that is late writes into its own.
    received: list[int] = []
    _received = received
    _left.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Python itself writes the number of each signal there, at once, even while XLA keeps the main thread busy.
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {n: signal.signal(n, lambda number, frame: _note(received, number)) for n in numbers}
    over = threading.Event()
    threading.Thread(target=_watch, args=(reading, received, over, say), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        for n, handler in handlers.items():
            signal.signal(n, handler)
        signal.set_wakeup_fd(before)
        os.close(writing)  # ends the thread, which closes the other end
        _received = []


def _note(received: list[int], number: int) -> None:
    if not received:
        received.append(number)


def _watch(reading: int, received: list[int], over: threading.Event, say: Callable[[], None]) -> None:
    """Wait for signals; end the process if the first one goes unnoticed, or as soon as a second one comes."""
    n_heard = 0
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            _note(received, number[0])  # the handler does so too, but only once the main thread is back in Python
            n_heard += 1
            if n_heard == 1:
                threading.Thread(target=_leave_later, args=(over, say), daemon=True).start()
            else:
                _leave_now(over, say)


def _leave_later(over: threading.Event, say: Callable[[], None]) -> None:
    end = time.monotonic() + GRACE
    while _busy or time.monotonic() < end:
        time.sleep(0.05)
    _leave_now(over, say)


def _leave_now(over: threading.Event, say: Callable[[], None]) -> None:
    if not over.is_set():
        say()
        os._exit(exit_code())


def _short(path: Path) -> str:
    """A path as the user is likely to have written it: relative to the working folder if it is inside."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
