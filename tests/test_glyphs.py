"""Text in pictures that the usual font lacks: another font where there is one, numbers where there is none."""

import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.image import imread

from tests.helpers import curves_by_hand
from wpjax.report.curves import write_curves
from wpjax.report.glyphs import fonts_with, save_figure
from wpjax.report.tracing import make_fact, write_tracing
from wpjax.results.tracing import FactTrace, Tracing

ODD = "\U00105555"  # of the private use area: no font of any machine has it


@pytest.fixture
def fonts(monkeypatch):
    """The fonts of this machine; a test may add some."""
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist])
    fonts_with.cache_clear()
    yield font_manager.fontManager
    fonts_with.cache_clear()


def font_file(path):
    """A font of one character, a triangle, and what stands for characters that it lacks."""
    pen = TTGlyphPen(None)
    for at, to in ((pen.moveTo, (0, 0)), (pen.lineTo, (400, 700)), (pen.lineTo, (800, 0))):
        at(to)
    pen.closePath()
    triangle, empty = pen.glyph(), TTGlyphPen(None).glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "triangle"])
    font.setupCharacterMap({ord(ODD): "triangle"})
    font.setupGlyf({".notdef": empty, "triangle": triangle})
    font.setupHorizontalMetrics({".notdef": (900, 0), "triangle": (900, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Odd", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    font.save(path)
    return path


def test_curves_are_drawn_with_what_no_font_has(fonts, tmp_path):
    with warnings.catch_warnings(action="error"):
        pictures = write_curves(curves_by_hand(behaviour=f"in {ODD}"), tmp_path / "c.nc")
    assert all(picture.stat().st_size for picture in pictures)


def trace(token):
    maps = {"stream": np.array([[0.1, 0.5], [0.3, 0.9]])}
    return FactTrace(f"{token} is in", token, f" {token}", (token, " is in"), 0, 1, 0.9, 0.1, maps)


def texts(figure):
    labels = figure.axes[0].yaxis.get_majorticklabels()
    return [label.get_text() for label in labels], figure.get_suptitle(), labels[0].get_fontfamily()


def test_what_no_font_has_is_written_as_its_number(fonts, tmp_path):
    figure = make_fact(trace(ODD), 2)
    with warnings.catch_warnings(action="error"):
        save_figure(figure, tmp_path / "a.png")
    labels, title, _ = texts(figure)
    assert labels == ["U+105555*", "is in"]
    assert "p(U+105555)" in title
    assert ODD not in title


def test_a_font_that_has_it_is_used(fonts, tmp_path):
    fonts.addfont(font_file(tmp_path / "odd.ttf"))
    figure = make_fact(trace(f"x{ODD}"), 2)
    with warnings.catch_warnings(action="error"):
        save_figure(figure, tmp_path / "a.png")
    labels, title, families = texts(figure)
    assert labels == [f"x{ODD}*", "is in"]
    assert f"x{ODD}" in title
    assert families[-1] == "Odd"
    # The triangle is there: another picture than that of the letter alone.
    with warnings.catch_warnings(action="error"):
        save_figure(make_fact(trace("x "), 2), tmp_path / "b.png")
    assert not np.array_equal(imread(tmp_path / "a.png"), imread(tmp_path / "b.png"))


def test_a_trace_in_chinese_is_drawn_without_boxes(fonts, tmp_path):
    """Whether this machine has a font for it or not."""
    with warnings.catch_warnings(action="error"):
        write_tracing(Tracing("m", (trace("東京"), trace("大阪")), 2, {"window": 2}), tmp_path / "trace")
    assert {path.name for path in (tmp_path / "trace").iterdir()} >= {"fact-1.png", "average.png", "trace.json"}
