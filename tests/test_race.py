"""Racing: it loses none of the true top more often than it says, and finds what the full sweep finds with less."""

import numpy as np
import pytest

from tests.helpers import make_anchor
from wpjax.behaviours import behaviour
from wpjax.components import enumerate_components
from wpjax.engines.flow import add_flow
from wpjax.engines.replay import replay
from wpjax.estimators.race import eliminated, filled_up, rounds_of, still_in
from wpjax.estimators.sweep import sweep
from wpjax.pairs import load_pair, planted_components


def test_the_true_top_is_kept_as_often_as_promised():
    """300 races of 60 components over 5 queries at confidence 0.8, the third and fourth close together."""
    rng, truth = np.random.default_rng(0), np.linspace(0, 0.5, 60)
    truth[-4:] = [0.95, 1.0, -2.0, 3.0]
    lost, out = 0, 0
    for _ in range(300):
        stays, _ = still_in(truth[:, None] + 0.2 * rng.standard_normal((60, 5)), 3, 0.8, 60)
        lost += not stays[-3:].all()
        out += int((~stays).sum())
    assert lost <= 0.2 * 300
    assert out > 0  # it does decide


KINDS_OF = ["head"] * 20 + ["neuron"] * 40
TOP, CONFIDENCE = 3, 0.8


def planted_races(n_races=300, n_rounds=4, n_queries=24):
    """How often any of the true top of two kinds is lost after the last round, and what share of the others is out.

    Four of each kind are nearly as large as the last of its top; values of a query are normal.
    """
    rng, truth = np.random.default_rng(0), np.linspace(-0.4, 0.4, len(KINDS_OF))
    tops = [[2, 5, 7], [23, 40, 45]]
    for top in tops:
        truth[top], truth[top[-1] + 1 : top[-1] + 5] = [3.0, -2.0, 1.0], -0.99
    kept = np.isin(np.arange(len(truth)), np.concatenate(tops))
    lost, out = 0, 0.0
    for _ in range(n_races):
        values = truth[:, None] + 0.5 * rng.standard_normal((len(truth), n_queries))
        rounds = np.split(values, n_rounds, axis=1)
        left, _ = eliminated(KINDS_OF, n_rounds, lambda i, here, r=rounds: r[i][here], TOP, CONFIDENCE)
        lost += not left[kept].all()
        out += (~left[~kept]).mean() / n_races
    return lost / n_races, out


def test_the_true_top_outlives_all_rounds_as_often_as_promised():
    lost, out = planted_races()
    assert lost <= 1 - CONFIDENCE
    assert out > 0.5


def test_intervals_that_need_not_hold_together_lose_more(monkeypatch):
    """What the test before would not let pass."""

    def alone(values, top, confidence, n_tests):
        return still_in(values, top, confidence, 1)

    monkeypatch.setattr("wpjax.estimators.race.still_in", alone)
    assert planted_races(100)[0] > 1 - CONFIDENCE


def test_a_kind_is_measured_until_it_is_decided():
    """Of three heads two are best at once, three KV groups are alike, and one MLP is in by itself."""
    asked, truth = [], np.array([5.0, 0.1, 4.0, 1.0, 1.0, 1.0, 3.0])

    def measure(number, here):
        asked.append(here.tolist())
        return truth[here, None] + 1e-3 * np.arange(3)

    kinds = ["head"] * 3 + ["kv_group"] * 3 + ["mlp"]
    left, mean = eliminated(kinds, 3, measure, 2, 0.95)
    assert left.tolist() == [True, False, *[True] * 5]
    assert asked == [[0, 1, 2, 3, 4, 5], [3, 4, 5], [3, 4, 5]]
    np.testing.assert_allclose(mean, [5.001, 0.101, 4.001, 1.001, 1.001, 1.001, np.nan])
    assert eliminated(kinds, 3, measure, 3, 0.95)[0].all()
    assert len(asked) == 3  # nothing to decide


def test_rounds_share_queries_out_and_are_filled_up():
    queries = np.repeat(np.arange(14), 2)
    rounds = rounds_of(queries, seed=3)
    assert [len(some) for some in rounds] == [4, 4, 3, 3]
    assert sorted(np.concatenate(rounds)) == list(range(14))
    assert len(rounds_of(np.arange(5))) == 1
    assert filled_up([np.array([4, 1, 7]), np.array([2, 9])]).tolist() == [[4, 1, 7], [2, 9, 9]]


