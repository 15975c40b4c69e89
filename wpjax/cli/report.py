"""`wpjax report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wpjax.cli.options import OverwriteOption

EXAMPLE = "Example: wpjax report title.nc --out title.html"


def run(
    result: Annotated[Path, typer.Argument(help="A result file from `wpjax sweep`.")],
    out: Annotated[Path, typer.Option("--out", help="The page to write; PNGs go beside it.")] = Path("report.html"),
    execution: Annotated[
        Path | None,
        typer.Option(
            "--execution", help="A sweep with --given-anchor: its components join the hierarchy as executors."
        ),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Components in its table.")] = 100,
    overwrite: OverwriteOption = False,
) -> None:
    """Draw a sweep's result: one HTML page that opens without a network, and its figures as PNG files."""
    from wpjax.files import check_output
    from wpjax.report import write_report
    from wpjax.results import SweepResult

    check_output(out, overwrite)
    swept, later = SweepResult.from_netcdf(result), None if execution is None else SweepResult.from_netcdf(execution)
    for path in write_report(swept, out, execution=later, n_rows=rows, overwrite=overwrite):
        print(path)
