"""`wpjax sweep`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wpjax.arguments import OUTPUT, RUNNING, Setting, SweepConfig, arguments_of, config_values
from wpjax.cli.options import Json, Processes
from wpjax.errors import WpjaxError
from wpjax.methods import find_method
from wpjax.methods.metrics import reads_anchor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wpjax.cli.console import Reporter
    from wpjax.results.sweep_result import Row, SweepResult
    from wpjax.runtime.processes import Member
    from wpjax.runtime.progress import Schedule
    from wpjax.study import Study

EXAMPLE = "Example: wpjax sweep --base tiny:base --expert tiny:expert --behaviour tiny:title --out title.nc"

MARKS = ("anchor_acceptance", "behaviour_differs")
"""Attributes that JSON holds beside those of the method: they say whether to trust the ranking."""


def defaults_from(path: Path) -> dict[str, Any]:
    """The arguments that a file names, as the command line takes them."""
    separators = {arg.name: arg.setting.separator for arg in arguments_of(SweepConfig)}
    return {
        name: separators[name].join(map(str, value)) if isinstance(value, list) and separators[name] else value
        for name, value in config_values(path).items()
    }


def run(
    config: SweepConfig,
    processes: Processes,
    show: Annotated[int, Setting("Rows to print.", least=1, panel=OUTPUT)] = 20,
    as_json: Json = False,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="YAML file of arguments, say wpjax.yaml: base: org/model, n_prompts: 64, and so on. What stands on "
            "the command line wins.",
            # Typer fills `context` in, as it is the first of two parameters without a type.
            callback=lambda context, path: path and setattr(context, "default_map", defaults_from(path)),
            is_eager=True,
            metavar="PATH",
            rich_help_panel=RUNNING,
        ),
    ] = None,
) -> None:
    """Measure how much of the behaviour each component's weights carry, and write the result."""
    del config_file  # what it says is in `config`
    if config.shards is not None and config.part is None:
        raise WpjaxError(f"--shards needs --part; to put finished parts together: wpjax collect {config.shards}")
    if config.part is None:
        with processes.joined() as member:
            run_as(member, config, show, as_json)
        return
    if processes.are_named:
        raise WpjaxError("--part is for processes that know nothing of each other; drop it, or --coordinator")
    config.check()  # before anything heavy is imported

    from wpjax.cli.console import progress_bars
    from wpjax.runtime.progress import in_words

    with progress_bars() as progress:
        begin(progress, config, f"part {config.part} of them, into {config.shards}")
        from wpjax.study import run_part

        def planned(schedule: Schedule) -> None:
            progress.planned(schedule)
            progress.say(f"this part takes about {in_words(schedule.left)}, if it finds nothing that is done already")

        said = run_part(config, progress, tell=progress.note, planned=planned)
    print(f"{said}\nwhen all parts have ended: wpjax collect {shlex.quote(str(config.shards))} --out r.nc")


def run_as(member: Member, config: SweepConfig, show: int, as_json: bool) -> None:
    """Run a study as one of several processes, or alone; only the first one prints.

    Args:
        member: which process this is.
        config: the study.
        show: rows to print.
        as_json: whether to print JSON.
    """
    from wpjax.runtime.processes import agree

    config.check(member.writes)  # before anything heavy is imported
    if member.size > 1:
        agree("arguments", {**config.shared_arguments, "mesh": config.mesh, "memory_mb": config.memory_mb})
    if member.writes:
        run_and_print(config, show, as_json)
    else:
        import warnings

        from wpjax.study import run_study

        warnings.simplefilter("ignore")  # process 0 gives them
        run_study(config, planned=lambda schedule: None)  # every process runs the same programs, also to make a plan


def begin(progress: Reporter, config: SweepConfig, what: str) -> None:
    """Say which sweep begins, then import what it needs.

    Args:
        progress: says it.
        config: the sweep.
        what: what becomes of it, in words.
    """
    progress.say(
        f"sweep of {config.base} -> {config.expert}, {config.behaviour}: {config.metric} metric, method "
        f"{config.method}; {what}"
    )
    from wpjax.cli.compiled import watch_compilation

    watch_compilation()


