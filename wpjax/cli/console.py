"""What commands print: tables, progress and JSON."""

from __future__ import annotations

import abc
import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from wpjax.cli.compiled import seconds_of_compilation
from wpjax.runtime import interrupts
from wpjax.runtime.processes import member_now
from wpjax.runtime.progress import Schedule, in_words

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


@contextlib.contextmanager
def progress_bars() -> Iterator[Reporter]:
    """Give a `Reporter`: bars and lines on a terminal, lines alone in a log. All of it goes to the error stream.

    Of processes that work together only the first one says something.

    After Ctrl-C its next call raises `KeyboardInterrupt` (see `runtime.interrupts`).
    """
    reporter = Silent() if not member_now().writes else Bars() if err.is_terminal else Lines()
    with reporter:
        yield reporter


def interval(elapsed: float) -> float:
    """Seconds between two lines of a log: 5 in the first ten minutes, then growing slowly to 30.

    >>> interval(10), interval(1200), interval(36000)
    (5.0, 10.0, 30.0)
    """
    return min(30.0, max(5.0, elapsed / 120))


class Reporter(abc.ABC):
    """A `Progress` for the command line that also says what is planned, and how long the rest will take.

    It is a context manager: it says something only inside.
    """

    def __init__(self) -> None:
        self.start = time.monotonic()
        self._schedule: Schedule | None = None
        self._n_said = 0  # finished phases that were said
        self._lock = threading.RLock()  # what is printed is printed by one thread at a time

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take a report of progress; stop the work if a signal came that asks for it."""
        with self._lock:
            self._say_finished()
            self.update(what, done, total)
        interrupts.check()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            with self._lock:
                self._say_finished()

    @abc.abstractmethod
    def update(self, what: str, done: int, total: int) -> None:
        """Show a report of progress."""
        ...

    @abc.abstractmethod
    def say(self, line: str) -> None:
        """Print a line, with the time since the start."""
        ...

    def note(self, note: str) -> None:
        """Print something worth knowing; it may quote a file."""
        from wpjax.cli.words import printable

        self.say(f"note: {printable(note)}")

    @abc.abstractmethod
    def paused(self) -> contextlib.AbstractContextManager[None]:
        """While this lasts, nothing is said: the output of the command is printed."""
        ...

    def planned(self, schedule: Schedule) -> None:
        """Print a schedule, phase by phase, and from now on how far it is kept."""
        with self._lock:
            self._schedule = schedule
            name = max(len(phase.name) for phase in schedule.phases)
            work = max(len(phase.work) for phase in schedule.phases)
            self.say("the plan, with times measured on this machine and corrected on the way:")
            for phase in schedule.phases:
                about = "" if phase.seconds is None else in_words(phase.seconds)
                self.say(f"  {phase.name:<{name}}  {phase.work:<{work}}  {about:>12}")
            self.say(f"  {'together':<{name}}  {'':<{work}}  {in_words(schedule.seconds):>12}")

    def _say_finished(self) -> None:
        """Say which phases are over since the last call, and what is left."""
        if self._schedule is None:
            return
        new = self._schedule.finished[self._n_said :]
        self._n_said += len(new)
        for phase, seconds in new:
            plan = "" if phase.seconds is None else f" (planned {in_words(phase.seconds)})"
            rest = f"; about {in_words(self._schedule.left)} left" if self._schedule.running else ""
            self.say(f"{phase.name} done in {in_words(seconds)}{plan}{rest}")


class Silent(Reporter):
    """Says nothing."""

    def update(self, what: str, done: int, total: int) -> None:
        """Take a report."""

    def say(self, line: str) -> None:
        """Drop a line."""

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is said anyway."""
        return contextlib.nullcontext()


class Left(ProgressColumn):
    """What is left of the work that runs, and of all work."""

    schedule: Schedule | None = None

    def render(self, task: Task) -> Text:
        """The text beside a bar; empty for work that is done."""
        if self.schedule is None or self.schedule.running is None or task.finished:
            return Text()
        of_it, of_all = in_words(self.schedule.left_of_running), in_words(self.schedule.left)
        return Text(f"about {of_it} left of it, {of_all} to the end")


class Bars(Reporter):
    """A bar for each piece of work, which moves by itself."""

    def __init__(self) -> None:
        super().__init__()
        self._left = Left()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), self._left)
        self._progress = rich.progress.Progress(*columns, console=err)
        self._bars: dict[str, Any] = {"": self._progress.add_task("getting ready", total=None)}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._progress.stop()

    def planned(self, schedule: Schedule) -> None:
        """Print a schedule, and show beside the bars what is left."""
        super().planned(schedule)
        self._left.schedule = schedule

    def update(self, what: str, done: int, total: int) -> None:
        """Show a report of progress."""
        if "" in self._bars:
            self._progress.remove_task(self._bars.pop(""))
        if what not in self._bars:
            for task in self._progress.tasks:  # the work before has ended, though it may not have said so
                if task.total == 1:
                    self._progress.update(task.id, completed=1)
            self._bars[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._bars[what], completed=done, total=total)

    def say(self, line: str) -> None:
        """Print a line."""
        self._progress.console.print(Text(line))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While this lasts, nothing is said: the output of the command is printed."""
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()


class Lines(Reporter):
    """A line for each piece of work that ends, and one every few seconds meanwhile, from a thread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._now = ("getting ready", 0, 1)  # the last report
        self._since = self._printed = self.start  # when its work began; when a line was printed last
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Lines:
        self._ticker.start()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        with self._lock:  # no line is half printed
            self._over.set()

    def update(self, what: str, done: int, total: int) -> None:
        """Show a report of progress."""
        if what != self._now[0]:
            self._since = time.monotonic()
        elif (done, total) == self._now[1:]:
            return
        self._now = what, done, total
        if done == total:
            self.say(f"{what}: {done} of {total}" if total > 1 else f"{what}: done")

    def say(self, line: str) -> None:
        """Print a line."""
        with self._lock:
            self._printed = time.monotonic()
            print(f"[{self._printed - self.start:5.0f} s] {line}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While this lasts, nothing is said: the output of the command is printed."""
        with self._lock:
            yield
            sys.stdout.flush()  # a file gets it now, not at the end
            self._printed = time.monotonic()

    def _tick(self) -> None:
        while not self._over.wait(0.25):
            with self._lock:
                now = time.monotonic()
                # A little early, so that no more than the interval passes in silence.
                if now - self._printed < interval(now - self.start) - 0.5 or self._over.is_set() or interrupts.came():
                    continue
                self.say(self._state(now))

    def _state(self, now: float) -> str:
        """What is being done, how far it is, and how long the rest takes."""
        what, done, total = self._now
        compiling = seconds_of_compilation()
        if done == total:
            state = f"preparing what follows {what}"
        else:
            state = f"{what}: {done} of {total}" if total > 1 else f"{what}: {in_words(now - self._since)} so far"
        if compiling > 1:
            state += f", compiling for {in_words(compiling)}"
        schedule = self._schedule
        if schedule is None or schedule.running is None:
            return state
        return f"{state}, about {in_words(schedule.left_of_running)} left of it, {in_words(schedule.left)} to the end"
