"""Steered generation against HF torch with hooks; the causal tests of anchors on the embedded pair.

Versions that are steered together, from one reading of the prompts, are held to the same versions one by one.
"""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.oracles import hf_layers
from tests.tiny import build
from wpjax.behaviours import Tokens, behaviour
from wpjax.checkpoints.checkpoint import load_checkpoint
from wpjax.errors import AnchorRejected, BehaviourError
from wpjax.evaluation.continued import Continued, steer
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.evaluation.judge import Judge, check_behaviour_differs
from wpjax.evaluation.steering import Candidate, Directions, candidates, steering_tests
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.answers import answer_metric
from wpjax.metrics.diagnostics import MAX_EXCESS_NLL, SteeringTest
from wpjax.metrics.metric import scores
from wpjax.models.decoder import forward
from wpjax.models.edits import ClampTo, Edit
from wpjax.models.generate import Generation, generate, generate_batched
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


def random_ways(cfg, n, seed=0):
    """Ways to steer at several layers, the last of which moves nothing."""
    rng = np.random.default_rng(seed)
    unit = rng.standard_normal((n, 2, cfg.d_model))
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    ways = [(i % cfg.n_layers, read, write, 5.0 * (i - 1)) for i, (read, write) in enumerate(unit)]
    return [*ways, (0, unit[0, 0], np.zeros(cfg.d_model), 9.0)]


def edits_of(way, start):
    layer, read, write, target = way
    vectors = (jnp.asarray(v, jnp.float32) for v in (read, write))
    return (Edit(Site.RESID_POST, ClampTo(*vectors, jnp.asarray(target, jnp.float32)), layer, start),)


@pytest.mark.parametrize("name", ["llama-gqa3", "gpt2-tied"])
def test_versions_steered_together_are_the_same_versions_one_by_one(name, tmp_path):
    """Answers token for token; the likelihood of answers; and a metric along given words.

    The prompts begin with the same three tokens, which the versions' model reads once.
    """
    hf = build(name, tmp_path)
    ours = load_checkpoint(str(hf.folder))
    cfg, params, rng = ours.cfg, ours.params, np.random.default_rng(0)
    ids = rng.integers(0, 61, (4, 14)).astype(np.int32)
    ids[:, :3] = ids[0, :3]
    prompts = Tokens(ids, np.array([14, 6, 9, 12], np.int32))
    assert prompts.n_shared == 3
    ways, stop = random_ways(cfg, 5), (3, 5)
    together = Continued(cfg, params, prompts, N_NEW)
    together.at_once = 4  # two programs' worth
    answers = together.answers(steer(ways), stop)
    assert len({a.tobytes() for a in answers.tokens}) > 2
    metric = answer_metric(cfg, prompts, Generation(answers.tokens[0], answers.lengths[0]))
    step = np.asarray(metric.at) - prompts.last[:, None]
    scored = together.scores(steer(ways), answers.tokens[0], np.maximum(step, 0), metric)
    nll = together.nll(answers)
    for i, way in enumerate(ways):
        edits = edits_of(way, jnp.asarray(prompts.last))
        alone = generate_batched(cfg, params, *prompts, stop, N_NEW, edits=edits)
        np.testing.assert_array_equal(answers.tokens[i], alone.tokens)
        np.testing.assert_array_equal(answers.lengths[i], alone.lengths)
        own = scores(cfg, params, answer_metric(cfg, prompts, alone))
        np.testing.assert_allclose(nll[i], -own, atol=1e-5)
        held = dataclasses.replace(metric, held=edits[0])
        np.testing.assert_allclose(scored[i], scores(cfg, params, held), atol=1e-5)


@pytest.fixture(scope="module")
def planted(tiny_pair):
    """A pair that differs by one direction: the expert's embedding is shifted along that of a question mark.

    It says question marks, then, and the base does not.
    """
    base, (word,) = tiny_pair.base, tiny_pair.tokenizer("?")["input_ids"]
    vector = np.asarray(base["embed"]["W_E"], np.float64)[word]  # the unembedding is tied to it
    vector /= np.linalg.norm(vector)
    shifted = base["embed"]["W_E"] + 60.0 * jnp.asarray(vector, jnp.float32)
    pair = dataclasses.replace(tiny_pair, expert={**base, "embed": {**base["embed"], "W_E": shifted}})
    task = dataclasses.replace(behaviour("tiny:title"), checker=lambda text, args: "??" in text)
    return pair, Judge(pair, task, task.encode(pair.tokenizer, "sweep"), max_new_tokens=6), vector


