"""The on-policy score of single components: against HF torch, and against answering anew for every patch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import make_anchor
from tests.oracles import hf_answer, hf_log_p
from tests.tiny import build_pair, patched_torch
from wpjax.components import Component, enumerate_components
from wpjax.engines.engine import Engine
from wpjax.engines.on_policy import BaseAnswers, OnPolicy, OnPolicyEngine
from wpjax.engines.packing import pack
from wpjax.engines.plan import make_plan
from wpjax.errors import WpjaxError
from wpjax.estimators.screens import output_linearised
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import mean_states
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.metric import scores
from wpjax.metrics.reading import read_at
from wpjax.patching import PatchMask, materialize

N_NEW = 5
ANCHOR_LAYER = 1
KINDS = ("head", "kv_group", "neuron", "norm", "final_norm")


@pytest.fixture(scope="module")
def hf_pair(tmp_path_factory):
    return build_pair("llama-gqa3", tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def base_answers(pair, batch):
    return BaseAnswers(pair, batch, make_anchor(pair, ANCHOR_LAYER), N_NEW)


@pytest.fixture(scope="module")
def components(pair):
    """Of every layer, those after the anchor too."""
    return [c for kind in KINDS for c in enumerate_components(pair.cfg, [kind])[:: 5 if kind == "neuron" else 1]]


def swept(base_answers, components, donor=None):
    """Changes [C, B], flow [C, U] and the engine."""
    engine = OnPolicyEngine(base_answers, components, {}, lambda *_: None)
    engine.models |= {} if donor is None else {"expert": donor}
    plan = make_plan(base_answers.pair.cfg, components, engine.packing)
    return *engine.changes("exact", plan), engine


@pytest.fixture(scope="module")
def found(base_answers, components):
    return swept(base_answers, components)


@torch.no_grad()
def hf_score(model, batch, vector, stop_tokens):
    """The stream along the anchor at every token of the model's own answer, and the answers."""
    values, answers = [], []
    for ids, n in zip(batch.with_instruction.ids, batch.with_instruction.lengths, strict=True):
        answer = hf_answer(model, ids[:n].tolist(), stop_tokens, N_NEW)
        full = torch.tensor([[*map(int, ids[:n]), *answer]])
        states = model(full, output_hidden_states=True).hidden_states[ANCHOR_LAYER + 1]
        values.append(float((states[0, n:] @ vector).mean()))
        answers.append(answer)
    return np.array(values), answers


def test_single_components_equal_hf_torch(hf_pair, pair, batch, components, found):
    vector = torch.tensor(np.asarray(make_anchor(pair, ANCHOR_LAYER).vector))
    before, said = hf_score(hf_pair.base.model, batch, vector, pair.stop_tokens)
    last, anew = pair.cfg.n_layers - 1, 0
    some = [Component("head", 0, 1), Component("kv_group", 1, 0), Component("neuron", 0, 5), Component("head", last, 1)]
    for c in some:
        after, answers = hf_score(patched_torch(hf_pair, c), batch, vector, pair.stop_tokens)
        np.testing.assert_allclose(found[0][components.index(c)], after - before, atol=1e-4, err_msg=c.name)
        changed = np.mean([a != b for a, b in zip(said, answers, strict=True)])
        assert found[2].changed[components.index(c)] == changed
        anew += changed > 0
    assert anew > 0


def test_every_component_equals_answering_anew(pair, base_answers, components, found):
    delta, _, engine = found
    before = base_answers.score(pair.base)
    for c, got in zip(components, delta, strict=True):
        patched = materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, [c]))
        np.testing.assert_allclose(got, base_answers.score(patched) - before, atol=5e-5, err_msg=c.name)
    late = np.array([not base_answers.metric.reaches(c) for c in components])
    assert 0 < engine.changed.mean() < 1
    assert np.abs(delta[late]).max() > 0.01  # by other words alone
    assert (delta[late][engine.changed[late] == 0] == 0).all()


def test_rows_of_the_flow_sum_to_the_effects(pair, components, found):
    """The rest is what other words do; without any, nothing is left."""
    delta, flow, engine = found
    assert flow.shape == (len(components), len(engine.targets))
    np.testing.assert_allclose(flow.sum(1), delta.mean(1), atol=3e-5)
    assert np.abs(flow[engine.changed == 0, -1]).max(initial=0.0) < 3e-5


