"""A cache of compiled programs on disk, so that a command compiles once on a machine."""

from __future__ import annotations

import os
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
