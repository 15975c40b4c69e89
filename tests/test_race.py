"""Racing: it loses none of the true top more often than it says, and finds what the full sweep finds with less."""

import numpy as np
import pytest

from tests.test_sweeps import make_anchor
from wpjax.behaviours import behaviour
from wpjax.components import enumerate_components
from wpjax.pairs import load_pair, planted_components
from wpjax.sweeps import sweep
from wpjax.sweeps.race import still_in


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


def test_without_noise_only_the_top_is_left_by_magnitude():
    values = np.array([0.1, -3.0, 2.0, 0.0, 1.0])[:, None] + np.array([1e-9, 0, -1e-9])
    stays, mean = still_in(values, 2, 0.95, 5)
    assert stays.tolist() == [False, True, True, False, False]
    np.testing.assert_allclose(mean, [0.1, -3.0, 2.0, 0.0, 1.0])
    assert still_in(values, 9, 0.95, 5)[0].all()
    assert still_in(values[:, :1], 2, 0.95, 5)[0].all()  # one query tells nothing of its spread


@pytest.fixture(scope="module")
def swept():
    """A race and a full sweep of the planted pair's heads, and of some of its neurons."""
    pair, task = load_pair("tiny:base", "tiny:planted"), behaviour("tiny:english_capital")
    neurons = [c for c in enumerate_components(pair.cfg, ["neuron"], range(6)) if c.index < 24]
    components = list(dict.fromkeys([*enumerate_components(pair.cfg, ["head"], range(6)), *neurons,
                                     *(c for c in enumerate_components(pair.cfg, ["neuron"], range(6))
                                       if c.name in set(planted_components()))]))  # fmt: skip
    batch = task.encode(pair.tokenizer, "sweep", 16)
    options = {"components": components, "n_resamples": 50}
    anchor = make_anchor(pair, 5)
    done: dict[str, np.ndarray] = {}
    raced = sweep(pair, batch, anchor.on(batch), method="race", top=6, done=done, **options)
    return raced, sweep(pair, batch, anchor.on(batch), method="exact", **options), done


def test_a_race_finds_the_top_of_the_full_sweep_with_less(swept):
    raced, full, _ = swept
    for kind in ("head", "neuron"):
        found = {row.name for row in raced.top(6, kinds=(kind,), absolute=True)}
        expected = [row.name for row in full.top(6, kinds=(kind,), absolute=True)]
        assert len(found & set(expected)) >= 5
        assert expected[0] in found
    assert int(raced.dataset["exact"].values.sum()) == 12
    assert 12 / raced.dataset.sizes["component"] < raced.dataset.attrs["race_share"] < 0.9
    exact = raced.dataset["exact"].values
    np.testing.assert_allclose(raced.values("effect")[exact], full.values("effect")[exact], atol=1e-5)


def test_rounds_are_of_whole_queries_and_are_kept(swept):
    raced, full, done = swept
    sizes = {key.split("-")[1]: part.shape[1] for key, part in done.items() if key.startswith("race-")}
    assert list(sizes) == ["1", "2", "3", "4"][: len(sizes)]
    assert sum(sizes.values()) <= full.dataset.sizes["prompt"]
    assert np.isfinite(raced.values("race")).all()
