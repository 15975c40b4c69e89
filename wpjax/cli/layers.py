"""`wpjax layers`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wpjax.arguments import Out, Overwrite
from wpjax.cli.options import Json

if TYPE_CHECKING:
    from wpjax.results.layers import LayerCurve

EXAMPLE = "Example: wpjax layers caps.nc trace scores-4.json scores-8.json --out layers.json"


def run(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Results of one model: a .nc of `wpjax sweep`, a folder of `wpjax trace`, a .json of `wpjax circuit`, "
            "and any number of scores of `wpjax edit --facts`, each of another layer."
        ),
    ],
    out: Out,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Put results side by side, layer by layer: where it appears to live, and where changing it works.

    Beside the JSON stands a figure; `wpjax report --layers` puts both on a page.
    """
    from wpjax.runtime.files import check_output

    check_output(out, overwrite, inputs=results, ending=".json")
    check_output(out.with_suffix(".png"), overwrite, inputs=results)

    from wpjax.errors import WpjaxError
    from wpjax.report.layers import write_layers
    from wpjax.results.layers import layer_curves

    curves = layer_curves(results)
    if not curves:
        raise WpjaxError("there is nothing to draw: the results have no layers")
    figure = write_layers(curves, out, overwrite)
    print_layers(curves, as_json)
    if not as_json:
        from wpjax.cli.words import print_next, print_written

        print()
        print_written(out, figure)
        sweeps = [path for path in results if path.suffix == ".nc"]
        for path in sweeps[:1]:
            print_next(["report", path, "--layers", out, "--out", out.with_suffix(".html")])


def print_layers(curves: Sequence[LayerCurve], as_json: bool) -> None:
    """Print where each curve is largest, and how its order of layers agrees with that of the edits."""
    from wpjax.cli.console import print_json, print_table
    from wpjax.results.layers import COLUMNS, TITLE, layer_rows, layers_as_json

    if as_json:
        print_json(layers_as_json(curves))
        return
    print_table(TITLE, COLUMNS, layer_rows(curves))
