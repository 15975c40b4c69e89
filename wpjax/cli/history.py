"""What `wpjax sweep` and `wpjax show` print of a history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wpjax.errors import WpjaxError

if TYPE_CHECKING:
    from wpjax.results.history import History

MOST_STEPS = 8
"""Steps that a table has columns for; of more, some are shown, the first and the last among them."""


def print_history(history: History, n: int, as_json: bool, kinds: tuple[str, ...] | None = None) -> None:
    """Print when the behaviour appears, and which components carry it when.

    Args:
        history: the history.
        n: components to print, at most.
        as_json: whether to print JSON, which has all steps.
        kinds: kinds of components; None for all.

    Raises:
        WpjaxError: a kind was not swept.
    """
    from rich.table import Table
    from rich.text import Text

    from wpjax.cli.console import out, print_json, print_table
    from wpjax.cli.words import printable
    from wpjax.methods.metrics import reads_anchor

    _check_kinds(history, kinds)
    if as_json:
        print_json(history.figures(n, kinds))
        return
    data, attrs, labels = history.dataset, history.dataset.attrs, history.labels
    shown = sorted({*np.linspace(0, len(labels) - 1, min(len(labels), MOST_STEPS)).round().astype(int).tolist()})
    what = "stage" if history.are_stages else "step"
    base, last = data["base"].values[0], data["expert"].values[-1]
    layer = f" at layer {attrs['metric_layer']}" if reads_anchor(attrs["metric"]) else ""
    share = [f"{history.share[i]:.1%}" for i in shown]
    together = [f"{data['coverage'].values[i]:.1%}" for i in shown]
    courses = history.courses(n, kinds)
    rows = [("all that changed", *share, ""), ("all that were swept", *together, "")]
    for c in courses:
        effects = (_cell(float(c.effects[i]), float(c.known[i])) for i in shown)
        rows.append((c.name, *effects, labels[c.peak if history.are_stages else c.since]))
    print_table(
        printable(f"{attrs['behaviour']}: {base} -> {last}, {attrs['metric']} metric{layer}; shares of the final gap"),
        ("", *(printable(labels[i]) for i in shown), "largest" if history.are_stages else f"half at {what}"),
        [tuple(printable(cell) for cell in row) for row in rows],
    )
    if any("~" in cell for row in rows for cell in row[1:]):
        print("~: estimated by the screen, not replaced there")
    if len(shown) < len(labels):
        print(f"({len(labels)} {what}s; --json and --csv print all of them)")
    out.print(Text("\nIn words", style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for heading, sentence in history.points:
        table.add_row(Text(printable(heading)), Text(printable(sentence)))
    out.print(table)


def history_rows(history: History, n: int | None, kinds: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """Every number of the components of largest effect, one row for each of them and each step.

    Args:
        history: the history.
        n: number of components; None for all.
        kinds: kinds of components; None for all.

    Raises:
        WpjaxError: a kind was not swept.
    """
    _check_kinds(history, kinds)
    data = history.dataset
    position = {name: i for i, name in enumerate(data["name"].values.astype(str).tolist())}
    columns = [str(name) for name, values in data.data_vars.items() if values.dims == ("step", "component")]
    rows = []
    for course in history.courses(n or len(position), kinds):
        i = position[course.name]
        about = {"name": course.name, **{name: data[name].values[i].item() for name in ("layer", "index")}}
        about["kind"] = str(data["kind"].values[i])
        for s, label in enumerate(history.labels):
            cells = {name: data[name].values[s, i].item() for name in columns}
            number = int(data["step"].values[s])
            rows.append({**about, "step": number, "label": label, **{k: "" if v != v else v for k, v in cells.items()}})
    return rows


def _cell(effect: float, known: float) -> str:
    """An effect with its sign; behind a tilde, an estimate of one that was not measured; nothing if there is none."""
    share = effect if effect == effect else known
    if share != share:
        return ""
    text = f"{share:+.1%}"
    return ("" if effect == effect else "~") + ("0.0%" if text in ("+0.0%", "-0.0%") else text)


def _check_kinds(history: History, kinds: Sequence[str] | None) -> None:
    has = history.dataset["swept_kind"].values.astype(str).tolist()
    if absent := [kind for kind in kinds or () if kind not in has]:
        raise WpjaxError(f"kind {absent[0]!r} was not swept, only {', '.join(has)}")
