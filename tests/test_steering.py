"""Steered generation against HF torch with hooks; the causal tests of anchors on the embedded pair."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.oracles import hf_layers
from tests.tiny import build
from wpjax.behaviours import behaviour
from wpjax.checkpoints.checkpoint import load_checkpoint
from wpjax.errors import AnchorRejected, BehaviourError
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.evaluation.judge import Judge, check_behaviour_differs
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.answers import answer_metric
from wpjax.metrics.diagnostics import MAX_EXCESS_NLL, SteeringTest
from wpjax.metrics.metric import scores
from wpjax.models.edits import ClampTo, Edit
from wpjax.models.generate import Generation, generate
from wpjax.models.sites import Site

N_NEW = 6


@torch.no_grad()
def hf_steered(model, prompt, layer, read, write, target):
    """Greedy tokens, one whole forward each, a hook moving the stream from the last prompt token on."""

    def hook(module, args, out):
        resid = out[0] if isinstance(out, tuple) else out
        moved = resid.clone()
        late = resid[:, len(prompt) - 1 :]
        moved[:, len(prompt) - 1 :] += (target - late @ read)[..., None] * write
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    handle = hf_layers(model)[layer].register_forward_hook(hook)
    ids = list(prompt)
    for _ in range(N_NEW):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    handle.remove()
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama-gqa3", "gpt2-tied"])
def test_steered_generation_equals_hf_torch_token_for_token(name, tmp_path):
    hf = build(name, tmp_path)
    ours = load_checkpoint(str(hf.folder))
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, 61, (4, 14)).astype(np.int32), np.array([14, 6, 9, 12], np.int32)
    read, write = (v / np.linalg.norm(v) for v in rng.standard_normal((2, ours.cfg.d_model)).astype(np.float32))
    unmoved = None
    for layer in (0, 2):
        clamp = ClampTo(jnp.asarray(read), jnp.asarray(write), jnp.asarray(7.0))
        edits = (Edit(Site.RESID_POST, clamp, layer=layer, start=lengths - 1),)
        options = {"max_new_tokens": N_NEW, "stop_tokens": ()}
        got = generate(ours.cfg, ours.params, jnp.asarray(tokens), jnp.asarray(lengths), edits=edits, **options)
        unmoved = generate(ours.cfg, ours.params, jnp.asarray(tokens), jnp.asarray(lengths), **options).tokens
        args = (layer, torch.tensor(read), torch.tensor(write), 7.0)
        expected = [hf_steered(hf.model, t[:n].tolist(), *args) for t, n in zip(tokens, lengths, strict=True)]
        np.testing.assert_array_equal(got.tokens, expected)
        assert (np.asarray(unmoved) != expected).any()


@pytest.fixture(scope="module")
def anchor(tiny_pair):
    return fit_anchor(tiny_pair, behaviour("tiny:multiple_sections"))


def test_an_anchor_is_accepted_where_steering_and_removal_beat_chance(anchor):
    tests = [d.steering for d in anchor.diagnostics if d.steering]
    chosen = next(t for t in tests if t.layer == anchor.layer)
    assert anchor.acceptance == "accepted"
    assert len(tests) == 4
    assert chosen.steered > chosen.steered_random + 0.05
    assert chosen.removed < chosen.removed_random - 0.5
    assert chosen.effect_size == max(t.effect_size for t in tests if not t.verdict())


def test_the_removal_is_what_the_expert_says_when_held_at_the_base(tiny_pair, anchor):
    """Recomputed by hand from the anchor: the chosen layer's pass rates."""
    task = behaviour("tiny:multiple_sections")
    fit, check = (task.encode(tiny_pair.tokenizer, split) for split in ("fit", "sweep"))
    base, expert = (float(anchor.score(tiny_pair.cfg, p, fit).mean()) for p in (tiny_pair.base, tiny_pair.expert))
    chosen = anchor.diagnostics[anchor.layer]
    judge = Judge(tiny_pair, task, check)

    def rate(params, target):
        clamp = ClampTo(anchor.vector, anchor.vector, jnp.asarray(target, jnp.float32))
        return judge.passes(judge.answers(params, clamp, anchor.layer)).mean()

    assert rate(tiny_pair.expert, base) == pytest.approx(chosen.removed, abs=0.02)
    target = base + chosen.strength * (expert - base)
    assert rate(tiny_pair.base, target) == pytest.approx(chosen.steered, abs=0.02)


