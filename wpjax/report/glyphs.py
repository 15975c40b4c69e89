"""Text in figures that the usual font has no pictures for: Chinese, Japanese, Korean and others.

matplotlib draws each character in the first font of a list that has it. So fonts of this machine are added that have
what the usual one lacks. What none has is written as its number, U+6771, which can be read and looked up; a box cannot.
"""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from wpjax.report.figures import STYLE

FIRST = ("noto sans cjk", "source han sans", "wenquanyi", "droid sans fallback", "noto sans", "noto", "unifont")
"""Beginnings of names of fonts that are tried first, as they have many characters."""

BOXES = "Last Resort"
"""Name of a font that has every character, as a box: matplotlib brings it along."""


def save_figure(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG, with text that can be read whatever its script.

    Args:
        figure: the figure; its text is changed where no font has a character.
        path: the file.
        dpi: dots per inch.
    """
    make_readable(figure)
    with mpl.rc_context(STYLE):
        figure.savefig(path, format="png", dpi=dpi)


def make_readable(figure: Figure) -> None:
    """Give text fonts that have its characters, and write those that no font has as their numbers.

    >>> figure = Figure()
    >>> title = figure.suptitle("what no font has: \\U00105555")
    >>> make_readable(figure)
    >>> title.get_text()
    'what no font has: U+105555'
    """
    for text in figure.findobj(Text):
        text.set_text(said := _readable(text.get_text(), text))
        text.set_fontfamily(_families(said, text))
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label.get_text() for label in axis.get_majorticklabels()]
            if _lacking("".join(labels), axis.label):  # they were given as texts; drawing writes them anew
                labels = [_readable(label, axis.label) for label in labels]
                axis.set_ticks(axis.get_majorticklocs(), labels, fontfamily=_families("".join(labels), axis.label))


def _readable(said: str, text: Text) -> str:
    """A text with the numbers of characters that no font has."""
    _, unknown = fonts_with(_lacking(said, text))
    return "".join(f"U+{ord(c):04X}" if c in unknown else c for c in said)


def _families(said: str, text: Text) -> list[str]:
    """The fonts that a text needs, its usual ones first."""
    return list(dict.fromkeys([*text.get_fontfamily(), *fonts_with(_lacking(said, text))[0]]))


def _lacking(said: str, text: Text) -> frozenset[str]:
    """The characters that the usual font of a text lacks; those without a picture of their own do not count."""
    if said.isascii():
        return frozenset()
    usual = _characters(font_manager.findfont(text.get_fontproperties()))
    return frozenset(c for c in set(said) - usual if c.isprintable() or unicodedata.category(c) == "Co")


@functools.cache
def fonts_with(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Fonts of this machine that have some characters, as few as are found, and the characters that none has.

    Args:
        characters: the characters.
    """

    def order(entry: font_manager.FontEntry) -> tuple[int, str]:
        name = entry.name.lower()
        return next((i for i, first in enumerate(FIRST) if name.startswith(first)), len(FIRST)), name

    families, left = list[str](), set(characters)
    tried = set[str]()
    for entry in sorted(font_manager.fontManager.ttflist, key=order):
        if not left:
            break
        if entry.name in tried or entry.name.startswith(BOXES):  # another weight of the same
            continue
        tried.add(entry.name)
        if has := left & _characters(entry.fname):
            families.append(entry.name)
            left -= has
    return tuple(families), frozenset(left)


@functools.cache
def _characters(file: str) -> frozenset[str]:
    """The characters that a font file has."""
    try:
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):  # a font that is gone, or that FreeType cannot read
        return frozenset()
