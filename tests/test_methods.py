"""The registry of methods: a new one in a file of its own is swept, kept, ranked by, drawn and listed."""

import sys

import numpy as np
import pytest

from tests import dummy_estimator
from wpjax import cli
from wpjax.behaviours import behaviour
from wpjax.columns import Column, add_columns, effect_estimates, find_column, rankings
from wpjax.engines.on_policy import OnPolicy
from wpjax.errors import WpjaxError
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.methods import Method, check_method, methods, register
from wpjax.pairs import load_pair
from wpjax.report import write_report
from wpjax.results.sweep_result import SweepResult, effect_or_estimate


@pytest.fixture(scope="module")
def setting():
    pair, task = load_pair("tiny:base", "tiny:expert"), behaviour("tiny:title")
    return pair, task.encode(pair.tokenizer, n_prompts=4), fit_anchor(pair, task, causal="skip")


@pytest.fixture(scope="module")
def swept(setting):
    return sweep(*setting, kinds=("head",), method="dummy")


def test_its_column_is_what_it_says(setting, swept):
    """The norm of the change, which every result has, and the sign of the screen, which another sweep makes."""
    screen = sweep(*setting, kinds=("head",), method="screen").dataset
    expected = screen["delta_norm"].values * np.sign(screen["screen"].values)
    assert (expected < 0).any()
    np.testing.assert_allclose(swept.dataset["dummy"], expected, rtol=1e-6)
    assert swept.dataset.attrs["method"] == "dummy"
    assert swept.dataset["coverage_sum"].values[0] == pytest.approx(expected.sum())  # it stands in for the effect


def test_its_file_is_read_and_components_are_ranked_by_it(swept, tmp_path):
    swept.to_netcdf(tmp_path / "r.nc")
    again = SweepResult.from_netcdf(tmp_path / "r.nc")
    values, names = again.dataset["dummy"].values, again.dataset["name"].values
    best = np.argsort(-values)[:5]
    assert again.ranking == "dummy"
    assert [(row.name, row.value) for row in again.top(5, by="dummy")] == [(names[i], values[i]) for i in best]
    np.testing.assert_array_equal(again.best(), values)
    broken = SweepResult(again.dataset.assign(dummy=again.dataset["dummy"] * np.inf))
    with pytest.raises(WpjaxError, match="dummy: infinite, so nothing is written"):
        broken.to_netcdf(tmp_path / "x.nc")


def test_the_page_names_it(swept, tmp_path):
    write_report(swept, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert '<th title="signed norm of the change">dummy</th>' in page
    assert "share of gap (signed norm of the change)" in page  # beside the colours of the heads
    assert "ranking below is by dummy, a first-order estimate" in page
    assert f"{swept.top(1, by='dummy')[0].value:.4f}" in page


def test_the_command_line_lists_it(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["wpjax", "sweep", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert dummy_estimator.DUMMY.help in shown
    for method in methods():
        assert f"{method.name} " in shown
    monkeypatch.setattr(sys, "argv", "wpjax sweep --base a --expert b --behaviour c --out d --method worst".split())
    with pytest.raises(SystemExit):
        cli.main()
    assert "'dummy'" in capsys.readouterr().err  # among those that it is not


def test_it_is_refused_where_words_change(setting):
    pair, batch, anchor = setting
    with pytest.raises(WpjaxError, match=r"dummy needs fixed words, .* take one of exact, screen, screen"):
        sweep(pair, batch, OnPolicy(anchor, 4), method="dummy")
    with pytest.raises(WpjaxError, match=r"unknown method 'dumy'; methods: exact, .*dummy"):
        check_method("dumy")


def test_names_are_given_once():
    with pytest.raises(ValueError, match="another method 'exact'"):
        register(Method("exact", "does nothing", lambda job: None))
    with pytest.raises(ValueError, match="another column 'effect'"):
        add_columns([Column("effect")])
    with pytest.raises(ValueError, match="another column 'ci_low'"):
        add_columns([Column("ci", has_interval=True)])


def test_a_column_that_no_entry_names_is_an_error(setting):
    def run(job):
        return dummy_estimator.run(job)._replace(shares={"nameless": np.zeros((1, len(job.components)))})

    register(Method("nameless", "makes a column that it does not name", run))
    with pytest.raises(ValueError, match="no column 'nameless' is registered"):
        sweep(*setting, components=["L0.head.0"], method="nameless")


def test_the_most_trustworthy_estimate_stands_in_for_the_effect():
    """Of two estimates the first in trust, wherever the columns stand; the effect itself before any."""
    nan = np.nan
    values = {
        "gradient": np.array([1.0, 2.0, 3.0, nan]),
        "screen": np.array([10.0, nan, 30.0, nan]),
        "effect": np.array([100.0, nan, nan, nan]),
    }
    np.testing.assert_array_equal(effect_or_estimate(values), [100.0, 2.0, 30.0, nan])
    assert effect_estimates()[:5] == ("race", "screen", "gradient", "ig", "secant")
    assert [c.name for c in rankings()][:2] == ["effect", "activation"]
    assert rankings()[-1].name == "delta_norm"
    assert find_column("knockout").bounds == ("knockout_low", "knockout_high")
    assert find_column("effect").bounds == ("ci_low", "ci_high")
