"""`wpjax compare`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import typer

from wpjax.arguments import Setting
from wpjax.cli.options import Json

EXAMPLE = "Example: wpjax compare title.nc capital.nc --top 20"


def run(
    a: Annotated[Path, typer.Argument(help="A result file from `wpjax sweep`.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    by: Annotated[str | None, Setting("The ranking to compare, say screen; that of each result if absent.")] = None,
    top: Annotated[int, Setting("Components of each kind in a top.", least=1)] = 10,
    as_json: Json = False,
) -> None:
    """Compare two sweeps: do they rank alike, do their tops overlap, and which effects surely differ?"""
    from wpjax.cli.console import print_json, print_table
    from wpjax.cli.words import printable
    from wpjax.results.comparison import compare
    from wpjax.results.sweep_result import SweepResult

    found = compare(SweepResult.from_netcdf(a), SweepResult.from_netcdf(b), by=by, top=top)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    names = [printable(path.stem) for path in (a, b)]
    if found.differs:
        rows = [(name, *map(printable, values)) for name, values in found.differs.items()]
        print_table("What differs between the two", ("", *names), rows)
    else:
        print("The two were made in the same way from the same models and prompts.")
    print_table(
        f"\nHow alike they rank ({' and '.join(dict.fromkeys(found.by))})",
        ("kind", "in both", "rank correlation", "top", "shared", "by chance"),
        [
            (k.kind, f"{k.n_common:,}", _number(k.rho, ".2f"), f"{k.n_top}", f"{k.n_shared}", f"{k.by_chance:.1f}")
            for k in found.kinds
        ],
    )
    if found.unpaired:
        print_table(
            "\nThe tops, side by side (95 % interval)",
            ("component", *names, ""),
            [(side.name, _bounded(side.a), _bounded(side.b), "differ" if side.apart else "") for side in found.sides],
        )
        if found.n_intervals:
            print(
                f"\nof {found.n_intervals:,} components with an interval in both, {found.n_apart:,} have intervals "
                "without a common point"
            )
        print(f"differences are not tested query by query: {found.unpaired}")
        return
    print_table(
        "\nThe tops, side by side (95 % interval of the difference, over queries)",
        ("component", *names, "difference", "q"),
        [
            (
                side.name,
                f"{side.a[0]:+.4f}",
                f"{side.b[0]:+.4f}",
                _bounded(side.difference),
                _number(side.q_value, ".2g"),
            )
            for side in found.sides
        ],
    )
    print(f"\nof {found.n_tested:,} components that were replaced in both, {found.n_differ:,} differ with q < 0.05")
    if found.reach and not found.n_differ:
        print(found.reach)


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"


def _bounded(figures: tuple[float, float, float]) -> str:
    value, low, high = figures
    if math.isnan(value):
        return ""
    return f"{value:+.4f}" + ("" if math.isnan(low) else f" [{low:+.4f}, {high:+.4f}]")
