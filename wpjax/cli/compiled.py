"""A cache of compiled programs on disk, so that a command compiles once on a machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

MAX_BYTES = 2 * 2**30
"""Largest size of the cache; programs that were not used for longest are deleted first."""


def keep_programs() -> None:
    """Tell JAX to keep compiled programs in a folder of the user's cache. Call this before JAX is imported.

    `JAX_COMPILATION_CACHE_DIR` names another folder, and `JAX_ENABLE_COMPILATION_CACHE=0` switches the cache off. JAX
    tells processors apart, so several machines may share a home.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wpjax" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none that can be written to: compile every time
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))


_began: list[float] = []  # when the program that is being compiled was begun; empty while none is


def watch_compilation() -> None:
    """From now on, take note of what JAX compiles (`seconds_of_compilation`). JAX must have been imported."""
    from jax import monitoring

    def begun(event: str, **kwargs: str | int) -> None:
        if event.endswith("compile_requests_use_cache"):
            _began[:] = [time.monotonic()]

    def over(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            _began.clear()

    monitoring.register_event_listener(begun)
    monitoring.register_event_duration_secs_listener(over)


def seconds_of_compilation() -> float:
    """For how long JAX has been compiling the program that it compiles now; 0 if it compiles none."""
    began = _began[:1]  # another thread may clear the list
    return time.monotonic() - began[0] if began else 0.0
