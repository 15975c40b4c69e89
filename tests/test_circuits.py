"""Circuits: ablations by hand, the measures worked out by hand, and files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wpjax.behaviours import Tokens
from wpjax.checkpoints.checkpoint import fingerprint
from wpjax.circuits.circuit import Circuit, ablation, circuit_scores
from wpjax.circuits.contrast import Contrast
from wpjax.circuits.edges import score_edges
from wpjax.circuits.measures import Curve, circuit_curve, completeness, faithfulness, minimality
from wpjax.circuits.nodes import Graph
from wpjax.errors import ComponentError, WpjaxError
from wpjax.models.decoder import forward
from wpjax.models.edits import Add, Edit, Set
from wpjax.models.sites import Site

rng = np.random.default_rng(4)
CLEAN, CORRUPTED = rng.integers(0, 61, (2, 4, 6)).astype(np.int32)
LENGTHS = np.array([6, 5, 6, 5])
ANSWERS, FOILS = np.array([4, 9, 1, 3]), np.array([11, 2, 8, 7])
HEADS = ("L0.head.1", "L1.head.0", "L2.head.2")


@pytest.fixture(scope="module")
def model(one_pair):
    return one_pair.base_checkpoint


@pytest.fixture(scope="module")
def two(model):
    return Contrast.of_tokens(model.cfg, Tokens(CLEAN, LENGTHS), Tokens(CORRUPTED, LENGTHS), ANSWERS, FOILS)


@functools.partial(jax.jit, static_argnums=0)
def ablated_logits(cfg, params, z, gone):
    edits = [Edit(Site.Z, Set(z[i]), layer=i, channels=gone[i]) for i in range(cfg.n_layers)]
    return forward(cfg, params, jnp.asarray(CLEAN), edits=edits).logits


def by_edits(model, two, members, kind):
    """F with every head outside of a set ablated where it is: at z, before W_O."""
    cfg = model.cfg
    z = forward(cfg, model.params, jnp.asarray(CORRUPTED), sites=(Site.Z,)).sites[Site.Z]
    if kind == "mean":
        z = jnp.stack([z[:, n == LENGTHS].mean(1) for n in LENGTHS], 1)
    z = z * 0 if kind == "zero" else z
    gone = [[f"L{i}.head.{h}" not in members for h in range(cfg.n_heads)] for i in range(cfg.n_layers)]
    logits = np.asarray(ablated_logits(cfg, model.params, z, jnp.asarray(gone)))
    last = logits[np.arange(4), LENGTHS - 1]
    return last[np.arange(4), ANSWERS] - last[np.arange(4), FOILS]


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_what_is_not_in_the_circuit_is_ablated(model, two, kind):
    circuit = Circuit("nodes", HEADS, "0", ablates=("head",))
    ablated = ablation(model.cfg, model.params, two, kind)
    got = circuit_scores(model.cfg, model.params, two, ablated, [circuit])
    np.testing.assert_allclose(got[0], by_edits(model, two, HEADS, kind), atol=1e-4, rtol=1e-4)


def test_a_mean_may_be_over_other_prompts(model, two):
    """Twice the same prompts, in another order and beside prompts of another group: the mean is the same."""
    alike = [i for i in range(4) if two.corrupted.tokens.lengths[i] == two.corrupted.tokens.lengths[0]]
    pair = two.take(alike)
    own = ablation(model.cfg, model.params, pair, "mean")
    n = len(alike)
    more = pair.take([*range(n)[::-1], *range(n)])
    other = ablation(model.cfg, model.params, pair, "mean", [7] * n, (more, [7] * (2 * n)))
    np.testing.assert_allclose(other.writes, own.writes, atol=1e-5)
    with pytest.raises(WpjaxError, match="no prompt of group 7"):
        ablation(model.cfg, model.params, pair, "mean", [7] * n, (more, [8] * (2 * n)))


def test_the_measures_are_their_definitions(model, two):
    """Every F again, one set at a time."""
    cfg, params = model.cfg, model.params
    circuit, ablated = Circuit("nodes", HEADS, "0", ablates=("head",)), ablation(cfg, params, two, "mean")
    every = [f"L{i}.head.{h}" for i in range(3) for h in range(cfg.n_heads)]

    def score(members):
        return float(by_edits(model, two, members, "mean").mean())

    faith = faithfulness(cfg, params, two, ablated, circuit)
    expected = score(every), score(HEADS), score(())
    np.testing.assert_allclose(faith[:3], expected, atol=1e-4, rtol=1e-4)
    assert faith.ablation == "mean"
    np.testing.assert_allclose(faith.share, (expected[1] - expected[2]) / (expected[0] - expected[2]), rtol=1e-3)

    def without(members, gone):
        return score([m for m in members if m not in gone])

    by_chance, greedy = completeness(cfg, params, two, ablated, circuit, n_random=3, n_greedy=2)
    assert len(by_chance) == 3
    for one in (*by_chance, *greedy):
        np.testing.assert_allclose(one.model, without(every, one.removed), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(one.circuit, without(HEADS, one.removed), atol=1e-4, rtol=1e-4)
    # Greedy: the first member is the one with the largest score of all.
    singles = {m: abs(without(every, [m]) - without(HEADS, [m])) for m in HEADS}
    assert greedy[0].removed == (max(singles, key=singles.get),)
    assert len(greedy[1].removed) == 2

    needed = minimality(cfg, params, two, ablated, circuit, classes={HEADS[0]: "a", HEADS[1]: "a"})
    assert [n.member for n in needed] == list(HEADS)
    for n in needed:
        expected_score = abs(without(HEADS, [*n.given, n.member]) - without(HEADS, n.given))
        np.testing.assert_allclose(n.score, expected_score, atol=1e-4, rtol=1e-4)
    alone = abs(score(HEADS[1:]) - score(HEADS))
    with_class = abs(score(HEADS[2:]) - score([HEADS[0], HEADS[2]]))
    np.testing.assert_allclose(needed[0].score, max(alone, with_class), atol=1e-4, rtol=1e-4)


def test_areas_of_a_curve_worked_out_by_hand():
    """Trapezoids from .001 on: f = 0, 2, 1 at k = .001, .501, 1.001 (one beyond, to keep the numbers plain)."""
    curve = Curve((0.001, 0.501, 1.001), (1, 2, 3), (0.0, 2.0, 1.0), "nodes", False, "mean", "hand")
    assert curve.cpr == pytest.approx(0.5 * (0 + 2) / 2 + 0.5 * (2 + 1) / 2)  # .5 + .75
    assert curve.cmd == pytest.approx(0.5 * (1 + 1) / 2 + 0.5 * (1 + 0) / 2)  # .5 + .25
    assert str(curve) == "CPR 1.250, CMD 0.750 (nodes by hand, signed top k, mean ablation)"


def test_a_curve_keeps_the_best_edges(model, two):
    cfg, params = model.cfg, model.params
    scores, ablated = score_edges(cfg, params, two, steps=1), ablation(cfg, params, two)
    curve = circuit_curve(cfg, params, two, ablated, scores, absolute=False, shares=(0.1, 1.0))
    assert curve.counts == (round(0.1 * scores.graph.n_edges), scores.graph.n_edges)
    best = Circuit.of(scores, curve.counts[0], "0", absolute=False)
    assert best.found_by == f"top {curve.counts[0]} of EAP-IG, 1 steps, signed"
    kept, nothing = circuit_scores(cfg, params, two, ablated, [best, best.without(best.members)]).mean(1)
    clean, corrupted = (np.asarray(m(cfg, params)).mean() for m in two)
    np.testing.assert_allclose(nothing, corrupted, atol=1e-4)
    np.testing.assert_allclose(curve.f, [(kept - corrupted) / (clean - corrupted), 1.0], atol=1e-3)


def test_a_curve_of_nodes_keeps_the_best_nodes(model, two):
    """Heads alone are ranked: MLPs stay, so the empty circuit is not the corrupted run."""
    cfg, params = model.cfg, model.params
    scores, ablated = score_edges(cfg, params, two, steps=1), ablation(cfg, params, two)
    heads = scores.nodes(("head",))
    assert heads.n_members == 3 * cfg.n_heads
    curve = circuit_curve(cfg, params, two, ablated, heads, absolute=False, shares=(0.01, 0.3, 1.0))
    assert (curve.level, curve.counts) == ("nodes", (1, round(0.3 * heads.n_members), heads.n_members))
    best = Circuit.of(heads, curve.counts[1], "0", absolute=False)
    assert (best.level, best.ablates) == ("nodes", ("head",))
    mean = heads.by_prompt.mean(0)
    order = sorted(
        (s.name for s in scores.graph.senders if s.kind == "head"), key=lambda n: mean[scores.graph.sender(n)]
    )
    assert list(best.members) == order[: curve.counts[1]]  # the most negative score helps most
    whole, some, first, nothing = (
        by_edits(model, two, members, "resample").mean() for members in (order, best.members, order[:1], ())
    )
    expected = (np.array([first, some, whole]) - nothing) / (whole - nothing)
    np.testing.assert_allclose(curve.f, expected, atol=1e-3, rtol=1e-3)
    assert 0 <= heads.stability(4)[0] <= 1
    with pytest.raises(WpjaxError, match="the empty circuit have the same mean metric"):
        circuit_curve(cfg, params, two, ablated, scores.nodes(()))


def test_scores_of_nodes_are_slopes_of_what_they_write(model, two):
    """Attribution patching of a head: the slope by its output times its change, at z."""
    cfg, params = model.cfg, model.params
    scores = score_edges(cfg, params, two, "eap")
    z = [forward(cfg, params, jnp.asarray(ids), sites=(Site.Z,)).sites[Site.Z][1] for ids in (CLEAN, CORRUPTED)]

    def score(step):
        out = two.clean.run(cfg, params, edits=(Edit(Site.Z, Add(step), layer=1),))
        return two.clean.read(cfg, params, two.clean.pick(out.resid)).sum()

    slope = jax.grad(score)(jnp.zeros_like(z[0]))
    expected = np.asarray((slope * (z[1] - z[0])).sum((1, 3)))  # [B, H]
    first = scores.graph.sender("L1.head.0")
    np.testing.assert_allclose(scores.nodes().by_prompt[:, first : first + cfg.n_heads], expected, atol=1e-4, rtol=1e-3)


def test_a_circuit_file_comes_back_and_is_of_its_model(model, one_pair, tmp_path):
    own = fingerprint(model.cfg, model.params)
    circuit = Circuit("edges", ("L0.mlp->L1.head.2.q", "embed->logits"), own, found_by="by hand")
    circuit.save(tmp_path / "c.json")
    assert Circuit.load(tmp_path / "c.json", model) == circuit
    with pytest.raises(WpjaxError, match=f"a circuit of another model .fingerprint {own}"):
        Circuit.load(tmp_path / "c.json", one_pair.expert_checkpoint)
    content = json.loads((tmp_path / "c.json").read_text())
    for change, message in (
        ({"members": ["L9.mlp->logits"]}, "L9.mlp: the model has layers L0 to L2"),
        ({"members": ["L1.mlp->L1.head.0.q"]}, r"L1.head.0.q comes before L1.mlp has written"),
        ({"members": ["L1.mlp"]}, "'L1.mlp' is not the name of an edge"),
        ({"members": [3]}, "its fields are damaged"),
        ({"level": "weights"}, "its fields are damaged"),
        ({"ablates": ["neuron"]}, "its fields are damaged"),
        ({"what": "sweep"}, "is not a circuit file"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(content | change))
        with pytest.raises(WpjaxError, match=message):
            Circuit.load(tmp_path / "bad.json", model)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(WpjaxError, match="cannot be read as JSON"):
        Circuit.load(tmp_path / "bad.json", model)


def test_ablations_that_mean_nothing_are_refused(model, two):
    with pytest.raises(WpjaxError, match="group 0 has prompts of several lengths"):
        ablation(model.cfg, model.params, two, "mean", groups=[0, 0, 0, 0])
    with pytest.raises(ComponentError, match=r"L1.neuron.3 is no sender"):
        dataclasses.replace(Circuit("nodes", HEADS, "0"), members=("L1.neuron.3",)).kept(Graph.of(model.cfg))
