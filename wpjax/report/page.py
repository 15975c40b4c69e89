"""The HTML page of a sweep: one file that needs no network.

Without a script it shows matplotlib's figures and the first rows of the table. `templates/page.js` puts live figures in
their place, and the whole table.

Libraries were chosen by size and upkeep (minified, November 2026). Observable Plot 0.6 with D3 7: 490 kB, ISC, both
maintained by their authors; it draws SVG, which takes its colours from the page (light and dark), prints sharp, and has
the heat maps, intervals and links that are needed here. Plotly's basic bundle and ECharts (common) have 1,190 and
715 kB and draw with colours of their own; Vega-Lite needs Vega beside it (over 750 kB), and compiles expressions, which
the page's policy forbids; uPlot (51 kB) draws lines only. For the table, Tabulator (420 kB) would be as much again: an
HTML table that holds the rows in view takes a few dozen lines, and stays a table for screen readers. The files, their
licences and sums stand in `vendor/`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from markupsafe import Markup
from matplotlib.figure import Figure

from wpjax.columns import ALWAYS, Column, columns, effect_estimates, title_of
from wpjax.errors import WpjaxError
from wpjax.report.figures import COLOURS, available, make_figure, make_overview
from wpjax.report.glyphs import save_figure
from wpjax.report.live import live_about, live_columns
from wpjax.report.pages import page_file, page_style, page_template
from wpjax.report.payload import packed
from wpjax.report.shown import interference_figure, layers_figure, sweep_figures, validation_figures
from wpjax.results.curves import DIRECTIONS, Curves
from wpjax.results.interference import Interference
from wpjax.results.layers import COLUMNS, LayerCurve, layer_rows
from wpjax.results.sweep_result import SweepResult
from wpjax.results.verdict import Verdict, verdict
from wpjax.runtime import interrupts
from wpjax.runtime.files import atomic_outputs, check_output
from wpjax.stats import Interval


def write_report(
    result: SweepResult,
    path: str | Path,
    *,
    execution: SweepResult | None = None,
    curves: Curves | None = None,
    interference: Interference | None = None,
    layers: Sequence[LayerCurve] | None = None,
    source: Path | None = None,
    n_rows: int = 100,
    overwrite: bool = False,
) -> list[Path]:
    """Write a page about a sweep, and beside it its figures as PNG files; all of them or none.

    Args:
        result: the sweep.
        path: path of the page, say "report.html"; the figures are named after it ("report-top.png").
        execution: a second sweep, with the anchor's state given: its components are the hierarchy's executors.
        curves: a validation of this sweep: the page shows its curves and answers, too.
        interference: a map that the behaviour is on: the page shows it, too.
        layers: results by layer of the base (`results.layers`): the page shows them, too.
        source: where the file of the result is, so that the page can say what to run next; None to leave it out.
        n_rows: number of components in the table that stands there without a script.
        overwrite: whether files that exist may be replaced.

    Returns:
        paths of the files, the page first.

    Raises:
        OutputError: a file exists or cannot be written.
        WpjaxError: the curves are of another sweep, the map is of other behaviours, or the results by layer are of a
            model of another depth.

    >>> import tempfile
    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:title")
    >>> anchor, batch = wp.fit_anchor(pair, task, n_prompts=8, causal="skip"), task.encode(pair.tokenizer, n_prompts=4)
    >>> result = wp.sweep(pair, batch, anchor, kinds=("attn", "mlp"), method="screen")
    >>> [file.name for file in write_report(result, Path(tempfile.mkdtemp()) / "title.html")]
    ['title.html', 'title-overview.png', 'title-depth.png', 'title-coverage.png', 'title-anchor.png']
    """
    if curves is not None:
        check_belongs(curves, result)
    behaviour = str(result.dataset.attrs["behaviour"])
    if interference is not None and behaviour not in interference.behaviours:
        raise WpjaxError(
            f"the map is of {', '.join(interference.behaviours)}, this sweep is of {behaviour}: name a map with it"
        )
    n_layers, deepest = (
        int(result.dataset.attrs["n_layers"]),
        max((int(c.layers.max()) for c in layers or ()), default=0),
    )
    if deepest >= n_layers:
        raise WpjaxError(
            f"the results by layer are of another model: they have a layer {deepest}, the sweep {n_layers} layers"
        )
    page = Path(path)
    names = tuple(available(result, execution))
    targets = {name: page.with_name(f"{page.stem}-{name}.png") for name in ("overview", *names)}
    for target in (page, *targets.values()):  # all of them before the first is written
        check_output(target, overwrite)
    figures = {}
    for name in names:
        interrupts.check()
        figures[name] = make_figure(result, name, execution)
    pictures = {"overview": make_overview(result), **figures}
    with atomic_outputs((page, *(targets[name] for name in pictures)), overwrite) as (text, *images):
        page_text = render_page(result, figures, n_rows, source, curves, interference, layers, execution)
        text.write_text(page_text, encoding="utf-8")
        for figure, image in zip(pictures.values(), images, strict=True):
            interrupts.check()
            save_figure(figure, image)
    return [page, *(targets[name] for name in pictures)]


def check_belongs(curves: Curves, result: SweepResult) -> None:
    """Refuse curves of another sweep.

    Raises:
        WpjaxError: models or behaviour are not those of the sweep.
    """
    of, swept = curves.dataset.attrs, result.dataset.attrs
    behaviour = of.get("swept_behaviour", of["behaviour"])
    if behaviour != swept["behaviour"]:
        raise WpjaxError(f"the curves are of a sweep of {behaviour}, this one is of {swept['behaviour']}: name its own")
    for model in ("base", "expert"):
        if of.get(f"{model}_fingerprint") != swept[f"{model}_fingerprint"]:
            raise WpjaxError(
                f"the curves are of another {model} ({of[model]}) than the sweep's ({swept[model]}): name its own"
            )


def render_page(
    result: SweepResult,
    figures: dict[str, Figure],
    n_rows: int,
    source: Path | None = None,
    curves: Curves | None = None,
    interference: Interference | None = None,
    layers: Sequence[LayerCurve] | None = None,
    execution: SweepResult | None = None,
) -> str:
    """The text of the page. Names and prompts in it are escaped, so they are never taken for markup.

    Its policy lets no script run but those that the page is made with, and nothing be loaded.

    Args:
        result: the sweep.
        figures: figures by name, names of `shown.TITLES`.
        n_rows: number of components in the table that stands there without a script.
        source: where the file of the result is, or None.
        curves: a validation of the sweep, or None.
        interference: a map that the behaviour is on, or None.
        layers: results by layer, or None.
        execution: a sweep with the anchor's state given, or None.
    """
    template = page_template("report.html.jinja")
    data = result.dataset
    exact = bool(data["exact"].values.any())
    by, found = result.ranking, verdict(result, source)
    scripts = _scripts()
    return template.render(
        attrs=data.attrs,
        policy=_policy((THEME_SCRIPT, *scripts)),
        css=page_style(),
        theme_script=Markup(THEME_SCRIPT),
        scripts=[Markup(script) for script in scripts],
        data=packed(live_about(result, by, execution, curves, interference, layers or ()), live_columns(result, by)),
        colours=list(COLOURS.items()),
        rankings_colours=[COLOURS[kind] for kind in ("neuron", "kv_group", "norm", "embed")],
        n_components=data.sizes["component"],
        verdict=found,
        facts=_facts(result, found),
        # This is the page already, and with curves the sweep is validated.
        commands=[c for c in found.commands if c.split()[1] not in ("report", *["validate"][: curves is not None])],
        answers=result.answers,
        curves=curves,
        curve_figures=[] if curves is None else validation_figures(curves),
        curve_rows=[] if curves is None else _curve_rows(curves),
        interference=interference,
        interference_figure=None if interference is None else interference_figure(interference),
        layers_figure=layers_figure(layers) if layers else None,
        layers_columns=COLUMNS,
        layers_rows=layer_rows(layers or ()),
        by=by,
        exact=exact,
        first_order=by in effect_estimates(),
        rows=_table(result, by, n_rows),
        extra=_extra_columns(result),
        figures=sweep_figures(result, figures),
        kinds=_kind_rows(result),
        steering=_steering_rows(result),
        prompts=[str(p) for p in data["prompt"].values[:6]],
    )


THEME_SCRIPT = (
    'try { const t = localStorage.getItem("wpjax-theme"); if (t) document.documentElement.dataset.theme = t; } catch {}'
)
"""Sets the reader's choice of light or dark before anything is drawn."""


