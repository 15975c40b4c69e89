"""`wpjax collect`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from wpjax.arguments import INPUT, OUTPUT, Out, Overwrite, Setting, SweepConfig, as_read
from wpjax.cli.options import Json

EXAMPLE = "Example: wpjax collect parts --out title.nc"

NotThere = "if it is not where the parts found it."


def run(
    shards: Annotated[Path, typer.Argument(help="The folder that the parts of the sweep share.", metavar="DIR")],
    out: Out,
    base: Annotated[str | None, Setting(f"The base model, {NotThere}", panel=INPUT)] = None,
    expert: Annotated[str | None, Setting(f"The expert model, {NotThere}", panel=INPUT)] = None,
    behaviour: Annotated[str | None, Setting(f"The .jsonl file of the behaviour, {NotThere}", panel=INPUT)] = None,
    anchor: Annotated[Path | None, Setting(f"The anchor file, {NotThere}", panel=INPUT)] = None,
    checker: Annotated[
        str | None, Setting("The checker, if it has the form module:function: code must be named again.", panel=INPUT)
    ] = None,
    show: Annotated[int, Setting("Rows to print.", least=1, panel=OUTPUT)] = 20,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Put the parts of a sweep together (`wpjax sweep --part`): the result is that of one process, bit for bit."""
    config = config_of(shards)
    files = {"base": base, "expert": expert, "behaviour": behaviour, "checker": checker}
    given: dict[str, Any] = {name: value for name, value in files.items() if value is not None}
    if anchor is not None:
        given["anchor" if config.given_anchor is None else "given_anchor"] = anchor
    config = dataclasses.replace(config, out=out, shards=shards, overwrite=overwrite, **given)

    from wpjax.errors import BehaviourError
    from wpjax.results.origin import Origin

    origin = Origin(config.base, config.expert, config.behaviour, config.checker)
    if origin.checker_is_code and checker is None:
        raise BehaviourError(
            f"{shards} names the checker {config.checker!r}, which is code, and a folder is not trusted to choose "
            f"code: pass --checker {config.checker} if it is yours"
        )
    config.check()  # before anything heavy is imported

    from wpjax.cli.sweep import run_and_print

    run_and_print(config, show, as_json)


def config_of(shards: Path) -> SweepConfig:
    """What the parts of a sweep were asked for, as their folder records it.

    Raises:
        OutputError: the folder holds no parts of a sweep, or what it records is damaged.
    """
    from wpjax.errors import OutputError, WpjaxError
    from wpjax.runtime.farm import check_farm
    from wpjax.runtime.shards import MANIFEST, read_manifest

    check_farm(shards, {})
    try:
        return as_read(read_manifest(shards)["arguments"]["config"])
    except (KeyError, AttributeError, WpjaxError) as error:
        raise OutputError(f"{shards / MANIFEST} is damaged ({error}); begin anew in another folder") from error
