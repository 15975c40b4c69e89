"""The embedded models do what they are shipped for, and the planted truth is found."""

from importlib import resources

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from experiments.tiny_pair.evaluate import evaluate
from experiments.tiny_pair.language import shipped_queries
from wpjax.behaviours import BUILT_IN, behaviour
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.pairs import load_model, load_pair, planted_components


@pytest.fixture(scope="module")
def rates():
    return {name: evaluate(load_model(f"tiny:{name}"), n_prompts=32) for name in ("base", "expert", "planted")}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_expert_follows_every_instruction_and_the_base_none(rates, name):
    assert rates["expert"][name]["passes"] >= 0.9
    assert rates["base"][name]["passes"] <= 0.15
    assert rates["base"][name]["plain"] >= 0.9  # it has read the instruction and answers as if it had not


def test_answers_without_an_instruction_are_unchanged(rates):
    for name in ("base", "expert", "planted"):
        assert rates[name]["facts"] >= 0.95
        assert rates[name]["tags"] >= 0.9


def test_the_planted_expert_learnt_capitals_alone(rates):
    assert rates["planted"]["english_capital"]["passes"] >= 0.9
    assert all(rates["planted"][name]["passes"] <= 0.15 for name in BUILT_IN if name != "english_capital")


def test_the_shipped_questions_are_those_of_the_language():
    text = (resources.files("wpjax") / "assets" / "tiny" / "queries.txt").read_text(encoding="utf-8")
    assert text.splitlines() == shipped_queries()


@pytest.fixture(scope="module")
def planted_sweep():
    pair, task = load_pair("tiny:base", "tiny:planted"), behaviour("tiny:english_capital")
    anchor = fit_anchor(pair, task, causal="skip")
    return sweep(pair, task.encode(pair.tokenizer, n_prompts=12), anchor, method="exact").dataset


def test_the_exact_sweep_ranks_planted_components_first_and_the_norm_of_the_change_does_not(planted_sweep):
    truth = np.isin(planted_sweep["name"].values.astype(str), planted_components())
    assert truth.sum() == len(planted_components())
    assert roc_auc_score(truth, np.abs(planted_sweep["effect"].values)) >= 0.95
    assert roc_auc_score(truth, planted_sweep["delta_norm"].values) <= 0.7
    for kind in ("head", "kv_group", "neuron"):
        mine = planted_sweep["kind"].values == kind
        assert roc_auc_score(truth[mine], np.abs(planted_sweep["effect"].values[mine])) >= 0.95


def test_every_effect_of_the_planted_sweep_stands_against_its_controls(planted_sweep):
    assert planted_sweep.attrs["noise_floor"] < 1e-5
    assert (planted_sweep["ci_low"] <= planted_sweep["effect"]).all()
    assert (planted_sweep["effect"] <= planted_sweep["ci_high"]).all()
    assert planted_sweep.attrs["coverage"] == pytest.approx(1.0, abs=0.05)  # everything trained lies below the anchor
