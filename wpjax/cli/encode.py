"""`wpjax encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wpjax.arguments import ChangeInt8, ChangeRank, ChangeTolerance, Out, Overwrite
from wpjax.cli.options import Json

EXAMPLE = "Example: wpjax encode title.safetensors --int8 --out small.safetensors"


def run(
    patch: Annotated[Path, typer.Argument(help="A patch file that is stored exactly.")],
    out: Out,
    rank: ChangeRank = None,
    tolerance: ChangeTolerance = None,
    int8: ChangeInt8 = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make a patch file smaller: changes in a low rank or in 8 bits, to an error that the new file states.

    What the patch can undo stays exact.
    """
    from wpjax.runtime.files import check_output

    check_output(out, overwrite, inputs=[patch])

    from wpjax.cli.console import print_json
    from wpjax.errors import PatchError
    from wpjax.patchfiles import Encoding, encode_patch, load_patch

    how = Encoding(rank, tolerance, int8)
    how.check()
    if how == Encoding():
        raise PatchError("say how changes are to be stored: --int8, --rank N or --tolerance X")
    made = encode_patch(out, load_patch(patch), how, overwrite)
    sizes = [path.stat().st_size for path in (patch, out)]
    if as_json:
        print_json({"out": str(out), "encoding": made.info.encoding, "error": made.info.error, "bytes": sizes[1]})
        return
    from wpjax.cli.words import print_next, print_written

    stored = f"{made.info.encoding}, relative error {made.info.error:.2g}"
    print_written(out, about=f"{stored}; {sizes[1]:,} bytes, and {sizes[0]:,} before")
    print_next(["apply", "--base", made.info.into, "--patch", out, "--out", out.with_suffix("")])
