"""Committed results: written whole, with where and when they were made, and the tables that READMEs show of them.

A test holds every README to the tables that its JSON files give, so no number in one is typed by hand.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib

from wpjax.runtime.files import atomic_output


def made() -> dict[str, Any]:
    """Where, with what and when a result is made."""
    devices = jax.devices()
    return {
        "device": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "n_devices": len(devices),
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        **commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> dict[str, str]:
    """The commit that this code was checked out at; nothing where it was not."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": found.stdout.strip()}


def machine() -> str:
    """Processor, cores and memory, as far as the system says; a Linux one says most."""
    found = {name: Path("/proc", name) for name in ("cpuinfo", "meminfo")}
    text = {name: path.read_text() if path.exists() else "" for name, path in found.items()}
    processor, memory = (
        re.search(pattern, text[name], re.MULTILINE)
        for name, pattern in (("cpuinfo", r"^model name\s*: (.*)$"), ("meminfo", r"^MemTotal:\s*(\d+) kB$"))
    )
    parts = [processor[1] if processor else platform.processor() or platform.machine(), f"{os.cpu_count()} cores"]
    return ", ".join([*parts, *([f"{int(memory[1]) / 2**20:.0f} GiB"] if memory else [])])


def write(out: Path | None, report: Any) -> None:
    """Write a result as JSON, whole or not at all, in place of an earlier one; nothing without a place."""
    if out is not None:
        with atomic_output(out, overwrite=True) as temporary:
            text = json.dumps(report, indent=1, ensure_ascii=False, default=lambda value: value.item())
            temporary.write_text(text + "\n", encoding="utf-8")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are figures."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))
