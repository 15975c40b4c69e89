"""The interference map: against models patched by hand, and made-up shares whose overlap is known."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from wpjax import cli
from wpjax.behaviours import behaviour
from wpjax.components import Component, enumerate_components, n_parameters
from wpjax.errors import PairError, WpjaxError
from wpjax.estimators.secant import secant_adjoint
from wpjax.estimators.sets import set_metrics
from wpjax.evaluation.interference import KINDS, N_HALVINGS, Parts, alike, interference
from wpjax.evaluation.judge import Judge
from wpjax.evaluation.validation import curve_steps
from wpjax.metrics.metric import scores
from wpjax.models.config import ModelConfig
from wpjax.pairs import load_pair
from wpjax.patching import PatchMask, materialize
from wpjax.results.interference import Interference
from wpjax.results.sweep_result import SweepResult

SHARE, N, N_NEW = 0.05, 8, 8
SAVED = Path(__file__).parent / "data" / "schema4" / "title.nc"


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
def folder(tmp_path_factory):
    """A folder with the prompts of english_capital as a file: another name, and no other programs."""
    folder = tmp_path_factory.mktemp("interference")
    pairs = behaviour("tiny:english_capital").pairs
    lines = [json.dumps({"with": p.with_instruction, "without": p.without}) for p in pairs]
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def made(folder):
    pairs = [load_pair("tiny:base", "tiny:expert"), load_pair("tiny:base", "tiny:planted")]
    return pairs, [behaviour(folder / "mine.jsonl", "english_capital"), behaviour("tiny:english_capital")]


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
    assert level.brings_back[0] != level.brings_back[1]
    assert found.levels["modules"].n_parts[0] < Parts.of(pairs[0].cfg, every, "modules").sizes.size == 16


def test_finished_parts_are_used(made, found, parts):
    before = set(parts)
    assert len(before) == 2 + 2 * 4
    again = interference(*made, share=SHARE, n_prompts=N, max_new_tokens=N_NEW, done=parts)
    assert again.as_json == found.as_json
    assert set(parts) == before


def test_the_command_writes_a_map_and_a_figure(found, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    swept = SweepResult.from_netcdf(SAVED)
    swept.dataset.attrs |= {"behaviour": "mine", "behaviour_source": "mine.jsonl", "checker": "english_capital"}
    swept.to_netcdf("a.nc")
    del swept.dataset.attrs["checker"]
    swept.dataset.attrs |= {"behaviour": "tiny:english_capital", "expert": "tiny:planted", "behaviour_source": ""}
    swept.to_netcdf("b.nc")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["wpjax", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code, capsys.readouterr()

    code, printed = run("interference", "a.nc", "--out", "m.json")
    assert (code, list(folder.glob("*m.*"))) == (2, [])
    assert "needs two different behaviours" in printed.err
    quick = ["--n-prompts", str(N), "--max-new-tokens", str(N_NEW), "--share", str(SHARE)]
    code, printed = run("interference", "a.nc", "b.nc", *quick, "--out", "m.json")
    assert code == 0, printed.err
    assert json.loads((folder / "m.json").read_text()) == json.loads(json.dumps(found.as_json))
    assert (folder / "m.png").read_bytes()[:4] == b"\x89PNG"
    assert "mine: its set brings back" in " ".join(printed.out.split())
    assert Interference.from_json("m.json").as_json == found.as_json
    code, shown = run("show", "m.json")
    assert code == 0, shown.err
    assert shown.out.strip() == printed.out.partition("\nwrote")[0].strip()


def test_other_bases_and_shares_are_refused(made):
    pairs, tasks = made
    swapped = dataclasses.replace(pairs[1], base=pairs[1].expert, expert=pairs[1].base)
    with pytest.raises(PairError, match="different bases"):
        interference([pairs[0], swapped], tasks)
    with pytest.raises(WpjaxError, match="share=2: above 0 and below 1"):
        interference(pairs, tasks, share=2.0)
    with pytest.raises(WpjaxError, match="two different behaviours"):
        interference(pairs, [tasks[0], tasks[0]])
