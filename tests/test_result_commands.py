"""What can be done with a result: shown, compared, validated and exported, from its file alone."""

import csv
import io
import json
import re
import shlex
import sys

import chex
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from scipy.stats import spearmanr

from tests.helpers import run_cli, sweep_by_hand
from tests.tiny import patched_torch
from wpjax.behaviours import behaviour
from wpjax.checkpoints.checkpoint import load_checkpoint
from wpjax.checkpoints.rewrite import open_model
from wpjax.components import parse_component
from wpjax.errors import WpjaxError
from wpjax.evaluation.export import choose, export, joint_effect, patch_path
from wpjax.patchfiles import apply_patches, load_patch
from wpjax.patching import PatchMask, materialize
from wpjax.results.comparison import compare
from wpjax.results.curves import Curves
from wpjax.results.sweep_result import SweepResult

CHECKER = "regex:^[^a-z]*[A-Z][^a-z]*$"
NAMES = "L2.head.0,L2.head.1,L3.head.1,L4.mlp,L5.mlp"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with eight prompts of the user's own, a sweep on them, and the same sweep with other numbers.

    Names have a space and a quote, and all prompts serve every purpose.
    """
    folder = tmp_path_factory.mktemp("user's folder")
    queries = {p.without: p.with_instruction for p in behaviour("tiny:english_capital").pairs[:60]}
    lines = [json.dumps({"with": with_, "without": without}) for without, with_ in list(queries.items())[:8]]
    for name in ("my prompts.jsonl", "others.jsonl"):
        (folder / name).write_text("\n".join(lines))
    asked = ["--base", "tiny:base", "--expert", "tiny:expert", "--behaviour", folder / "my prompts.jsonl"]
    asked += ["--checker", CHECKER, "--split", "none", "--causal", "skip"]
    small = ["--components", NAMES, "--method", "exact", "--max-new-tokens", "10"]
    assert run_cli("sweep", *asked, *small, "--out", folder / "r 1.nc") == 0
    other = SweepResult.from_netcdf(folder / "r 1.nc")
    del other.dataset.attrs["checker"]
    other.dataset.attrs |= {"metric": "decision", "metric_layer": 7}
    other.dataset["effect"] = other.dataset["effect"][::-1]
    other.to_netcdf(folder / "r2.nc")
    return folder


@pytest.fixture
def workplace(folder):
    return folder


def test_a_result_is_shown_again(wpjax):
    code, out, _ = wpjax("show", "r 1.nc", "--top", "3")
    assert code == 0
    result = SweepResult.from_netcdf("r 1.nc")
    found = re.findall(r"^ (L\d\.\S+) +([+-]\d\.\d{4}) ", out, re.MULTILINE)
    assert found == [(row.name, f"{row.value:+.4f}") for row in result.top(3)]
    assert "Where" in out
    assert "wpjax validate 'r 1.nc'" in out
    assert f"base + {result.answers.n_components}" in out
    _, out, _ = wpjax("show", "r 1.nc", "--by", "set_score", "--kinds", "mlp")
    rows = result.top(by="set_score", kinds=("mlp",))
    assert re.findall(r"^ (L\d\.mlp) +([+-]\d\.\d{4})", out, re.MULTILINE) == [
        (r.name, f"{r.value:+.4f}") for r in rows
    ]


def test_csv_and_json_hold_the_numbers(wpjax):
    result = SweepResult.from_netcdf("r 1.nc")
    _, out, _ = wpjax("show", "r 1.nc", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["name"] for row in rows] == [row.name for row in result.top(99)]
    for row in rows:
        one = result.dataset.isel(component=result.dataset["name"].values.tolist().index(row["name"]))
        for column in ("effect", "ci_low", "q_value", "set_score", "delta_norm"):
            assert float(row[column]) == pytest.approx(float(one[column]), rel=1e-12)
    _, out, _ = wpjax("show", "r 1.nc", "--json")
    shown = json.loads(out)
    assert [row["name"] for row in shown["top"]] == [row["name"] for row in rows]
    assert shown["verdict"]["coverage"] == result.dataset.attrs["coverage"]
    assert shown["answers"]["texts"][2] == list(result.answers.texts[2])


def test_what_cannot_be_shown(wpjax):
    for arguments, says in (
        (["show", "r 1.nc", "--by", "screen"], "no ranking 'screen'"),
        (["show", "r 1.nc", "--kinds", "neuron"], "kind 'neuron' was not swept, only head, mlp"),
        (["show", "my prompts.jsonl"], "not a readable result file"),
        (["show", "r 1.nc", "--csv", "--json"], "choose one of them"),
        (["export", "r 1.nc", "--top", "6", "--out", "x"], "has 5 components, 6 were asked for"),
        (["export", "r 1.nc", "--top", "1", "--kinds", "norm", "--out", "x"], "kind 'norm' was not swept"),
    ):
        code, _, err = wpjax(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert says in err


def test_validation_takes_all_from_the_file(wpjax, folder):
    """Pair, behaviour, checker and length of answers; the curves say so, and hold answers to read."""
    small = ["--n-prompts", "6", "--points", "2", "--n-random", "1"]
    code, out, err = wpjax("validate", "r 1.nc", *small)
    assert code == 0, err
    curves = Curves.from_netcdf("r 1.curves.nc")
    attrs = curves.dataset.attrs
    assert (attrs["behaviour"], attrs["checker"], attrs["max_new_tokens"]) == ("my prompts", CHECKER, 10)
    assert "swept_behaviour" not in attrs
    task = behaviour("my prompts.jsonl", split="none")
    assert curves.answers.prompts == tuple(p.with_instruction for p in task.select("test", 4))
    assert set(curves.answers.passes[2]) == {1}  # the expert
    assert "Answers to held-out prompts" in out
    _, again, _ = wpjax("show", "r 1.curves.nc")
    assert again.strip() in out
    _, table, _ = wpjax("show", "r 1.curves.nc", "--csv")
    points = list(csv.DictReader(io.StringIO(table)))
    assert len(points) == 2 * len(curves.rankings) * 2
    assert float(points[0]["strict"]) == pytest.approx(curves.share("strict")[0][0, 0, 0, 0])
    assert "holds curves: --by" in wpjax("show", "r 1.curves.nc", "--by", "effect")[2]

    code, _, err = wpjax("validate", "r2.nc", *small)  # swept without a checker
    assert code == 2
    assert "pass --checker" in err
    other = ["validate", "r 1.nc", "--behaviour", "others.jsonl", *small, "--out", "o.nc"]
    code, _, err = wpjax(*other)
    assert code == 2
    assert "the result is of the behaviour my prompts, this one is others" in err
    assert not (folder / "o.nc").exists()
    code, out, err = wpjax(*other, "--other-behaviour")
    assert code == 0, err
    assert "the answers are of others, the ranking is of my prompts" in out
    attrs = Curves.from_netcdf("o.nc").dataset.attrs
    assert (attrs["behaviour"], attrs["swept_behaviour"], attrs["checker"]) == ("others", "my prompts", CHECKER)


def test_other_prompts_under_the_same_name_are_refused(wpjax, tmp_path):
    lines = [json.dumps({"prompt": f"Say {i}.", "instruction": "Shout."}) for i in range(20)]
    (tmp_path / "my prompts.jsonl").write_text("\n".join(lines))
    code, _, err = wpjax("validate", "r 1.nc", "--behaviour", tmp_path / "my prompts.jsonl", "--out", "x.nc")
    assert code == 2
    assert "the behaviour my prompts, with other prompts than this one has" in err


def test_a_file_does_not_choose_code(wpjax, folder):
    """A result that names a checker of the form module:function runs nothing by itself."""
    result = SweepResult.from_netcdf("r 1.nc")
    result.dataset.attrs["checker"] = "antigravity:geohash"
    result.to_netcdf(folder / "code.nc")
    code, _, err = wpjax("validate", "code.nc", "--out", "x.nc")
    assert code == 2
    assert "a result file is not trusted to choose code: pass --checker antigravity:geohash" in err
    assert "antigravity" not in sys.modules
    result.dataset.attrs |= {"checker": CHECKER}
    del result.dataset.attrs["behaviour_source"]
    result.to_netcdf(folder / "unnamed.nc")
    assert "does not say which file its behaviour 'my prompts' came from" in wpjax("validate", "unnamed.nc")[2]


def test_two_sweeps_are_compared(wpjax):
    a, b = SweepResult.from_netcdf("r 1.nc"), SweepResult.from_netcdf("r2.nc")
    found = compare(a, b, top=1)
    heads = [name for name in NAMES.split(",") if "head" in name]
    for kind, names in (("head", heads), ("mlp", ["L4.mlp", "L5.mlp"])):
        mine = next(k for k in found.kinds if k.kind == kind)
        values = [r.dataset.set_index(component="name")["effect"].sel(component=names).values for r in (a, b)]
        assert (mine.n_common, mine.n_top, mine.by_chance) == (len(names), 1, pytest.approx(1 / len(names)))
        assert mine.n_shared == int(values[0].argmax() == values[1].argmax())
        if len(names) > 2:
            assert mine.rho == pytest.approx(spearmanr(*values).statistic)
    assert {"metric", "metric_layer"} <= set(found.differs)
    assert "base" not in found.differs
    code, out, _ = wpjax("compare", "r 1.nc", "r2.nc")
    assert code == 0
    assert re.search(r"metric +anchor +decision", out)
    assert "of 5 components that were replaced in both, 0 differ with q < 0.05" in out
    assert "With 8 queries" not in out  # of five components a single one can be found
    _, out, _ = wpjax("compare", "r 1.nc", "r2.nc", "--json")
    assert json.loads(out)["n_intervals"] == 5


def test_intervals_that_have_no_common_point_are_told_apart():
    one, other = sweep_by_hand([0.5, 0.2, 0.1, 0.0]), sweep_by_hand([0.51, 0.3, 0.1, 0.0], base="renamed")
    found = compare(one, other)
    assert [(side.name, side.apart) for side in found.sides[:2]] == [("L0.neuron.0", False), ("L1.neuron.1", True)]
    assert (found.n_apart, found.n_intervals) == (1, 4)
    assert found.kinds[0].rho == pytest.approx(1)


def with_effects_by_query(delta, gap, prompts, queries):
    """A sweep of three neurons, the last of which was not replaced, on prompts of several queries."""
    delta, gap = np.array([*delta, [np.nan] * len(gap)], float), np.array(gap, float)
    data = sweep_by_hand(delta.mean(1) / gap.mean()).dataset.drop_vars("prompt")
    columns = {"delta": (("component", "prompt"), delta), "gap": ("prompt", gap), "query": ("prompt", queries)}
    return SweepResult(data.assign(columns).assign_coords(prompt=("prompt", np.array(prompts, object))))


def test_effects_on_the_same_queries_are_compared_by_query():
    """By hand: four queries of two prompts. The first component's shares differ by .25, .75, 1.25 and 1.75, which all
    have one sign, so p is 2 of 16. Prompts and numbers of queries come in another order in the second file.
    """
    prompts, queries = [f"{q}{half}" for q in "abcd" for half in "xy"], np.repeat([4, 5, 6, 7], 2)
    mine = [[0.5, 1.5, 2, 2, 3, 3, 4, 4], [1, 1, -1, -1, 1, 1, -1, -1]]
    one = with_effects_by_query(mine, [1.0, 3.0] * 4, prompts, queries)
    theirs = np.array([[1.0] * 8, [0.0] * 8])
    order = [3, 2, 1, 0, 7, 5, 6, 4]
    other = with_effects_by_query(
        theirs[:, order], np.array([3.0, 5.0] * 4)[order], [prompts[i] for i in order], queries[order] - 4
    )
    found = compare(one, other)
    assert (found.unpaired, found.n_tested, found.n_differ) == ("", 2, 0)
    (first,) = found.sides
    assert (first.a[0], first.b[0]) == (1.25, 0.25)
    assert first.difference[0] == pytest.approx(1.0)
    assert 0.25 <= first.difference[1] < 1 < first.difference[2] <= 1.75
    # Benjamini and Hochberg over three components, of which the one that was not replaced counts with p = 1
    assert first.q_value == pytest.approx(3 * 2 / 16)
    assert found.reach.startswith("With 4 queries no p is below 0.12")
    (same,) = compare(one, one).sides
    assert (same.difference, same.q_value) == ((0, 0, 0), 1)


def test_what_is_not_on_the_same_queries_is_said_to_be_unpaired():
    prompts, queries, gap = list("abcd"), np.arange(4), [1.0] * 4
    one = with_effects_by_query([[1.0] * 4, [2.0] * 4], gap, prompts, queries)
    two = with_effects_by_query([[1.0] * 4, [2.0] * 4], gap, list("abce"), queries)
    merged = with_effects_by_query([[1.0] * 4, [2.0] * 4], gap, prompts, queries // 2)
    norms = {"by": "delta_norm"}
    for other, options, says in (
        (two, {}, "the two were swept on different prompts"),
        (merged, {}, "the two count different prompts as one query"),
        (one, norms, "only effects are kept query by query, not delta_norm"),
        (sweep_by_hand([0.5, 0.2, 0.1]), {}, "the effects on each query are not in both files"),
    ):
        found = compare(one, other, **options)
        assert (found.unpaired, found.n_tested) == (says, 0)
        assert np.isnan(found.sides[0].q_value)


def test_sweeps_of_other_shapes_are_not_compared():
    one = sweep_by_hand([0.5, 0.2])
    with pytest.raises(WpjaxError, match="tiny:base has 4 layers, big has 9: equal names are not the same"):
        compare(one, sweep_by_hand([0.5, 0.2], base="big", base_fingerprint="other", n_layers=9))
    with pytest.raises(WpjaxError, match="no component in common"):
        compare(one, sweep_by_hand([0.5, 0.2], names=["L0.mlp", "L1.mlp"]))
    twin = compare(one, sweep_by_hand([0.5, 0.2], base="twin", base_fingerprint="other"))
    assert twin.differs["base"] == ("tiny:base", "twin")


def test_an_exported_folder_is_the_patched_model(hf_pair, pair, tmp_path):
    """Loaded by transformers, it is the torch base with the component's slices copied, tensor by tensor."""
    name = "L1.head.1"
    result = sweep_by_hand([0.5], kinds=["head"], names=[name], **ends_of(pair))
    export(pair, result, choose(result, 1), tmp_path / "out")
    expected = patched_torch(hf_pair, parse_component(pair.cfg, name)).state_dict()
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for tensor, values in expected.items():
        torch.testing.assert_close(found[tensor], values, rtol=0, atol=0)