def test_without_noise_only_the_top_is_left_by_magnitude():
    values = np.array([0.1, -3.0, 2.0, 0.0, 1.0])[:, None] + np.array([1e-9, 0, -1e-9])
    stays, mean = still_in(values, 2, 0.95, 5)
    assert stays.tolist() == [False, True, True, False, False]
    np.testing.assert_allclose(mean, [0.1, -3.0, 2.0, 0.0, 1.0])
    assert still_in(values, 9, 0.95, 5)[0].all()
    assert still_in(values[:, :1], 2, 0.95, 5)[0].all()  # one query tells nothing of its spread


@pytest.fixture(scope="module")
def swept():
    """A race and a full sweep of the planted pair's heads, and of some of its neurons; what the race left behind, and
    how many programs it made. Rounds are of 4, 4, 3 and 3 prompts.
    """
    pair, task = load_pair("tiny:base", "tiny:planted"), behaviour("tiny:english_capital")
    neurons = [c for c in enumerate_components(pair.cfg, ["neuron"], range(6)) if c.index < 24]
    components = list(dict.fromkeys([*enumerate_components(pair.cfg, ["head"], range(6)), *neurons,
                                     *(c for c in enumerate_components(pair.cfg, ["neuron"], range(6))
                                       if c.name in set(planted_components()))]))  # fmt: skip
    batch = task.encode(pair.tokenizer, "sweep", 14)
    options = {"components": components, "n_resamples": 50}
    anchor = make_anchor(pair, 5)
    done: dict[str, np.ndarray] = {}
    replay.clear_cache()
    add_flow.clear_cache()
    raced = sweep(pair, batch, anchor.metric_along(batch), method="race", top=6, done=done, **options)
    programs = replay._cache_size(), add_flow._cache_size()
    return raced, sweep(pair, batch, anchor.metric_along(batch), method="exact", **options), done, programs


def test_a_race_finds_the_top_of_the_full_sweep_with_less(swept):
    raced, full, *_ = swept
    for kind in ("head", "neuron"):
        assert (full.dataset["kind"] == kind).sum() > 6  # of fewer, all are in
        found = {row.name for row in raced.top(6, kinds=(kind,), absolute=True)}
        expected = [row.name for row in full.top(6, kinds=(kind,), absolute=True)]
        assert len(found & set(expected)) >= 5
        assert expected[0] in found
    assert int(raced.dataset["exact"].values.sum()) == 12
    assert 12 / raced.dataset.sizes["component"] < raced.dataset.attrs["race_share"] < 0.9
    exact = raced.dataset["exact"].values
    np.testing.assert_allclose(raced.values("effect")[exact], full.values("effect")[exact], atol=1e-5)


def test_a_race_is_the_elimination_of_the_full_sweeps_changes(swept):
    raced, full, *_ = swept
    delta, queries = (full.dataset[name].values for name in ("delta", "query"))
    rounds = rounds_of(queries)
    kinds = [str(kind) for kind in full.dataset["kind"].values]

    def measure(number, here):
        return np.stack([delta[np.ix_(here, queries == q)].mean(1) for q in rounds[number]], axis=1)

    left, mean = eliminated(kinds, len(rounds), measure, 6, 0.95)
    np.testing.assert_allclose(raced.values("race") * full.dataset["gap"].values.mean(), mean, atol=1e-4)
    for kind in ("head", "neuron"):
        mine = np.flatnonzero(left & (np.array(kinds) == kind))
        best = mine[np.argsort(-np.abs(mean[mine]))[:6]]
        assert set(np.flatnonzero(raced.dataset["exact"].values & (np.array(kinds) == kind))) == set(best)


def test_rounds_are_kept_and_run_in_one_program_a_kind(swept):
    """One more a kind replaces the chosen ones on all prompts, and follows the flow."""
    raced, _, done, (replays, runs) = swept
    shapes = {key.split("-")[1]: part.shape[1] for key, part in done.items() if key.startswith("race-")}
    assert len(shapes) > 2
    assert list(shapes) == ["1", "2", "3", "4"][: len(shapes)]
    assert set(shapes.values()) == {4}
    assert replays <= 2 * 2
    assert runs <= 3  # of the base in rounds; on all prompts
    assert np.isfinite(raced.values("race")).all()
