"""`wpjax show`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from wpjax.arguments import OUTPUT, Setting
from wpjax.cli.options import Json

if TYPE_CHECKING:
    from wpjax.circuits.ioi_study import IOIStudy
    from wpjax.patchfiles.patch import Patch
    from wpjax.results.sweep_result import SweepResult

EXAMPLE = "Example: wpjax show title.nc --by effect --kinds head,kv_group --top 30"


def run(
    result: Annotated[
        Path,
        typer.Argument(
            help="A result of `wpjax sweep` or `wpjax validate`; a .json of `wpjax interference`, `wpjax circuit`, "
            "`wpjax edit --facts` or `wpjax layers`; a folder of `wpjax trace`; or a patch file."
        ),
    ],
    by: Annotated[str | None, Setting("The ranking of a sweep to print, say effect, screen or set_score.")] = None,
    top: Annotated[int | None, Setting("Components to print: 20, or all with --csv.", least=1)] = None,
    kinds: Annotated[
        tuple[str, ...] | None, Setting("Print components of these kinds only, comma-separated.", separator=",")
    ] = None,
    words: Annotated[
        bool, Setting("Print what was found in sentences, without tables and answers.", panel=OUTPUT)
    ] = False,
    as_csv: Annotated[
        bool, Setting("Print comma-separated values: every number of each component.", option="--csv", panel=OUTPUT)
    ] = False,
    as_json: Json = False,
) -> None:
    """Print a result: a sweep's ranking, verdict and answers; curves; a map; a trace; a circuit; what a patch holds."""
    from wpjax.errors import WpjaxError
    from wpjax.patchfiles.patch import is_safetensors, load_patch

    chosen = [option for option, on in (("--words", words), ("--csv", as_csv), ("--json", as_json)) if on]
    if len(chosen) > 1:
        raise WpjaxError(f"{' and '.join(chosen)}: choose one of them")
    if words:
        if by is not None or kinds is not None or top is not None:
            raise WpjaxError("--words prints no components: leave out --by, --kinds and --top")
        print_words(result)
        return
    if is_safetensors(result):
        if by is not None or kinds is not None or as_csv:
            raise WpjaxError(f"{result} is a patch: --by, --kinds and --csv are for the result of a sweep")
        print_patch(load_patch(result), top or 20, as_json)
        return
    if result.is_dir() or result.suffix == ".json":
        if by is not None or kinds is not None or top is not None or as_csv:
            raise WpjaxError(f"{result} holds no sweep: --by, --kinds, --top and --csv are for the result of a sweep")
        show_json(result, as_json)
        return

    from wpjax.cli.sweep import print_result
    from wpjax.cli.validate import print_curves
    from wpjax.cli.words import print_answers, print_verdict, printable
    from wpjax.results.curves import Curves
    from wpjax.results.opening import open_result
    from wpjax.results.verdict import verdict

    found = open_result(result)
    if isinstance(found, Curves):
        if by is not None or kinds is not None or top is not None:
            raise WpjaxError(f"{result} holds curves: --by, --kinds and --top are for the result of a sweep")
        if as_csv:
            _write_csv(_curve_rows(found))
            return
        print_curves(found, as_json)
        if not as_json:
            print_answers(found.answers)
        return
    if kinds is not None:
        has = found.dataset["swept_kind"].values.astype(str).tolist()
        absent = [kind for kind in kinds if kind not in has]
        if absent:
            raise WpjaxError(f"{result}: kind {absent[0]!r} was not swept, only {', '.join(has)}")
    if as_csv:
        _write_csv(component_rows(found, by or found.ranking, top, kinds))
        return
    print_result(found, top or 20, as_json, by=by, kinds=kinds, path=result)
    if not as_json:
        print_answers(found.answers)
        print_verdict(verdict(found, result))
        if command := found.dataset.attrs.get("command"):
            print(f"\nmade by\n  {printable(str(command))}")


def print_words(path: Path) -> None:
    """Print what a file says, in sentences."""
    from wpjax.cli.words import print_verdict, printable
    from wpjax.patchfiles.patch import is_safetensors, load_patch
    from wpjax.results.curves import Curves
    from wpjax.results.opening import open_result
    from wpjax.results.verdict import verdict

    if is_safetensors(path):
        print_patch(load_patch(path), 20, as_json=False)
        return
    if path.is_dir() or path.suffix == ".json":
        shown = read_shown(path)
        sentences = shown.in_words(shown.result)
    else:
        swept = open_result(path)
        if not isinstance(swept, Curves):
            attrs = swept.dataset.attrs
            print(printable(f"{attrs['base']} -> {attrs['expert']}"))
            print_verdict(verdict(swept, path))
            return
        sentences = swept.summary
    for line in sentences.splitlines():
        print(printable(line))