def ends_of(pair):
    fingerprints = dict(zip(("base_fingerprint", "expert_fingerprint"), pair.fingerprints, strict=True))
    return {**fingerprints, "base": pair.base_checkpoint.source, "expert": pair.expert_checkpoint.source}


def test_the_patch_beside_the_folder_undoes_it(one_pair, tmp_path):
    """The patch undoes what it did to the base, and the knock-out what it did to the expert."""
    pair = one_pair
    result = sweep_by_hand([0.5, 0.1], kinds=["head", "mlp"], names=["L1.head.1", "L0.mlp"], **ends_of(pair))
    for knockout, (host, donor) in ((False, (pair.base, pair.expert)), (True, (pair.expert, pair.base))):
        out = tmp_path / f"out-{knockout}"
        export(pair, result, choose(result, 2), out, knockout=knockout)
        patch = load_patch(patch_path(out))
        assert patch.info.components == ("L1.head.1", "L0.mlp")
        assert (patch.info.into, patch.info.origin) == (("expert", "base") if knockout else ("base", "expert"))
        expected = materialize(host, donor, PatchMask.of(pair.cfg, patch.info.components))
        chex.assert_trees_all_equal(load_checkpoint(out).params, expected)
        apply_patches(open_model(out), [patch], tmp_path / f"back-{knockout}", undo=True)
        chex.assert_trees_all_equal(load_checkpoint(tmp_path / f"back-{knockout}").params, host)
    with pytest.raises(WpjaxError, match="the result is of the pair"):
        export(pair, sweep_by_hand([0.5]), [], tmp_path / "x")


