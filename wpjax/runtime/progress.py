"""How long work reports its progress, and what is worth knowing before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""A function (what, done, total), called as work gets done: its name, how much of it is done, how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


Tell: TypeAlias = Callable[[str], None]
"""A function that is called with a note worth knowing, before the work that it is about."""


def untold(note: str) -> None:
    """Tell nobody."""
