"""A study as Python users call it: what it writes, when, and what it refuses."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import wpjax
from wpjax import SweepConfig, cli, run_study
from wpjax.arguments import arguments_of
from wpjax.behaviours import behaviour, strict
from wpjax.checkpoints.checkpoint import save_checkpoint
from wpjax.engines.packing import pack
from wpjax.errors import OutputError, WpjaxError
from wpjax.estimators.sets import add_set_score
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.evaluation.reading import answers_to_read
from wpjax.finetuning import answer
from wpjax.forecast import EFFICIENCY, Forecast, Pace
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.answers import instructed_metric, kl_metric, partings_metric
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import Projection
from wpjax.pairs import load_model, load_pair
from wpjax.patching import PatchMask, materialize
from wpjax.results.sweep_result import SweepResult
from wpjax.results.verdict import verdict
from wpjax.runtime.shards import Shards, parts_folder

SAVED = Path(__file__).parent / "data" / "schema4"
NAMES = ("L1.head.0", "L2.head.0", "L3.head.1")


def config(folder, **changes):
    first = SweepConfig(
        "tiny:base", "tiny:expert", "tiny:title", folder / "r.nc", causal="skip", n_prompts=4, answers=0
    )
    return dataclasses.replace(first, components=NAMES, **changes)


def without_times(dataset):
    return dataset.drop_attrs(deep=False).assign_attrs(
        {name: value for name, value in dataset.attrs.items() if name not in ("date", "wall_time_s")}
    )


def test_a_study_is_its_steps(tmp_path):
    """The anchor, the sweep and the set score one by one give the same; the file is the result."""
    plans, ranked = [], []
    study = run_study(config(tmp_path), planned=plans.append, ranked=ranked.append)
    pair, task = load_pair("tiny:base", "tiny:expert"), behaviour("tiny:title")
    batch = task.encode(pair.tokenizer, n_prompts=4)
    anchor = fit_anchor(pair, task, n_prompts=4, causal="skip")
    expected = sweep(pair, batch, anchor, components=NAMES, method="screen+exact")
    expected = add_set_score(pair, expected, [instructed_metric(pair, batch, 32), partings_metric(pair, batch, 32)])
    expected.dataset.attrs |= {
        "behaviour_source": "tiny:title",
        "max_new_tokens": 32,
        "command": study.result.dataset.attrs["command"],  # tests/test_config_file.py reads it
    }
    xr.testing.assert_identical(without_times(study.result.dataset), without_times(expected.dataset))
    xr.testing.assert_identical(SweepResult.from_netcdf(tmp_path / "r.nc").dataset, study.result.dataset)
    assert study.no_set_score == ""
    assert [path.name for path in tmp_path.iterdir()] == ["r.nc"]
    (schedule,), (first,) = plans, ranked
    # Every phase of the plan had reports, and none took place twice.
    assert [done.phase for done in schedule.finished] == list(schedule.phases)
    assert [phase.name for phase in schedule.phases][-4:] == ["exact patches", "controls", "joint patches", "set score"]
    assert all(phase.seconds > 0 for phase in schedule.phases)
    assert schedule.left == 0
    xr.testing.assert_identical(first.dataset, study.result.dataset.drop_vars(["set_score", "set_share"]))


def test_a_forecast_is_operations_over_speed(tiny_pair):
    """By hand: 3 heads of layer 2, read at layer 4: their own MLP, layer 3, and the keys and values of layer 4."""
    task = behaviour("tiny:title")
    batch = task.encode(tiny_pair.tokenizer, n_prompts=8)
    arguments = SweepConfig("b", "e", "t", Path("r.nc"), components=("L2.head.0", "L2.head.1", "L2.head.5"))
    forecast = Forecast(tiny_pair, task, 32, Pace(1e9, compiling=0))
    exact = next(p for p in forecast.sweep(arguments, batch, layer=4) if p.name == "exact patches")
    cfg = tiny_pair.cfg
    mlp = 2 * 3 * cfg.d_model * cfg.d_mlp
    keys, queries = (2 * 2 * cfg.d_model * n * cfg.d_head for n in (cfg.n_kv_heads, cfg.n_heads))
    tokens, readout = batch.with_instruction, Projection(jnp.ones(cfg.d_model))
    metric = Metric(tokens, jnp.asarray(tokens.last)[:, None], jnp.ones((8, 1)), readout, 4, "anchor")
    n_tokens = pack(metric).n_tokens
    assert exact.seconds == pytest.approx(3 * n_tokens * (mlp + (mlp + queries + keys) + keys) / (EFFICIENCY * 1e9))
    assert exact.work == "3 of 3 components, 8 prompts"
    # One part of four makes a quarter of the patches. What needs all of them is not its work.
    part = dataclasses.replace(arguments, part="2/4", out=None, shards=Path("parts"))
    *_, quarter, controls = forecast.sweep(part, batch, layer=4)
    assert (quarter.name, controls.name) == ("exact patches", "controls")
    assert quarter.seconds == pytest.approx(exact.seconds / 4)


def test_the_file_is_written_once_and_whole(tmp_path):
    """Interrupted when all but the set score is done: there is no file yet, and what is done is not done again."""

    def stop(what, done, total):
        if what == "set score":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(config(tmp_path), stop)
    assert [path.name for path in tmp_path.iterdir()] == [parts_folder(tmp_path / "r.nc").name]
    with pytest.raises(OutputError, match="pass --resume, or delete it"):
        run_study(config(tmp_path))
    parts = {path.name: path.stat().st_mtime_ns for path in parts_folder(tmp_path / "r.nc").glob("*.npy")}
    kept = []

    def look(what, done, total):
        if what == "set score" and not done:
            kept.append({path.name: path.stat().st_mtime_ns for path in parts_folder(tmp_path / "r.nc").glob("*.npy")})

    study = run_study(config(tmp_path, resume=True), look)
    assert kept == [parts]
    assert np.isfinite(study.result.values("set_score")).all()
    assert [path.name for path in tmp_path.iterdir()] == ["r.nc"]


def test_a_sweep_is_not_lost_with_its_set_score(tmp_path):
    """Base and expert do not part in one word, so there is no decision to score."""
    study = run_study(config(tmp_path, behaviour="tiny:no_comma", metric="kl", max_new_tokens=2, method="screen"))
    assert "part ways on" in study.no_set_score
    assert "set_score" not in SweepResult.from_netcdf(tmp_path / "r.nc").dataset


def test_answers_to_read_are_those_of_the_patched_model(tmp_path):
    """Base, expert, and the base with the best components by the set score, each asked by itself."""
    study = run_study(config(tmp_path, answers=2))
    found, pair, task = study.result.answers, load_pair("tiny:base", "tiny:expert"), behaviour("tiny:title")
    names = [row.name for row in study.result.top(found.n_components, by="set_score")]
    patched = materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, names))
    for texts, params in zip(found.texts, (pair.base, patched, pair.expert), strict=True):
        expected = answer(pair.base_checkpoint, found.prompts, max_new_tokens=32, params=params)
        assert list(texts) == [text for text, _ in expected]
    assert found.prompts == tuple(p.with_instruction for p in task.select("test", 2))
    assert found.passes.tolist() == [[strict(task.checker, text, {}) for text in texts] for texts in found.texts]
    assert found.passes[2].all()
    xr.testing.assert_identical(SweepResult.from_netcdf(tmp_path / "r.nc").dataset, study.result.dataset)


def test_a_sweep_is_not_lost_with_its_answers(tmp_path):
    """The answers would exceed the model's context."""
    study = run_study(config(tmp_path, answers=2, max_new_tokens=200, set_score=False))
    assert "exceed the context of 192" in study.no_answers
    assert SweepResult.from_netcdf(tmp_path / "r.nc").answers is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "best"}, "method='best': there are exact, screen, "),
        ({"n_prompts": 3}, "n_prompts=3: at least 4"),
        ({"confidence": 1.0}, "confidence=1.0: at most 0.9999"),
        ({"memory_mb": float("nan")}, "memory_mb=nan: at least 1"),
        ({"kinds": ("heads",)}, "did you mean head"),
        ({"metric": "kl", "anchor": Path("a")}, "--anchor a goes with --metric anchor or on_policy, not with"),
        ({"metric": "on_policy", "method": "ig"}, "method ig needs fixed words"),
    ],
)
def test_what_a_study_refuses(tmp_path, change, says):
    with pytest.raises(WpjaxError, match=re.escape(says)):
        run_study(config(tmp_path, **change))
    assert not list(tmp_path.iterdir())


