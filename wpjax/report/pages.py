"""What all pages share: their templates, which escape every text, and their style."""

from __future__ import annotations

import functools
import re
from importlib.resources import files

import jinja2
from markupsafe import Markup, escape


def page_template(name: str) -> jinja2.Template:
    """A template of `report/templates`. Names and prompts in it are escaped, so they are never taken for markup.

    Its filter `code` sets what stands between backticks as code.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wpjax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = with_code
    return environment.get_template(name)


def with_code(sentence: str) -> Markup:
    """A sentence, escaped, with what stands between backticks as code.

    >>> with_code("`wpjax show` says <b>")
    Markup('<code>wpjax show</code> says &lt;b&gt;')
    """
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(sentence))))


@functools.cache
def page_file(name: str) -> str:
    """The text of a file beside the pages, say "templates/page.css"."""
    return files("wpjax.report").joinpath(name).read_text(encoding="utf-8")


def page_style() -> Markup:
    """The style of all pages."""
    return Markup(page_file("templates/page.css"))
