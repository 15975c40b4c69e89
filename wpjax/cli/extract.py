"""`wpjax extract`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wpjax.arguments import (
    MEASURED,
    PATCHED,
    RUNNING,
    ChangeInt8,
    ChangeRank,
    ChangeTolerance,
    Mesh,
    NPrompts,
    Out,
    Overwrite,
    Resume,
    Seed,
    Setting,
)
from wpjax.cli.options import Json
from wpjax.cli.swept import Given, SweepFile, SweptNewTokens, behaviour_of, pair_of, swept_or_given

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wpjax.behaviours import Behaviour
    from wpjax.evaluation.extraction import Extraction, TriedSet
    from wpjax.runtime.progress import Schedule

EXAMPLE = "Example: wpjax extract title.nc --recover 0.9 --text notes.txt --others quotation --out title.safetensors"


def run(
    result: SweepFile,
    given: Given,
    out: Out,
    recover: Annotated[
        float | None,
        Setting(
            "Find the smallest set that brings back this share of the behaviour, by the checker; 0.9 unless --share or "
            "--top is given.",
            least=0.01,
            most=1,
        ),
    ] = None,
    share: Annotated[
        float | None,
        Setting(
            "Instead: take the best components within this share of the parameters of all components of their kinds.",
            least=1e-9,
            most=1,
        ),
    ] = None,
    top: Annotated[int | None, Setting("Instead: take this number of the best components.", least=1)] = None,
    by: Annotated[str | None, Setting("The ranking to search along; the set score if absent.", panel=PATCHED)] = None,
    drops: Annotated[
        int,
        Setting(
            "Blocks of the set that are left out on trial, at most, once its size is found; 0 for none.",
            least=0,
            most=10000,
            panel=PATCHED,
        ),
    ] = 40,
    n_prompts: NPrompts = 32,
    max_new_tokens: SweptNewTokens = None,
    text: Annotated[
        Path | None,
        Setting("A text file: its perplexity before and after is measured (its first 4,096 tokens).", panel=MEASURED),
    ] = None,
    others: Annotated[
        tuple[str, ...] | None,
        Setting(
            "Other behaviours whose pass rates are measured, too, comma-separated: built-in ones, or "
            "FILE.jsonl=CHECKER.",
            separator=",",
            panel=MEASURED,
        ),
    ] = None,
    n_random: Annotated[
        int, Setting("Random sets of as many parameters to compare with.", least=0, most=1000, panel=MEASURED)
    ] = 2,
    rank: ChangeRank = None,
    tolerance: ChangeTolerance = None,
    int8: ChangeInt8 = False,
    dry_run: Annotated[
        bool, Setting("Let base and expert answer, say how long the rest takes, and stop.", panel=RUNNING)
    ] = False,
    resume: Resume = False,
    seed: Seed = 0,
    mesh: Mesh = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find the smallest set of components that carries the behaviour, and write it as a patch file.

    The set is searched on the prompts that were swept. What it brings back, and what it does besides, is measured on
    held-out prompts. Models, behaviour and checker are those of the sweep, as its file names them.
    """
    from wpjax.runtime.files import beginning_of_text, check_output
    from wpjax.runtime.shards import Shards, check_parts

    check_output(out, overwrite, inputs=(result, *given.inputs, text))
    check_parts(out, "extract", resume)
    words = None if text is None else beginning_of_text(text)

    from wpjax.evaluation.extract import GoalMissed, check_goal, extract
    from wpjax.patchfiles import Encoding, save_patch
    from wpjax.results.sweep_result import SweepResult

    check_goal(recover, share, top)
    encoding = Encoding(rank, tolerance, int8)
    encoding.check()
    swept = SweepResult.from_netcdf(result)
    asked = swept_or_given(swept, given)
    asked.expect_whole(result, "a patch file holds slices of matrices")
    n_new = max_new_tokens or asked.max_new_tokens or 32

    import wpjax
    from wpjax.cli.console import progress_bars

    task, more = behaviour_of(result, asked, given.has_checker), [other_behaviour(name) for name in others or ()]
    for one in (task, *more):
        one.check_checker()
    pair = pair_of(asked, mesh)
    # Everything that finished parts depend on. A part is of one set, whatever goal or ranking led to it.
    settings = {
        "version": wpjax.__version__,
        "pair": pair.fingerprints,
        "tokenizer": asked.tokenizer,
        "behaviours": [
            [(p.with_instruction, dict(p.args)) for split in ("sweep", "test") for p in one.select(split, n_prompts)]
            for one in (task, *more)
        ],
        "checkers": [asked.checker, *(others or ())],
        "text": words,
        "max_new_tokens": n_new,
    }
    with Shards(out, "extract", settings, resume) as shards:
        with progress_bars() as progress:

            def planned(schedule: Schedule) -> None:
                progress.planned(schedule)
                if dry_run:
                    raise typer.Exit

            try:
                found = extract(
                    pair,
                    task,
                    swept,
                    recover=recover,
                    share=share,
                    top=top,
                    by=by,
                    others=more,
                    text=words,
                    n_prompts=n_prompts,
                    max_new_tokens=n_new,
                    most_drops=drops,
                    n_random=n_random,
                    seed=seed,
                    done=shards,
                    progress=progress,
                    planned=planned,
                )
            except GoalMissed as error:
                shards.discard()
                if not as_json:
                    with progress.paused():
                        print_tried(error.tried)
                raise
        patch = save_patch(
            out,
            pair,
            found.components,
            behaviour=found.behaviour,
            measured=found.measured,
            ranked_by=found.ranked_by,
            encoding=encoding,
            overwrite=overwrite,
            ignore_config=asked.ignore_config,
        )
        shards.discard()
    print_extraction(found, out, as_json, {"encoding": patch.info.encoding, "error": patch.info.error})
    if not as_json:
        from wpjax.cli.words import print_next, print_written

        info = patch.info
        print()
        print_written(
            out, about="" if info.encoding == "exact" else f"{info.encoding}, relative error {info.error:.2g}"
        )
        print_next(["apply", "--base", asked.base, "--patch", out, "--out", out.with_suffix("")])


