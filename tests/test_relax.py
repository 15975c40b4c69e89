"""Learned masks against planted truth, finite differences and hand-worked thresholds."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wpjax import PatchMask, behaviour, enumerate_components, kl_metric, load_pair, materialize
from wpjax.behaviours import Tokens
from wpjax.components import n_parameters
from wpjax.errors import ComponentError, OutputError, WpjaxError
from wpjax.metrics.metric import Metric, scores
from wpjax.metrics.readouts import LogOdds, Projection
from wpjax.models.decoder import forward
from wpjax.pairs import planted_components
from wpjax.relax.gates import Gates
from wpjax.relax.learn import RelaxConfig, learn
from wpjax.relax.objectives import Recover, Reward, Weighted, prepared
from wpjax.relax.parametrisations import HardConcrete, Nested, StraightThrough, make_parametrisation, threshold
from wpjax.runtime.shards import Shards, check_parts

KINDS = ("head", "kv_group", "neuron")


def test_gates_of_zeros_and_ones_are_the_hard_patch(family_pair):
    cfg, rng = family_pair.cfg, np.random.default_rng(0)
    components = enumerate_components(cfg, (*KINDS, "norm"))
    gates = Gates.of(cfg, components)
    values = rng.integers(0, 2, len(components))
    chosen = [c for c, value in zip(components, values, strict=True) if value]
    relaxed = materialize(family_pair.base, family_pair.expert, gates.mask(jnp.asarray(values, jnp.float32)))
    hard = materialize(family_pair.base, family_pair.expert, PatchMask.of(cfg, chosen))
    jax.tree.map(np.testing.assert_array_equal, relaxed, hard)


def test_shares_are_those_of_the_parameters(family_pair):
    components = enumerate_components(family_pair.cfg, KINDS)
    sizes = np.array([n_parameters(family_pair.cfg, c) for c in components])
    np.testing.assert_allclose(Gates.of(family_pair.cfg, components).share, sizes / sizes.sum(), rtol=1e-5)


def test_components_that_overlap_are_refused(family_pair):
    components = enumerate_components(family_pair.cfg, ("attn", "head"))
    with pytest.raises(ComponentError, match=r"L0\.head\.0 and L0\.attn own the same weights"):
        Gates.of(family_pair.cfg, components)
    with pytest.raises(ComponentError, match="no component"):
        Gates.of(family_pair.cfg, [])


@pytest.mark.parametrize("budget", [0.03, 0.4, 0.9])
def test_threshold_keeps_the_budget_and_its_slope_is_the_implicit_one(budget):
    rng = np.random.default_rng(1)
    numbers, share = jnp.asarray(rng.normal(size=9), jnp.float32), rng.uniform(0.1, 1, 9)
    share = jnp.asarray(share / share.sum(), jnp.float32)
    target, temperature = jnp.asarray(budget, jnp.float32), 0.3
    t = threshold(numbers, share, target, temperature)
    assert float(share @ jax.nn.sigmoid((numbers - t) / temperature)) == pytest.approx(budget, abs=1e-5)
    slope = jax.grad(lambda s: threshold(s, share, target, temperature))(numbers)
    for c, step in itertools.product(range(9), (0.01,)):
        up, down = (threshold(numbers.at[c].add(d), share, target, temperature) for d in (step, -step))
        assert float(slope[c]) == pytest.approx(float(up - down) / (2 * step), abs=2e-3)


def test_straight_through_is_hard_and_has_the_slope_of_the_sigmoid(family_pair):
    gates = Gates.of(family_pair.cfg, enumerate_components(family_pair.cfg, ["head"]))
    numbers = jnp.linspace(-1.0, 1.0, len(gates))
    drawn, back = jax.vjp(lambda a: StraightThrough().draw(a, gates, jax.random.key(0)), numbers)
    assert set(np.asarray(drawn).round(6).tolist()) == {0.0, 1.0}
    soft = np.asarray(jax.nn.sigmoid(numbers))
    np.testing.assert_allclose(back(jnp.ones(len(gates)))[0], soft * (1 - soft), rtol=1e-5)


def test_price_of_hard_concrete_is_the_chance_that_a_gate_is_open(family_pair):
    gates = Gates.of(family_pair.cfg, enumerate_components(family_pair.cfg, ["head"]))
    numbers, gate = jnp.linspace(-2.0, 2.0, len(gates)), HardConcrete(weight=1.0)
    draws = jax.vmap(lambda key: gate.draw(numbers, gates, key))(jax.random.split(jax.random.key(0), 4000))
    expected = float(((draws > 0).mean(0) * gates.share).sum())
    assert float(gate.price(numbers, gates)) == pytest.approx(expected, abs=0.01)


def roc_area(scores, truth):
    """The chance that a planted component ranks above another (the area of the ROC curve)."""
    positive, negative = scores[truth], scores[~truth]
    return float((positive[:, None] > negative[None]).mean() + 0.5 * (positive[:, None] == negative[None]).mean())


def test_a_nested_mask_finds_what_was_planted():
    """The planted expert's sources are known; all other components have inert changes of the same size."""
    pair, task = load_pair("tiny:base", "tiny:planted"), behaviour("tiny:english_capital")
    components = enumerate_components(pair.cfg, KINDS)
    truth = np.isin([c.name for c in components], planted_components())
    metric = kl_metric(pair, task.encode(pair.tokenizer, n_prompts=32), max_new_tokens=8)
    reached = jnp.zeros(len(metric))  # no divergence of the expert from itself
    objective = Recover(pair.cfg, pair.base, pair.expert, metric, reached, n_prompts=8)
    config = RelaxConfig(steps=100, lr=0.1)
    learned = learn(objective, Gates.of(pair.cfg, components), Nested(smallest=0.005, largest=0.1), config)
    best = np.argsort(-learned.scores)[: truth.sum()]
    assert roc_area(learned.scores, truth) > 0.99
    assert truth[best].mean() >= 0.9
    assert learned.losses[0, -20:].mean() < learned.losses[0, :20].mean()


