"""Files that version 0.1.0 wrote: read as they are, and their numbers found again by sweeping anew.

`data/schema4` holds an anchor of the embedded pair, and a factorial sweep of seven components with its set score.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from wpjax.behaviours import behaviour
from wpjax.errors import WpjaxError
from wpjax.estimators.sweep import sweep
from wpjax.metrics.anchor import Anchor
from wpjax.report import write_report
from wpjax.results.sweep_result import SweepResult

FOLDER = Path(__file__).parent / "data" / "schema4"


@pytest.fixture(scope="module")
def anchor():
    return Anchor.load(FOLDER / "title.anchor.safetensors")


@pytest.fixture(scope="module")
def before():
    return SweepResult.from_netcdf(FOLDER / "title.nc")


def test_an_anchor_belongs_to_its_pair(anchor, tiny_pair):
    anchor.check_belongs(tiny_pair)
    assert (anchor.layer, anchor.behaviour, anchor.acceptance) == (6, "tiny:title", "not tested")
    assert len(anchor.diagnostics) == tiny_pair.cfg.n_layers


def test_a_result_is_ranked_and_drawn(before, tmp_path):
    assert before.top(1)[0].name == "L2"
    assert before.set_ranking == "set_score"
    write_report(before, tmp_path / "title.html")
    assert "L3.kv_group.1" in (tmp_path / "title.html").read_text()


def test_its_numbers_are_found_again(before, anchor, tiny_pair):
    """Every cell of the 2x2, both screens, the flow, intervals and tests.

    Nulls are of a sample of the patches, which is another one now.
    """
    names = before.dataset["name"].values.tolist()
    batch = behaviour("tiny:title").encode(tiny_pair.tokenizer, n_prompts=before.dataset.sizes["prompt"])
    anew = sweep(tiny_pair, batch, anchor, components=names, method="factorial")
    before = before.dataset.drop_vars("set_score")  # a score of another definition
    assert set(anew.dataset.variables) >= set(before.variables)
    for name, values in before.variables.items():
        if str(name).startswith("null_"):
            np.testing.assert_array_equal(np.isfinite(anew.dataset[name]), np.isfinite(values), err_msg=str(name))
        elif values.dtype.kind == "f":
            np.testing.assert_allclose(anew.dataset[name], values, rtol=1e-4, atol=2e-5, err_msg=str(name))
        else:
            np.testing.assert_array_equal(anew.dataset[name], values, err_msg=str(name))


def test_another_schema_is_refused_in_one_line(before, tmp_path):
    other = before.dataset.assign_attrs(schema=3)
    SweepResult(other).to_netcdf(tmp_path / "old.nc")
    with pytest.raises(WpjaxError, match=r"old\.nc: schema 3, this version reads 4; make it anew with `wpjax sweep`"):
        SweepResult.from_netcdf(tmp_path / "old.nc")


def test_an_anchor_of_another_expert_is_refused(anchor, tiny_pair):
    other = dataclasses.replace(anchor, expert_fingerprint="0" * 16)
    with pytest.raises(WpjaxError, match="fitted in another expert"):
        other.check_belongs(tiny_pair)