def test_while_words_last_the_screen_is_the_slope(pair, base_answers, components):
    near = jax.tree.map(lambda b, e: b + 1e-3 * (e - b), pair.base, pair.expert)
    delta, _, engine = swept(base_answers, components, near)
    felt = [i for i, c in enumerate(components) if base_answers.metric.reaches(c)]
    assert (engine.changed[felt] == 0).mean() > 0.9
    expected = output_linearised(pair.cfg, pair.base, near, [components[i] for i in felt], base_answers.metric)
    same = engine.changed[felt] == 0
    assert np.abs(delta[felt] - expected)[same].max() < 0.05 * np.abs(expected).max()


def test_kept_words_are_hf_torch_s_first_choices(hf_pair, pair, batch, base_answers):
    """The expert, given the base's words: how many of them it would say."""
    got = scores(pair.cfg, pair.expert, base_answers.words_unchanged)
    for i, (ids, n) in enumerate(zip(batch.with_instruction.ids, batch.with_instruction.lengths, strict=True)):
        m = int(base_answers.answers.lengths[i])
        answer = np.asarray(base_answers.answers.tokens)[i, :m]
        log_p = hf_log_p(hf_pair.expert.model, [*ids[:n], *answer])[n - 1 : n - 1 + m]
        top = log_p.topk(2, dim=-1)
        sure = (top.values[:, 0] - top.values[:, 1]).numpy() > 1e-3
        assert got[i] == ((top.indices[:, 0].numpy() == answer) & sure).sum()


def test_a_sweep_of_it(pair, batch, components):
    """Shares of the gap between both models' own answers, with every statistic; the screen leaves words out."""
    base_answers = BaseAnswers(pair, batch, make_anchor(pair, ANCHOR_LAYER), N_NEW)
    models = (pair.base, pair.expert)
    states = [
        mean_states(pair.cfg, model, read_at(batch.with_instruction, base_answers.of(model)))[ANCHOR_LAYER].mean(0)
        for model in models
    ]
    vector = (states[1] - states[0]) / np.linalg.norm(states[1] - states[0])  # an anchor with a gap
    anchor = Anchor(jnp.asarray(vector), ANCHOR_LAYER)
    before, after = (BaseAnswers(pair, batch, anchor, N_NEW).score(model) for model in models)
    done: dict[str, np.ndarray] = {}
    heads = [c for c in components if c.kind == "head"]
    result = sweep(pair, batch, OnPolicy(anchor, N_NEW), components=heads, method="exact", done=done)
    data = result.dataset
    np.testing.assert_allclose(data["gap"], after - before, atol=1e-4)
    delta, _, engine = swept(BaseAnswers(pair, batch, anchor, N_NEW), heads)
    np.testing.assert_allclose(data["delta"], delta, atol=1e-5)
    np.testing.assert_allclose(data["words_changed"], engine.changed)
    np.testing.assert_allclose(data["flow"].sum("target"), data["effect"], atol=1e-4)
    everything = materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, heads))
    joint = (engine.base_answers.score(everything) - engine.base_answers.score(pair.base)).mean() / data[
        "gap"
    ].values.mean()
    assert data.attrs["coverage"] == pytest.approx(joint, abs=1e-4)
    assert data.attrs["metric"] == "on_policy"
    assert np.isfinite(data["null_permuted"]).all()
    assert np.isfinite(data["null_direction"]).all()
    again = sweep(pair, batch, OnPolicy(anchor, N_NEW), components=heads, method="exact", done=done).dataset
    np.testing.assert_array_equal(again["delta"], data["delta"])
    np.testing.assert_array_equal(again["words_changed"], data["words_changed"])


def test_along_fixed_words_it_is_any_other_sweep(pair, base_answers, components, found):
    """Where no word changes, the change is that of an engine of the anchor along the base's words."""
    felt = [c for c in components if base_answers.metric.reaches(c)]
    engine = Engine(pair, base_answers.metric, felt, {}, lambda *_: None)
    delta, _ = engine.changes("exact", make_plan(pair.cfg, felt, pack(base_answers.metric)))
    at = [components.index(c) for c in felt]
    same = found[2].changed[at] == 0
    np.testing.assert_allclose(found[0][at][same], delta[same], atol=1e-6)


@pytest.mark.parametrize("method", ["masks", "race", "factorial", "activation", "ig", "secant"])
def test_what_needs_fixed_words_is_refused(pair, batch, method):
    with pytest.raises(WpjaxError, match="needs fixed words"):
        sweep(pair, batch, OnPolicy(make_anchor(pair, ANCHOR_LAYER), N_NEW), method=method)


def test_the_anchor_s_state_cannot_be_given_to_its_own_score(pair, batch):
    anchor = make_anchor(pair, ANCHOR_LAYER)
    with pytest.raises(WpjaxError, match="reads the anchor"):
        sweep(pair, batch, OnPolicy(anchor, N_NEW), given=anchor)