def test_recover_is_the_distance_of_the_hard_patch(family_pair):
    """At gates of 0 and 1 the loss is that of the model with the slices copied; a sum weighs its parts.

    With log-odds the loss is what the log-probability of the choice lacks, place by place.
    """
    cfg, pair = family_pair.cfg, family_pair
    components = enumerate_components(cfg, ["head", "neuron"])
    tokens = Tokens(np.arange(12).reshape(3, 4) % cfg.d_vocab, np.array([4, 4, 4]))
    direction = Projection(jnp.ones(cfg.d_model) / cfg.d_model**0.5)
    metric = Metric(tokens, jnp.full((3, 1), 3), jnp.ones((3, 1)), direction, cfg.n_layers - 1, "anchor")
    here, foils = np.array([[1, 2], [3, 4], [5, 6]]), np.array([[7, 8], [9, 10], [11, 12]])
    odds_at, weight = np.array([[1, 3], [0, 2], [2, 3]]), np.array([[0.5, 0.5], [0.25, 0.75], [1, 0]], np.float32)
    odds_metric = Metric(
        tokens, jnp.asarray(odds_at), jnp.asarray(weight), LogOdds(jnp.asarray(here), jnp.asarray(foils)),
        cfg.n_layers - 1, "a metric of one's own",
    )  # fmt: skip
    assert metric.to_learn == metric

    def choices(params):
        """Mean log-probability of the tokens against their foils, from the logits."""
        logits = np.asarray(forward(cfg, params, jnp.asarray(tokens.ids)).logits, np.float64)
        rows = np.arange(3)[:, None]
        odds = logits[rows, odds_at, here] - logits[rows, odds_at, foils]
        return (-np.log1p(np.exp(-odds)) * weight).sum(1)

    reached, reached_odds = (jnp.asarray(scores(cfg, pair.expert, m)) for m in (metric.to_learn, odds_metric.to_learn))
    np.testing.assert_allclose(reached_odds, choices(pair.expert), atol=1e-5)
    recover = Recover(cfg, pair.base, pair.expert, metric.to_learn, reached)
    odds = Recover(cfg, pair.base, pair.expert, odds_metric.to_learn, reached_odds)
    values = np.random.default_rng(0).integers(0, 2, len(components))
    mask = Gates.of(cfg, components).mask(jnp.asarray(values, jnp.float32))
    chosen = [c for c, value in zip(components, values, strict=True) if value]
    patched = materialize(pair.base, pair.expert, PatchMask.of(cfg, chosen))
    distance = float((np.asarray(reached) - scores(cfg, patched, metric)).mean())
    loss = float((choices(pair.expert) - choices(patched)).mean())
    key = jax.random.key(0)
    assert float(recover(mask, key)) == pytest.approx(distance, abs=1e-4)
    assert float(odds(mask, key)) == pytest.approx(loss, abs=1e-4)
    both = Weighted((recover, odds), jnp.array([2.0, 0.5]))
    assert float(both(mask, key)) == pytest.approx(2 * distance + 0.5 * loss, abs=3e-4)


