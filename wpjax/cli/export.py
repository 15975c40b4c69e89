"""`wpjax export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wpjax.arguments import PATCHED, IgnoreConfig, Out, Overwrite, Setting
from wpjax.cli.options import Json
from wpjax.cli.swept import SweptBase, SweptDtype, SweptExpert, pair_of, swept_or_given

EXAMPLE = "Example: wpjax export title.nc --top 100 --out title-top100"


def run(
    result: Annotated[Path, typer.Argument(help="A result file from `wpjax sweep`.")],
    top: Annotated[int, Setting("Number of components of the expert that the base gets.", least=1)],
    out: Out,
    by: Annotated[
        str | None, Setting("The ranking whose best components are taken; the set score if absent.", panel=PATCHED)
    ] = None,
    kinds: Annotated[
        tuple[str, ...] | None,
        Setting("Take components of these kinds only, comma-separated.", separator=",", panel=PATCHED),
    ] = None,
    knockout: Annotated[
        bool, Setting("The reverse: the expert with these components of the base.", panel=PATCHED)
    ] = False,
    base: SweptBase = None,
    expert: SweptExpert = None,
    dtype: SweptDtype = None,
    ignore_config: IgnoreConfig = (),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the base with a sweep's best components of the expert, as a Hugging Face folder with a model card."""
    from wpjax.runtime.files import check_output

    check_output(out, overwrite, "config.json")

    from wpjax.cli.console import print_json
    from wpjax.evaluation.export import choose, export
    from wpjax.results.sweep_result import SweepResult

    swept = SweepResult.from_netcdf(result)
    rows = choose(swept, top, by=by, kinds=kinds)
    asked = swept_or_given(swept, base=base, expert=expert, dtype=dtype, ignore_config=ignore_config)
    export(pair_of(asked), swept, rows, out, by=by, knockout=knockout, overwrite=overwrite)
    if as_json:
        print_json({"out": str(out), "components": [row.name for row in rows]})
        return
    print(f"wrote {out}: {'expert' if knockout else 'base'} with {len(rows):,} components, named in {out}/patch.json")
