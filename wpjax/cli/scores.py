"""`wpjax scores`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from wpjax.arguments import PATCHED, IgnoreConfig, Overwrite, Setting
from wpjax.cli.options import Json
from wpjax.cli.swept import Given, SweepFile, SweptBase, swept_or_given

EXAMPLE = "Example: wpjax scores title.nc --out title.safetensors"


def run(
    result: SweepFile,
    out: Annotated[Path, Setting("The .safetensors file to write; what it holds is told in a .json file beside it.")],
    by: Annotated[str | None, Setting("The ranking to publish; that for sets if absent.", panel=PATCHED)] = None,
    kinds: Annotated[
        tuple[str, ...] | None,
        Setting(
            "Kinds of components, comma-separated; the finest that were swept if absent.", separator=",", panel=PATCHED
        ),
    ] = None,
    base: SweptBase = None,
    ignore_config: IgnoreConfig = (),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Publish a sweep's scores as numbers of tensors, by their names in the model's files, for merging."""
    from wpjax.runtime.files import check_output

    for path in (out, out.with_suffix(".json")):
        check_output(path, overwrite, inputs=[result])

    from wpjax.checkpoints.rewrite import open_model
    from wpjax.cli.console import print_json
    from wpjax.merging.scores import scores_of, write_scores
    from wpjax.results.sweep_result import SweepResult

    swept = SweepResult.from_netcdf(result)
    asked = swept_or_given(swept, Given(base, ignore_config=ignore_config))
    asked.expect_whole(result, "scores of tensors are of their own numbers")
    cfg = open_model(asked.base, asked.ignore_config).cfg
    scores = scores_of(cfg, swept, by, kinds)
    files = write_scores(out, cfg, scores, overwrite=overwrite)
    if as_json:
        print_json({"files": [str(file) for file in files], "n_components": len(scores.components), **scores.about})
    else:
        from wpjax.cli.words import print_written

        print_written(*files, about=f"{scores.about['ranking']} of {len(scores.components):,} components")