def test_a_run_in_parts_is_the_run_in_one():
    gates = Gates({"head": jnp.arange(4)[None]}, jnp.ones(4) / 4)
    objective = jax.tree_util.Partial(lambda mask, key: ((mask.units["head"][0, :2] - 1) ** 2).sum())
    runs = [learn(objective, gates, Nested(), RelaxConfig(steps=6, steps_at_once=n)) for n in (6, 4)]
    np.testing.assert_allclose(runs[0].scores, runs[1].scores, rtol=1e-6)
    assert runs[0].losses.shape == runs[1].losses.shape == (1, 6)


def toy(n_gates=4, sizes=None):
    """Gates of the heads of one layer, and an objective that wants the first two open, more so on some prompts."""
    share = np.ones(n_gates) if sizes is None else np.asarray(sizes, float)
    gates = Gates({"head": jnp.arange(n_gates)[None]}, jnp.asarray(share / share.sum(), jnp.float32))

    def loss(mask, key):
        return jax.random.uniform(key) * ((mask.units["head"][0, :2] - 1) ** 2).sum()

    return jax.tree_util.Partial(loss), gates


def test_restarts_are_the_runs_of_the_next_seeds():
    objective, gates = toy()
    config = RelaxConfig(steps=6, seed=3, restarts=3, steps_at_once=3)
    every = learn(objective, gates, Nested(), config)
    groups = learn(objective, gates, Nested(), dataclasses.replace(config, at_once=2))
    for r in range(3):
        alone = learn(objective, gates, Nested(), dataclasses.replace(config, seed=3 + r, restarts=1))
        for run in (every.runs[r], groups.runs[r]):
            np.testing.assert_allclose(run, alone.scores, rtol=1e-5)
        np.testing.assert_allclose(every.losses[r], alone.losses[0], rtol=1e-5)
    assert len({tuple(run) for run in every.runs.tolist()}) == 3
    below, ties = (f(every.runs[:, None], every.runs[:, :, None]).sum(2) for f in (np.less, np.equal))
    np.testing.assert_allclose(every.scores, (below + (ties - 1) / 2).mean(0) / 3)


class Killed(Exception):
    """What stops the learning of a test."""


