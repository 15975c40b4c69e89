"""Names that others may read: no path of this machine, no markup."""

from __future__ import annotations

from pathlib import Path


def public_name(source: str) -> str:
    """A model's name for others: a hub id as it is, of a path its last part, so that no path of this machine is told.

    >>> public_name("org/name"), public_name("/home/me/models/capital"), public_name("~/b.gguf")
    ('org/name', 'capital', 'b.gguf')
    """
    path = Path(source)
    is_path = path.is_absolute() or source.startswith((".", "~")) or path.exists() or len(path.parts) > 2
    return one_line(path.name if is_path else source)


def one_line(text: object) -> str:
    """A text that stays one line, and code between backticks, in a model card.

    >>> one_line("a`b\\n# c")
    "a'b # c"
    """
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).replace("`", "'").split())


def kind_of(name: str) -> str:
    """The kind of a component, from its name; "layer" for a whole one.

    >>> kind_of("L3.head.5"), kind_of("L3"), kind_of("embed")
    ('head', 'layer', 'embed')
    """
    head, *rest = name.split(".")
    return rest[0] if rest else "layer" if head[1:].isdigit() else head
