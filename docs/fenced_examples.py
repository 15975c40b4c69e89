"""Makes the examples of docstrings, lines after `>>>`, blocks of code in the pages."""

from __future__ import annotations

from typing import Any

import griffe


class FencedExamples(griffe.Extension):
    """Puts a fence around every example, as Markdown needs it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """A docstring with a fence around each run of lines that begins with `>>>` and ends before a blank line.

    >>> print(fenced("One:" + chr(10) * 2 + ">>> 1 + 1" + chr(10) + "2"))
    One:
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    lines: list[str] = []
    inside = False
    for line in [*text.splitlines(), ""]:
        indent = line[: len(line) - len(line.lstrip())]
        if not inside and line.lstrip().startswith(">>>"):
            inside, before = True, indent
            lines.append(f"{before}```pycon")
        elif inside and not line.strip():
            inside = False
            lines.append(f"{before}```")
        lines.append(line)
    return "\n".join(lines[:-1])
