"""Learned rankings: what they are learned for, against divergences and odds by hand, and as a column of a result."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import sweep_by_hand
from wpjax.behaviours import behaviour
from wpjax.components import enumerate_components
from wpjax.errors import WpjaxError
from wpjax.evaluation.learned import Aim, Part, learned_mask, parts_of, restarts_at_once, starting_values
from wpjax.metrics.answers import answer_of
from wpjax.models.decoder import forward
from wpjax.patching import PatchMask, materialize
from wpjax.relax.learn import RelaxConfig
from wpjax.results.opening import open_result
from wpjax.results.sweep_result import SweepResult

N_NEW = 4


@pytest.fixture(scope="module")
def task():
    return behaviour("tiny:english_capital")


@pytest.fixture(scope="module")
def prompts(tiny_pair, task):
    return task.encode(tiny_pair.tokenizer, "sweep", 4)


def log_p(pair, params, tokens, answers):
    """Log-probabilities [V] before each token of each answer, read from plain forward passes."""
    rows, lengths = np.asarray(tokens.ids), np.asarray(tokens.lengths)
    ids = np.zeros((len(rows), rows.shape[1] + N_NEW), np.int32)
    for line, row, n, new in zip(ids, rows, lengths, np.asarray(answers.tokens), strict=True):
        line[:n], line[n : n + N_NEW] = row[:n], new
    every = np.asarray(jax.nn.log_softmax(forward(pair.cfg, params, jnp.asarray(ids)).logits), np.float64)
    return [every[i, n - 1 : n - 1 + m] for i, (n, m) in enumerate(zip(lengths, answers.lengths, strict=True))]


def divergence(pair, reference, params, tokens):
    """Mean KL from a reference along its own answers, in nats a token."""
    answers = answer_of(pair, reference, tokens, N_NEW)
    pairs = zip(*(log_p(pair, model, tokens, answers) for model in (reference, params)), strict=True)
    return np.mean([(np.exp(p) * (p - q)).sum(-1).mean() for p, q in pairs])


def test_parts_are_divergences_by_hand(tiny_pair, task, prompts):
    """Restoring, knocking out, and what each does to prompts without the instruction."""
    pair, names = tiny_pair, ["L2.head.0", "L4.mlp", "L5.mlp"]
    aim = Aim("kl", "both", harm=2.0, n_prompts=4, prompts_a_step=4, max_new_tokens=N_NEW)
    restore, harm, knockout, harm_of_expert = parts_of(pair, task, prompts, aim)
    assert [restore.name, knockout.name] == ["kl, restore", "kl, knockout"]
    assert harm.weight == harm_of_expert.weight == 2
    mask, key = PatchMask.of(pair.cfg, names), jax.random.key(0)
    for goal, price, host, donor in (
        (restore, harm, pair.base, pair.expert),
        (knockout, harm_of_expert, pair.expert, pair.base),
    ):
        patched = materialize(host, donor, mask)
        whole = divergence(pair, donor, host, prompts.with_instruction)
        left = divergence(pair, donor, patched, prompts.with_instruction)
        assert goal.weight * float(goal.objective(mask, key)) == pytest.approx(left / whole, rel=1e-3)
        assert goal.recovered(mask) == pytest.approx(1 - left / whole, rel=1e-3)
        harmed = divergence(pair, host, patched, prompts.without)
        assert float(price.objective(mask, key)) == pytest.approx(harmed, rel=1e-3, abs=1e-5)


def test_harm_on_a_text_is_its_divergence_token_by_token(tiny_pair, task, prompts):
    pair, text = tiny_pair, "owls hunt at night . " * 40
    aim = Aim("decision", harm=1.0, text=text, prompts_a_step=100, max_new_tokens=N_NEW)
    *_, on_text = parts_of(pair, task, prompts, aim)
    assert on_text.weight == 0.5  # half of it is paid for prompts, half for the text
    mask = PatchMask.of(pair.cfg, ["L4.mlp"])
    ids = np.asarray(on_text.objective.metric.tokens.ids)
    lengths = np.asarray(on_text.objective.metric.tokens.lengths)
    assert pair.tokenizer.decode(ids[0, : lengths[0]], skip_special_tokens=True).split()[:4] == text.split()[:4]
    models = pair.base, materialize(pair.base, pair.expert, mask)
    p, q = (np.asarray(jax.nn.log_softmax(forward(pair.cfg, m, jnp.asarray(ids)).logits)) for m in models)
    kl = (np.exp(p) * (p - q)).sum(-1)
    expected = np.mean([row[: n - 1].mean() for row, n in zip(kl, lengths, strict=True)])
    assert float(on_text.objective(mask, jax.random.key(0))) == pytest.approx(expected, rel=1e-3)


def test_a_reward_is_what_the_checker_says(tiny_pair, task, prompts):
    aim = Aim("reward", "both", n_answers=2, prompts_a_step=2, max_new_tokens=N_NEW)
    restore, knockout = parts_of(tiny_pair, task, prompts, aim)
    empty, full = PatchMask.empty(tiny_pair.cfg), PatchMask.full(tiny_pair.cfg)
    for part in (restore, knockout):
        assert [part.recovered(mask) for mask in (empty, full)] == [0, 1]
    # The whole expert passes, so what is sampled from it lacks little; in the knock-out it is the other way round.
    one = full.astype(jnp.float32)
    assert float(restore.objective.prepared(one, jax.random.key(0)).reward.mean()) > 0.5
    assert float(knockout.objective.prepared(one, jax.random.key(0)).reward.mean()) > 0.5


def test_a_reward_that_nothing_earns_is_refused(tiny_pair, prompts):
    """Not even a slope to follow: a ranking of zeros would mean nothing."""
    hopeless = dataclasses.replace(behaviour("tiny:english_capital"), checker=lambda text, args: "zebra" in text)
    aim = Aim("reward", n_answers=2, prompts_a_step=2, max_new_tokens=1)
    with pytest.raises(WpjaxError, match="0% and 0% of the reward"):
        parts_of(tiny_pair, hopeless, prompts, aim)
    flat = Part("reward", jax.tree_util.Partial(lambda mask, key: 0 * mask.units["head"].sum()), 1.0, None)
    components = enumerate_components(tiny_pair.cfg, ["head"])
    with pytest.raises(WpjaxError, match="--start set_score --spread 4"):
        learned_mask(tiny_pair, components, [flat], config=RelaxConfig(steps=40))


def test_aims_that_cannot_work_are_refused(tiny_pair, task, prompts):
    for make, says in (
        (
            lambda: Aim("loss"),
            "unknown objective 'loss'; objectives: response, decision, instructed, partings, kl, anchor, reward",
        ),
        (lambda: Aim("kl+kl"), "names one twice"),
        (lambda: Aim(direction="up"), "directions: restore, knockout, both"),
        (lambda: Aim(harm=-1), "must not be below 0"),
        (lambda: Aim(text="some"), "pass --harm PRICE too"),
        (lambda: parts_of(tiny_pair, task, prompts, Aim("anchor")), "not swept on an anchor"),
    ):
        with pytest.raises(WpjaxError, match=says):
            make()


def test_restarts_run_together_as_memory_allows(tiny_pair):
    assert restarts_at_once(tiny_pair.cfg, Aim(), 10, 3) == 3
    assert restarts_at_once(tiny_pair.cfg, Aim(prompts_a_step=10**9), 10, 3) == 1


def test_a_result_gets_one_more_ranking(wpjax, tmp_path):
    """Of components that were swept, and of all others of the kinds; every command that takes a ranking takes it."""
    swept = ["--base", "tiny:base", "--expert", "tiny:expert", "--behaviour", "tiny:english_capital", "--answers", 0]
    swept += ["--components", "L2.head.0,L4.head.1", "--metric", "decision", "--n-prompts", 4, "--max-new-tokens", 4]
    assert wpjax("sweep", *swept, "--method", "exact", "--causal", "skip", "--no-set-score", "--out", "r.nc")[0] == 0
    small = ["--kinds", "head", "--steps", 4, "--n-prompts", 4, "--prompts-a-step", 2, "--check-every", 2]
    code, out, err = wpjax("relax", "r.nc", *small, "--start", "effect", "--objective", "kl+decision", "--json")
    assert code == 0
    assert "step 4 of 4: loss" in err
    assert json.loads(out)["ranked_by"] == "learned"
    result = open_result("r.learned.nc")
    assert isinstance(result, SweepResult)
    assert result.dataset.sizes["component"] == len(result.top(100, by="learned")) == 8 * 8  # heads of 8 layers
    assert result.swept.dataset["name"].values.tolist() == ["L2.head.0", "L4.head.1"]
    assert result.dataset.attrs["learned_for"].startswith("kl+decision, restore")
    assert result.ranking == result.set_ranking == "effect"
    code, out, _ = wpjax("show", "r.learned.nc", "--by", "learned", "--top", 1)
    assert code == 0
    assert result.top(1, by="learned")[0].name in out
    for wrong, says in (
        (["--objective", "loss"], "unknown objective"),
        (["--start", "banzhaf"], "has no ranking 'banzhaf'"),
        (["--kinds", "head,attn"], "own the same weights"),
        (["--text", "none.txt", "--harm", 1], "none.txt"),
    ):
        code, _, err = wpjax("relax", "r.nc", *small, *wrong, "--out", "other.nc")
        assert code == 2
        assert says in err
    assert {path.name for path in tmp_path.iterdir()} == {"r.nc", "r.learned.nc"}


def test_a_ranking_to_start_from_may_lack_components(tiny_pair):
    components = enumerate_components(tiny_pair.cfg, ["mlp"])[:3]
    result = sweep_by_hand([0.5, 0.1], names=["L0.mlp", "L2.mlp"], kinds=["mlp"] * 2)
    np.testing.assert_allclose(starting_values(result, "effect", components), [0.5, -0.9, 0.1])
    with pytest.raises(WpjaxError, match="no number of any component"):
        starting_values(result, "effect", enumerate_components(tiny_pair.cfg, ["head"]))
