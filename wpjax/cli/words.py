"""What commands print in words: the verdict of a sweep, answers to read, what was written and what comes next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wpjax.results.answers import Answers
    from wpjax.results.verdict import Verdict

MARKS = {True: "passes", False: "fails", None: ""}
"""How the checker's verdict on an answer is printed."""


def print_verdict(verdict: Verdict) -> None:
    """Print a verdict: a heading and a sentence on each line, and what to run next."""
    from rich.table import Table
    from rich.text import Text

    from wpjax.cli.console import out

    out.print(Text("\nVerdict", style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for heading, sentence in verdict.points:
        table.add_row(Text(heading), Text(printable(sentence)))
    out.print(table)
    print_next(*verdict.commands)


def print_written(*files: str | Path, about: str = "") -> None:
    """Print what a command wrote.

    Args:
        files: files and folders, the most important first.
        about: what is in the first, in words; empty to say no more.
    """
    names = ", ".join(printable(shlex.quote(str(file))) for file in files)
    print(f"wrote {names}{f': {printable(about)}' if about else ''}")


def print_next(*commands: str | Sequence[str | Path]) -> None:
    """Print commands that one may run next, quoted for a shell; nothing if there are none.

    Args:
        commands: whole commands, or their arguments after `wpjax`.
    """
    if not commands:
        return
    from rich.text import Text

    from wpjax.cli.console import out
    from wpjax.results.verdict import as_argument

    out.print(Text("\nNext", style="bold"))
    for command in commands:  # never wrapped, so that it can be copied
        line = (
            command
            if isinstance(command, str)
            else shlex.join(["wpjax", *(as_argument(part) if isinstance(part, Path) else part for part in command)])
        )
        print(f"  {printable(line)}")


def print_answers(answers: Answers | None) -> None:
    """Print answers to read, prompt by prompt; nothing if there are none."""
    if answers is None:
        return
    from rich.table import Table
    from rich.text import Text

    from wpjax.cli.console import out

    out.print(Text("\nAnswers to held-out prompts", style="bold"))
    out.print(Text(printable(answers.about)))
    for i, prompt in enumerate(answers.prompts):
        out.print(Text(printable(prompt), style="italic"))
        table = Table(box=None, show_header=False)
        for _ in range(2):
            table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for who, passes, text in answers.rows(i):
            table.add_row(Text(who), Text(MARKS[passes]), Text(printable(text)))
        out.print(table)


def printable(text: str) -> str:
    """A text in which control characters and line breaks are written as escapes: none of them reaches the terminal.

    >>> print(printable("one line\\nand \\x1b[31m another"))
    one line\\nand \\x1b[31m another
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
