"""`wpjax interference`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wpjax.arguments import MEASURED, PATCHED, Mesh, NPrompts, Out, Overwrite, Resume, Seed, Setting
from wpjax.cli.options import Json
from wpjax.cli.swept import behaviour_of, pair_of, swept_or_given

if TYPE_CHECKING:
    from wpjax.pairs import Pair
    from wpjax.results.interference import Interference

EXAMPLE = "Example: wpjax interference title.nc quotation.nc --out map.json"


def run(
    results: Annotated[
        list[Path], typer.Argument(help="Result files from `wpjax sweep`: experts of one base, two or more.")
    ],
    out: Out,
    share: Annotated[
        float,
        Setting(
            "The part of the parameters of heads, KV groups and neurons that each set has, about.",
            least=1e-6,
            most=0.99,
            panel=PATCHED,
        ),
    ] = 0.02,
    n_prompts: NPrompts = 32,
    max_new_tokens: Annotated[
        int, Setting("Longest answer that the checkers judge, in tokens.", least=1, panel=MEASURED)
    ] = 32,
    mesh: Mesh = None,
    resume: Resume = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Patch the set of each behaviour, and let the checkers of the others judge: by units, and by whole modules.

    Models, behaviours and checkers are those of the sweeps, as their files name them. Beside the JSON stands a figure.
    """
    from wpjax.runtime.files import check_output
    from wpjax.runtime.shards import Shards, check_parts

    check_output(out, overwrite, inputs=results, ending=".json")
    check_output(out.with_suffix(".png"), overwrite)
    check_parts(out, "interference", resume)

    import wpjax
    from wpjax.cli.console import progress_bars
    from wpjax.errors import WpjaxError
    from wpjax.evaluation.interference import interference
    from wpjax.report.interference import write_interference
    from wpjax.results.sweep_result import SweepResult

    origins = [swept_or_given(SweepResult.from_netcdf(path)) for path in results]
    for path, origin in zip(results, origins, strict=True):
        origin.expect_whole(path, "interference is between sets of heads, KV groups and neurons")
        if origin.checker_is_code:
            raise WpjaxError(
                f"{path} names the checker {origin.checker!r}, which is code, and a result file is not trusted to "
                "choose code: use wp.interference in Python"
            )
    tasks = [behaviour_of(path, origin, False) for path, origin in zip(results, origins, strict=True)]
    for task in tasks:
        task.check_checker()
    pairs: list[Pair] = []
    for origin in origins:
        pair = pair_of(origin, mesh)
        # One copy of the base in memory, if it is one.
        same = pairs and pair.fingerprints[0] == pairs[0].fingerprints[0]
        pairs.append(dataclasses.replace(pair, base=pairs[0].base) if same else pair)
    settings = {
        "version": wpjax.__version__,
        "pairs": [pair.fingerprints for pair in pairs],
        "behaviours": [
            [(p.with_instruction, dict(p.args)) for split in ("sweep", "test") for p in task.select(split, n_prompts)]
            for task in tasks
        ],
        "checkers": [origin.checker for origin in origins],
        "share": share,
        "max_new_tokens": max_new_tokens,
    }
    with Shards(out, "interference", settings, resume) as shards:
        with progress_bars() as progress:
            found = interference(
                pairs,
                tasks,
                share=share,
                n_prompts=n_prompts,
                max_new_tokens=max_new_tokens,
                seed=seed,
                done=shards,
                progress=progress,
            )
        figure = write_interference(found, out, overwrite)
        shards.discard()
    print_interference(found, as_json)
    if not as_json:
        from wpjax.cli.words import print_next, print_written

        print()
        print_written(out, figure)
        print_next(["report", results[0], "--interference", out, "--out", out.with_suffix(".html")])


def print_interference(found: Interference, as_json: bool) -> None:
    """Print the map as tables, and in words."""
    from wpjax.cli.console import print_json, print_table
    from wpjax.cli.words import printable

    if as_json:
        print_json(found.as_json)
        return
    for name in found.levels:
        print_table(
            f"By {name}: what the set of each row brings back (95 % interval), and its overlap with that of the column",
            ("set of", "parts", "share", *found.behaviours),
            found.rows(name),
        )
    print()
    for line in found.summary.splitlines():
        print(printable(line))
