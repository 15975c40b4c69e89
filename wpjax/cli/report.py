"""`wpjax report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wpjax.arguments import Overwrite, Setting
from wpjax.cli.options import Json
from wpjax.cli.swept import SweepFile

EXAMPLE = "Example: wpjax report title.nc title.curves.nc --out title.html"


def run(
    result: SweepFile,
    curves: Annotated[
        Path | None,
        typer.Argument(help="Its curves, from `wpjax validate`: the page shows them, and the answers in them, too."),
    ] = None,
    out: Annotated[Path, Setting("The page to write. The figures are written beside it, as PNG files.")] = Path(
        "report.html"
    ),
    execution: Annotated[
        Path | None,
        Setting("Result of a sweep with --given-anchor: its best components join the hierarchy as executors."),
    ] = None,
    interference: Annotated[
        Path | None,
        Setting(
            "A map from `wpjax interference` that this behaviour is on: the page shows what sets do to one another."
        ),
    ] = None,
    layers: Annotated[
        Path | None,
        Setting("Results by layer from `wpjax layers`: the page shows where it appears to live, and where edits work."),
    ] = None,
    rows: Annotated[int, Setting("Components in the table of the page.", least=1)] = 100,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw the result of a sweep: one HTML page that needs no network, and its figures as PNG files."""
    from wpjax.cli.console import print_json
    from wpjax.cli.words import print_written
    from wpjax.errors import OtherResult
    from wpjax.report import write_report
    from wpjax.results.curves import Curves
    from wpjax.results.interference import Interference
    from wpjax.results.layers import read_layers
    from wpjax.results.sweep_result import SweepResult
    from wpjax.runtime.files import check_output

    check_output(out, overwrite, inputs=(result, curves, execution, interference, layers))
    try:
        swept = SweepResult.from_netcdf(result)
    except OtherResult as error:
        raise OtherResult(f"{error}; a page is of a sweep: wpjax report SWEEP.nc {result}") from error
    later = None if execution is None else SweepResult.from_netcdf(execution)
    validated = None if curves is None else Curves.from_netcdf(curves)
    found = None if interference is None else Interference.from_json(interference)
    written = write_report(
        swept,
        out,
        execution=later,
        curves=validated,
        interference=found,
        layers=None if layers is None else read_layers(layers),
        source=result,
        n_rows=rows,
        overwrite=overwrite,
    )
    if as_json:
        print_json({"files": [str(path) for path in written]})
        return
    print_written(*written, about="open the first in a browser")
