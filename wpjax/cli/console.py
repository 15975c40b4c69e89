"""What commands print: tables, progress and JSON."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from wpjax.runtime import interrupts
from wpjax.runtime.progress import Progress

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print a value as JSON; NaN and infinity, which JSON lacks, become null."""
    print(json.dumps(without_nan(value), indent=1, default=str, allow_nan=False))


def without_nan(value: Any) -> Any:
    """A tree of JSON values with None in place of NaN and infinity.

    >>> without_nan({"effect": float("nan"), "ranks": (1, 2)})
    {'effect': None, 'ranks': [1, 2]}
    """
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with the first column aligned left and the others right.

    Cells are plain text: brackets in a name are not taken for rich's markup.
    """
    out.print(Text(title, style="bold"))
    table = Table(box=None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)


def print_note(note: str) -> None:
    """Print a note on the error stream, above the bars if there are some."""
    from wpjax.cli.words import printable

    err.print(Text(f"note: {printable(note)}"), soft_wrap=True)


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress]:
    """Give a `Progress` that draws a bar for each piece of work, on the error stream.

    If the error stream is not a terminal, it prints a plain line every few seconds instead. After Ctrl-C the next call
    raises `KeyboardInterrupt` (see `runtime.interrupts`).
    """
    if not err.is_terminal:
        yield _heeding(_log_lines())
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

        yield _heeding(update)


def _heeding(progress: Progress) -> Progress:
    """The same progress, which stops the work if a signal came that asks for it."""

    def update(what: str, done: int, total: int) -> None:
        progress(what, done, total)
        interrupts.check()

    return update


def _log_lines(seconds: float = 10.0) -> Progress:
    """A progress that prints a line when work ends, and before that at most once in so many seconds."""
    start = time.monotonic()
    printed: dict[str, tuple[float, int]] = {}  # when the last line of a piece of work was printed, and what it said

    def update(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        last_time, last_done = printed.get(what, (start, 0))
        if done != last_done and (done == total or now - last_time >= seconds):
            printed[what] = now, done
            print(f"[{now - start:5.0f} s] {what}: {done} of {total}", file=sys.stderr, flush=True)

    return update