def test_a_folder_is_exported_from_the_command_line(wpjax, folder):
    code, out, err = wpjax("export", "r 1.nc", "--top", "2", "--by", "effect", "--out", "top2")
    assert code == 0, err
    assert "wrote top2, top2.safetensors: the base with 2 components" in out
    (undo,) = re.findall(r"^Next\n  wpjax (.*)$", out, re.MULTILINE)
    assert wpjax(*shlex.split(undo))[0] == 0
    best = [row.name for row in SweepResult.from_netcdf("r 1.nc").top(2)]
    assert list(load_patch(folder / "top2.safetensors").info.components) == best
    card = (folder / "top2" / "README.md").read_text()
    assert all(f"`{name}`" in card for name in best)
    assert "`my prompts`" in card
    assert re.search(r"- Effect: together these components bring back \d+% of the gap", card)
    assert str(folder) not in card
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "top2")
    assert tokenizer.chat_template
    weights = load_file(folder / "top2" / "model.safetensors")
    assert all(np.isfinite(values.astype(np.float32)).all() for values in weights.values())
    left = sorted(p.name for p in folder.iterdir())
    code, _, err = wpjax("export", "r 1.nc", "--top", "2", "--out", "top2")
    assert code == 2
    assert "exists" in err
    assert sorted(p.name for p in folder.iterdir()) == left


