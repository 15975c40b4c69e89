"""`wpjax validate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from wpjax.arguments import INPUT, MEASURED, Mesh, NPrompts, Overwrite, Resume, Seed, Setting
from wpjax.cli.options import Json, Processes
from wpjax.cli.swept import Given, SweepFile, SweptNewTokens, behaviour_of, pair_of, swept_or_given

if TYPE_CHECKING:
    from wpjax.results.curves import Curves
    from wpjax.stats import Interval

EXAMPLE = "Example: wpjax validate title.nc --out title.curves.nc"


def run(
    result: SweepFile,
    given: Given,
    processes: Processes,
    out: Annotated[
        Path | None, Setting("Where to write; beside the result if absent: title.curves.nc for title.nc.")
    ] = None,
    other_behaviour: Annotated[
        bool,
        Setting("Allow a --behaviour that was not swept. The curves are of it, and say so.", panel=INPUT),
    ] = False,
    by: Annotated[
        str | None,
        Setting("The ranking to test, say effect or screen; the set score if absent.", panel=MEASURED),
    ] = None,
    n_prompts: NPrompts = 32,
    points: Annotated[
        int, Setting("Sizes of sets on each curve, from one component to all.", least=2, most=1000, panel=MEASURED)
    ] = 10,
    n_random: Annotated[int, Setting("Random orders to compare with.", least=1, most=1000, panel=MEASURED)] = 3,
    max_new_tokens: SweptNewTokens = None,
    resume: Resume = False,
    seed: Seed = 0,
    mesh: Mesh = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Patch a sweep's best components into the base, and out of the expert; the checker judges the answers.

    Models, behaviour and checker are those of the sweep, as its file names them.
    """
    from wpjax.runtime.files import check_output
    from wpjax.runtime.processes import Together, agree, together
    from wpjax.runtime.shards import Shards, check_parts

    out = result.with_suffix(".curves.nc") if out is None else out
    with processes.joined() as member:
        if member.writes:
            check_output(out, overwrite, inputs=(result, *given.inputs))
            check_parts(out, "validate", resume)

        from wpjax.report.curves import curve_figures
        from wpjax.results.sweep_result import SweepResult

        for figure in curve_figures(out) if member.writes else ():
            check_output(figure, overwrite)
        swept = SweepResult.from_netcdf(result)
        asked = swept_or_given(swept, given)
        n_new = max_new_tokens or asked.max_new_tokens or 32

        import wpjax
        from wpjax.cli.console import progress_bars
        from wpjax.cli.words import print_answers, print_next, print_written
        from wpjax.evaluation.validation import validate
        from wpjax.report.curves import write_curves

        task = behaviour_of(result, asked, given.has_checker)
        pair = pair_of(asked, mesh)
        settings = {  # everything that finished parts depend on
            "version": wpjax.__version__,
            "pair": pair.fingerprints,
            "tokenizer": asked.tokenizer,
            "result": [swept.dataset.attrs["date"], swept.best().tolist(), by],
            "behaviour": [(p.with_instruction, dict(p.args)) for p in task.select("test", n_prompts)],
            "checker": asked.checker,
            "points": points,
            "n_random": n_random,
            "max_new_tokens": n_new,
            "seed": seed,
        }
        agree("settings", {**settings, "mesh": mesh})
        with together(lambda: Shards(out, "validate", settings, resume)) as done:
            with progress_bars() as progress:
                curves = validate(
                    pair,
                    task,
                    swept,
                    other_behaviour=other_behaviour,
                    by=by,
                    n_prompts=n_prompts,
                    n_points=points,
                    n_random=n_random,
                    max_new_tokens=n_new,
                    seed=seed,
                    done=done,
                    progress=progress,
                )
            if not member.writes:
                return
            if asked.checker is not None:
                curves.dataset.attrs["checker"] = asked.checker
            figures = write_curves(curves, out, overwrite)
            assert isinstance(done, Shards | Together)
            done.discard()
    print_curves(curves, as_json)
    if not as_json:
        print_answers(curves.answers)
        print()
        print_written(out, *figures)
        print_next(["report", result, out, "--out", out.with_suffix(".html")])


def print_curves(curves: Curves, as_json: bool) -> None:
    """Print the areas under the curves of every ranking, and the calibration of every score."""
    from wpjax.cli.console import print_json, print_table
    from wpjax.cli.words import printable
    from wpjax.results.curves import BINS, CHECKS, DIRECTIONS

    measures = curves.measures
    areas = {
        direction: {name: {m: curves.area(m, direction, r) for m in measures} for r, name in enumerate(curves.rankings)}
        for direction in DIRECTIONS
    }
    calibration = curves.calibration()
    if as_json:
        tree = {d: {n: {m: a._asdict() for m, a in f.items()} for n, f in of.items()} for d, of in areas.items()}
        print_json(
            {
                "areas": tree,
                "calibration": [c._asdict() for c in calibration],
                "gaps": {m: curves.gap(m)._asdict() for m in measures},
                "summary": curves.summary,
                **{n: curves.dataset.attrs.get(n) for n in ("behaviour", "swept_behaviour", "anchor_acceptance")},
            }
        )
        return
    print(f"{printable(curves.summary)}\n")
    titles = {"restore": "Brought into the base", "knockout": "\nTaken out of the expert"}
    for direction, of in areas.items():
        print_table(
            f"{titles[direction]}: mean share along the curve (95 % interval)",
            ("ranking", "pass the checker", "loosely"),
            [(name, *(_bounded(figures[check]) for check in CHECKS)) for name, figures in of.items()],
        )
    print_table(
        f"\nShare of answers that pass, by the share that a score gives ({calibration[0].n_sets} patched models)",
        ("score", *(f"{max(low, 0):.1f}-{high:.1f}" if math.isfinite(high) else f"{low:.1f}+" for low, high in BINS),
         "rank corr."),
        [
            (c.measure, *("" if math.isnan(p) else f"{p:.0%}" for p in c.passing), _figure(c.rho))
            for c in calibration
        ],
    )  # fmt: skip
    for measure in measures:
        gap = curves.gap(measure)
        if not gap.low > 0:
            print(f"\nno share by {measure}: expert minus base is {gap.mean:.3g} [{gap.low:.3g}, {gap.high:.3g}]")
    attrs = curves.dataset.attrs
    if "swept_behaviour" in attrs:
        print(f"\nthe answers are of {attrs['behaviour']}, the ranking is of {attrs['swept_behaviour']}")
    if "anchor_acceptance" in attrs:
        print(f"\nthe anchor's causal tests: {attrs['anchor_acceptance']}")


def _figure(value: float) -> str:
    """A number as a cell of a table; empty if there is none."""
    return "" if math.isnan(value) else f"{value:.2f}"


def _bounded(area: Interval) -> str:
    """A number with its interval as a cell of a table; empty if there is none."""
    return "" if math.isnan(area.mean) else f"{area.mean:.2f} [{area.low:.2f}, {area.high:.2f}]"
