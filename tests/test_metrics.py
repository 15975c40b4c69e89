"""Metrics against HF torch, prompt by prompt; sweeps and screens of them against the definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import exact, make_anchor
from tests.oracles import hf_answer, hf_log_p
from tests.tiny import build_pair, patched_torch
from wpjax.components import KINDS, MODEL_LAYER, Component, enumerate_components
from wpjax.engines.reference import reference_changes
from wpjax.errors import MetricRejected, WpjaxError
from wpjax.estimators.screens import output_linearised, weight_gradient
from wpjax.estimators.sets import set_metrics
from wpjax.methods.metrics import answer_metrics
from wpjax.metrics.answers import ExpertAnswers, decision_metric, partings_metric, response_metric
from wpjax.metrics.metric import expect_positive_gap, joint_scores, scores
from wpjax.models.generate import Generation
from wpjax.patching import PatchMask, patch

N_NEW = 5
METRICS = answer_metrics()


@pytest.fixture(scope="module", params=["llama-tied", "gpt2-untied"])
def hf_pair(request, tmp_path_factory):
    """Grouped heads with a tied embedding; layer norms and biases with an unembedding of its own."""
    return build_pair(request.param, tmp_path_factory.mktemp(request.param))


def all_components(pair):
    """Every component of the model; of neurons, some."""
    every = {kind: enumerate_components(pair.cfg, [kind]) for kind in KINDS}
    return [c for kind, members in every.items() for c in members[:: 7 if kind == "neuron" else 1]]


def hf_response(hf_pair, model, prompt, stop_tokens):
    answer = hf_answer(hf_pair.expert.model, prompt, stop_tokens, N_NEW)
    log_p = hf_log_p(model, [*prompt, *answer])
    return np.mean([float(log_p[len(prompt) - 1 + t, y]) for t, y in enumerate(answer)])


def hf_decision(hf_pair, model, prompt, stop_tokens):
    answer = hf_answer(hf_pair.expert.model, prompt, stop_tokens, N_NEW)
    for t, y in enumerate(answer):
        so_far = [*prompt, *answer[:t]]
        b = int(hf_log_p(hf_pair.base.model, so_far)[-1].argmax())
        if b != y:
            log_p = hf_log_p(model, so_far)[-1]
            return float(log_p[y] - log_p[b])
    return 0.0


def hf_partings(hf_pair, model, prompt, stop_tokens):
    answer = hf_answer(hf_pair.expert.model, prompt, stop_tokens, N_NEW)
    odds = []
    for t, y in enumerate(answer):
        base, log_p = (hf_log_p(m, [*prompt, *answer[:t]])[-1] for m in (hf_pair.base.model, model))
        b = int(base.argmax())
        odds += [] if b == y else [float(log_p[y] - log_p[b])]
    return np.mean(odds) if odds else 0.0


def hf_instructed(hf_pair, model, prompt, stop_tokens, plain):
    """The parting at which the instruction adds at least half of what it adds anywhere to the expert's log-odds."""
    answer = hf_answer(hf_pair.expert.model, prompt, stop_tokens, N_NEW)
    due, odds = [], []
    for t, y in enumerate(answer):
        so_far = [*prompt, *answer[:t]]
        b = int(hf_log_p(hf_pair.base.model, so_far)[-1].argmax())
        if b != y:
            asked, unasked = (hf_log_p(hf_pair.expert.model, [*p, *answer[:t]])[-1] for p in (prompt, plain))
            due.append(float(asked[y] - asked[b] - unasked[y] + unasked[b]))
            log_p = hf_log_p(model, so_far)[-1]
            odds.append(float(log_p[y] - log_p[b]))
    if not odds:
        return 0.0
    return next((o for d, o in zip(due, odds, strict=True) if max(due) > 0 and d >= max(due) / 2), odds[0])


def hf_kl(hf_pair, model, prompt, stop_tokens):
    answer = hf_answer(hf_pair.expert.model, prompt, stop_tokens, N_NEW)
    log_p, log_q = (hf_log_p(m, [*prompt, *answer[:-1]])[len(prompt) - 1 :] for m in (hf_pair.expert.model, model))
    return -float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("name", METRICS)
