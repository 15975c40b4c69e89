"""The page: every figure of the result on it, nothing of a name or a prompt as markup, nothing from a network."""

import html.parser
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.helpers import curves_by_hand, map_by_hand
from wpjax.behaviours import behaviour
from wpjax.errors import OutputError, WpjaxError
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.pairs import load_pair
from wpjax.report import write_report
from wpjax.report.figures import available, make_figure
from wpjax.report.interference import write_interference
from wpjax.results.answers import Answers
from wpjax.results.curves import Curves
from wpjax.results.interference import Interference
from wpjax.results.sweep_result import SweepResult

SAVED = Path(__file__).parent / "data" / "schema4" / "title.nc"
HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x> $\\frac$ & [bold]"


@pytest.fixture(scope="module")
def result():
    pair, task = load_pair("tiny:base", "tiny:expert"), behaviour("tiny:title")
    anchor = fit_anchor(pair, task, causal="skip")
    batch = task.encode(pair.tokenizer, n_prompts=4)
    return sweep(pair, batch, anchor, kinds=("head", "kv_group", "neuron"), method="screen+exact", top=8)


def test_sources_and_relays_stand_on_a_plane(tmp_path):
    """One point a component that was measured in all cells, where the file says, and a column for every cell."""
    pair, task = load_pair("tiny:base", "tiny:planted"), behaviour("tiny:english_capital")
    batch = task.encode(pair.tokenizer, n_prompts=4)
    names = ["L0.head.3", "L0.mlp", "L6.mlp", "L3.head.0"]
    found = sweep(pair, batch, fit_anchor(pair, task, causal="skip"), components=names, method="factorial")
    points = make_figure(found, "plane").axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(points, np.stack([found.dataset["source"], found.dataset["relay"]], axis=1))
    source, relay = (
        dict(zip(found.dataset["name"].values, found.dataset[v].values, strict=True)) for v in ("source", "relay")
    )
    assert source["L0.head.3"] > 0.3 > 0.05 > abs(relay["L0.head.3"])  # planted, and the first thing that happens
    assert relay["L6.mlp"] > 0.3 > 0.05 > abs(source["L6.mlp"])  # where everything passes, and unchanged
    write_report(found, tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert f"{source['L0.head.3']:.4f}" in page.shown
    assert (tmp_path / "r-plane.png").exists()


class Page(html.parser.HTMLParser):
    """Cells of every table, tags, and what is loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.rows, self.shown = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        sources = [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        self.loads += [s for s in sources if not s.startswith(("#", "data:"))]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        self.shown.append(data)
        if self.rows and self.lasttag in ("th", "td", "code") and data.strip():
            self.rows[-1].append(data.strip())


def test_what_stands_in_no_layer_flows_without_a_picture(tmp_path):
    """The embedding's effect arrives by way of every layer, but it has no row of its own."""
    pair, task = load_pair("tiny:base", "tiny:expert"), behaviour("tiny:title")
    batch = task.encode(pair.tokenizer, n_prompts=4)
    found = sweep(pair, batch, fit_anchor(pair, task, causal="skip"), kinds="embed")
    assert "flow" in found.dataset
    assert "flow" not in available(found)
    write_report(found, tmp_path / "r.html")


def test_the_table_holds_the_numbers_of_the_result(result, tmp_path):
    write_report(result, tmp_path / "r.html", n_rows=12)
    page = Page((tmp_path / "r.html").read_text())
    rows = {cells[1]: cells for cells in page.rows if len(cells) > 5 and re.fullmatch(r"L\d+\.\w+\.\d+", cells[1])}
    top = result.top(12)
    assert list(rows) == [r.name for r in top]
    for r in top:
        assert rows[r.name][4] == f"{r.effect:.4f}"
        assert rows[r.name][5] == f"[{r.ci_low:.4f}, {r.ci_high:.4f}]"
    assert not page.loads


def test_names_and_prompts_are_text_never_markup(result, tmp_path):
    data = result.dataset.copy(deep=True)
    data["prompt"] = ("prompt", np.array([HOSTILE] * data.sizes["prompt"], dtype=object))
    data.attrs |= {"base": HOSTILE, "expert": HOSTILE, "behaviour": HOSTILE}
    write_report(SweepResult(data), tmp_path / "r.html")
    clean = tmp_path / "clean.html"
    write_report(result, clean)
    page, expected = Page((tmp_path / "r.html").read_text()), Page(clean.read_text())
    assert page.tags == expected.tags  # not one element more
    assert not page.loads
    assert any(HOSTILE in text for text in page.shown)


def test_a_validation_stands_on_the_page_with_its_answers(tmp_path):
    saved = SweepResult.from_netcdf(SAVED)
    swept = ("behaviour", "base", "expert", "base_fingerprint", "expert_fingerprint")
    of = {name: saved.dataset.attrs[name] for name in swept}
    texts = [["plain", "words"], ["SHOUTED", HOSTILE], ["LOUD", "LOUDER"]]
    answers = Answers(("Hi?", HOSTILE), texts, np.array([[0.0, 0], [1, 0], [1, 1]]), 2, HOSTILE)
    validated = [
        Curves(answers.added_to(curves_by_hand(("effect", name), **of).dataset)) for name in (HOSTILE, "delta_norm")
    ]
    pages = []
    for i, curves in enumerate(validated):
        curves.to_netcdf(tmp_path / f"{i}.nc")
        again = Curves.from_netcdf(tmp_path / f"{i}.nc")
        written = write_report(saved, tmp_path / f"{i}.html", curves=again, source=tmp_path / "r.nc")
        assert not [path.name for path in written if "curves" in path.name]  # `validate` has written them
        pages.append(Page(written[0].read_text()))
    hostile, clean = pages
    assert (hostile.tags, hostile.loads) == (clean.tags, [])
    area = validated[0].area("strict", "restore", 0)
    assert f"{area.mean:.2f} [{area.low:.2f}, {area.high:.2f}]" in {cell for row in hostile.rows for cell in row}
    said = [row for row in hostile.rows if row[:1] in (["base"], ["base + 2"], ["expert"])]
    assert said[0] == ["base", "fails", "plain"]
    assert any(again.summary in text for text in clean.shown)
    assert said[4] == ["base + 2", "fails", HOSTILE]
    assert not any(f"wpjax validate {tmp_path}" in text for text in hostile.shown)


def test_an_interference_map_stands_on_the_page(tmp_path):
    saved, pages = SweepResult.from_netcdf(SAVED), []
    for i, other in enumerate((HOSTILE, "quotation")):
        written = write_interference(map_by_hand("tiny:title", other), tmp_path / f"{i}.json")
        found = Interference.from_json(tmp_path / f"{i}.json")
        assert found.as_json == map_by_hand("tiny:title", other).as_json
        assert written.exists()
        page = write_report(saved, tmp_path / f"{i}.html", interference=found)[0]
        pages.append(Page(page.read_text()))
    hostile, clean = pages
    without = Page(write_report(saved, tmp_path / "none.html")[0].read_text())
    assert (hostile.tags, hostile.loads) == (clean.tags, [])
    assert clean.tags.count("svg") == without.tags.count("svg") + 1
    rows = [row for row in hostile.rows if row[:1] == [HOSTILE]]
    assert rows == [[HOSTILE, parts, "1.23%", "20% [5, 95], 0.00", "30% [5, 95], 0.50"] for parts in ("7", "1")]
    for line in found.summary.splitlines():
        assert line in clean.shown
        assert line not in without.shown


def test_maps_of_other_behaviours_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "m.json"
    with pytest.raises(WpjaxError, match=r"the map is of a, b, this sweep is of tiny:title: name a map with it"):
        write_report(SweepResult.from_netcdf(SAVED), tmp_path / "r.html", interference=map_by_hand("a", "b"))
    with pytest.raises(WpjaxError, match="no such file"):
        Interference.from_json(path)
    whole = map_by_hand("a", "b").as_json
    cases = [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no interference map"),
        (json.dumps(whole | {"share": "2"}), "damaged .*'2' is no number"),
        (json.dumps(whole | {"share": float("nan")}), "damaged .*nan is no number"),
        (json.dumps(whole | {"behaviours": ["a", "b", "c"]}), "damaged .*as many rows and columns"),
        (json.dumps(whole | {"behaviours": ["a", 2]}), "damaged .*2 is no name"),
        (json.dumps(whole | {"levels": {"units": whole["levels"]["units"]}}), "damaged .*not two levels"),
        (json.dumps({k: v for k, v in whole.items() if k != "passes"}), "damaged .*passes"),
        (json.dumps(whole | {"passes": {"a": {"base": {"mean": 1}}}}), "damaged .*missing"),
    ]
    for text, says in cases:
        path.write_text(text)
        with pytest.raises(WpjaxError, match=says):
            Interference.from_json(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"behaviour": "other"}, "the curves are of a sweep of other, this one is of tiny:title: name its own"),
        ({"swept_behaviour": "other"}, "the curves are of a sweep of other"),
        ({"expert_fingerprint": "0"}, r"the curves are of another expert \(tiny:expert\) than the sweep's"),
    ],
)
def test_a_validation_of_another_sweep_is_refused(tmp_path, changes, says):
    saved = SweepResult.from_netcdf(SAVED)
    swept = ("behaviour", "base", "expert", "base_fingerprint", "expert_fingerprint")
    of = {name: saved.dataset.attrs[name] for name in swept} | changes
    with pytest.raises(WpjaxError, match=says):
        write_report(saved, tmp_path / "r.html", curves=curves_by_hand(**of))
    assert not list(tmp_path.iterdir())


