"""`wpjax sweep`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

from wpjax.arguments import Setting, SweepConfig
from wpjax.cli.options import Json
from wpjax.methods import find_method
from wpjax.methods.metrics import reads_anchor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wpjax.results.sweep_result import Row, SweepResult

EXAMPLE = "Example: wpjax sweep --base tiny:base --expert tiny:expert --behaviour tiny:title --out title.nc"

MARKS = ("anchor_acceptance", "behaviour_differs")
"""Attributes that are printed with every ranking, beside those of the method: they say whether to trust it."""


def run(
    config: SweepConfig, show: Annotated[int, Setting("Rows to print.", least=1)] = 20, as_json: Json = False
) -> None:
    """Measure how much of the behaviour each component's weights carry, and write the result."""
    config.check()  # before anything heavy is imported

    from wpjax.cli.console import progress_bars
    from wpjax.study import run_study

    with progress_bars() as progress:
        study = run_study(config, progress)
    if study.no_set_score:
        print(f"no set score: {study.no_set_score}", file=sys.stderr)
    print_result(study.result, show, as_json)
    if not as_json:
        out = config.out
        print(f"\nwrote {out}; for the pictures: wpjax report {out} --out {out.with_suffix('.html')}")


def print_result(result: SweepResult, n: int, as_json: bool) -> None:
    """Print the n components that rank highest, and below them the gap, the coverage and the noise floor."""
    from wpjax.cli.console import print_json, print_table
    from wpjax.columns import EFFECT, find_column

    data, attrs = result.dataset, result.dataset.attrs
    method = find_method(str(attrs.get("method")))
    by = result.ranking
    rows, exact, column = result.top(n, by=by), by == EFFECT, find_column(by)
    coverage = dict(
        zip(result.dataset["swept_kind"].values.tolist(), result.dataset["coverage_joint"].values.tolist(), strict=True)
    )
    if as_json:
        print_json(
            {"ranked_by": by, "top": [r._asdict() for r in rows], "coverage": {**coverage, "all": attrs["coverage"]}}
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
    at_once = ", ".join(f"{kind} {n}" for kind, n in json.loads(attrs["rows_per_program"]).items())
    parts = ", ".join(f"{kind} {share:.0%}" for kind, share in coverage.items())
    print(
        f"\ngap {attrs['gap_mean']:.3g} [{attrs['gap_low']:.3g}, {attrs['gap_high']:.3g}] on "
        f"{attrs['n_prompts']} prompts; recovered jointly: {parts}, together {attrs['coverage']:.0%}"
        + (f"; noise floor {attrs['noise_floor']:.1e}; patches at once: {at_once}" if exact else "")
        + (f"\n{method.note(result)}" if method and method.note else "")
        + (f"\nthe anchor's causal tests: {attrs['anchor_acceptance']}" if "anchor_acceptance" in attrs else "")
        + (f"\ndo base and expert differ: {attrs['behaviour_differs']}" if "behaviour_differs" in attrs else "")
    )
