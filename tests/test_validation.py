"""Behavioural curves: hand-worked cases, and the embedded planted pair, whose truth is known."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from tests.helpers import curves_by_hand
from wpjax.behaviours import behaviour
from wpjax.cli.validate import print_curves
from wpjax.components import Component, enumerate_components, n_parameters
from wpjax.errors import AnchorRejected, WpjaxError
from wpjax.estimators.secant import secant_adjoint
from wpjax.estimators.sets import add_set_score, weighted_sum
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.evaluation.judge import Judge
from wpjax.evaluation.validation import activation_values, anchor_of, control_orders, curve_steps, log_grid, validate
from wpjax.metrics.answers import decision_metric, partings_metric, response_metric
from wpjax.metrics.metric import scores
from wpjax.models.decoder import forward
from wpjax.pairs import load_pair, planted_components
from wpjax.patching import PatchMask, patch
from wpjax.report.curves import write_curves
from wpjax.results.curves import Curves
from wpjax.results.sweep_result import SweepResult
from wpjax.results.verdict import verdict
from wpjax.stats import resample

FINEST = ("head", "kv_group", "neuron", "norm", "embed", "unembed", "final_norm")
QK_NORMS = ("norm_q", "norm_k", "joint_norm_q", "joint_norm_k")
N_NEW = 16


def test_sizes_of_components_add_up_to_the_model(pair):
    """Every parameter has one owner; a module owns the bias of its output, norms that heads share, and a router."""
    total = sum(leaf.size for leaf in np_leaves(pair.base))
    modules = enumerate_components(pair.cfg, ["attn", "mlp", "norm", "embed", "unembed", "final_norm"])
    assert sum(n_parameters(pair.cfg, c) for c in modules) == total
    layers = sum(n_parameters(pair.cfg, c) for c in enumerate_components(pair.cfg, ["layer"]))
    assert layers == sum(n_parameters(pair.cfg, c) for c in modules if c.kind in ("attn", "mlp", "norm"))
    fine = sum(n_parameters(pair.cfg, c) for c in enumerate_components(pair.cfg, FINEST))
    blocks = pair.base["blocks"]
    shared = [blocks[m][b] for m, b in (("attn", "b_O"), ("mlp", "b_out"), ("mlp", "W_router")) if b in blocks[m]]
    shared += [blocks["attn"][norm]["scale"] for norm in QK_NORMS if norm in blocks["attn"]]
    assert fine == total - sum(b.size for b in shared)


def np_leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_controls_stay_within_the_budget():
    order = [Component("neuron", 0, i) for i in range(4)]
    steps = curve_steps(order, np.array([10, 1, 1, 30]), [1, 11, 13, 41, 1000])
    assert [(len(s.components), s.n_parameters) for s in steps] == [(1, 10), (2, 11), (3, 12), (3, 12), (4, 42)]
    assert log_grid(1000, 4) == [1, 10, 100, 1000]
    assert log_grid(3, 8) == [1, 2, 3]


def by_hand() -> Curves:
    """Two prompts of two queries, two rankings, two points; scores chosen so that shares are round."""
    checks = np.zeros((2, 2, 2, 2), bool)
    checks[0, 0, 1] = True  # restoring with all of the first ranking makes both pass
    checks[1, :, 0] = True  # little taken out: both still pass
    score = np.zeros((2, 2, 2, 2), np.float32)
    score[0, 0] = [[1, 3], [4, 4]]  # ends are 0 and 4: shares 1/2 and 1
    score[1] = [[4, 4], [1, 1]]  # lost: 0 and 3/4
    dims = ("direction", "ranking", "point", "prompt")
    return Curves(
        xr.Dataset(
            {
                "n_components": (("ranking", "point"), [[1, 2], [1, 2]]),
                "n_parameters": (("ranking", "point"), [[10, 1000], [10, 1000]]),
                "query": ("prompt", [0, 1]),
                "strict": (dims, checks),
                "loose": (dims, checks),
                "score_kl": (dims, score),
                "end_strict": (("end", "prompt"), [[False, False], [True, True]]),
                "end_loose": (("end", "prompt"), [[False, False], [True, True]]),
                "end_kl": (("end", "prompt"), np.array([[0, 0], [4, 4]], np.float32)),
            },
            {
                "direction": ["restore", "knockout"],
                "ranking": ("ranking", np.array(["effect", "random 1"], object)),
                "end": ["base", "expert"],
            },
            {"what": "curves", "schema": 1, "seed": 0, "behaviour": "b", "base": "x", "expert": "y"},
        )
    )


def test_shares_areas_and_calibration_by_hand(tmp_path):
    curves = by_hand()
    assert curves.rankings == ["effect", "random 1"]
    assert curves.measures == ["strict", "loose", "kl"]
    share, own = curves.share("kl")
    np.testing.assert_allclose(share[0], [[[0.5, 1], [0, 0]], [[0, 0.75], [0, 0.75]]])
    np.testing.assert_allclose(own[0], [[[2, 4], [0, 0]], [[4, 1], [4, 1]]])
    assert share[1, 0, 0, 0] < 0.5 < share[2, 0, 0, 0]  # prompts differ: 1/4 and 3/4
    np.testing.assert_allclose(share[1:, 0, 0, 1], 1)
    np.testing.assert_allclose(curves.share("strict")[0][0], [[[0, 1], [0, 0]], [[0, 1], [0, 1]]])
    # two points a hundredfold apart: the mean over the logarithm is that of the two
    assert curves.area("kl", "restore", 0).mean == pytest.approx(0.75)
    assert curves.area("strict", "knockout", 1).mean == pytest.approx(0.5)
    np.testing.assert_allclose(curves.position("kl"), [[[0.5, 1], [0, 0]], [[1, 0.25], [1, 0.25]]])
    (kl,) = curves.calibration()
    assert kl.n_sets == 6  # everything, in and out, counts once though both rankings end with it
    # by the score: 0 | 1/4 | 1/2 | 1, 1, 1; of them pass: 0 | 0 | 0 | 1, 1, 1
    np.testing.assert_allclose(kl.passing, [0, 0, 0, np.nan, np.nan, 1])
    assert kl.error == pytest.approx(np.sqrt((0.25 + 0.0625) / 6))
    assert [path.name for path in write_curves(curves, tmp_path / "c.nc")] == ["c-curves.png", "c-calibration.png"]
    xr.testing.assert_identical(Curves.from_netcdf(tmp_path / "c.nc").dataset, curves.dataset)


def test_a_score_whose_gap_may_be_zero_gives_no_share(tmp_path, capsys):
    """A score that falls from base to expert, and one that moves on one of two prompts only."""
    for ends in ([[4, 4], [0, 0]], [[0, 0], [4, 0]]):
        curves = by_hand()
        curves.dataset["end_kl"] = (("end", "prompt"), np.array(ends, np.float32))
        assert not curves.gap("kl").low > 0
        assert np.isnan(curves.share("kl")[0]).all()
        np.testing.assert_allclose(curves.share("kl")[1][0], by_hand().share("kl")[1][0])
        assert np.isnan(curves.area("kl", "restore", 0)).all()
        (kl,) = curves.calibration()
        assert np.isnan([kl.rho, kl.error, *kl.passing]).all()
        assert curves.area("strict", "knockout", 1).mean == pytest.approx(0.5)
        write_curves(curves, tmp_path / "c.nc", overwrite=True)
        print_curves(curves, as_json=False)
        assert "no share by kl: expert minus base is" in capsys.readouterr().out
        print_curves(curves, as_json=True)
        printed = json.loads(capsys.readouterr().out)
        assert printed["areas"]["restore"]["effect"]["kl"] == {"mean": None, "low": None, "high": None}
        assert printed["gaps"]["kl"]["low"] <= 0


def test_resamples_without_any_prompt_that_differs_are_left_out():
    """The expert passes on 4 of 16: a sure gap, though some resamples hold none of the four."""
    data = by_hand().dataset.isel(prompt=[0] * 16).assign(query=("prompt", np.arange(16)))
    passing = np.arange(16) < 4
    data["end_strict"] = (("end", "prompt"), np.stack([np.zeros(16, bool), passing]))
    data["strict"] = data["strict"] & xr.DataArray(passing, dims="prompt")
    curves = Curves(data)
    drawn = resample(data["query"].values, seed=0).weights @ passing
    assert (drawn == 0).any()
    assert curves.gap("strict").low > 0
    np.testing.assert_allclose(curves.share("strict")[0][:, 0, 0], [[0, 1]] * 3)
    np.testing.assert_allclose(curves.area("strict", "restore", 0), [0.5] * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.drop_vars("end_strict"), "end_strict"),
        (lambda d: d.assign(score_kl=d["score_kl"] * np.nan), "score_kl"),
        (lambda d: d.assign(n_parameters=0 * d["n_parameters"]), "n_parameters"),
        (lambda d: d.isel(direction=[0]), "direction"),
        (lambda d: d.assign_attrs(schema=9), "schema 9"),
        (lambda d: d.assign_attrs(what="sweep"), "holds sweep, not curves"),
        (lambda d: d.assign_attrs(seed="x"), "seed"),
    ],
)
def test_damaged_curves_are_refused(change, message, tmp_path):
    Curves(change(by_hand().dataset)).to_netcdf(tmp_path / "c.nc")
    with pytest.raises(WpjaxError, match=message):
        Curves.from_netcdf(tmp_path / "c.nc")


@pytest.fixture(scope="module")
def planted():
    return load_pair("tiny:base", "tiny:planted"), behaviour("tiny:english_capital")


@pytest.fixture(scope="module")
def result(planted):
    """A sweep of the planted components and as many others."""
    pair, task = planted
    anchor = fit_anchor(pair, task, layer=5, n_prompts=16, causal="skip")
    others = [f"L{layer}.neuron.{i}" for layer in (0, 1, 2) for i in range(200, 207)] + ["L3.head.0"]
    batch = task.encode(pair.tokenizer, "sweep", 8)
    return sweep(pair, batch, anchor, components=[*planted_components(), *others])


@pytest.fixture(scope="module")
def curves(planted, result):
    return validate(*planted, result, n_prompts=6, n_points=3, n_random=1, max_new_tokens=N_NEW)


def test_the_planted_components_carry_the_behaviour(curves):
    """All that was swept, inert ones and planted ones together, is the whole expert but for inert changes."""
    strict = curves.share("strict")[0][0]
    np.testing.assert_allclose(strict[:, :, -1], 1)
    for direction in ("restore", "knockout"):
        effect, random = (curves.area("anchor", direction, i) for i in (0, curves.rankings.index("random 1")))
        assert effect.low > random.high


def test_patched_models_on_the_curve_are_patches(planted, curves, result):
    """The response score of the single best component, each way, by the lazy patch."""
    pair, task = planted
    best = result.top(1)[0].name
    metric = response_metric(pair, task.encode(pair.tokenizer, "test", 6), N_NEW)
    for side, (host, donor) in enumerate(((pair.base, pair.expert), (pair.expert, pair.base))):
        expected = scores(pair.cfg, patch(host, donor, PatchMask.of(pair.cfg, best)), metric)
        np.testing.assert_allclose(curves.dataset["score_response"].values[side, 0, 0], expected, atol=1e-5)
    assert curves.dataset["n_parameters"].values[0, 0] == n_parameters(pair.cfg, parse(pair, best))


def parse(pair, name):
    return next(c for c in enumerate_components(pair.cfg, FINEST) if c.name == name)


def test_the_on_policy_score_reads_a_models_own_answer(planted, curves, result):
    """Prompt by prompt, without padding: the stream along the anchor at each token that the expert said."""
    pair, task = planted
    anchor, batch = anchor_of(result), task.encode(pair.tokenizer, "test", 6)
    answers = Judge(pair, task, batch, N_NEW).answers(pair.expert)
    tokens = batch.with_instruction
    for i, (n, m) in enumerate(zip(tokens.lengths, answers.lengths, strict=True)):
        ids = np.concatenate([tokens.ids[i, :n], answers.tokens[i, :m]])[None]
        out = forward(pair.cfg, pair.expert, jnp.asarray(ids), stop=anchor.layer + 1, logits=False)
        expected = float((out.resid[0, n:] @ anchor.vector).mean())
        assert curves.dataset["end_on_policy"].values[1, i] == pytest.approx(expected, abs=1e-3)


def test_finished_parts_are_used(planted, result, curves):
    done: dict[str, np.ndarray] = {}
    options = {"n_prompts": 6, "n_points": 3, "n_random": 1, "max_new_tokens": N_NEW}
    again = validate(*planted, result, done=done, **options)
    assert len(done) == 2 * 4 * 3
    xr.testing.assert_equal(again.dataset, curves.dataset)
    done["restore-effect-0"] = done["restore-effect-0"] + 1
    third = validate(*planted, result, done=done, **options).dataset
    np.testing.assert_allclose(third["score_kl"][0, 0, 0], curves.dataset["score_kl"][0, 0, 0] + 1, rtol=1e-6)


def test_a_control_that_is_the_ranking_under_test_is_left_out(planted, result):
    for by in ("delta_norm", "effect"):
        found = control_orders(*planted, result, anchor_of(result), by=by, n_random=1)
        assert list(found) == list(dict.fromkeys([by, "effect", "attribution", "delta_norm", "random 1"]))
        assert [c.name for c in found[by][:3]] == [row.name for row in result.top(3, by=by)]


def test_sets_are_ranked_by_a_share_of_the_decisions_gap_for_each_parameter(planted, result):
    """Weighted by their parameters, scores of all units of the model make up the gap; a result is validated by them."""
    pair, task = planted
    metric = decision_metric(pair, task.encode(pair.tokenizer, "sweep", 8), N_NEW)
    components = enumerate_components(pair.cfg, FINEST)
    every = SweepResult(result.dataset.isel(component=[0]))
    names = [c.name for c in components]
    every.dataset = every.dataset.isel(component=np.zeros(len(names), int)).assign_coords(name=("component", names))
    sizes = np.array([n_parameters(pair.cfg, c) for c in components])
    total = add_set_score(pair, every, [metric]).values("set_score") @ sizes / sizes.sum()
    assert total == pytest.approx(1, abs=1e-3)

    scored = add_set_score(pair, result, [metric])
    assert (result.set_ranking, scored.ranking, scored.set_ranking) == ("effect", "effect", "set_score")
    found = control_orders(*planted, scored, anchor_of(result), n_random=1)
    assert list(found) == ["set_score", "effect", "attribution", "delta_norm", "random 1"]
    truth = set(planted_components())
    assert np.mean([c.name in truth for c in found["set_score"][: len(truth)]]) > 0.8


def test_activations_that_were_patched_rank_the_control(planted, result):
    """Where they were, by their effect; elsewhere by first order."""
    data = result.dataset
    patched = np.where(np.arange(data.sizes["component"]) % 2, np.nan, np.linspace(0, 1, data.sizes["component"]))
    first = -np.linspace(0, 1, len(patched))
    found = SweepResult(data.assign(activation=("component", patched), attribution=("component", first)))
    np.testing.assert_allclose(
        activation_values(*planted, found, None),
        [p if np.isfinite(p) else f for p, f in zip(patched, first, strict=True)],
    )
    assert "activation" in control_orders(*planted, found, anchor_of(result), n_random=1)
    alone = SweepResult(found.dataset.assign(effect=found.dataset["effect"] * np.nan))  # of a sweep of activations
    order = control_orders(*planted, alone, None, n_random=1)
    assert list(order) == ["activation", "delta_norm", "random 1"]
    expected = np.where(np.isfinite(patched), patched, first)
    assert [c.name for c in order["activation"]] == data["name"].values[np.argsort(-expected, kind="stable")].tolist()


def test_finished_parts_of_another_shape_are_refused(planted, result):
    options = {"n_prompts": 6, "n_points": 3, "n_random": 1, "max_new_tokens": N_NEW}
    with pytest.raises(WpjaxError, match=r"part restore-effect-0 has shape \(2, 6\)"):
        validate(*planted, result, done={"restore-effect-0": np.zeros((2, 6))}, **options)


def test_the_result_knows_its_anchor(result):
    anchor = anchor_of(result)
    assert anchor is not None
    assert anchor.layer == 5
    assert np.linalg.norm(anchor.vector) == pytest.approx(1, abs=1e-5)


def test_results_of_other_models_and_absent_behaviours_are_refused(planted, result):
    pair, task = planted
    with pytest.raises(WpjaxError, match="the result is of the pair"):
        validate(load_pair("tiny:base", "tiny:expert"), task, result)
    always = dataclasses.replace(task, checker=lambda text, args: True)
    with pytest.raises(AnchorRejected, match="no behaviour to find"):
        validate(pair, always, result, n_prompts=6, max_new_tokens=N_NEW)
    with pytest.raises(WpjaxError, match="no ranking 'secant'"):
        validate(pair, task, result, by="secant")


def test_curves_say_in_words_how_few_components_are_enough():
    """Four prompts; one and two of two components, in a ranking and in a random order of as many parameters."""

    def said(back, away, random_back, n=(1, 2)):
        curves = curves_by_hand()
        strict = np.zeros((2, 2, 2, 4), bool)
        for place, n_pass in {(0, 0): back, (1, 0): away, (0, 1): random_back}.items():
            strict[place] = [np.arange(4) < k for k in n_pass]
        data = curves.dataset.assign(strict=(curves.dataset["strict"].dims, strict))
        return Curves(data.assign(n_components=(("ranking", "point"), [n, n]))).summary

    one = said((3, 4), (1, 0), (1, 4))
    assert one.startswith("With the best of 2 components (by effect) the base passes the checker on 75% of the prompts")
    assert "alone it passes on 0%, the expert on 100%. Without them the expert passes on 25%." in one
    assert one.endswith("With random components of as many parameters the base passes on 25%.")
    both = said((1, 4), (1, 0), (1, 4))
    assert both.startswith("With the 2 best of 2 components (by effect) the base passes the checker on 100%")
    assert "random" not in both
    assert said((1, 1), (1, 0), (0, 1)).startswith("No set that was tried brings half of the behaviour back")


def test_later_layers_are_ranked_for_sets_and_counted_nowhere_else(tiny_pair):
    """A sweep by an anchor ends at its layer; a set may go on. What was measured stays what it was."""
    task = behaviour("tiny:english_capital")
    batch = task.encode(tiny_pair.tokenizer, n_prompts=4)
    anchor = fit_anchor(tiny_pair, task, layer=3, n_prompts=8, causal="skip")
    result = sweep(tiny_pair, batch, anchor, kinds=("kv_group", "mlp"), method="screen+exact", top=3, stratum=1)
    metric = decision_metric(tiny_pair, batch, N_NEW)
    scored = add_set_score(tiny_pair, result, [metric])
    every = enumerate_components(tiny_pair.cfg, ["kv_group", "mlp"])
    assert scored.dataset["name"].values.tolist() == [c.name for c in every]
    np.testing.assert_allclose(scored.dataset["delta_norm"], tiny_pair.delta_norms(every), rtol=1e-6)
    assert [c.name for c, swept in zip(every, scored.dataset["swept"].values, strict=True) if c.layer > 3] == [
        c.name for c, swept in zip(every, scored.dataset["swept"].values, strict=True) if not swept
    ]
    xr.testing.assert_identical(scored.swept.dataset.drop_vars(["set_score", "set_share"]), result.dataset)
    before, after = dict(verdict(result).points), dict(verdict(scored).points)
    assert after.pop("Where").startswith(before.pop("Where"))
    assert after == before
    # By the definition, of the first MLP after the anchor.
    change = secant_adjoint(tiny_pair.cfg, tiny_pair.base, tiny_pair.expert, every, metric).mean(1)
    sizes = np.array([n_parameters(tiny_pair.cfg, c) for c in every])
    gap = (scores(tiny_pair.cfg, tiny_pair.expert, metric) - scores(tiny_pair.cfg, tiny_pair.base, metric)).mean()
    np.testing.assert_allclose(scored.values("set_score"), change / gap / (sizes / sizes.sum()), rtol=1e-5)
    # Two metrics in one pass are the mean of each alone.
    both = [metric, partings_metric(tiny_pair, batch, N_NEW)]
    alone = [add_set_score(tiny_pair, result, [one]).values("set_score") for one in both]
    together = add_set_score(tiny_pair, result, both).values("set_score")
    np.testing.assert_allclose(together, np.mean(alone, axis=0), rtol=1e-3, atol=1e-4)
    assert len(weighted_sum(both, np.ones(2))) == 1
    # The rows that were not swept come last where a ranking has no number of them.
    orders = control_orders(tiny_pair, task, scored, anchor, n_random=1)
    assert {len(order) for order in orders.values()} == {len(every)}
    assert all(c.layer <= 3 for c in orders["effect"][: result.dataset.sizes["component"]])
