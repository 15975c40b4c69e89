"""A cache of compiled programs on disk, so that a command compiles once on a machine."""

from __future__ import annotations

import os
from pathlib import Path

MAX_BYTES = 2 * 2**30
"""Size of the cache; what was used longest ago goes first."""


def keep_programs() -> None:
    """Name a folder for JAX's persistent cache, unless the environment names one. Call it before JAX is imported.

    JAX's keys tell processors apart, so machines may share a home. `JAX_ENABLE_COMPILATION_CACHE=0` switches it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wpjax" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written: compile every time
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))
