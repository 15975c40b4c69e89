"""The verdict in words against hand-made sweeps, whose spread is counted by brute force; and answers to read."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
import xarray as xr

from tests.helpers import sweep_by_hand as by_hand
from wpjax.cli import make_app
from wpjax.cli.words import print_answers, print_verdict
from wpjax.results.answers import Answers
from wpjax.results.sweep_result import SweepResult
from wpjax.results.verdict import n_reaching, verdict
from wpjax.stats import benjamini_hochberg, sign_flip_p, smallest_p


@pytest.mark.parametrize("seed", range(5))
def test_how_many_reach_a_share_is_the_smallest_number_that_does(seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(50) ** 3
    values[:5] = np.nan
    best_first = sorted(values[values > 0], reverse=True)
    for total in (0.1, 1.0, 0.999 * sum(best_first)):
        expected = next(k for k in range(1, 51) if sum(best_first[:k]) >= total)
        assert n_reaching(values, total) == expected
    assert n_reaching(values, 1.01 * sum(best_first)) is None
    assert n_reaching(values, 0.0) is None
    assert n_reaching(-np.abs(values), 1.0) is None


def test_one_component_that_carries_it_all_is_concentrated():
    found = verdict(by_hand([0.9, *[0.001] * 99], layers=[2, *[0] * 99]))
    assert (found.shape, found.n_half, found.n_most, found.n_components) == ("concentrated", 1, 1, 100)
    assert found.layers == (2, 2)
    points = dict(found.points)
    assert (
        "Only layers 0 to 2 of 0 to 3 were swept, the others were not looked at; of these, layer 2 holds 90% of"
        in points["Where"]
    )
    assert "L2.neuron.0 90.0% [89.0%, 91.0%]" in points["Where"]
    assert points["Where"].startswith("Put in together, all 100 of them recover 100% of it.")
    assert points["How concentrated"].endswith("makes half of what all recover together, and 90%.")
    assert points["How concentrated"].startswith("Added up, the largest single effect of 100 (1 neuron) makes half")
    assert points["What was measured"].endswith("100 components were swept: each was put into the base alone.")
    assert "the anchor score, at layer 3: 2 [1, 3], on 8 prompts." in points["What was measured"]
    assert "100 of 100 replaced components are above it" in points["Noise"]


def test_it_says_what_the_models_do_and_where_their_answers_part():
    """Layers 0 and 1 were swept; the set score knows of layer 3, too, and heads hold most there."""
    swept = by_hand([0.5, 0.1, np.nan, np.nan], ["head", "neuron", "head", "neuron"], [0, 1, 3, 3], coverage=0.6)
    shares, is_swept = np.array([0.2, 0.1, 0.4, 0.2]), np.array([True, True, False, False])
    data = swept.dataset.assign(set_share=("component", shares), swept=("component", is_swept))
    answers = Answers(
        ("Be kind.", "SHOUT!"), (("a", "quiet"), ("b", "LOUD"), ("c", "LOUDER")),
        np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), 2, "effect",
    )  # fmt: skip
    points = dict(verdict(SweepResult(answers.added_to(data))).points)
    assert (
        "Only layers 0 to 1 of 0 to 3 were swept, the others were not looked at; of these, layer 0 holds 83% of"
        in points["Where"]
    )
    assert (
        "heads hold 60% and neurons 30% (the other 10%: weights that were not ranked); layer 3 holds half."
        in points["Where"]
    )
    assert "do not agree" not in points["Where"]
    assert "the base shows it on 0 and the expert on 1. So few prompts" in points["What it does"]
    assert "Asked “SHOUT!”, the base says “quiet”, the expert “LOUDER”." in points["What it does"]
    # By effect the set is the two that were swept; a third component is ranked by it nowhere.
    assert points["A set of them"].startswith(
        "With all that were ranked (2), the base shows the behaviour on 1 of 2 prompts"
    )
    by_score = data.assign(set_score=("component", [0.2, 0.1, 3.0, 2.0]))
    answers = answers._replace(by="set_score", tried=(1,), share=0.25)
    told = dict(verdict(SweepResult(answers.added_to(by_score))).points)["A set of them"]
    what = "1 head and 1 neuron, 25.0% of the parameters; layer 3 holds half of them"
    shows = "the base shows the behaviour on 1 of 2 prompts (alone on 0; the expert on 1)"
    assert told.startswith(f"With the 2 best by set score, of 4 that were ranked ({what}), {shows}.")
    assert "With the best 1, on too few. Asked as above, it says “LOUD”, which passes." in told
    other = data.assign(set_share=("component", [0.1, 0.4, 0.0, 0.5]))
    joint = other.assign_coords(swept_kind=["head", "neuron"]).assign(coverage_joint=("swept_kind", [0.5, 0.1]))
    assert "do not agree on which kind holds most" in dict(verdict(SweepResult(joint)).points)["Where"]
    assert "prompts" not in dict(verdict(SweepResult(data)).points)["What it does"]
    assert "A set of them" not in dict(verdict(SweepResult(data)).points)


@pytest.mark.parametrize(
    ("by_patched", "n", "says"),
    [
        ([1, 1, 1, 0], 2, "the 2 best components alone bring the behaviour back on 3 of 4 prompts"),
        ([1, 1, 0, 0], 2, "No small set that was tried brings the behaviour back"),
        ([1, 1, 1, 1], 4, ""),
    ],
)
def test_a_set_speaks_for_the_places_or_against_them(by_patched, n, says):
    """Where the anchor's tests do not: beside base 0 of 4 and expert 4 of 4. All components are no small set."""
    passes = np.array([[0.0] * 4, by_patched, [1.0] * 4])
    answers = Answers(("p",) * 4, (("a",) * 4, ("b",) * 4, ("c",) * 4), passes, n, "effect")
    swept = by_hand([0.4, 0.3, 0.2, 0.1], anchor_acceptance="undecided: few")
    told = dict(verdict(SweepResult(answers.added_to(swept.dataset))).points)["How far to trust it"]
    assert says in told if says else told.endswith("`wpjax validate` decide.")
    accepted = by_hand([0.4, 0.3, 0.2, 0.1])
    assert not says or says not in str(verdict(SweepResult(answers.added_to(accepted.dataset))))


