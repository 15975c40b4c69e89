"""`wpjax export`."""

from __future__ import annotations

from typing import Annotated

from wpjax.arguments import PATCHED, IgnoreConfig, Out, Overwrite, Setting
from wpjax.cli.options import Json
from wpjax.cli.swept import Given, SweepFile, SweptBase, SweptDtype, SweptExpert, pair_of, swept_or_given

EXAMPLE = "Example: wpjax export title.nc --top 100 --out title-top100"


def run(
    result: SweepFile,
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
    """Write the base with a sweep's best components of the expert, as a Hugging Face folder, and its patch."""
    from wpjax.runtime.files import check_output

    check_output(out, overwrite, "config.json")
    check_output(out.with_name(f"{out.name}.safetensors"), overwrite)

    from wpjax.cli.console import print_json
    from wpjax.evaluation.export import choose, export, patch_path
    from wpjax.results.sweep_result import SweepResult

    swept = SweepResult.from_netcdf(result)
    swept_or_given(swept).expect_whole(result, "a patch file holds slices of matrices")
    rows = choose(swept, top, by=by, kinds=kinds)
    asked = swept_or_given(swept, Given(base, expert, dtype=dtype, ignore_config=ignore_config))
    pair = pair_of(asked)
    export(pair, swept, rows, out, by=by, knockout=knockout, overwrite=overwrite, ignore_config=asked.ignore_config)
    if as_json:
        print_json({"out": str(out), "patch": str(patch_path(out)), "components": [row.name for row in rows]})
        return
    host = "expert" if knockout else "base"
    from wpjax.cli.words import print_next, print_written

    patch = patch_path(out)
    print_written(out, patch, about=f"the {host} with {len(rows):,} components, and the patch, which can undo it")
    print_next(["apply", "--base", out, "--patch", patch, "--undo", "--out", out.with_name(f"{out.name}-undone")])