def test_the_joint_effect_of_a_set_of_one_is_its_effect(folder, tiny_pair):
    """And of all that was swept, the coverage, which another engine measured."""
    result = SweepResult.from_netcdf(folder / "r 1.nc")
    for names, expected in (
        ([result.top(1)[0].name], result.top(1)[0].effect),
        (NAMES.split(","), result.dataset.attrs["coverage"]),
    ):
        patched = materialize(tiny_pair.base, tiny_pair.expert, PatchMask.of(tiny_pair.cfg, names))
        assert joint_effect(tiny_pair, result, patched) == pytest.approx(expected, abs=1e-4)
    assert joint_effect(tiny_pair, result, tiny_pair.expert) == pytest.approx(1)
    assert joint_effect(tiny_pair, result, tiny_pair.expert, knockout=True) == pytest.approx(0)
    assert joint_effect(tiny_pair, sweep_by_hand([0.5]), tiny_pair.expert) is None


def test_few_prompts_serve_every_purpose(wpjax):
    """Eight prompts, refused in thirds, swept undivided; the result says so."""
    asked = ["--base", "tiny:base", "--expert", "tiny:expert", "--behaviour", "my prompts.jsonl", "--causal", "skip"]
    code, _, err = wpjax("sweep", *asked, "--out", "few.nc")
    assert code == 2
    assert "8 different queries, at least 12 are needed" in err
    assert "or pass --split none" in err
    result, task = SweepResult.from_netcdf("r 1.nc"), behaviour("my prompts.jsonl", split="none")
    assert result.dataset.attrs["split"] == "all"
    assert result.dataset.sizes["prompt"] == 8
    assert set(result.answers.prompts) <= {p.with_instruction for p in task.pairs}
    assert "All prompts served to fit, to sweep and to test" in " ".join(wpjax("show", "r 1.nc")[1].split())


