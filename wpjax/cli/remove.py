"""`wpjax remove`."""

from __future__ import annotations

from typing import Annotated

from wpjax.arguments import MODEL, IgnoreConfig, Out, Overwrite, Setting
from wpjax.cli.apply import PATCH_FILE, Written
from wpjax.cli.options import Json

EXAMPLE = "Example: wpjax remove --expert EXPERT --patch title.safetensors --out WITHOUT"


def run(
    expert: Annotated[str, Setting(f"The model that loses the behaviour: {MODEL} Or an adapter, with --base.")],
    patch: Annotated[str, Setting(PATCH_FILE)],
    out: Out,
    base: Annotated[
        str | None, Setting("The base: needed for an adapter; else, to check that the patch is one of its.")
    ] = None,
    dtype: Written = None,
    ignore_config: IgnoreConfig = (),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Take a behaviour out of an expert: it gets the base's weights at a patch's components."""
    from wpjax.checkpoints.folder import MARKER
    from wpjax.runtime.files import check_output

    check_output(out, overwrite, MARKER, [expert, base, patch])

    from wpjax.checkpoints.rewrite import open_model
    from wpjax.cli.console import print_json, progress_bars
    from wpjax.patchfiles import load_patch, remove_patch

    opened = load_patch(patch)
    with progress_bars() as progress:
        host = None if base is None else open_model(base, ignore_config)
        model = open_model(expert, ignore_config, host)
        found = remove_patch(model, opened, out, base=host, dtype=dtype, overwrite=overwrite, progress=progress)
    names = list(opened.info.components)
    if as_json:
        print_json({"out": str(out), "components": names, "n_weights": found.n_weights})
        return
    from wpjax.cli.words import print_written

    print_written(
        out, about=f"{expert} with {len(names):,} components, {found.n_weights:,} weights, of {opened.info.into}"
    )