def directions_along(pair, batch, unit):
    """The same direction at every layer, with the mean states of both models at the last prompt token."""
    unit, prompts, means = np.tile(unit, (pair.cfg.n_layers, 1)), batch.with_instruction, []
    for params in (pair.base, pair.expert):
        resid = forward(pair.cfg, params, jnp.asarray(prompts.ids), sites=(Site.RESID_POST,)).sites[Site.RESID_POST]
        last = np.asarray(resid)[:, np.arange(len(batch)), prompts.last]
        means.append(np.einsum("lbd,ld->l", last, unit) / len(batch))
    return Directions(unit, *means)


def test_a_planted_direction_is_accepted_and_a_random_one_rejected(planted):
    """Both with a part of the prompts: the test stops once it is decided."""
    pair, judge, vector = planted
    random = np.random.default_rng(1).standard_normal(len(vector))
    found = {}
    for name, unit in (("planted", vector), ("random", random / np.linalg.norm(random))):
        (found[name],) = steering_tests(judge, [Candidate(3, 1.0)], directions_along(pair, judge.batch, unit))
    assert (found["planted"].outcome, found["random"].outcome) == ("accepted", "rejected")
    assert found["planted"].steered > 0.9 > 0.1 > found["planted"].removed
    assert found["planted"].n_queries < len(np.unique(judge.batch.queries))


def test_a_test_that_no_number_of_queries_would_decide_stops_undecided(planted):
    """Steered to the expert's state the base passes, but the expert is held at its own state and loses nothing."""
    pair, judge, vector = planted
    along = directions_along(pair, judge.batch, vector)
    (test,) = steering_tests(judge, [Candidate(3, 1.0)], along._replace(base=along.expert))
    assert test.steered > 0.9
    assert test.verdict().startswith("undecided: without it the expert passes on")
    assert test.queries_needed > len(np.unique(judge.batch.queries)) > test.n_queries


def test_layers_are_tried_until_one_promises_to_pass(planted):
    pair, judge, vector = planted
    few, random = judge.take(np.arange(4)), np.random.default_rng(1).standard_normal(len(vector))
    tried: dict[str, list[int]] = {}
    for name, unit in (("planted", vector), ("random", random / np.linalg.norm(random))):
        done = tried[name] = []
        progress = lambda what, n_done, n_all, done=done: done.append(n_done)  # noqa: E731
        next(candidates(few, [3, 2, 1, 4], directions_along(pair, few.batch, unit), progress))
    assert tried == {"planted": [0, 4], "random": [0, 2, 4]}  # the first two layers were enough


def test_few_prompts_leave_an_anchor_undecided(planted):
    """Six queries cannot tell, whatever the answers: it is said, with how many would."""
    pair, judge, vector = planted
    few = judge.take(np.arange(6))
    (test,) = steering_tests(few, [Candidate(3, 1.0)], directions_along(pair, few.batch, vector))
    assert test.steered > test.steered_random + 0.8
    assert re.match(r"undecided: .*; about \d+ queries would decide it, 6 were tried", test.verdict())


def test_finished_looks_are_not_answered_again(planted):
    pair, judge, vector = planted
    few, done = judge.take(np.arange(8)), {}
    directions = directions_along(pair, few.batch, vector)
    steering_tests(few, [Candidate(3, 1.0)], directions, done=done)
    assert list(done) == ["steering-0-0"]
    nothing = {key: np.zeros_like(part) for key, part in done.items()}
    with pytest.raises(AnchorRejected, match="base passes the checker on 0% of 8 prompts, the expert on 0%"):
        steering_tests(few, [Candidate(3, 1.0)], directions, done=nothing)


@pytest.fixture(scope="module")
def anchor(tiny_pair):
    return fit_anchor(tiny_pair, behaviour("tiny:multiple_sections"), causal="report")


def test_the_removal_is_what_the_expert_says_when_held_at_the_base(tiny_pair, anchor):
    """Recomputed by hand from the anchor: the chosen layer's pass rates, on the queries that were needed."""
    task, chosen = behaviour("tiny:multiple_sections"), anchor.diagnostics[anchor.layer]
    assert anchor.acceptance == (chosen.steering.verdict() or "accepted")
    fit, check = (task.encode(tiny_pair.tokenizer, split) for split in ("fit", "sweep"))
    base, expert = (float(anchor.score(tiny_pair.cfg, p, fit).mean()) for p in (tiny_pair.base, tiny_pair.expert))
    first = list(dict.fromkeys(check.queries.tolist()))[: int(chosen.n_queries)]
    judge = Judge(tiny_pair, task, check.take(np.flatnonzero(np.isin(check.queries, first))))
    prompts, vector = judge.batch.with_instruction, np.asarray(anchor.vector)

    def rate(params, target):
        edits = edits_of((anchor.layer, vector, vector, target), jnp.asarray(prompts.last))
        answers = generate_batched(tiny_pair.cfg, params, *prompts, tiny_pair.stop_tokens, 32, edits=edits)
        return judge.passes(answers).mean()

    assert rate(tiny_pair.expert, base) == pytest.approx(chosen.removed, abs=0.02)
    assert rate(tiny_pair.base, base + chosen.strength * (expert - base)) == pytest.approx(chosen.steered, abs=0.02)


