"""How far work is, and how long the rest takes: schedules by hand, and what the command line says of them."""

import io
import re
import time

import pytest
from rich.console import Console

from experiments.bench.startup import Line, milestones
from wpjax.cli import console
from wpjax.cli.console import interval, progress_bars
from wpjax.runtime.progress import Phase, Schedule, silent


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def schedule(clock):
    phases = [Phase("tests", "", 15.0, ("tried", "tested")), Phase("patches", "", 30.0), Phase("unknown", "", None)]
    return Schedule([*phases, Phase("answers", "", 10.0)], clock)


def test_before_it_begins_all_estimates_are_left(schedule):
    assert schedule.seconds == schedule.left == 55
    assert schedule.left_before("patches") == 15
    assert schedule.left_before("no such phase") == 55
    assert schedule.running is None


def test_what_finished_phases_took_corrects_the_rest(schedule, clock):
    """15 s were planned and took 35: with the prior of 5, all else takes (5 + 35) / (5 + 15) = 2 times as long."""
    schedule.note("tried", 0, 1)
    clock.now = 20
    schedule.note("tested", 3, 4)  # the same phase, by another name; it is overdue by now
    assert schedule.left == 0.1 * 20 + 40
    clock.now = 35
    schedule.note("patches, 8 at once", 0, 10)
    assert [(done.phase.name, done.seconds) for done in schedule.finished] == [("tests", 35)]
    assert schedule.left == 2 * (30 + 10)
    assert schedule.left_before("answers") == 60


def test_the_phase_that_runs_has_a_pace_of_its_own(schedule, clock):
    """Half of it took 40 s: by its pace 40 are left; by the plan it is overdue, a tenth is left. They count alike."""
    schedule.note("patches", 0, 10)
    clock.now = 10
    assert schedule.left_of_running == 20
    clock.now = 40
    schedule.note("patches", 5, 10)
    assert schedule.left_of_running == (40 + 4) / 2
    assert schedule.left == 22 + 10


def test_what_is_over_does_not_begin_again(schedule, clock):
    schedule.note("patches", 0, 1)
    schedule.note("tested", 0, 1)
    schedule.note("something else", 0, 1)
    assert schedule.running.name == "patches"
    clock.now = 5
    schedule.finish()
    assert schedule.running is None
    assert schedule.left == 0
    assert [done.phase.name for done in schedule.finished] == ["patches"]  # the others were skipped


def test_reports_are_passed_on(schedule):
    seen = []
    schedule.watching(lambda *report: seen.append(report))("patches", 1, 2)
    assert seen == [("patches", 1, 2)]
    assert schedule.running.name == "patches"
    schedule.watching(silent)("answers", 1, 1)
    assert schedule.running.name == "answers"


def test_a_log_is_never_silent_for_long(schedule, clock, capsys, monkeypatch):
    """Lines come by themselves while work goes on, and none after the end."""
    monkeypatch.setattr(console, "interval", lambda elapsed: 0.6)
    with progress_bars() as progress:
        progress.planned(schedule)
        update = schedule.watching(progress)
        update("tested", 0, 1)
        time.sleep(0.9)
        assert "tested: 1 s so far" in capsys.readouterr().err  # nothing was reported meanwhile
        clock.now = 35
        update("patches", 0, 10)
        with progress.paused():
            print("the ranking")
            time.sleep(0.9)
            assert "patches: 0 of 10" not in capsys.readouterr().err  # nothing comes between the lines of the output
            print("its end")
        time.sleep(0.9)
        assert "patches: 0 of 10" in capsys.readouterr().err
    time.sleep(0.9)
    assert "patches: 0 of 10" not in capsys.readouterr().err


def test_a_terminal_shows_bars_and_the_plan(schedule, clock, monkeypatch, capsys):
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=120))
    with progress_bars() as progress:
        progress.say("a sweep")
        progress.planned(schedule)
        update = schedule.watching(progress)
        update("tested", 0, 1)
        clock.now = 35
        update("patches", 0, 10)
        with progress.paused():
            print("the ranking")
    shown = screen.getvalue()
    assert re.search(r"a sweep.*together.*tests done in 35 s \(planned 15 s\)", shown, re.DOTALL)
    assert "about 1 min left of it, 1 min 20 s to the end" in shown
    assert capsys.readouterr().out == "the ranking\n"


def test_lines_get_rarer_in_long_runs():
    assert [interval(t) for t in (0, 600, 1800, 10_000)] == [5, 5, 15, 30]


def test_milestones_of_a_sweep():
    lines = [
        Line(0.5, "err", "[    0 s] sweep of a -> b"),
        Line(6.0, "err", "[    6 s] the plan, with times"),
        Line(10.0, "out", "a table"),
        Line(10.0, "out", "L0.head.1"),
        Line(13.0, "err", "[   13 s] set score: done"),
    ]
    expected = {"first line": 0.5, "plan": 6.0, "ranking": 10.0, "end": 19.0, "longest silence": 6.0}
    assert milestones(lines, 19.0) == expected
