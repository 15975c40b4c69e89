"""The sweep as a whole: resumed parts, families of tests, coverage, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest
import xarray as xr

from wpjax.behaviours import behaviour
from wpjax.errors import ComponentError, WpjaxError
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.pairs import load_pair, planted_components
from wpjax.results.sweep_result import SweepResult
from wpjax.stats import benjamini_hochberg


@pytest.fixture(scope="module")
def setting():
    pair, task = load_pair("tiny:base", "tiny:expert"), behaviour("tiny:title")
    return pair, task.encode(pair.tokenizer, n_prompts=8), fit_anchor(pair, task, causal="skip")


def test_whatever_parts_are_done_the_result_is_the_same(setting):
    """Also the noise floor: a sham draws the same whether or not others before it were done."""
    done = {}
    whole = sweep(*setting, kinds=("head",), done=done).dataset
    for kept in (0, 3):
        part = dict(sorted(done.items(), key=lambda item: item[0][::-1])[kept::2])
        again = sweep(*setting, kinds=("head",), done=part).dataset
        for dataset in (whole, again):
            for name in ("date", "wall_time_s"):
                dataset.attrs.pop(name, None)
        xr.testing.assert_identical(again, whole)


def test_parts_of_other_components_are_not_mistaken(setting):
    done = {}
    sweep(*setting, components=["L0.head.0", "L0.head.1"], done=done)
    mixed = sweep(*setting, components=["L0.head.0", "L0.head.5"], done=done).dataset
    fresh = sweep(*setting, components=["L0.head.0", "L0.head.5"]).dataset
    np.testing.assert_allclose(mixed["effect"], fresh["effect"], rtol=1e-5)


def test_a_screen_on_the_same_prompts_does_not_shrink_the_family(setting):
    data = sweep(*setting, kinds=("neuron",), method="screen+exact", top=64, stratum=0).dataset
    exact = data["exact"].values
    assert exact.sum() == 64
    p = np.where(exact, data["p_value"].values, 1.0)
    np.testing.assert_allclose(data["q_value"].values[exact], benjamini_hochberg(p)[exact])
    assert (data["q_value"].values[exact] > 1.5 * benjamini_hochberg(p[exact])).all()
    assert np.isnan(data["q_value"].values[~exact]).all()
    filled = np.where(exact, data["effect"], data["screen"])
    assert float(data["coverage_sum"][0]) == pytest.approx(filled.sum())


def test_what_a_sweep_refuses(setting):
    pair, batch, anchor = setting
    with pytest.raises(ComponentError, match="is empty"):
        sweep(*setting, components=[])
    with pytest.raises(WpjaxError, match="only screen, delta_norm: name one"):
        sweep(*setting, kinds="head", method="screen").top(1)
    broken = jax.tree.map(lambda a: a, pair.expert)
    broken["blocks"]["attn"]["W_O"] = broken["blocks"]["attn"]["W_O"].at[0, 3].set(np.nan)
    nan_pair = dataclasses.replace(pair, expert=broken)
    with pytest.raises(WpjaxError, match="of the expert is nan on prompt 0: its stream reaches nan at layer 0"):
        sweep(nan_pair, batch, dataclasses.replace(anchor, expert_fingerprint=""), kinds="head")


def test_parts_of_another_shape_are_refused(setting):
    done = {}
    sweep(*setting, components=["L0.head.0"], method="screen+exact", done=done)
    assert any(key.startswith("sham") for key in done)
    for key in done:
        with pytest.raises(WpjaxError, match=rf"part {key} has shape \(2, 3\).* delete its file"):
            sweep(*setting, components=["L0.head.0"], method="screen+exact", done=done | {key: np.zeros((2, 3))})


def test_a_random_stratum_says_what_the_screen_missed(setting):
    """Against the truth: every neuron of two layers replaced."""
    named = [f"L{layer}.neuron.{i}" for layer in (0, 1) for i in range(0, 320, 4)]
    data = sweep(*setting, components=named, method="screen+exact", top=16, stratum=24).dataset
    sampled, exact = data["sampled"].values, data["exact"].values
    assert (sampled.sum(), exact.sum()) == (24, 40)
    whole = sweep(*setting, components=named).dataset
    np.testing.assert_allclose(data["effect"].values[exact], whole["effect"].values[exact], atol=1e-6)
    size = np.abs(whole["effect"].values)
    chosen = exact & ~sampled
    truth = int((size[~chosen] >= np.median(size[chosen])).sum())
    assert float(data["missed_low"][0]) <= truth <= float(data["missed_high"][0])
    np.testing.assert_allclose(data["screen_error"], data["screen"] - data["effect"], equal_nan=True)
    assert np.abs(data["screen_error"].values[exact]).max() < 0.1 * size.max()


def test_a_stratum_of_all_the_others_misses_nothing_and_is_read_again(setting, tmp_path):
    """What it missed is then a count, not an estimate; the file holds numbers of one kind."""
    named = [f"L0.head.{i}" for i in range(6)]
    result = sweep(*setting, components=named, method="screen+exact", top=3, stratum=3)
    data = result.dataset
    size, chosen = np.abs(data["effect"].values), ~data["sampled"].values
    truth = int((size[~chosen] >= np.median(size[chosen])).sum())
    assert [float(data[name][0]) for name in ("missed", "missed_low", "missed_high")] == [truth] * 3
    result.to_netcdf(tmp_path / "r.nc")
    xr.testing.assert_identical(SweepResult.from_netcdf(tmp_path / "r.nc").dataset, data)


def test_activation_patches_have_their_statistics(setting):
    """The same tests and intervals as patched weights, and what the screen missed."""
    named = [f"L1.neuron.{i}" for i in range(0, 320, 8)]
    data = sweep(*setting, components=named, method="activation", top=12, stratum=12).dataset
    patched = np.isfinite(data["activation"].values)
    assert (patched.sum(), int(data["sampled"].sum())) == (24, 12)
    for name in ("p_value", "q_value", "activation_low"):
        np.testing.assert_array_equal(np.isfinite(data[name].values), patched)
    assert np.isnan(data["effect"].values).all()
    whole = sweep(*setting, components=named, method="activation").dataset
    np.testing.assert_allclose(data["p_value"].values[patched], whole["p_value"].values[patched])
    size = np.abs(whole["activation"].values)
    chosen = patched & ~data["sampled"].values
    truth = int((size[~chosen] >= np.median(size[chosen])).sum())
    assert float(data["missed_low"][0]) <= truth <= float(data["missed_high"][0])
    assert np.isfinite(data["split_half"].values).all()


def test_the_weight_gradient_chooses_what_is_replaced(setting):
    named = [f"L1.neuron.{i}" for i in range(0, 320, 8)]
    first = sweep(*setting, components=named, method="gradient").dataset["gradient"].values
    data = sweep(*setting, components=named, method="gradient+exact", top=10, stratum=0).dataset
    np.testing.assert_array_equal(np.flatnonzero(data["exact"]), np.sort(np.argsort(-np.abs(first))[:10]))
    np.testing.assert_allclose(data["screen_error"], data["gradient"] - data["effect"], equal_nan=True)


def test_nulls_are_smaller_than_planted_effects():
    pair, task = load_pair("tiny:base", "tiny:planted"), behaviour("tiny:english_capital")
    anchor = fit_anchor(pair, task, n_prompts=16, causal="skip")
    batch = task.encode(pair.tokenizer, n_prompts=8)
    data = sweep(pair, batch, anchor, components=[*planted_components(), "L3.head.0", "L4.head.0"]).dataset
    names = ("null_permuted", "null_direction")
    nulls = {name: dict(zip(data["swept_kind"].values, data[name].values, strict=True)) for name in names}
    best = np.nanmax(data["effect"].values)
    for by_kind in nulls.values():
        assert set(by_kind) == {"head", "kv_group", "neuron"}
        assert all(0 < null < 0.5 * best for null in by_kind.values())
    assert (data["split_half"].values[[0, 2]] > 0.8).all()