def test_an_anchor_that_changes_no_answer_is_not_accepted(tiny_pair):
    task = behaviour("tiny:no_comma")
    marked = fit_anchor(tiny_pair, task, layer=3)
    assert marked.acceptance.startswith("undecided: steered along it the base passes on 0% of prompts")
    assert fit_anchor(tiny_pair, task, layer=3, causal="skip").acceptance == "not tested"


def test_answers_grow_where_the_checker_needs_their_end(tiny_pair):
    task = behaviour("tiny:quotation")
    few = task.encode(tiny_pair.tokenizer, "fit", 8)
    short = Judge(tiny_pair, task, few, max_new_tokens=4)
    assert short.cut(short.answers(tiny_pair.expert)).all()
    judge, answers = short.with_room(tiny_pair.expert)
    assert judge.max_new_tokens > 8
    assert judge.passes(answers).mean() > 0.8
    capital = Judge(tiny_pair, behaviour("tiny:english_capital"), few, max_new_tokens=4)
    assert capital.with_room(tiny_pair.expert)[0] is capital


def test_answers_that_fool_the_checker_are_degenerate(tiny_pair):
    """Held at the expert's state the base repeats quotation marks, which the checker passes."""
    message = r"of 1 layers tried none .* layer 4: .* \d+\.\d\d nats a token and 0"
    with pytest.raises(AnchorRejected, match=message) as error:
        fit_anchor(tiny_pair, behaviour("tiny:quotation"), layer=4)
    assert [d.layer for d in error.value.diagnostics] == list(range(tiny_pair.cfg.n_layers))
    assert error.value.diagnostics[4].steering.outcome == "rejected"


def test_the_likelihood_of_answers_is_that_of_the_base(tiny_pair):
    task = behaviour("tiny:title")
    judge = Judge(tiny_pair, task, task.encode(tiny_pair.tokenizer, "sweep", 8))
    answers = judge.answers(tiny_pair.expert)
    metric = answer_metric(tiny_pair.cfg, judge.batch.with_instruction, answers)
    assert judge.nll(answers) == pytest.approx(-scores(tiny_pair.cfg, tiny_pair.base, metric).mean(), rel=1e-6)
    assert judge.nll(answers) > judge.nll(judge.answers(tiny_pair.base)) + 0.1


def test_a_behaviour_that_the_base_has_is_refused(tiny_pair):
    task = dataclasses.replace(behaviour("tiny:multiple_sections"), checker=lambda text, args: True)
    with pytest.raises(AnchorRejected, match=r"base passes the checker on 100% of 32 prompts, the expert on 100%"):
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
    ends = {"gain_high": 0.9, "drop_high": 0.95, "difference": 0.9, "n_queries": 16.0}
    good = SteeringTest(3, 1.0, 0.8, 0.0, 0.6, 0.1, 0.9, 0.5, 2.0, 1.5, **ends)
    assert (good.verdict(), good.outcome) == ("", "accepted")
    assert good.effect_size == pytest.approx(0.8 * 0.8)

    def outcome(**changed):
        return dataclasses.replace(good, **changed).verdict()

    assert outcome(nll=1.5 + MAX_EXCESS_NLL + 0.1).startswith("rejected: steered answers are degenerate")
    assert outcome(nll_removed=1.5 + MAX_EXCESS_NLL + 0.1).startswith("rejected: without it the expert's answers are")
    none = {"gain_high": 0.2, "gain_low": -0.2}
    assert outcome(**none, drop_high=0.2, drop_low=-0.2).startswith("rejected: steered along it")  # a quarter of .9 is .225
    assert outcome(**none).startswith("undecided: steered along it")
    assert outcome(drop_high=0.2, drop_low=-0.2).startswith("undecided: without it")
    # [-.3, .9] is half .6 wide about .3: 16 (.6 / .3)^2 = 64 queries
    assert outcome(gain_low=-0.3).endswith("not surely more; about 64 queries would decide it, 16 were tried")
    assert outcome(drop_low=float("nan")).startswith("undecided: without it")
    assert Anchor(jnp.ones(1), 0).acceptance == "not tested"