def test_a_set_as_good_as_the_expert_on_few_prompts_may_be_chance():
    passes = np.array([[0.0] * 4, [1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    answers = Answers(("p",) * 4, (("a",) * 4, ("b",) * 4, ("c",) * 4), passes, 2, "effect")
    swept = by_hand([0.4, 0.3, 0.2, 0.1], anchor_acceptance="undecided: few")
    told = dict(verdict(SweepResult(answers.added_to(swept.dataset))).points)["How far to trust it"]
    assert told.endswith("as often as the expert shows it, but on so few prompts that it may be chance.")


def test_what_is_no_effect_of_weights_is_not_added_up():
    """Patched activations are shares of the gap, but no parts of what the weights recover."""
    swept = by_hand([np.nan] * 3, layers=[0, 1, 2], coverage=0.9)
    columns = {"activation": [0.6, 0.5, 0.0001], "activation_low": [0.5, 0.4, 0], "activation_high": [0.7, 0.6, 0.0002]}
    found = verdict(SweepResult(swept.dataset.assign({name: ("component", v) for name, v in columns.items()})))
    assert (found.shape, found.n_half, found.n_most, found.layers) == ("not known", None, None, None)
    points = dict(found.points)
    assert points["How concentrated"] == "Not known: what single weights do was not measured."
    assert points["What was measured"].endswith("no weights put in alone: what is ranked is the activation patching.")
    assert "L0.neuron.0 60.0% [50.0%, 70.0%], L1.neuron.1 50.0% [40.0%, 60.0%], L2.neuron.2 0.01%" in points["Where"]
    assert points["Noise"] == "No component's weights were replaced alone, so there is no noise floor."


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        (["head", "mlp"], "say --kinds head,mlp,kv_group,norm,embed."),
        (["delta_direction", "norm"], "say --kinds delta_direction,norm,embed."),
        (["layer", "embed"], "in components or layers that were not swept"),
    ],
)
def test_kinds_that_were_not_swept_are_named(kinds, says):
    layers = [0 if kind != "embed" else -1 for kind in kinds]
    assert says in dict(verdict(by_hand([0.1, 0.1], kinds=kinds, layers=layers, coverage=0.2)).points)["Where"]
    assert "elsewhere" not in str(verdict(by_hand([0.1, 0.1], kinds=kinds, layers=layers, coverage=-0.2)))


def test_an_effect_that_is_spread_evenly_is_diffuse():
    found = verdict(by_hand([0.01] * 100))
    assert (found.shape, found.n_half, found.n_most) == ("diffuse", 50, 90)
    assert found.layers == (0, 1)  # of four layers with a quarter each


def test_what_only_shows_in_company_is_said_to_be_so():
    found = verdict(by_hand([0.001] * 100, coverage=0.9))
    assert (found.shape, found.n_half, found.n_most) == ("in company", None, None)
    assert "add up to 11% of what" in dict(found.points)["How concentrated"]
    half = verdict(by_hand([0.006] * 100, coverage=1.0))
    assert (half.n_half, half.n_most) == (84, None)
    assert "All positive ones make 60%; the rest shows only when several are put in at once." in str(half)
    assert "together the components recover nothing" in str(verdict(by_hand([0.1] * 5, coverage=-0.2)))


def test_components_that_overlap_are_not_counted_twice():
    """A layer holds its neurons, and more than them: of both, the layer counts. Layers are looked at one by one."""
    for kinds, finest in (
        (["neuron", "layer"], ["layer"]),
        (["attn", "mlp", "layer"], ["attn", "mlp"]),
        (["head", "attn", "neuron"], ["attn", "neuron"]),
        (["head", "kv_group", "attn", "mlp", "norm"], ["head", "kv_group", "mlp", "norm"]),
        (["layer", "norm", "embed"], ["layer", "embed"]),
        (["head", "unembed"], ["head", "unembed"]),
        (["norm"], ["norm"]),
    ):
        outside = [-1 if kind in ("embed", "unembed") else 0 for kind in kinds]
        assert by_hand([0.1] * len(kinds), kinds=kinds, layers=outside).finest_kinds == finest
    mixed = by_hand([0.5, 0.5, 1.0, 0.2], kinds=["head", "head", "attn", "head"], layers=[0, 0, 1, 1], coverage=2.0)
    assert mixed.finest.tolist() == [True, True, True, False]
    assert (verdict(mixed).n_half, verdict(mixed).n_most, verdict(mixed).n_components) == (1, 3, 3)


@pytest.mark.parametrize(
    ("n_queries", "says"),
    [
        (4, "no p is below 0.12, and no q below p: no component can have q < 0.05, however large its effect"),
        (
            6,
            "takes at least 63 of 100 components with that p, and 60 are replaced: no component can have q < 0.05",
        ),
        (8, "q < 0.05 takes at least 16 of 100 components with that p: fewer large effects than that do not count"),
        (40, ""),
    ],
)
def test_a_q_that_so_few_queries_cannot_reach_is_said_to_be_so(n_queries, says):
    """The smallest q is that of effects which are equal on all queries, 60 of 100 components, in the test itself."""
    result = by_hand([0.01] * 100, n_queries=n_queries)
    result.dataset["q_value"][:60], result.dataset["q_value"][60:] = 1, np.nan
    found, p = verdict(result), np.ones(100)
    p[:60] = sign_flip_p(np.ones((60, n_queries)), np.arange(n_queries))
    assert found.smallest_q == pytest.approx(benjamini_hochberg(p)[0])
    noise = dict(found.points)["Noise"]
    assert says in noise
    if says:
        enough = int(re.search(r"With (\d+) queries a single component", noise)[1])
        one = [benjamini_hochberg(np.r_[smallest_p(n), np.ones(99)])[0] < 0.05 for n in (enough - 1, enough)]
        assert one == [False, True]
    else:
        assert noise.endswith("none has q < 0.05.")
    result.dataset["q_value"][0] = 0.01  # one is found, and so would be any of so large an effect
    assert dict(verdict(result).points)["Noise"].endswith("1 effect on the metric is surely not 0: it has q < 0.05.")


def test_what_differs_in_the_pair_is_said():
    notes = "contexts of 64 and 32 tokens: the smaller is used; 2 added tokens differ, in name or id: '<a>', '<b>'"
    assert notes in dict(verdict(by_hand([0.5], pair_notes=notes)).points)["The pair"]
    assert "The pair" not in dict(verdict(by_hand([0.5])).points)


@pytest.mark.parametrize(
    ("attrs", "status", "says"),
    [
        ({"anchor_acceptance": "accepted"}, "accepted", "passed its tests: held"),
        ({"anchor_acceptance": "not tested"}, "not tested", "Nothing has tested whether the direction"),
        ({"anchor_acceptance": "undecided: 7 of 12 pass"}, "undecided", "causes the behaviour (7 of 12 pass)"),
        ({"anchor_acceptance": "rejected: steered answers"}, "rejected", "failed its tests (steered answers)"),
        ({"anchor_acceptance": "steered answers are odd"}, "rejected", "failed its tests (steered answers are odd)"),
        ({"metric": "kl", "behaviour_differs": "by the checker"}, "accepted", "The checker finds the behaviour"),
        ({"metric": "kl", "behaviour_differs": "not tested"}, "not tested", "Nothing has tested whether base"),
        ({"metric": "kl", "behaviour_differs": "both pass"}, "rejected", "do not surely differ in the behaviour (both"),
        ({"metric": "on_policy", "behaviour_differs": "both pass"}, "accepted", "It is not certain that base and"),
    ],
)
def test_what_the_tests_said_and_what_it_means(attrs, status, says):
    result = by_hand([0.5, 0.1], **attrs)
    if attrs.get("metric") == "kl":
        del result.dataset.attrs["anchor_acceptance"]
    found = verdict(result)
    assert found.status == status
    assert says in dict(found.points)["How far to trust it"]


def test_prompts_that_serve_every_purpose_are_said_to():
    assert "--split none" in dict(verdict(by_hand([0.5], split="all")).points)["How far to trust it"]


def parsed(command):
    """What the command line makes of a command: its name and the values of its options."""
    program, name, *arguments = shlex.split(command)
    assert program == "wpjax"
    app = typer.main.get_command(make_app())
    return name, app.commands[name].make_context(name, arguments).params


@pytest.mark.parametrize("text", ["accepted", "undecided: few", "rejected: weak", "not tested"])
def test_the_next_commands_can_be_copied(text, tmp_path):
    """Every one is taken by the command line as it stands, whatever is in the names."""
    path = tmp_path / "it's mine.nc"
    path.touch()
    asked = {"behaviour": "odd", "behaviour_source": "my prompts.jsonl", "checker": 'regex:^it\'s "$HOME" [A-Z]+$'}
    loaded = {"tokenizer": "expert", "dtype": "bfloat16", "ignore_config": '["_num_labels", "foo bar"]'}
    commands = verdict(by_hand([0.5, 0.1], anchor_acceptance=text, **asked, **loaded), path).commands
    found = dict(map(parsed, commands))
    assert found["validate"]["result"] == path
    assert found["report"]["out"] == path.with_suffix(".html")
    if not text.startswith("rejected"):
        assert found["extract"]["out"] == path.with_suffix(".safetensors")
        assert found["extract"]["checker"] == found["validate"]["checker"]
    if text.startswith(("undecided", "rejected")):
        again = found["sweep"]
        assert (again["behaviour"], again["checker"]) == (asked["behaviour_source"], asked["checker"])
        assert (again["tokenizer"], again["dtype"]) == ("expert", "bfloat16")
        assert list(again["ignore_config"]) == ["_num_labels", "foo bar"]
        assert (again["base"], again["expert"], again["out"].parent) == ("tiny:base", ["tiny:expert"], tmp_path)
    assert verdict(by_hand([0.5])).commands == ()


@pytest.mark.parametrize(
    ("text", "changed"),
    [("accepted", {}), ("undecided: few", {}), ("rejected: weak", {"metric": "decision"})],
)
def test_after_a_first_look_the_whole_sweep_is_named(text, changed):
    found = verdict(by_hand([0.5, 0.1], anchor_acceptance=text, quick="a first look"), "r.nc")
    assert "It is a first look (--quick)" in dict(found.points)["How far to trust it"]
    again = dict(map(parsed, (command for command in found.commands if " validate " not in command)))["sweep"]
    assert (again["quick"], again["n_steered"]) == (False, 64)
    assert {name: again[name] for name in changed} == changed
    assert again["out"] != Path("r.nc")


def test_a_checker_that_is_code_stands_in_the_command():
    code = {"behaviour_source": "p.jsonl", "behaviour": "p", "checker": "mine:check"}
    assert verdict(by_hand([0.5], **code), "r.nc").commands[0] == "wpjax validate r.nc --checker mine:check"
    assert verdict(by_hand([0.5]), "-r.nc").commands[0] == "wpjax validate ./-r.nc"


def test_a_result_shows_what_it_is():
    text = repr(by_hand(np.linspace(0.5, 0, 9)))
    assert text.splitlines()[0] == "SweepResult of tiny:title: tiny:base -> tiny:expert"
    assert "anchor metric, method exact; 9 neuron" in text
    assert "gap 2 [1, 3] on 8 prompts" in text
    assert re.findall(r"\d\. (L\d\.neuron\.\d) ", text) == [f"L{i % 4}.neuron.{i}" for i in range(5)]


ANSWERS = Answers(
    ("Hi \x1b[31m?", "Ho?"),
    (("a\nb", "\0"), ("A [bold]", "B"), ("A", "B")),
    np.array([[0, np.nan], [1, np.nan], [1, np.nan]]),
    3,
    "effect",
)


def test_answers_are_stored_beside_the_result_and_found_again(tmp_path):
    dataset = ANSWERS.added_to(by_hand([0.5]).dataset)
    dataset.to_netcdf(tmp_path / "r.nc", engine="h5netcdf")
    again = SweepResult(xr.load_dataset(tmp_path / "r.nc", engine="h5netcdf")).answers
    assert again.prompts == ANSWERS.prompts
    assert again.texts == (("a\nb", "\N{REPLACEMENT CHARACTER}"), ("A [bold]", "B"), ("A", "B"))
    np.testing.assert_array_equal(again.passes, ANSWERS.passes)
    assert (again.n_components, again.by) == (3, "effect")
    assert by_hand([0.5]).answers is None
    assert SweepResult(dataset.drop_vars("answer_passes")).answers is None
    assert SweepResult(dataset.assign_attrs(answers_by=3)).answers is None


def test_printed_words_cannot_steer_the_terminal(capsys):
    print_answers(ANSWERS)
    print_verdict(verdict(by_hand([0.5], anchor_acceptance="rejected: \x1b[2J"), "a\x1b.nc"))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "a\\nb" in shown
    assert "A [bold]" in shown
    assert re.search(r"base \+ 3 +passes +A", shown)
    assert re.search(r"base +fails", shown)