def test_metrics_equal_hf_torch(hf_pair, pair, batch, name):
    metric = METRICS[name](pair, batch, N_NEW)
    oracle = {
        "response": hf_response, "decision": hf_decision, "instructed": hf_instructed, "partings": hf_partings,
        "kl": hf_kl,
    }[name]  # fmt: skip
    prompts, plain = (
        [ids[:n].tolist() for ids, n in zip(tokens.ids, tokens.lengths, strict=True)]
        for tokens in (batch.with_instruction, batch.without)
    )
    for model, params in ((hf_pair.base.model, pair.base), (hf_pair.expert.model, pair.expert)):
        expected = [
            oracle(hf_pair, model, *both[:1], pair.stop_tokens, *(both[1:] if name == "instructed" else ()))
            for both in zip(prompts, plain, strict=True)
        ]
        np.testing.assert_allclose(metric(pair.cfg, params), expected, atol=1e-4)


def one_each(pair):
    """One metric for each pair, where both would say the same."""
    return response_metric if pair.cfg.tied else decision_metric


def test_replay_of_every_component_of_the_model_equals_the_lazy_patch(pair, batch):
    """Final norm, unembedding and a tied embedding included: they change the readout."""
    metric = one_each(pair)(pair, batch, N_NEW)
    components = all_components(pair)
    expected = reference_changes(pair.cfg, pair.base, pair.expert, components, metric)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(exact(pair, batch, metric, components), expected, atol=3e-5)


def test_effects_on_the_response_equal_hf_torch_with_slices_copied(hf_pair, pair, batch):
    metric = response_metric(pair, batch, N_NEW)
    components = [Component("head", 2, 1), Component("kv_group", 1, 0), Component("mlp", 2), Component("final_norm")]
    tokens = batch.with_instruction
    prompts = [ids[:n].tolist() for ids, n in zip(tokens.ids, tokens.lengths, strict=True)]

    def scores(model):
        return np.array([hf_response(hf_pair, model, prompt, pair.stop_tokens) for prompt in prompts])

    before = scores(hf_pair.base.model)
    expected = np.stack([scores(patched_torch(hf_pair, c)) - before for c in components])
    np.testing.assert_allclose(exact(pair, batch, metric, components), expected, atol=1e-4)


@pytest.mark.parametrize("hf_pair", ["gpt2-untied"], indirect=True)
def test_screens_approach_the_exact_effect_of_a_small_change(pair, batch):
    metric = one_each(pair)(pair, batch, N_NEW)
    near = jax.tree.map(lambda b, e: b + 1e-2 * (e - b), pair.base, pair.expert)
    components = all_components(pair)
    effect = exact(pair, batch, metric, components, donor=near)
    for screen in (output_linearised, weight_gradient):
        got = screen(pair.cfg, pair.base, near, components, metric)
        for kind in {c.kind for c in components}:
            mine = [i for i, c in enumerate(components) if c.kind == kind]
            error = np.abs(got[mine] - effect[mine]).max() / np.abs(effect[mine]).max()
            assert error < 0.06, (screen.__name__, kind, error)


def test_the_screen_is_exact_for_what_only_the_readout_sees(pair, batch):
    metric = response_metric(pair, batch, N_NEW)
    readers = [c for c in all_components(pair) if c.kind in ("final_norm", "unembed")]
    got = output_linearised(pair.cfg, pair.base, pair.expert, readers, metric)
    np.testing.assert_allclose(got, exact(pair, batch, metric, readers), atol=2e-5)


def test_a_metric_of_some_prompts_is_theirs(pair, batch):
    rows = jnp.asarray([4, 1])
    for make in METRICS.values():
        metric = make(pair, batch, N_NEW)
        some = metric.take(rows)(pair.cfg, pair.expert)
        np.testing.assert_allclose(some, metric(pair.cfg, pair.expert)[rows], atol=1e-6)


def test_digests_tell_metrics_apart(pair, batch):
    made = {name: make(pair, batch, N_NEW) for name, make in METRICS.items()}
    some = made["kl"].take(jnp.asarray([0, 1]))
    assert len({m.digest for m in [*made.values(), some]}) == len(METRICS) + 1
    assert METRICS["kl"](pair, batch, N_NEW).digest == made["kl"].digest


def test_metrics_compose_with_vmap_and_grad(pair, batch):
    metric = response_metric(pair, batch, N_NEW)
    components = [Component("head", 0, 1), Component("final_norm", MODEL_LAYER)]
    masks = [PatchMask.of(pair.cfg, [c]) for c in components]
    stacked = jax.tree.map(lambda *units: jnp.stack(units), *masks)

    def score(mask):
        return metric(pair.cfg, patch(pair.base, pair.expert, mask))

    together = jax.jit(jax.vmap(score))(stacked)
    np.testing.assert_allclose(together, [score(m) for m in masks], atol=1e-5)
    slope = jax.grad(lambda m: score(m).sum())(PatchMask.empty(pair.cfg, jnp.float32))
    assert float(jnp.abs(slope.units["final_norm"])) > 0


