"""What commands print in words: the verdict of a sweep, and answers to read."""

from __future__ import annotations

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
    if verdict.commands:
        out.print(Text("\nNext", style="bold"))
        for command in verdict.commands:  # never wrapped, so that it can be copied
            print(f"  {printable(command)}")


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