def run_and_print(config: SweepConfig, show: int, as_json: bool) -> None:
    """Run a study, or collect its parts, and print what it finds.

    Args:
        config: the study.
        show: rows to print.
        as_json: whether to print JSON.
    """
    from wpjax.cli.console import progress_bars
    from wpjax.runtime.progress import in_words

    with progress_bars() as progress:
        begin(progress, config, f"result: {config.out}")
        from wpjax.study import run_study

        def planned(schedule: Schedule) -> None:
            progress.planned(schedule)
            about = in_words(schedule.left_before("set score", "answers to read"))
            less = "" if config.quick else "; less: --quick"
            progress.say(f"the ranking comes after about {about}{less}; more: --n-prompts, --top, --n-steered")

        def ranked(result: SweepResult) -> None:
            with progress.paused():
                print_result(result, show, as_json=False)

        study = run_study(
            config,
            progress,
            tell=progress.note,
            planned=planned if config.shards is None else None,  # of collected parts most is done
            ranked=None if as_json else ranked,
        )
    print_study(study, config.output, show, as_json)


def print_study(study: Study, path: Path, show: int, as_json: bool) -> None:
    """Print what comes after the ranking: answers and verdict; with JSON, all of it."""
    from wpjax.cli.words import print_answers, print_verdict, print_written
    from wpjax.results.verdict import verdict

    if study.no_set_score:
        print(f"no set score: {study.no_set_score}", file=sys.stderr)
    if study.no_answers:
        print(f"no answers to read: {study.no_answers}", file=sys.stderr)
    if as_json:
        print_result(study.result, show, as_json, path=path)
    else:  # the ranking has been printed already
        print_answers(study.result.answers)
        print_verdict(verdict(study.result, path))
        print()
        print_written(path)


def print_result(
    result: SweepResult,
    n: int,
    as_json: bool,
    *,
    by: str | None = None,
    kinds: tuple[str, ...] | None = None,
    path: Path | None = None,
) -> None:
    """Print the components that rank highest, and below them the gap, the coverage and the noise floor.

    Args:
        result: the sweep.
        n: number of components, at most.
        as_json: whether to print JSON, which holds the verdict and the answers, too.
        by: name of the ranking; None for the result's own.
        kinds: kinds of components; None for all.
        path: where the file of the result is, for the commands of the verdict.
    """
    from wpjax.cli.console import print_json, print_table
    from wpjax.columns import EFFECT, find_column
    from wpjax.results.verdict import verdict

    data, attrs = result.dataset, result.dataset.attrs
    method = find_method(str(attrs.get("method")))
    by = by or result.ranking
    rows, exact, column = result.top(n, by=by, kinds=kinds), by == EFFECT, find_column(by)
    coverage = dict(
        zip(result.dataset["swept_kind"].values.tolist(), result.dataset["coverage_joint"].values.tolist(), strict=True)
    )
    if as_json:
        answers = result.answers
        print_json(
            {"ranked_by": by, "top": [r._asdict() for r in rows], "coverage": {**coverage, "all": attrs["coverage"]}}
            | {"verdict": dataclasses.asdict(verdict(result, path))}
            | ({} if answers is None else {"answers": answers._asdict() | {"passes": answers.passes.tolist()}})
            | {name: result.attribute(name) for name in (*MARKS, *(method.marks if method else ())) if name in attrs}
        )
        return
    bounds, tested = (column.bounds, column.is_tested) if column else ((), False)
    position = {name: i for i, name in enumerate(data["name"].values.tolist())}

    def line(r: Row) -> Iterator[str]:  # as many cells as the table below has columns
        yield from (r.name, f"{r.value:+.4f}")
        if bounds:
            low, high = (float(data[bound].values[position[r.name]]) for bound in bounds)
            yield f"[{low:+.4f}, {high:+.4f}]"
        if tested:
            yield f"{r.q_value:.2g}"
        if exact:
            yield "below the noise floor" if r.below_noise_floor else ""

    print_table(
        f"{attrs['behaviour']}: {attrs['base']} -> {attrs['expert']}, {attrs['metric']} metric"
        + (f" at layer {attrs['metric_layer']}" if reads_anchor(attrs["metric"]) else ""),
        ("component", by, *["95 % interval"][: bool(bounds)], *["q"][:tested], *[""][:exact]),
        [tuple(line(r)) for r in rows],
    )
    parts = ", ".join(f"{kind} {share:.0%}" for kind, share in coverage.items())
    print(
        f"\ngap {attrs['gap_mean']:.3g} [{attrs['gap_low']:.3g}, {attrs['gap_high']:.3g}] on "
        f"{attrs['n_prompts']} prompts; recovered jointly: {parts}, together {attrs['coverage']:.0%}"
        + (f"\n{method.note(result)}" if method and method.note else "")
    )