def test_a_decision_needs_models_that_part(pair, batch):
    """The base's own answers: nowhere does it choose another token."""
    same = pair.__class__(pair.cfg, pair.base, pair.base, None, pair.base_checkpoint, pair.base_checkpoint)
    with pytest.raises(MetricRejected, match="part ways on 0 of 6 prompts"):
        decision_metric(same, batch, N_NEW)


def test_several_metrics_read_from_one_pass_are_those_of_their_own(pair, batch):
    """Metrics of other tokens, and those given a state, have a pass of their own."""
    anchor = make_anchor(pair, 1)
    answers = (make(pair, batch, N_NEW) for make in answer_metrics().values())
    shifted = batch.with_instruction._replace(ids=(batch.with_instruction.ids + 1) % 61)
    given = anchor.clamp_to(pair, batch, response_metric(pair, batch, 2))
    metrics = [anchor.metric_along(batch), *answers, anchor.metric_along(shifted), given]
    got = joint_scores(pair.cfg, pair.expert, metrics)
    for metric, values in zip(metrics, got, strict=True):
        np.testing.assert_allclose(values, scores(pair.cfg, pair.expert, metric), atol=1e-5, err_msg=metric.name)
    assert np.abs(got[0] - got[-2]).max() > 0.01


def test_answers_that_are_given_are_used(pair, batch):
    answers = Generation(np.full((6, 2), 7, np.int32), np.array([2, 1, 2, 2, 1, 2], np.int32))
    metric = response_metric(pair, batch, answers=ExpertAnswers(pair, batch.with_instruction, given=answers))
    n = batch.with_instruction.lengths
    np.testing.assert_array_equal(metric.tokens.lengths, n + answers.lengths)
    np.testing.assert_array_equal(metric.at[:, 0], n - 1)
    np.testing.assert_array_equal(metric.weight[1], [1, 0])
    assert (np.asarray(metric.tokens.ids)[np.arange(6), n] == 7).all()


def test_metrics_that_share_the_answers_are_those_of_their_own(pair, batch):
    """Once both models have been read, they can be taken away: no metric of the answers' tokens reads them again."""
    shared = ExpertAnswers(pair, batch.with_instruction, N_NEW)
    assert len(shared.along.differs) == 6
    without = dataclasses.replace(pair, base={}, expert={})
    for make in (decision_metric, partings_metric, response_metric):
        alone = make(pair, batch, N_NEW)
        assert make(without, batch, answers=shared).digest == alone.digest
    for one, alone in zip(set_metrics(pair, batch, answers=shared), set_metrics(pair, batch, N_NEW), strict=True):
        assert one.digest == alone.digest
    # The first parting is the first of all partings.
    decision, partings = (make(pair, batch, N_NEW) for make in (decision_metric, partings_metric))
    parted = np.asarray(decision.weight[:, 0]) > 0
    first = np.where(np.asarray(partings.weight) > 0, np.asarray(partings.at), 10**6).min(1)
    np.testing.assert_array_equal(np.asarray(decision.at[:, 0])[parted], first[parted])


def test_gaps_that_are_negative_or_may_be_zero_are_refused():
    queries = np.arange(20)
    with pytest.raises(MetricRejected, match=r"the gap of x on these 20 prompts is -1 \[-1, -1\], not positive"):
        expect_positive_gap(-np.ones(20), queries, "x")
    spread = np.random.default_rng(0).normal(0.1, 1.0, 20)
    for gap in (spread - spread.mean() + 0.1, np.full(20, np.nan)):
        with pytest.raises(MetricRejected, match="not positive"):
            expect_positive_gap(gap, queries, "x")
    expect_positive_gap(spread - spread.mean() + 1.0, queries, "x")


def test_a_metric_beyond_the_model_is_refused(pair, batch):
    metric = response_metric(pair, batch, N_NEW)
    far = metric.__class__(metric.tokens, metric.at, metric.weight, metric.readout, 9, metric.name)
    with pytest.raises(WpjaxError, match="reads layer 9: the model has layers 0 to 2"):
        far(pair.cfg, pair.base)
