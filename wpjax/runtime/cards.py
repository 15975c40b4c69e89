"""Texts of model cards: names that tell nothing of this machine, and foreign text that stays one line."""

from __future__ import annotations

from pathlib import Path

LONGEST = 300
"""Characters of a text that a model card quotes, at most."""


def public_name(source: str) -> str:
    """A model's name for others: a hub id as it is, of a path its last part, so that no path of this machine is told.

    >>> public_name("org/name"), public_name("/home/me/models/capital"), public_name("~/b.gguf")
    ('org/name', 'capital', 'b.gguf')
    >>> public_name("org/name+/home/me/adapter")
    'org/name+adapter'
    """
    path = Path(source)
    if "+" in source and not path.exists():  # a model and an adapter over it
        return "+".join(map(public_name, source.split("+")))
    is_path = path.is_absolute() or source.startswith((".", "~")) or path.exists() or len(path.parts) > 2
    return one_line(path.name if is_path else source)


def one_line(text: object) -> str:
    """A text that stays one line, and code between backticks, in a model card. Of a long one, the beginning.

    >>> one_line("two\\nlines and a `tick`")
    "two lines and a 'tick'"
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).replace("`", "'").split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
