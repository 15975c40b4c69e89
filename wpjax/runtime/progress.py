"""How long work reports its progress, the schedule that says how long it will take, and what is worth knowing first.

Work calls a function, a `Progress`, as it gets done. A `Schedule` lists the phases of the work with an estimate for
each. It listens to the same reports, so that it knows which phases are over and how long they took:

    time left  =  scale * (what is left of this phase + sum of the estimates of the phases to come)
    scale      =  (prior + sum of what finished phases took)  /  (prior + sum of their estimates)

The prior, `PRIOR_SECONDS`, keeps one short phase from changing much.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""A function (what, done, total), called as work gets done: its name, how much of it is done, how much there is."""

PRIOR_SECONDS = 5.0
"""How many seconds of finished work the first estimates count for, when they are corrected."""

OVERDUE = 0.1
"""What is left of a phase that takes longer than planned, as a share of the time that it has taken."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


Tell: TypeAlias = Callable[[str], None]
"""A function that is called with a note worth knowing, before the work that it is about."""


def untold(note: str) -> None:
    """Tell nobody."""


class Phase(NamedTuple):
    """One phase of long work.

    Attributes:
        name: what it is called.
        work: how much it is, in words; may be empty.
        seconds: how long it takes, estimated; None if that cannot be known before it runs.
        reports: beginnings of the names under which its work reports progress; none: `name` alone.
    """

    name: str
    work: str
    seconds: float | None
    reports: tuple[str, ...] = ()

    def has(self, what: str) -> bool:
        """Whether a report belongs to this phase."""
        return what.startswith(self.reports or (self.name,))


class Finished(NamedTuple):
    """A phase that is over.

    Attributes:
        phase: the phase.
        seconds: how long it took.
    """

    phase: Phase
    seconds: float


class Schedule:
    """The phases of long work, how long they took so far, and how long the rest will take.

    A phase begins with its first report. It ends when a later phase begins, or when `finish` is called. A phase that
    never reports is skipped: it takes no time.

    Args:
        phases: the phases, in the order in which they run.
        clock: a function that returns the time in seconds.

    >>> now = 0.0
    >>> schedule = Schedule([Phase("screen", "", 10.0), Phase("patches", "", 30.0)], clock=lambda: now)
    >>> schedule.left
    40.0
    >>> schedule.note("screen", 0, 1)
    >>> now = 25.0  # it took 25 seconds: all else is taken to be (5 + 25) / (5 + 10) = 2 times as long, too
    >>> schedule.note("patches", 0, 10)
    >>> schedule.left
    60.0
    """

    def __init__(self, phases: Sequence[Phase], clock: Callable[[], float] = time.monotonic):
        self.phases = tuple(phases)
        self.finished: list[Finished] = []
        self._clock = clock
        self._at = -1  # number of the phase that runs
        self._began = 0.0
        self._share = 0.0  # of the phase that is done

    @property
    def seconds(self) -> float:
        """All estimates together, as they were made."""
        return sum(phase.seconds or 0.0 for phase in self.phases)

    @property
    def scale(self) -> float:
        """How many times as long as estimated the finished phases took."""
        known = [(f.seconds, f.phase.seconds) for f in self.finished if f.phase.seconds is not None]
        return (PRIOR_SECONDS + sum(took for took, _ in known)) / (PRIOR_SECONDS + sum(planned for _, planned in known))

    @property
    def running(self) -> Phase | None:
        """The phase that runs; None before the first and after the last."""
        return self.phases[self._at] if 0 <= self._at < len(self.phases) else None

    @property
    def left_of_running(self) -> float:
        """Seconds that the phase that runs still takes, about."""
        phase = self.running
        if phase is None:
            return 0.0
        elapsed = self._clock() - self._began
        # What takes longer than planned will take a little longer still.
        planned = max(self.scale * (phase.seconds or 0.0) - elapsed, OVERDUE * elapsed)
        if not self._share:
            return planned
        # The more of it is done, the more its own pace counts. At first, its pace is that of the compiler.
        paced = elapsed * (1 - self._share) / self._share
        return self._share * paced + (1 - self._share) * planned

    @property
    def left(self) -> float:
        """Seconds until all is done, about."""
        return self.left_before()

    def left_before(self, *names: str) -> float:
        """Seconds until the first of some phases begins, about; until all is done, if there is no such phase.

        Args:
            names: their names.
        """
        at = next((i for i, phase in enumerate(self.phases) if phase.name in names), len(self.phases))
        if at <= self._at:
            return 0.0
        to_come = sum(phase.seconds or 0.0 for phase in self.phases[self._at + 1 : at])
        return self.left_of_running + self.scale * to_come

    def note(self, what: str, done: int, total: int) -> None:
        """Take note of a report of progress; those that belong to no phase, or to one that is over, are passed by."""
        at = next((i for i, phase in enumerate(self.phases) if phase.has(what)), -1)
        if at < self._at or at < 0:
            return
        if at > self._at:
            self._close()
            self._at, self._began = at, self._clock()
        # A phase of several reports has no share of its own that could be counted.
        one = len(self.phases[at].reports) <= 1
        self._share = done / total if one and total > 1 else 0.0

    def finish(self) -> None:
        """Take note that all is done."""
        self._close()
        self._at = len(self.phases)

    def _close(self) -> None:
        phase = self.running
        if phase is not None:
            self.finished.append(Finished(phase, self._clock() - self._began))

    def watching(self, progress: Progress) -> Progress:
        """A progress that notes every report here, and then passes it on."""

        def update(what: str, done: int, total: int) -> None:
            self.note(what, done, total)
            progress(what, done, total)

        return update


def in_words(seconds: float) -> str:
    """A time as people say it.

    >>> in_words(0.4), in_words(47), in_words(130), in_words(3700)
    ('1 s', '47 s', '2 min 10 s', '1 h 1 min')
    """
    n = max(1, round(seconds))
    if n < 60:
        return f"{n} s"
    if n < 3600:
        n = round(n / 10) * 10 if n < 600 else round(n / 60) * 60
        minutes, rest = divmod(n, 60)
        return f"{minutes} min" + (f" {rest} s" if rest else "")
    return f"{n // 3600} h {n % 3600 // 60} min"