def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path):
    objective, gates = toy()
    config = RelaxConfig(steps=12, restarts=2, steps_at_once=2, save_every=4)
    whole = learn(objective, gates, Nested(), config)
    seen = []

    def watch(learned):
        seen.append(learned.losses.shape[1])
        if seen[-1] == 10:
            raise Killed

    out = tmp_path / "r.nc"
    with pytest.raises(Killed), Shards(out, "relax", {"seed": 0}, False) as shards, shards.states() as states:
        learn(objective, gates, Nested(), config, states=states, watch=watch)
    with pytest.raises(OutputError, match="pass --resume"):
        check_parts(out, "relax", resume=False)
    with pytest.raises(OutputError, match="other settings"):
        Shards(out, "relax", {"seed": 1}, resume=True)
    seen.clear()
    with Shards(out, "relax", {"seed": 0}, resume=True) as shards:
        with shards.states() as states:
            resumed = learn(objective, gates, Nested(), config, states=states, watch=watch_steps(seen))
        shards.discard()
    assert seen == [10, 12]  # the state of step 8 was the last
    for ours, theirs in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not list(tmp_path.iterdir())


def watch_steps(seen):
    return lambda learned: seen.append(learned.losses.shape[1])


def test_a_state_that_is_damaged_is_refused(tmp_path):
    objective, gates = toy()
    config = RelaxConfig(steps=4, steps_at_once=2, save_every=2)
    with Shards(tmp_path / "r.nc", "relax", {}, False) as shards, shards.states() as states:
        learn(objective, gates, Nested(), config, states=states)
    for file in (tmp_path / ".r.nc.relax" / "states").rglob("*"):
        if file.is_file():
            file.write_bytes(b"no state")
    with (
        Shards(tmp_path / "r.nc", "relax", {}, True) as shards,
        pytest.raises(OutputError, match="damaged"),
        shards.states() as states,
    ):
        learn(objective, gates, Nested(), config, states=states)


@pytest.mark.parametrize("sizes", [[1] * 6, [4, 1, 2, 1, 3, 2]], ids=["equal", "unequal"])
def test_a_linear_toy_is_ranked_by_what_a_parameter_is_worth(sizes):
    """Loss = -sum of the worth of what is open: within any budget the best set takes the worthiest parameters first."""
    worth = np.array([0.3, 2.0, 0.1, 1.2, 0.7, 3.0])
    gain = jnp.asarray(worth * np.array(sizes) / sum(sizes), jnp.float32)
    _, gates = toy(6, sizes)
    objective = jax.tree_util.Partial(lambda mask, key: -(mask.units["head"][0] * gain).sum())
    learned = learn(objective, gates, Nested(0.5, 0.05, 0.9), RelaxConfig(steps=400, lr=0.05, steps_at_once=100))
    assert np.argsort(-learned.scores).tolist() == np.argsort(-worth).tolist()


def test_a_reward_is_reinforced_as_by_hand(one_pair):
    """The slope of what was sampled is that of the definition, answer by answer, by finite differences."""
    cfg = one_pair.cfg
    gates = Gates.of(cfg, enumerate_components(cfg, ["head"]))
    prompts = Tokens(np.arange(8, dtype=np.int32).reshape(2, 4), np.array([4, 3], np.int32))
    values = jnp.linspace(0.2, 0.8, len(gates))
    judged = {}

    def judge(answers, rows):
        judged["answers"], judged["rows"] = answers, rows
        return (np.asarray(answers.tokens)[:, 0] % 2).astype(np.float32)  # an odd first token passes

    reward = Reward(cfg, one_pair.base, one_pair.expert, prompts, (5,), judge, None, 3, 2)
    key = jax.random.key(0)
    sampled = prepared(reward, gates.mask(values), key)
    answers, rows = judged["answers"], judged["rows"]
    assert sorted(rows.tolist()) == [0, 0, 0, 1, 1, 1]
    passed = np.asarray(answers.tokens)[:, 0] % 2
    others = np.array([passed[(rows == row) & (np.arange(6) != i)].mean() for i, row in enumerate(rows)])

    def gain(values):
        """Mean over answers of advantage times log-probability, token by token."""
        model, total = materialize(one_pair.base, one_pair.expert, gates.mask(values)), 0.0
        lengths, ids = np.asarray(prompts.lengths)[rows], np.zeros((6, 6), np.int32)
        for line, row, n, tokens in zip(ids, rows, lengths, np.asarray(answers.tokens), strict=True):
            line[:n], line[n : n + 2] = np.asarray(prompts.ids)[row, :n], tokens
        log_p = np.asarray(jax.nn.log_softmax(forward(cfg, model, jnp.asarray(ids)).logits))
        for i, (n, n_new, advantage) in enumerate(zip(lengths, answers.lengths, passed - others, strict=True)):
            for t in range(n, n + n_new):
                total += advantage * float(log_p[i, t - 1, ids[i, t]])
        return total / len(rows)

    value, slope = jax.value_and_grad(lambda v: sampled(gates.mask(v), key))(values)
    assert float(value) == pytest.approx(1 - passed.mean())
    c, step = int(np.abs(slope).argmax()), 0.05
    naive = (gain(values.at[c].add(step)) - gain(values.at[c].add(-step))) / (2 * step)
    assert float(slope[c]) == pytest.approx(-naive, rel=0.02, abs=1e-4)