def test_the_page_begins_with_a_picture_the_verdict_and_the_answers(wpjax, folder):
    hostile = SweepResult.from_netcdf("r 1.nc")
    hostile.dataset["answer"][1] = "<script>alert(1)</script>"
    hostile.to_netcdf(folder / "its page.nc")
    assert wpjax("report", "its page.nc", "--out", "r1.html")[0] == 0
    page = (folder / "r1.html").read_text()
    assert page.index("<svg") < page.index("What it does") < page.index("Answers to held-out prompts")
    assert page.index("Answers to held-out prompts") < page.index("Where the behaviour lives")
    assert "All prompts served to fit" in page
    assert "wpjax validate &#39;its page.nc&#39;" in page
    assert "wpjax report" not in page
    assert all(text in page for text in hostile.answers.texts[2])
    assert "<script>alert" not in page


def test_a_damaged_set_of_answers_is_refused(wpjax, folder):
    whole = SweepResult.from_netcdf("r 1.nc").dataset
    for change, lacks in (
        (lambda d: d.drop_vars("answer_passes"), "answer_passes"),
        (lambda d: d.assign_attrs(answers_by=1), "answers_by"),
        (lambda d: d.assign_coords(answerer=["a", "b", "c"]), "answerer"),
    ):
        SweepResult(change(whole)).to_netcdf(folder / "bad.nc", overwrite=True)
        with pytest.raises(WpjaxError, match=lacks):
            SweepResult.from_netcdf(folder / "bad.nc")


def test_functions_as_metrics(one_pair, batch):
    """A function that makes a metric is called; others are told what to pass."""
    import wpjax as wp

    options = {"components": ["L1.mlp"], "method": "screen"}
    found, expected = (
        wp.sweep(one_pair, batch, metric, **options).values("screen")
        for metric in (wp.decision_metric, wp.decision_metric(one_pair, batch))
    )
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(WpjaxError, match=r"does not take \(pair, batch\).*pass an Anchor \(wp.fit_anchor\)"):
        wp.sweep(one_pair, batch, lambda logits: logits.mean(), **options)
    with pytest.raises(WpjaxError, match="returns float; pass an Anchor"):
        wp.sweep(one_pair, batch, lambda pair, batch: 1.0, **options)
