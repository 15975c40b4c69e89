"""A limit of time for code of the user: patterns and functions that may never end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class TimeIsUp(BaseException):
    """The limit is reached. No `Exception`, so that a function that catches those does not go on."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` in the body once it has taken so long.

    The system's timer interrupts the body, also in the middle of a match of a regular expression. Outside the main
    thread, and on Windows, there is no such timer: the body runs as long as it likes.

    Args:
        seconds: time by the clock on the wall.

    >>> with time_limit(10):
    ...     print("done in time")
    done in time
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    # The timer rings again and again: Python drops an exception that comes up in some of its callbacks.
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)  # of somebody else's timer, what was left; 0 is none
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