def other_behaviour(name: str) -> Behaviour:
    """A behaviour as `--others` names it: a built-in one, or FILE.jsonl=CHECKER.

    Raises:
        BehaviourError: there is no such behaviour, or it cannot be read.
    """
    from wpjax import behaviours
    from wpjax.errors import BehaviourError

    if name.endswith(".jsonl"):
        raise BehaviourError(
            f"--others {name}: no checker, and answers are to be judged; name one: --others '{name}=contains:...'"
        )
    file, found, checker = name.partition(".jsonl=")
    return behaviours.behaviour(file + ".jsonl", checker) if found else behaviours.behaviour(name)


def print_tried(tried: Sequence[TriedSet]) -> None:
    """Print the sets of a search: how large, how much they bring back, how far they move unasked answers."""
    from wpjax.cli.console import print_table
    from wpjax.evaluation.extraction import bounded

    shown = [t for t in tried if t.stage == "ranking" or t.reaches]
    shown.sort(key=lambda t: t.n_parameters)
    n = max((t.n_prompts for t in tried), default=0)
    print_table(
        f"Sets that were tried, on {n} swept prompts (95 % interval; KL from the base, unasked, in nats a token)",
        ("set", "components", "parameters", "share", "brings back", "KL", "goal"),
        [
            (
                "leading" if t.stage == "ranking" else "thinned out",
                f"{t.n_components:,}",
                f"{t.n_parameters:,}",
                f"{t.share:.2%}",
                bounded(t.recovery) + ("" if t.n_prompts == n else f" of {t.n_prompts}"),
                _number(t.divergence),
                "yes" if t.reaches else "no",
            )
            for t in shown
        ],
    )
    if any(t.n_prompts < n for t in shown):
        print("a set that could not reach the goal any more was given up after the prompts that are named")
    n_failed = len(tried) - len(shown)
    if n_failed:
        print(f"{n_failed} more sets, without blocks that turned out to be needed, did not reach the goal")


def print_extraction(found: Extraction, out: Path, as_json: bool, stored: Mapping[str, str | float]) -> None:
    """Print what was found: the sets that were tried, the models on held-out prompts, the verdict.

    Args:
        found: what was found.
        out: the patch file.
        as_json: whether to print JSON.
        stored: how the patch is stored, for the JSON.
    """
    from wpjax.cli.console import print_json, print_table
    from wpjax.cli.words import printable
    from wpjax.evaluation.extraction import bounded

    if as_json:
        print_json(
            {
                "out": str(out),
                "behaviour": found.behaviour,
                "ranked_by": found.ranked_by,
                "components": [c.name for c in found.components],
                **found.measured,
                **stored,
                "tried": [t._asdict() | {"recovery": t.recovery._asdict()} for t in found.tried],
                "summary": found.summary,
            }
        )
        return
    if found.tried:
        print_tried(found.tried)
    split, n = found.measured_on
    harm = found.harm
    texts = {} if harm.perplexity is None else harm.perplexity.models

    def row(model: str) -> list[str]:
        kl = harm.divergence.get(model)
        cells = [model if model != "complement" else "all but the set", bounded(found.passes[model])]
        cells += [bounded(found.recovery[model]) if model in found.recovery else ""]
        cells += ["" if kl is None else f"{kl.mean:.3g} [{kl.low:.3g}, {kl.high:.3g}]"]
        cells += [f"{texts[model]:.4g}" if model in texts else ""] if texts else []
        return cells + [bounded(o.passes[model]) if model in o.passes else "" for o in harm.others.values()]

    print_table(
        f"\nOn {n} {split} prompts (95 % interval; KL from the base, unasked, in nats a token)",
        ("model", "passes", "brings back", "KL", *["perplexity"][: len(texts)], *harm.others),
        [row(model) for model in found.passes],
    )
    print(f"\n{printable(found.summary)}")


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"
