"""Committed results: written whole, with where and when they were made, and the tables that READMEs show of them.

A test holds every README to the tables that its JSON files give, so no number in one is typed by hand.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from wpjax.files import atomic_output


def made() -> dict[str, str]:
    """Where and when a result is made."""
    return {"device": jax.devices()[0].platform, "date": datetime.date.today().isoformat()}


def write(out: Path | None, report: Any) -> None:
    """Write a result as JSON, whole or not at all, in place of an earlier one; nothing without a place."""
    if out is not None:
        with atomic_output(out, overwrite=True) as temporary:
            text = json.dumps(report, indent=1, ensure_ascii=False, default=lambda value: value.item())
            temporary.write_text(text + "\n", encoding="utf-8")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are figures."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))
