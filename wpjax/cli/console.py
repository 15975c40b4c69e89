"""What commands print: tables, progress, JSON."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from wpjax.runtime.progress import Progress

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Machine-readable output; numbers that do not exist are null."""
    print(json.dumps(without_nan(value), indent=1, default=str, allow_nan=False))


def without_nan(value: Any) -> Any:
    """A tree of JSON values with None in place of numbers that do not exist."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, first column to the left, the others to the right; text in it is never markup."""
    out.print(Text(title, style="bold"))
    table = Table(box=None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress]:
    """A function (what, done, total) that draws a bar for each thing done, on the error stream.

    Where that is not a terminal it prints a plain line now and then instead.
    """
    if not err.is_terminal:
        yield _log_lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=err) as progress:
        bars: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, total=total)

        yield update


def _log_lines(seconds: float = 10.0) -> Progress:
    start = time.monotonic()
    printed: dict[str, tuple[float, int]] = {}

    def update(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        when, how_far = printed.get(what, (start, 0))
        if done != how_far and (done == total or now - when >= seconds):
            printed[what] = now, done
            print(f"[{now - start:5.0f} s] {what}: {done} of {total}", file=sys.stderr, flush=True)

    return update


def kept(folder: Path) -> str:
    """What an interrupted command leaves behind in its folder of finished parts, and how to go on."""
    return "finished parts are kept: go on with --resume" if any(folder.glob("*.npy")) else "nothing was written"


@contextlib.contextmanager
def on_interrupt(message: Callable[[], str]) -> Iterator[None]:
    """Say on Ctrl-C what was kept and how to go on, and exit with 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; {message()}", file=sys.stderr)
        raise SystemExit(130) from None
