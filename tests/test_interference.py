"""The interference map: against models patched by hand, and made-up shares whose overlap is known."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from tests.helpers import make_anchor
from wpjax import cli
from wpjax.behaviours import behaviour
from wpjax.components import Component, enumerate_components, n_parameters
from wpjax.errors import PairError, WpjaxError
from wpjax.estimators.secant import secant_adjoint
from wpjax.estimators.sets import set_metrics
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.interference import KINDS, N_HALVINGS, Parts, alike, interference
from wpjax.evaluation.judge import Judge
from wpjax.evaluation.validation import curve_steps
from wpjax.metrics.metric import scores
from wpjax.models.config import ModelConfig
from wpjax.pairs import load_pair
from wpjax.patching import PatchMask, materialize

SHARE, N, N_NEW = 0.05, 8, 8


def test_units_may_differ_where_modules_do_not():
    """Two behaviours, each sure of its units on every prompt, in the same modules; a third elsewhere."""
    cfg = ModelConfig("llama", 4, 16, 4, 2, 4, 32, 50, 64)
    neurons = [Component("neuron", layer, i) for layer in range(4) for i in range(8)]
    halvings = [(np.arange(4) < 2, np.arange(4) >= 2)] * N_HALVINGS
    shares = []
    for layer, first in ((1, 0), (1, 4), (3, 0)):
        share = np.zeros((4, 8))
        share[layer, first : first + 4] = 1
        shares.append(np.repeat(share.reshape(-1, 1), 4, axis=1))
    units, modules = (Parts.of(cfg, neurons, level) for level in ("units", "modules"))
    assert modules.sizes.tolist() == [8 * n_parameters(cfg, neurons[0])] * 4
    overlap, agreement = alike(units, shares, [halvings] * 3, budget=4 * n_parameters(cfg, neurons[0]))
    np.testing.assert_allclose(overlap, np.eye(3))
    assert (np.diag(agreement) > 0.99).all()
    assert agreement[0, 1] < 0
    overlap, agreement = alike(modules, shares, [halvings] * 3, budget=8 * n_parameters(cfg, neurons[0]))
    np.testing.assert_allclose(overlap, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert agreement[0, 1] > 0.99 > 0 > agreement[0, 2]


def test_a_set_that_changes_with_the_prompts_has_a_lower_ceiling():
    cfg = ModelConfig("llama", 4, 16, 4, 2, 4, 32, 50, 64)
    neurons = [Component("neuron", layer, i) for layer in range(4) for i in range(8)]
    halvings = [(np.arange(4) < 2, np.arange(4) >= 2)] * N_HALVINGS
    share = np.zeros((32, 4))
    share[:4, :2] = share[2:6, 2:] = 1  # four neurons on one half, of which the other half has two
    overlap, _ = alike(Parts.of(cfg, neurons, "units"), [share], [halvings], 4 * n_parameters(cfg, neurons[0]))
    np.testing.assert_allclose(overlap, 2 / 6)


@pytest.fixture(scope="module")
def made():
    pairs = [load_pair("tiny:base", "tiny:expert"), load_pair("tiny:base", "tiny:planted")]
    return pairs, [behaviour("tiny:title"), behaviour("tiny:english_capital")]


@pytest.fixture(scope="module")
def parts():
    return {}


@pytest.fixture(scope="module")
def found(made, parts):
    return interference(*made, share=SHARE, n_prompts=N, max_new_tokens=N_NEW, done=parts)


def test_each_set_is_judged_by_each_checker(made, found):
    """The set leads the mean secant share for each parameter; what it does is what a model patched by hand does."""
    pairs, tasks = made
    level, every = found.levels["units"], enumerate_components(pairs[0].cfg, KINDS)
    sizes = np.array([n_parameters(pairs[0].cfg, c) for c in every])
    for a, (pair, task) in enumerate(zip(pairs, tasks, strict=True)):
        share = 0
        for metric in set_metrics(pair, task.encode(pair.tokenizer, "sweep", N), N_NEW):
            gap = (scores(pair.cfg, pair.expert, metric) - scores(pair.cfg, pair.base, metric)).mean()
            share = share + secant_adjoint(pair.cfg, pair.base, pair.expert, every, metric).mean(1) / gap
        order = np.argsort(-share / sizes)
        step = curve_steps([every[i] for i in order], sizes[order], [round(SHARE * sizes.sum())])[0]
        assert level.n_parts[a] == len(step.components)
        assert level.shares[a] == pytest.approx(step.n_parameters / sizes.sum())
        patched = materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, step.components))
        for b, (other, task) in enumerate(zip(pairs, tasks, strict=True)):
            judge = Judge(other, task, task.encode(other.tokenizer, "test", N), N_NEW)
            rates = [judge.passes(judge.answers(p)).mean() for p in (other.base, patched, other.expert)]
            expected = (rates[1] - rates[0]) / (rates[2] - rates[0])
            assert level.brings_back[a][b].mean == pytest.approx(expected)
    assert level.brings_back[1][1].mean > 0.5 > level.brings_back[1][0].mean
    assert found.levels["modules"].n_parts[0] < Parts.of(pairs[0].cfg, every, "modules").sizes.size == 16


def test_finished_parts_are_used(made, found, parts):
    before = set(parts)
    assert len(before) == 2 + 2 * 4
    again = interference(*made, share=SHARE, n_prompts=N, max_new_tokens=N_NEW, done=parts)
    assert again.as_json == found.as_json
    assert set(parts) == before


def test_the_command_writes_a_map_and_a_figure(made, found, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pair, task = made[0][0], made[1][0]
    swept = sweep(pair, task.encode(pair.tokenizer, "sweep", N), make_anchor(pair, 1), components=["L0.head.3"])
    swept.dataset.attrs |= {"behaviour": "tiny:title", "expert": "tiny:expert"}
    swept.to_netcdf("a.nc")
    swept.dataset.attrs |= {"behaviour": "tiny:english_capital", "expert": "tiny:planted"}
    swept.to_netcdf("b.nc")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["wpjax", "interference", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code, capsys.readouterr()

    code, printed = run("a.nc", "--out", "m.json")
    assert (code, list(tmp_path.glob("*m*"))) == (2, [])
    assert "needs two different behaviours" in printed.err
    quick = ["--n-prompts", str(N), "--max-new-tokens", str(N_NEW), "--share", str(SHARE)]
    code, printed = run("a.nc", "b.nc", *quick, "--out", "m.json")
    assert code == 0, printed.err
    assert json.loads((tmp_path / "m.json").read_text()) == json.loads(json.dumps(found.as_json))
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"
    assert "tiny:title: its set brings back" in " ".join(printed.out.split())


def test_other_bases_and_shares_are_refused(made):
    pairs, tasks = made
    swapped = dataclasses.replace(pairs[1], base=pairs[1].expert, expert=pairs[1].base)
    with pytest.raises(PairError, match="different bases"):
        interference([pairs[0], swapped], tasks)
    with pytest.raises(WpjaxError, match="share=2: above 0 and below 1"):
        interference(pairs, tasks, share=2.0)
    with pytest.raises(WpjaxError, match="two different behaviours"):
        interference(pairs, [tasks[0], tasks[0]])
