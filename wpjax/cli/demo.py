"""`wpjax demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from wpjax.arguments import Overwrite, Seed, Setting
from wpjax.cli.options import Json

MARKER = "results.nc"
"""The file that every folder of a demo holds: `--overwrite` replaces no other folder."""

EXAMPLE = "Example: wpjax demo --out demo --behaviour title"


def run(
    out: Annotated[Path, Setting("Folder for results.nc, report.html and its figures.")] = Path("wpjax-demo"),
    behaviour: Annotated[str, Setting("One of the six built-in behaviours.")] = "english_capital",
    planted: Annotated[
        bool, Setting("Use the expert whose true components are known, and say how many are found.")
    ] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline on an embedded pair: which heads, KV groups and neurons carry the behaviour?"""
    from wpjax.runtime.files import atomic_output, check_output

    check_output(out, overwrite, MARKER)

    from wpjax.cli.console import progress_bars

    task_name, expert = f"tiny:{behaviour.removeprefix('tiny:')}", "tiny:planted" if planted else "tiny:expert"
    with progress_bars() as progress:
        progress.say(f"demo: tiny:base -> {expert}, {task_name}; results: {out}")
        from wpjax import behaviours
        from wpjax.cli.sweep import print_result
        from wpjax.cli.words import print_answers, print_verdict, printable
        from wpjax.estimators.sweep import sweep
        from wpjax.evaluation.fit_anchor import fit_anchor
        from wpjax.evaluation.reading import answers_to_read
        from wpjax.pairs import load_pair, planted_components
        from wpjax.report import write_report
        from wpjax.results.sweep_result import SweepResult
        from wpjax.results.verdict import verdict

        task = behaviours.behaviour(task_name)
        progress("reading the pair", 0, 1)
        pair = load_pair("tiny:base", expert)
        progress("reading the pair", 1, 1)
        progress("anchor", 0, 1)
        anchor = fit_anchor(pair, task, causal="report", seed=seed, progress=progress)
        batch = task.encode(pair.tokenizer, n_prompts=16)
        result = sweep(pair, batch, anchor, method="exact", seed=seed, progress=progress)
        progress("answers to read", 0, 1)
        answers = answers_to_read(pair, task, result, n_prompts=3)
        progress("answers to read", 1, 1)
        result = SweepResult(answers.added_to(result.dataset))
        progress("report", 0, 1)
        with atomic_output(out, overwrite, MARKER) as folder:
            folder.mkdir()
            result.to_netcdf(folder / MARKER)
            write_report(result, folder / "report.html", source=out / MARKER)
        progress("report", 1, 1)
    print_result(result, 10, as_json, path=out / MARKER)
    if as_json:
        return
    print_answers(answers)
    if planted:
        truth = set(planted_components())
        ranked = [row.name for row in result.top(len(result.dataset["name"]), absolute=True)]
        n_found = sum(name in truth for name in ranked[: len(truth)])
        print(f"\nplanted: {n_found} of {len(truth)} planted components are among the {len(truth)} of largest effect")
    print_verdict(verdict(result, out / MARKER))
    print(f"\nlook at {printable(str(out / 'report.html'))} and {printable(str(out / 'report-overview.png'))}")