def test_a_first_look_goes_on_with_its_parts(tmp_path):
    asked = config(tmp_path, quick=True)
    with Shards(asked.output, "sweep", {"dtype": asked.dtype, **asked.resolved.sweep_arguments}, resume=False) as parts:
        parts["part"] = np.zeros(1)
    dataclasses.replace(asked, resume=True).check()
    with pytest.raises(OutputError, match="top: 32 there, 128 here"):
        dataclasses.replace(asked, resume=True, quick=False).check()


def test_several_experts_are_no_study(tmp_path):
    for changes in ({"more_experts": ("tiny:planted",)}, {"expert": "run/checkpoint-*"}, {"stages": True}):
        with pytest.raises(WpjaxError, match=r"wp\.run_history"):
            run_study(config(tmp_path, **changes))
    with pytest.raises(WpjaxError, match=r"one expert has no history.*wp\.run_study"):
        wpjax.run_history(config(tmp_path))


def test_every_argument_is_an_option_with_its_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["wpjax", "sweep", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = " ".join(re.sub("[│]", " ", capsys.readouterr().out).split())
    for arg in arguments_of(wpjax.SweepConfig):
        name = arg.name if arg.setting.is_positional else f"--{arg.name.replace('_', '-')} "
        assert name in shown.replace("/--no-set-score", " ")
        assert " ".join(arg.setting.text.split())[:40] in shown


class Begun(Exception):
    """The long work has begun."""


def told_before_work(asked, n=1):
    """The notes of a study up to the n-th, or up to where its work begins."""
    told = []

    def tell(note):
        told.append(note)
        if len(told) == n:
            raise Begun

    def begin(what, done, total):
        if not what.startswith("reading"):  # the models are read before it
            raise Begun

    with pytest.raises(Begun):
        run_study(asked, begin, tell=tell)
    return told


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_prompts": 4}, "With 4 queries no p is below 0.12, and no q below p"),
        # 8 heads and an MLP in each of 8 layers; of each kind at most 2 + 1 are replaced
        ({"n_prompts": 8, "top": 2, "stratum": 1}, "at least 12 of 72 components with that p, and 6 are replaced"),
        ({"n_prompts": 8}, "at least 12 of 72 components with that p: fewer large effects than that do not count"),
        # up to the layer of the anchor, which is 6
        ({"n_prompts": 8, "anchor": Path("a")}, "at least 10 of 63 components with that p"),
        ({"n_prompts": 8, "anchor": Path("a"), "method": "gradient"}, None),
        ({"n_prompts": 32, "anchor": Path("a")}, None),
    ],
)
def test_what_few_queries_cannot_show_is_said_before_the_work(tmp_path, changes, says):
    if "anchor" in changes:
        known = dataclasses.replace(Anchor.load(SAVED / "title.anchor.safetensors"), identity={"split": "thirds"})
        known.save(tmp_path / "a")
        changes = changes | {"anchor": tmp_path / "a"}
    asked = dataclasses.replace(config(tmp_path), components=None, kinds=("head", "mlp"), **changes)
    told = told_before_work(asked)
    assert [says in note for note in told] == [True] if says else told == []


