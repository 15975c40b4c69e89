"""A cache of compiled programs on disk, so that a command compiles once on a machine."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

MAX_BYTES = 2 * 2**30


def keep_programs() -> None:
    """Name a folder for JAX's persistent cache, unless the environment names one. Call it before JAX is imported.

    `JAX_ENABLE_COMPILATION_CACHE=0` switches the cache off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = root / "wpjax" / "compiled" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written: compile every time
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))


def _processor() -> str:
    """What CPU programs are compiled for, as a name: a home may be shared by machines that differ in it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return hashlib.blake2b(f"{platform.machine()} {features}".encode(), digest_size=8).hexdigest()