def test_an_anchor_that_changes_no_answer_is_rejected_with_its_figures(tiny_pair):
    task = behaviour("tiny:no_comma")
    with pytest.raises(AnchorRejected, match=r"of 1 layers tried none passes .* layer 3: .*checker on 0% of prompts"):
        fit_anchor(tiny_pair, task, layer=3)
    marked = fit_anchor(tiny_pair, task, layer=3, causal="report")
    assert marked.acceptance.startswith("steering the base along it passes the checker on 0% of prompts")
    assert fit_anchor(tiny_pair, task, layer=3, causal="skip").acceptance == "not tested"


def test_answers_that_fool_the_checker_are_degenerate(tiny_pair):
    """Held at the expert's state the base repeats quotation marks, which the checker passes."""
    with pytest.raises(AnchorRejected, match=r"degenerate: 1\d\.\d\d nats a token under the base, the expert's own 0"):
        fit_anchor(tiny_pair, behaviour("tiny:quotation"), layer=4)


def test_the_likelihood_of_answers_is_that_of_the_base(tiny_pair):
    task = behaviour("tiny:title")
    judge = Judge(tiny_pair, task, task.encode(tiny_pair.tokenizer, "sweep", 8))
    answers = judge.answers(tiny_pair.expert)
    metric = answer_metric(tiny_pair.cfg, judge.batch.with_instruction, answers)
    assert judge.nll(answers) == pytest.approx(-scores(tiny_pair.cfg, tiny_pair.base, metric).mean(), rel=1e-6)
    assert judge.nll(answers) > judge.nll(judge.answers(tiny_pair.base)) + 0.1


def test_a_behaviour_that_the_base_has_is_refused(tiny_pair):
    task = dataclasses.replace(behaviour("tiny:multiple_sections"), checker=lambda text, args: True)
    with pytest.raises(AnchorRejected, match=r"base passes the checker on 100% of 64 prompts, the expert on 100%"):
        fit_anchor(tiny_pair, task)


def test_answers_that_are_all_empty_are_refused(tiny_pair):
    task = behaviour("tiny:multiple_sections")
    judge = Judge(tiny_pair, task, task.encode(tiny_pair.tokenizer, "sweep", 8))
    blank = Generation(np.full((8, 1), tiny_pair.tokenizer.eos_token_id), np.ones(8, np.int32))
    assert judge.texts(blank) == [""] * 8
    assert not judge.passes(blank).any()
    with pytest.raises(AnchorRejected, match="expert's answers are all empty"):
        check_behaviour_differs(judge, judge.answers(tiny_pair.base), blank)
    with pytest.raises(AnchorRejected, match="base's answers are all empty"):
        check_behaviour_differs(judge, blank, judge.answers(tiny_pair.expert))


def test_a_checker_that_raises_is_named(tiny_pair):
    def checker(text, args):
        if text.startswith("A line"):
            return True
        raise KeyError("n")

    task = dataclasses.replace(behaviour("tiny:multiple_sections"), checker=checker)
    with pytest.raises(BehaviourError, match=r"checker fails on the answer '.*' \(KeyError: 'n'\)"):
        fit_anchor(tiny_pair, task)


def test_verdicts_name_the_test_that_failed():
    good = SteeringTest(3, 1.0, 0.8, 0.0, 0.6, 0.1, 0.9, 0.5, 2.0, 1.5)
    assert good.verdict() == ""
    assert good.effect_size == pytest.approx(0.8 * 0.8)
    assert "degenerate" in dataclasses.replace(good, nll=1.5 + MAX_EXCESS_NLL + 0.1).verdict()
    assert "not surely more" in dataclasses.replace(good, gain_low=0.0).verdict()
    assert "not surely less" in dataclasses.replace(good, drop_low=float("nan")).verdict()
    broken = dataclasses.replace(good, nll_removed=1.5 + MAX_EXCESS_NLL + 0.1)
    assert "without it the expert's answers are degenerate: 2.60" in broken.verdict()
    assert Anchor(jnp.ones(1), 0).acceptance == "not tested"