def test_pictures_are_written_beside_the_page(result, tmp_path):
    written = write_report(result, tmp_path / "r.html")
    assert sorted(tmp_path.iterdir()) == sorted(written)
    for path in written[1:]:
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", head[16:24])) > 300
    with pytest.raises(OutputError, match="exists"):
        write_report(result, tmp_path / "r.html")
    for path in written[:-1]:
        path.unlink()
    with pytest.raises(OutputError, match="exists"):  # one figure in the way: nothing is written
        write_report(result, tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == written[-1:]


def test_a_screen_alone_says_that_nothing_was_replaced(tmp_path):
    pair, task = load_pair("tiny:base", "tiny:expert"), behaviour("tiny:title")
    anchor = fit_anchor(pair, task, causal="skip")
    batch = task.encode(pair.tokenizer, n_prompts=4)
    screened = sweep(pair, batch, anchor, kinds=("head",), method="gradient")
    write_report(screened, tmp_path / "r.html")
    said = "No component's weights were replaced alone: the ranking below is by gradient, a first-order estimate."
    assert said in (tmp_path / "r.html").read_text()
    assert screened.top(1, by="gradient")[0].name.startswith("L")
    with pytest.raises(WpjaxError, match="only gradient, delta_norm: name one"):
        screened.top(1)


def test_the_file_gives_back_the_result(result, tmp_path):
    result.to_netcdf(tmp_path / "r.nc")
    again = SweepResult.from_netcdf(tmp_path / "r.nc")
    xr.testing.assert_identical(again.dataset, result.dataset)
    assert again.top(5) == result.top(5)


def test_results_of_another_schema_are_refused(result, tmp_path):
    SweepResult(result.dataset.assign_attrs(schema=99)).to_netcdf(tmp_path / "r.nc")
    with pytest.raises(WpjaxError, match=r"r\.nc: schema 99.*make it anew with `wpjax sweep`"):
        SweepResult.from_netcdf(tmp_path / "r.nc")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: d.drop_vars("index"), "index"),
        (lambda d: d.drop_vars("anchor_gap_sd"), "anchor_gap_sd"),
        (lambda d: d.drop_attrs(), "schema None"),
        (lambda d: d.assign_attrs(coverage="much"), "coverage"),
        (lambda d: d.assign_attrs(noise_floor_by_kind="[1]"), "noise_floor_by_kind"),
        (lambda d: d.assign_attrs(schema=[1.0, 2.0]), "schema"),
        (lambda d: d.assign(gap=((), 1.0)), "gap"),
        (lambda d: d.assign(effect=d["effect"].astype(str).astype(object)), "effect"),
        (lambda d: d.assign(coverage_sum=d["coverage_sum"] * np.inf), "coverage_sum"),
        (lambda d: d.assign_coords(layer=d["layer"] + 10**12), "layer and index"),
        (lambda d: d.assign({name: d["effect"] * np.nan for name in ("effect", "screen", "delta_norm")}), "ranking"),
        (lambda d: d.isel(component=slice(0, 0)), "effect"),
        (lambda d: d.assign_attrs(given_layer="first"), "given_layer"),
        (lambda d: d.drop_vars("null_direction"), "null_direction"),
        (lambda d: d.drop_vars("sampled"), "sampled"),
        (lambda d: d.assign(anchor_vector=d["anchor_vector"] * np.nan), "anchor_vector"),
        (lambda d: d.assign_coords(target=[f"x{t}" for t in d["target"].values]), "target"),
        (lambda d: d.assign_attrs(metric_layer=1), "target"),
    ],
)
def test_results_that_are_damaged_are_refused_by_what_they_lack(result, tmp_path, damage, says):
    damage(result.dataset.copy(deep=True)).to_netcdf(tmp_path / "r.nc", engine="h5netcdf")
    with pytest.raises(WpjaxError, match=rf"r\.nc: .*{says}.*(sweep again|wpjax sweep)"):
        SweepResult.from_netcdf(tmp_path / "r.nc")


def test_a_file_with_flipped_bytes_is_refused(result, tmp_path):
    result.to_netcdf(tmp_path / "r.nc")
    whole = (tmp_path / "r.nc").read_bytes()
    at = whole.index(b"OHDR", 100)
    (tmp_path / "r.nc").write_bytes(whole[: at + 8] + bytes(64) + whole[at + 72 :])
    with pytest.raises(WpjaxError, match="not a readable result file"):
        SweepResult.from_netcdf(tmp_path / "r.nc")


def test_dollar_signs_in_component_names_are_not_mathematics(result, tmp_path):
    names = np.array([f"${name}^$" for name in result.dataset["name"].values], dtype=object)
    write_report(SweepResult(result.dataset.assign_coords(name=("component", names))), tmp_path / "r.html")
