"""`wpjax report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wpjax.arguments import Overwrite, Setting

EXAMPLE = "Example: wpjax report title.nc --out title.html"


def run(
    result: Annotated[Path, typer.Argument(help="A result file from `wpjax sweep`.")],
    out: Annotated[Path, Setting("The page to write. The figures are written beside it, as PNG files.")] = Path(
        "report.html"
    ),
    execution: Annotated[
        Path | None,
        Setting("Result of a sweep with --given-anchor: its best components join the hierarchy as executors."),
    ] = None,
    rows: Annotated[int, Setting("Components in the table of the page.", least=1)] = 100,
    overwrite: Overwrite = False,
) -> None:
    """Draw the result of a sweep: one HTML page that needs no network, and its figures as PNG files."""
    from wpjax.report import write_report
    from wpjax.results.sweep_result import SweepResult
    from wpjax.runtime.files import check_output

    check_output(out, overwrite, inputs=(result, execution))
    swept, later = SweepResult.from_netcdf(result), None if execution is None else SweepResult.from_netcdf(execution)
    for path in write_report(swept, out, execution=later, source=result, n_rows=rows, overwrite=overwrite):
        print(path)