def show_json(path: Path, as_json: bool) -> None:
    """Print what a JSON file holds, or the one in a folder of `wpjax trace`."""
    shown = read_shown(path)
    shown.show(shown.result, as_json)


class Shown(NamedTuple):
    """What a JSON file holds.

    Attributes:
        result: the result.
        show: prints it, as JSON if asked to.
        in_words: what it says, in sentences.
    """

    result: Any
    show: Callable[[Any, bool], None]
    in_words: Callable[[Any], str]


def read_shown(path: Path) -> Shown:
    """What a JSON file holds, or the one in a folder of `wpjax trace`."""
    from wpjax.circuits.ioi_study import IOIStudy
    from wpjax.cli.edit import print_scores
    from wpjax.cli.interference import print_interference
    from wpjax.cli.layers import print_layers
    from wpjax.cli.trace import print_tracing
    from wpjax.results.edit_scores import EditScores
    from wpjax.results.files import read_json
    from wpjax.results.interference import Interference
    from wpjax.results.layers import curves_of_json, in_words
    from wpjax.results.tracing import TRACE, Tracing

    def summary(result: Any) -> str:
        return str(result.summary)

    # What a file holds -> the result of its content, what prints it, and what says it in words.
    kinds: dict[str, tuple[Callable[[Any], Any], Callable[[Any, bool], None], Callable[[Any], str]]] = {
        "interference": (Interference.of_json, print_interference, summary),
        "tracing": (Tracing.of_json, print_tracing, summary),
        "edit scores": (EditScores.of_json, print_scores, lambda scores: scores.in_words),
        "layers": (curves_of_json, print_layers, in_words),
        "ioi": (IOIStudy.of_json, _print_circuit, summary),
    }
    makers = {
        what: lambda content, make=make, ways=ways: Shown(make(content), *ways) for what, (make, *ways) in kinds.items()
    }
    source = path / TRACE if path.is_dir() else path
    return read_json(source, makers, "result", "wpjax interference, circuit, trace, edit --facts or layers")


def _print_circuit(study: IOIStudy, as_json: bool) -> None:
    """Print a study of `wpjax circuit` again."""
    from wpjax.cli.circuit import print_study
    from wpjax.cli.console import print_json

    if as_json:
        print_json(study.as_json)
    else:
        print_study(study)


def print_patch(patch: Patch, n: int, as_json: bool) -> None:
    """Print what a patch says of itself, and its first components."""
    import dataclasses

    from wpjax.cli.console import print_json
    from wpjax.cli.words import printable
    from wpjax.patchfiles.card import described

    info = patch.info
    if as_json:
        print_json(
            {**dataclasses.asdict(info), "tensors": {name: len(of.positions) for name, of in patch.slices.items()}}
        )
        return
    for line in described(info):
        print(printable(line.replace("`", "")))
    more = f" and {len(info.components) - n:,} more" if len(info.components) > n else ""
    print(f"Components: {printable(', '.join(info.components[:n]))}{more}")


def component_rows(
    result: SweepResult, by: str, n: int | None = None, kinds: tuple[str, ...] | None = None
) -> list[dict[str, Any]]:
    """Every column of the components that rank highest, one row each, the highest first; an empty cell if there is no
    number.
    """
    data = result.dataset
    position = {name: i for i, name in enumerate(data["name"].values.astype(str).tolist())}
    columns = [str(name) for name, values in data.variables.items() if values.dims == ("component",)]
    first = ["name", "kind", "layer", "index"]
    columns = [*first, *(name for name in columns if name not in first)]
    rows = []
    for row in result.top(n or data.sizes["component"], by=by, kinds=kinds):
        cells = {name: data[name].values[position[row.name]].item() if data[name].dtype.kind != "O" else
                 str(data[name].values[position[row.name]]) for name in columns}  # fmt: skip
        rows.append({"rank": row.rank, **{name: "" if value != value else value for name, value in cells.items()}})
    return rows


def _curve_rows(curves: Any) -> list[dict[str, Any]]:
    """Every point of every curve, one row each, with the share by every measure."""
    from wpjax.results.curves import DIRECTIONS

    shares = {measure: curves.share(measure)[0] for measure in curves.measures}  # [figure, direction, ranking, point]
    sizes = {name: curves.dataset[name].values for name in ("n_components", "n_parameters")}
    rows = []
    for d, direction in enumerate(DIRECTIONS):
        for r, ranking in enumerate(curves.rankings):
            for k in range(curves.dataset.sizes["point"]):
                row = {"direction": direction, "ranking": ranking, **{n: int(v[r, k]) for n, v in sizes.items()}}
                for measure, values in shares.items():
                    for end, value in zip(("", "_low", "_high"), values[:, d, r, k].tolist(), strict=True):
                        row[measure + end] = "" if value != value else value
                rows.append(row)
    return rows


def _write_csv(rows: list[dict[str, Any]]) -> None:
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