def test_the_slope_of_a_reward_is_that_of_its_expectation(one_pair):
    """With one token to say, the expected reward is a sum over the vocabulary."""
    cfg = one_pair.cfg
    gates = Gates.of(cfg, enumerate_components(cfg, ["head"]))
    prompts = Tokens(np.arange(4, dtype=np.int32)[None], np.array([4], np.int32))
    values, key = jnp.linspace(0.2, 0.8, len(gates)), jax.random.key(0)
    passes = np.random.default_rng(0).integers(0, 2, cfg.d_vocab).astype(np.float32)

    def judge(answers, rows):
        return passes[np.asarray(answers.tokens)[:, 0]]

    reward = Reward(cfg, one_pair.base, one_pair.expert, prompts, (), judge, None, 4000, 1)

    def expected(values):
        model = materialize(one_pair.base, one_pair.expert, gates.mask(values))
        logits = forward(cfg, model, jnp.asarray(prompts.ids)).logits
        return 1 - jax.nn.softmax(logits[0, -1]) @ passes

    sampled = prepared(reward, gates.mask(values), key)
    value, slope = jax.value_and_grad(lambda v: sampled(gates.mask(v), key))(values)
    true_value, true_slope = jax.value_and_grad(expected)(values)
    assert float(value) == pytest.approx(float(true_value), abs=0.03)
    cosine = slope @ true_slope / jnp.linalg.norm(slope) / jnp.linalg.norm(true_slope)
    assert float(cosine) > 0.9
    assert float(jnp.linalg.norm(slope) / jnp.linalg.norm(true_slope)) == pytest.approx(1, abs=0.2)


def test_a_loss_that_is_not_finite_is_refused():
    gates = Gates({"head": jnp.arange(4)[None]}, jnp.ones(4) / 4)
    with pytest.raises(WpjaxError, match="the loss is nan at step"):
        learn(jax.tree_util.Partial(lambda mask, key: mask.units["head"].sum() * jnp.nan), gates)


def test_settings_that_cannot_work_are_refused():
    gates = Gates({"head": jnp.arange(4)[None]}, jnp.ones(4) / 4)
    objective = jax.tree_util.Partial(lambda mask, key: mask.units["head"].sum())
    for make, says in (
        (lambda: Nested(temperature=0), "the temperature must be above 0"),
        (lambda: Nested(smallest=0.4, largest=0.2), "0 < smallest <= largest <= 1"),
        (lambda: RelaxConfig(steps=0), "steps must be at least 1"),
        (lambda: RelaxConfig(restarts=0), "restarts must be at least 1"),
        (lambda: RelaxConfig(lr=0), "lr must be above 0"),
        (lambda: HardConcrete(-1), "must not be below 0"),
        (lambda: make_parametrisation("soft"), "parametrisations: nested, hard-concrete, straight-through"),
        (lambda: learn(objective, gates, start=np.zeros(3)), r"shape \(3,\); give a finite number for each of the 4"),
    ):
        with pytest.raises(WpjaxError, match=says):
            make()