def test_what_differs_in_the_pair_is_said_before_the_work_and_with_the_result(tmp_path):
    save_checkpoint(tmp_path / "expert", load_model("tiny:expert"))
    path = tmp_path / "expert" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 100}))
    note = "contexts of 192 and 100 tokens: the smaller is used"
    asked = config(tmp_path, expert=str(tmp_path / "expert"), n_prompts=8, method="screen", set_score=False)
    told = []
    study = run_study(asked, tell=told.append)
    assert told == ["weights stored as BF16 and as F32: what rounding changed counts as a change", note]
    assert note in dict(verdict(study.result).points)["The pair"]


def test_answers_to_read_are_as_long_as_the_checker_needs(tiny_pair):
    """A closing quote comes after the 8 tokens that are asked for; later commands take the length from the result."""
    task = behaviour("tiny:quotation")
    batch = task.encode(tiny_pair.tokenizer, n_prompts=4)
    result = sweep(tiny_pair, batch, kl_metric(tiny_pair, batch, 8), kinds=("attn", "mlp"), method="screen")
    answers = answers_to_read(tiny_pair, task, result, top=16, max_new_tokens=8)
    assert answers.passes[2].all()
    assert all(text.endswith('"') for text in answers.texts[2])
    assert answers.max_new_tokens == 64
