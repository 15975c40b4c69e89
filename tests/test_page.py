"""The page in a real browser, without a window: Chromium, driven by Playwright; axe-core judges who can use it."""

import csv
import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import wpjax.report
from tests.helpers import curves_by_hand, map_by_hand
from wpjax.report.figures import available, make_figure
from wpjax.report.page import render_page
from wpjax.results.answers import Answers
from wpjax.results.curves import Curves
from wpjax.results.layers import LayerCurve
from wpjax.results.sweep_result import SweepResult

SAVED = Path(__file__).parent / "data" / "schema4" / "title.nc"
HOSTILE = "</script><script>window.harmed=1</script>\"><img src=x onerror='window.harmed=1'><b>${harmed}</b>{{harm}}"
TAG = "</script><img src=x onerror=harmed()>"
N_LAYERS, PER_LAYER = 25, {"head": 9, "kv_group": 3, "neuron": 1588}  # 40,000 components
N = N_LAYERS * sum(PER_LAYER.values())
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests of this file."""
    programs = [found for name in BROWSERS if (found := shutil.which(name))]
    if not programs:
        pytest.skip(f"there is no browser on this machine: install one of {', '.join(BROWSERS)}")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=programs[0], args=["--no-sandbox"])
        yield started
        started.close()


def many_components():
    """A result of 40,000 components, every number of which is random, but that two heads and a layer lead."""
    rng = np.random.default_rng(0)
    saved = SweepResult.from_netcdf(SAVED).dataset
    kinds = np.concatenate([np.tile(np.repeat(list(PER_LAYER), list(PER_LAYER.values())), N_LAYERS)])
    index = np.tile(np.concatenate([np.arange(n) for n in PER_LAYER.values()]), N_LAYERS)
    layer = np.repeat(np.arange(N_LAYERS), sum(PER_LAYER.values()))
    names = np.array([f"L{a}.{k}.{i}" for a, k, i in zip(layer, kinds, index, strict=True)], dtype=object)
    effect = rng.normal(0, 1e-3, N)
    effect[layer == 7] += 1e-3
    effect[names == "L5.head.3"], effect[names == "L11.head.8"] = 0.25, -0.2
    p = rng.uniform(size=N)
    p[effect > 0.2] = 1e-6
    targets = np.array(["self", *(f"L{i}.{part}" for i in range(5, 9) for part in ("head.0", "mlp"))], dtype=object)
    flow = np.full((N, len(targets)), np.nan, np.float32)
    strong = np.argsort(-effect)[:30]
    flow[strong] = rng.dirichlet(np.ones(len(targets)), 30) * effect[strong, None]
    columns = {
        "effect": effect,
        "ci_low": effect - rng.uniform(0, 1e-3, N),
        "ci_high": effect + rng.uniform(0, 1e-3, N),
        "effect_paper": effect + rng.normal(0, 1e-4, N),
        "p_value": p,
        "q_value": np.minimum(p * 50, 1.0),
        "below_noise_floor": np.abs(effect) < 1e-5,
        "exact": np.ones(N, bool),
        "delta_norm": rng.lognormal(size=N),
        "screen": effect + rng.normal(0, 1e-4, N),
        "set_score": rng.normal(size=N),
    }
    rest = saved.drop_dims(["component", "swept_kind", "target"], errors="ignore").drop_vars("name", errors="ignore")
    swept = {
        "coverage_joint": [0.2, 0.1, 0.6],
        "coverage_sum": [0.3, 0.1, 0.4],
        "n_components": [N_LAYERS * n for n in PER_LAYER.values()],
    }
    data = rest.assign(
        {name: ("component", values) for name, values in columns.items()}
        | {name: ("swept_kind", values) for name, values in swept.items()}
        | {"flow": (("component", "target"), flow)}
    )
    data = data.assign_coords(
        {name: ("component", values) for name, values in dict(name=names, kind=kinds, layer=layer, index=index).items()}
        | {"swept_kind": list(PER_LAYER), "target": targets}
    )
    attrs = {"n_layers": 30, "metric_layer": N_LAYERS - 1, "noise_floor_by_kind": '{"head": 1e-5}', "coverage": 0.9}
    return SweepResult(data.assign_attrs(attrs))


def hostile_result():
    """All that a page can show; every text in it that comes from elsewhere would do harm as markup."""
    data = SweepResult.from_netcdf(SAVED).dataset.copy(deep=True).drop_vars(["flow", "target"], errors="ignore")
    data["prompt"] = ("prompt", np.array([HOSTILE] * data.sizes["prompt"], dtype=object))
    # Nothing was replaced: there are estimates only.
    data = data.assign({name: data[name] * np.nan for name in ("effect", "ci_low", "ci_high")})
    data["exact"] = data["exact"] & False
    names = [f"{name}{TAG}" for name in data["name"].values]
    data = data.assign_coords(name=("component", np.array(names, dtype=object)))
    data.attrs |= {"base": HOSTILE, "expert": HOSTILE, "behaviour": HOSTILE}
    swept = ("behaviour", "base", "expert", "base_fingerprint", "expert_fingerprint")
    answers = Answers((HOSTILE,), [[HOSTILE]] * 3, np.array([[0.0], [1], [1]]), 2, HOSTILE)
    of = curves_by_hand((HOSTILE, "delta_norm"), **{name: data.attrs[name] for name in swept}).dataset
    layers = [LayerCurve(source, HOSTILE, np.arange(4), np.arange(4.0)) for source in ("weights", "edits")]
    return SweepResult(data), Curves(answers.added_to(of)), map_by_hand(HOSTILE, "b"), layers


@pytest.fixture(scope="module")
def large():
    return many_components()


@pytest.fixture(scope="module")
def pages(large, tmp_path_factory):
    """The pages of two results, by name."""
    folder = tmp_path_factory.mktemp("pages")
    hostile, *others = hostile_result()
    for name, result, more in (("large", large, []), ("hostile", hostile, others)):
        figures = {figure: make_figure(result, figure) for figure in available(result)}
        text = render_page(result, figures, 100, folder / "r.nc", *more)
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def visit(browser, pages):
    """Opens a page; what the browser complains of, and what it asks the network for, is an error at the end."""
    contexts, complaints = [], []

    def open_page(name, hash="", **how):
        usual = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}  # no smooth scrolling
        context = browser.new_context(**usual | how)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url[:4] == "http" else None)
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(pages[name].as_uri() + hash)
        if how.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def count(page):
    """How many components the table has."""
    return int(re.match(r"[\d,]+", page.locator("#count").inner_text())[0].replace(",", ""))


def cells(page, title, n=5):
    """The first cells of a column of the table, by its title."""
    titles = [text.split(" ")[0].strip() for text in page.locator("#box thead th").all_inner_texts()]
    rows = page.locator("#box tbody tr:not(.gap)")
    return [rows.nth(i).locator("td").nth(titles.index(title)).inner_text() for i in range(min(n, rows.count()))]


def figure(page, name):
    """The live drawing of a figure."""
    return page.locator(f'figure[data-figure="{name}"] .live svg').first


def settle(page):
    """Wait until what has come into sight is drawn."""
    page.evaluate("() => new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(go))))")


def point_at(page, name, mark, click=None, modifiers=()):
    """Move the pointer over a mark of a figure, the middle of what a function of the page finds there; click it."""
    drawing = figure(page, name)
    drawing.scroll_into_view_if_needed()
    settle(page)
    middle = "(b) => [b.x + b.width / 2, b.y + b.height / 2]"
    box = drawing.evaluate(f"(svg) => ({middle})(({mark})(svg).getBoundingClientRect())")
    page.mouse.move(box[0] + 1, box[1] + 1)
    page.mouse.move(*box)
    if click:
        for key in modifiers:
            page.keyboard.down(key)
        page.mouse.click(*box)
        for key in modifiers:
            page.keyboard.up(key)


REDDEST = """(svg) => [...svg.querySelectorAll('[aria-label="cell"] rect')]
    .find((cell) => / 100.0%/.test(cell.getAttribute("fill")))"""


def test_a_page_of_40000_components_has_at_most_3_mb(pages, large):
    assert large.dataset.sizes["component"] == N == 40_000
    assert pages["large"].stat().st_size <= 3e6


def test_the_vendored_scripts_are_those_of_the_note():
    folder = Path(wpjax.report.__file__).parent / "vendor"
    rows = re.findall(r"\| `(\S+\.js)` \|.*, `(\S+)` \| ([0-9a-f]{64}) \|", (folder / "README.md").read_text())
    assert sorted(name for name, _, _ in rows) == sorted(path.name for path in folder.glob("*.js"))
    for name, licence, digest in rows:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        assert "Copyright" in (folder / licence).read_text()


def test_the_table_is_searched_filtered_sorted_by_the_keyboard_and_printed(visit, large):
    page, data = visit("large"), large.dataset
    effect, names = data["effect"].values, data["name"].values
    assert count(page) == N
    assert page.locator("#box tbody tr").count() < 100  # only what is seen is in the document
    best = large.top(5)
    assert cells(page, "component") == [row.name for row in best]
    assert float(cells(page, "effect", 1)[0].split()[0]) == pytest.approx(best[0].effect, abs=1e-4)
    page.locator('#box th[data-key="effect"] button').focus()
    for ends, order in (("descending", np.argsort(-effect)), ("ascending", np.argsort(effect))):
        page.keyboard.press("Enter")
        assert page.locator("#box th[aria-sort]").get_attribute("data-key") == "effect"
        assert page.locator("#box th[aria-sort]").get_attribute("aria-sort") == ends
        assert cells(page, "component") == list(names[order[:5]])
    page.locator('#box th[data-key="q_value"] button').press("Space")  # the smallest q is what is looked for
    assert page.locator("#box th[aria-sort]").get_attribute("aria-sort") == "ascending"
    assert cells(page, "component", 1) == ["L5.head.3"]
    page.locator('#box th[data-key="rank"] button').press("Enter")
    page.locator("#box").evaluate("(box) => { box.scrollTop = box.scrollHeight }")
    page.wait_for_function(f"() => document.querySelector('#box').innerText.includes('{names[effect.argmin()]}')")
    page.locator("#q").fill("l12 head")
    page.wait_for_function("() => document.querySelector('#count').textContent.startsWith('9 of')")
    assert set(cells(page, "layer", 9)) == {"12"}
    page.locator("#q").fill("")
    page.locator('#kinds input[data-kind="neuron"]').uncheck()
    page.wait_for_function("() => !location.hash.includes('q=')")
    assert count(page) == N_LAYERS * 12
    page.locator("#layer").select_option("3")
    assert count(page) == 12
    page.locator("#components [data-clear]").click()
    assert count(page) == N
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert cells(page, "rank", 200) == [str(i + 1) for i in range(100)]
    assert not page.locator("nav").is_visible()
    assert not page.locator(".filters").is_visible()


def test_the_csv_has_every_row_and_number(visit, large, tmp_path):
    page, data = visit("large"), large.dataset
    with page.expect_download() as download:
        page.locator("#csv").click()
    download.value.save_as(tmp_path / "all.csv")
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == N
    order = np.argsort(-data["effect"].values, kind="stable")
    assert [row["name"] for row in rows] == list(data["name"].values[order])
    for name in ("effect", "ci_low", "ci_high", "p_value", "delta_norm", "set_score", "screen"):
        np.testing.assert_allclose([float(row[name]) for row in rows], data[name].values[order], rtol=1e-4)
    with page.expect_download() as download:
        page.locator("#layer").select_option("3")
        page.locator("#csv").click()
    assert len(Path(download.value.path()).read_text().splitlines()) == 1 + N // N_LAYERS


def test_figures_tell_filter_and_pin(visit):
    page = visit("large")
    point_at(page, "heads", REDDEST)
    tip = figure(page, "heads").locator('[aria-label="tip"]')
    assert "L5.head.3" in tip.text_content()
    assert "+0.2500" in tip.text_content()
    point_at(page, "heads", REDDEST, click=True)
    assert (count(page), cells(page, "component")) == (1, ["L5.head.3"])
    assert page.locator("#pill").is_visible()  # the table is out of sight: this says what the click did
    page.locator("#pill a").click()
    page.wait_for_function("() => document.querySelector('#pill').hidden")
    page.locator("#components [data-clear]").click()
    bar = "(svg) => svg.querySelectorAll('[aria-label=\"bar\"] rect')[0]"
    point_at(page, "depth", bar, click=True)
    assert count(page) == N // N_LAYERS
    assert set(cells(page, "layer")) == {"0"}
    page.locator("#components [data-clear]").click()
    figure(page, "heads").scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelectorAll('[data-figure=heads] .live rect').length === 225")
    point_at(page, "heads", REDDEST, click=True, modifiers=("Shift",))
    assert count(page) == N
    assert figure(page, "heads").locator("rect").count() == 225 + 1  # a frame around what is pinned
    pin = page.locator("#box tr", has_text="L5.head.3").locator("button")
    assert pin.get_attribute("aria-pressed") == "true"
    second = page.locator("#box td.pin button").nth(1)
    second.press("Enter")
    assert second.get_attribute("aria-pressed") == "true"
    other = cells(page, "component", 2)[1]
    kept = page.evaluate("location.hash")
    again = visit("large", kept)
    assert again.locator("#pins button").count() == 3  # both, and the one that copies
    again.locator("#only-pinned").check()
    assert cells(again, "component") == ["L5.head.3", other]
    again.locator("#pins button").first.click()
    assert cells(again, "component") == [other]


def test_the_flow_graph_answers_and_no_figure_is_blank(visit):
    page = visit("large")
    graph = figure(page, "hierarchy")
    links = graph.locator('[aria-label="link"] path')
    assert links.count() > 3
    point_at(page, "hierarchy", "(svg) => svg.querySelectorAll('circle')[1]")
    assert 0 < graph.locator("path.fade").count() < links.count()
    assert "L5.head.3" in graph.locator('[aria-label="tip"]').text_content()
    assert page.locator("#n-sources").get_attribute("max") == "1"  # one source is surely above zero
    for shown, empty in ((page, 0), (visit("hostile"), 1)):
        for drawn in shown.locator("figure").all():
            drawn.scroll_into_view_if_needed()
            settle(shown)
            assert drawn.locator(".live svg [aria-label] > *").count() or drawn.locator(".empty").count()
        assert shown.locator('figure[data-figure="hierarchy"] .empty').count() == empty
    assert "This result holds no flow" in shown.locator('figure[data-figure="hierarchy"]').inner_text()


def test_light_and_dark(visit):
    page = visit("hostile", color_scheme="light")
    shade = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    assert page.evaluate(shade) > 200
    page.locator("#theme").click()
    assert page.evaluate(shade) < 60
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate(shade) < 60  # it is remembered
    page.locator("#theme").click()
    assert page.evaluate(shade) > 200
    page.emulate_media(color_scheme="dark")
    page.evaluate("() => delete document.documentElement.dataset.theme")
    assert page.evaluate(shade) < 60  # without a choice, the system's


@pytest.mark.parametrize("name", ["large", "hostile"])
def test_a_narrow_screen_needs_no_sideways_scrolling(visit, name):
    page = visit(name, viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator("#box td.name").first.is_visible()


def test_names_and_prompts_stay_text(visit):
    page = visit("hostile", "#q=" + "%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
    assert page.evaluate("window.harmed") is None
    assert page.locator("img, b:has-text('harmed')").count() == 0
    assert HOSTILE in page.locator("h1").text_content()
    assert HOSTILE in page.locator("#prompts pre").first.text_content()
    page.locator("#components [data-clear]").click()
    assert TAG in page.locator("#box td.name").first.text_content()
    page.locator("#box td.pin button").first.click()
    assert TAG in page.locator("#pins").text_content()
    assert page.evaluate("window.harmed") is None


@pytest.mark.parametrize(("name", "how"), [("large", "light"), ("hostile", "dark")])
def test_axe_finds_no_serious_fault(visit, name, how):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    narrow = {"viewport": {"width": 360, "height": 740}} if name == "large" else {}
    page = visit(name, "#pins=L5.head.3&layer=5" if name == "large" else "", color_scheme=how, **narrow)
    found = axe.run(page).response["violations"]
    faults = [
        (fault["id"], fault["nodes"][0]["html"][:200]) for fault in found if fault["impact"] in ("serious", "critical")
    ]
    assert not faults


def test_it_works_without_a_script(visit, large):
    page = visit("large", java_script_enabled=False)
    names = page.locator("#ranked tbody code").all_inner_texts()
    assert names == [row.name for row in large.top(100)]
    assert page.locator('figure[data-figure="heads"] .static svg').is_visible()
    assert not page.locator(".filters").is_visible()
    assert not page.locator("#theme").is_visible()