@functools.cache
def _scripts() -> tuple[str, ...]:
    """The page's scripts in order: the libraries, each after its licence, and the page's own."""
    libraries = [("d3.LICENSE", "d3.min.js"), ("plot.LICENSE", "plot.umd.min.js")]
    vendored = [
        f"/*\n{page_file(f'vendor/{licence}')}*/\n{page_file(f'vendor/{script}')}" for licence, script in libraries
    ]
    return (*vendored, page_file("templates/page.js"))


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: these scripts run and no other; nothing is loaded from anywhere."""
    sums = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in sums)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


_NO_HALF = {"not known": "single weights were not measured", "in company": "single effects do not add up to it"}
"""Shape of a verdict -> why no number of components holds half of the effect."""


def _facts(result: SweepResult, found: Verdict) -> list[dict[str, str]]:
    """The figures at the head of the page."""
    swept = result.swept.dataset.sizes["component"]
    status = "anchor" if str(result.dataset.attrs["metric"]) in ("anchor", "on_policy") else "behaviour"
    facts = [
        {
            "what": "Recovered together",
            "value": f"{found.coverage:.0%}",
            "of": f"of the gap, by all {swept:,} that were swept",
        },
        {
            "what": "Half of it",
            "value": "–" if found.n_half is None else f"{found.n_half:,}",
            "of": "components, the largest first"
            if found.n_half
            else _NO_HALF.get(found.shape, _NO_HALF["in company"]),
        },
    ]
    if found.layers is not None:
        low, high = found.layers
        where = f"{low}" if low == high else f"{low}–{high}"
        last = int(result.dataset.attrs["n_layers"]) - 1
        facts.append({"what": "Layers", "value": where, "of": f"of 0–{last}: half of all single effects"})
    facts.append({"what": f"Test of the {status}", "value": found.status, "of": "does it cause what is measured?"})
    return facts


def _curve_rows(curves: Curves) -> list[tuple[str, list[Interval]]]:
    """Name of each ranking of a validation; the shares that it brings back, and takes away, by the strict checker."""
    return [
        (title_of(name), [curves.area("strict", direction, i) for direction in DIRECTIONS])
        for i, name in enumerate(curves.rankings)
    ]


def _extra_columns(result: SweepResult) -> list[Column]:
    """The columns that the table shows beside the effect: estimates of it first."""
    shown = [c for c in columns() if c.name in result.dataset and c.dims == ("component",) and not c.group and c.shown]
    return sorted(shown, key=lambda c: not c.estimates_effect)


def _table(result: SweepResult, by: str, n_rows: int) -> list[dict[str, Any]]:
    """The rows of the table of components."""
    data = result.dataset
    position = {str(name): i for i, name in enumerate(data["name"].values)}
    extra = _extra_columns(result)
    rows = []
    for row in result.top(n_rows, by=by):
        i = position[row.name]
        rows.append(
            {
                **row._asdict(),
                "kind": str(data["kind"].values[i]),
                "layer": int(data["layer"].values[i]),
                "delta_norm": float(data["delta_norm"].values[i]),
                "p_value": float(data["p_value"].values[i]),
                **{column.name: _with_interval(data, column, i) for column in extra},
            }
        )
    return rows


def _with_interval(data: xr.Dataset, column: Column, i: int) -> str:
    """Component i's number in a column, with its interval if it has one; a dash if it was not measured."""
    value = float(data[column.name].values[i])
    if np.isnan(value):
        return "–"
    ends = [float(data[bound].values[i]) for bound in column.bounds]
    return f"{value:.4f}" + (f" [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else "")


def _kind_rows(result: SweepResult) -> list[dict[str, Any]]:
    """The rows of the table of kinds."""
    data, floors = result.swept.dataset, result.attribute("noise_floor_by_kind")
    trust = [c.name for c in columns() if c.dims == ("swept_kind",) and c.group != ALWAYS and c.name in data]
    rows = []
    for i, kind in enumerate(str(k) for k in data["swept_kind"].values):
        mine = data["kind"].values == kind
        rows.append(
            {
                "kind": kind,
                "n": int(mine.sum()),
                "n_exact": int((mine & np.isfinite(data["p_value"].values)).sum()),  # or activations were patched
                "joint": float(data["coverage_joint"].values[i]),
                "sum": float(data["coverage_sum"].values[i]),
                "floor": float(floors.get(kind, np.nan)),
                **{name: float(data[name].values[i]) for name in trust},
            }
        )
    return rows


def _steering_rows(result: SweepResult) -> list[dict[str, float]]:
    """The anchor's causal tests, one row for each layer that was tried."""
    data = result.dataset
    if "anchor_strength" not in data:
        return []
    names = ("strength", "steered", "steered_random", "removed", "removed_random", "nll", "nll_expert", "nll_removed")
    tried = np.flatnonzero(np.isfinite(data["anchor_strength"].values))
    figures = {n: data[f"anchor_{n}"].values if f"anchor_{n}" in data else np.full(len(data["model_layer"]), np.nan)
               for n in names}  # fmt: skip
    return [{"layer": int(i), **{n: float(figures[n][i]) for n in names}} for i in tried]
