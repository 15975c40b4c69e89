"""Models that are given an anchor's state: against HF torch with hooks, and sweeps of what comes after it."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from tests.helpers import exact, make_anchor
from tests.oracles import hf_answer, hf_layers, hf_log_p
from tests.tiny import build_pair
from wpjax.components import KINDS, enumerate_components
from wpjax.engines.reference import reference_changes
from wpjax.errors import ComponentError, WpjaxError
from wpjax.estimators.screens import output_linearised, weight_gradient
from wpjax.estimators.secant import secant_scores
from wpjax.estimators.sweep import sweep
from wpjax.metrics.answers import kl_metric, response_metric
from wpjax.metrics.metric import scores

N_NEW = 5
ANCHOR_LAYER = 1


@pytest.fixture(scope="module", params=["llama-gqa3", "gpt2-tied"])
def hf_pair(request, tmp_path_factory):
    return build_pair(request.param, tmp_path_factory.mktemp(request.param))


def given(pair, batch, make=response_metric):
    return make_anchor(pair, ANCHOR_LAYER).clamp_to(pair, batch, make(pair, batch, N_NEW))


def hf_held(model, prompt, answer, vector, target):
    """Log-probabilities of a model whose stream is held along a vector from the last prompt token on."""

    def hook(module, args, out):
        resid = (out[0] if isinstance(out, tuple) else out).clone()
        late = resid[:, len(prompt) - 1 :]
        resid[:, len(prompt) - 1 :] += (target - late @ vector)[..., None] * vector
        return (resid, *out[1:]) if isinstance(out, tuple) else resid

    handle = hf_layers(model)[ANCHOR_LAYER].register_forward_hook(hook)
    log_p = hf_log_p(model, [*prompt, *answer])
    handle.remove()
    return log_p


def test_a_given_state_equals_hf_torch_with_a_hook(hf_pair, pair, batch):
    metric, anchor = given(pair, batch), make_anchor(pair, ANCHOR_LAYER)
    target = float(scores(pair.cfg, pair.expert, anchor.metric_along(batch)).mean())
    vector = torch.tensor(np.asarray(anchor.vector))
    tokens = batch.with_instruction
    expected = []
    for ids, n in zip(tokens.ids, tokens.lengths, strict=True):
        prompt = ids[:n].tolist()
        answer = hf_answer(hf_pair.expert.model, prompt, pair.stop_tokens, N_NEW)
        log_p = hf_held(hf_pair.base.model, prompt, answer, vector, target)
        expected.append(np.mean([float(log_p[n - 1 + t, y]) for t, y in enumerate(answer)]))
    got = scores(pair.cfg, pair.base, metric)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    free = scores(pair.cfg, pair.base, dataclasses.replace(metric, held=None))
    assert np.abs(got - free).max() > 0.01


def late_components(pair, metric):
    """Of kinds that have a rule of their own each; the others are swept in `test_metrics`."""
    kinds = ("head", "neuron", "final_norm")
    return [c for kind in kinds for c in enumerate_components(pair.cfg, [kind])[::3] if metric.reaches(c)]


def test_replay_after_a_given_state_equals_the_lazy_patch(pair, batch):
    metric = given(pair, batch, kl_metric)
    components = late_components(pair, metric)
    assert min(c.layer for c in components if KINDS[c.kind].in_layer) == ANCHOR_LAYER + 1
    expected = reference_changes(pair.cfg, pair.base, pair.expert, components, metric)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(exact(pair, batch, metric, components), expected, atol=5e-5)


@pytest.mark.parametrize("hf_pair", ["llama-gqa3"], indirect=True)
def test_estimators_know_of_the_given_state(pair, batch):
    metric = given(pair, batch)
    near = jax.tree.map(lambda b, e: b + 1e-2 * (e - b), pair.base, pair.expert)
    components = late_components(pair, metric)
    effect = exact(pair, batch, metric, components, donor=near)
    for screen in (output_linearised, weight_gradient):
        got = screen(pair.cfg, pair.base, near, components, metric)
        assert np.abs(got - effect).max() < 0.06 * np.abs(effect).max(), screen.__name__
    by_unit = secant_scores(pair.cfg, pair.base, pair.expert, metric)
    total = sum(np.asarray(v, np.float64).reshape(len(batch), -1).sum(1) for v in by_unit.values())
    gap = scores(pair.cfg, pair.expert, metric) - scores(pair.cfg, pair.base, metric)
    np.testing.assert_allclose(total, gap, atol=1e-4)


def test_flow_after_a_given_state_sums_to_the_effects(pair, batch):
    """The metric is another anchor, above the one that is given."""
    later = make_anchor(pair, ANCHOR_LAYER + 1)
    metric = make_anchor(pair, ANCHOR_LAYER).clamp_to(pair, batch, later.metric_along(batch))
    heads = enumerate_components(pair.cfg, ["head"], [ANCHOR_LAYER + 1])
    data = sweep(pair, batch, metric, components=heads).dataset
    np.testing.assert_allclose(data["flow"].sum("target"), data["effect"], rtol=1e-3, atol=1e-4)
    assert data.attrs["given_layer"] == ANCHOR_LAYER


def test_what_comes_before_the_state_is_refused(pair, batch):
    metric = given(pair, batch, kl_metric)
    for name in ("L1.head.0", "embed"):
        with pytest.raises(ComponentError, match=rf"{name}: not after layer 1, where a state is given"):
            sweep(pair, batch, metric, components=[name])
    anchor = make_anchor(pair, ANCHOR_LAYER)
    with pytest.raises(WpjaxError, match="nothing comes between"):
        anchor.clamp_to(pair, batch, anchor.metric_along(batch))
