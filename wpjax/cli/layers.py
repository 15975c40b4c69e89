"""`wpjax layers`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wpjax.arguments import Out, Overwrite
from wpjax.cli.options import Json

EXAMPLE = "Example: wpjax layers caps.nc trace scores-4.json scores-8.json --out layers.png"


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
    """Put results side by side, layer by layer: where it appears to live, and where changing it works."""
    from wpjax.runtime.files import check_output

    check_output(out, overwrite, inputs=results)

    from wpjax.cli.console import print_json, print_table
    from wpjax.errors import WpjaxError
    from wpjax.report.layers import write_layers
    from wpjax.results.layers import EDITS, agreement, layer_curves

    curves = layer_curves(results)
    if not curves:
        raise WpjaxError("there is nothing to draw: the results have no layers")
    write_layers(curves, out, overwrite)
    edits = next((curve for curve in curves if curve.source == EDITS), None)
    with_edits = [float("nan") if edits is None or c.source == EDITS else agreement(c, edits) for c in curves]
    if as_json:
        print_json(
            [
                {**c._asdict(), "layers": c.layers.tolist(), "values": c.values.tolist(), "agreement_with_edits": rho}
                for c, rho in zip(curves, with_edits, strict=True)
            ]
        )
        return
    print_table(
        "By layer",
        ("", "what", "largest at layer", "share", "rank corr. with edits"),
        [
            (c.source, c.label, str(c.peak[0]), f"{c.peak[1]:.2f}", "" if rho != rho else f"{rho:+.2f}")
            for c, rho in zip(curves, with_edits, strict=True)
        ],
    )
    print(f"\nwrote {out}")
