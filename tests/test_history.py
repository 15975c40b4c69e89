"""Histories: every step is the sweep of its pair by the same metric, and a planted course of training is found."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from safetensors.numpy import save_file

import wpjax as wp
from tests.helpers import compiled
from wpjax.arguments import SweepConfig, as_command, as_read, as_written, read_config
from wpjax.behaviours import behaviour
from wpjax.checkpoints.checkpoint import save_checkpoint
from wpjax.checkpoints.line import in_order, step_of
from wpjax.errors import CheckpointError, OtherResult, WpjaxError
from wpjax.estimators.sweep import sweep
from wpjax.history import run_history
from wpjax.metrics.answers import decision_metric
from wpjax.pairs import load_model, load_pair
from wpjax.patching import PatchMask, materialize
from wpjax.report.history import make_history, write_history_report
from wpjax.results.history import History
from wpjax.runtime.patterns import expanded
from wpjax.runtime.shards import parts_folder
from wpjax.study import run_study

FIRST, SECOND, THIRD, FOURTH = "L0.attn", "L7.mlp", "L6.mlp", "L5.mlp"
PLANTED = {2: (FIRST,), 10: (FIRST, SECOND), 30: (FIRST, SECOND, THIRD, "L0.mlp"), 100: None}
"""Step of the training -> whose weights are the expert's by then; None: all."""

NAMES = (FIRST, SECOND, THIRD, FOURTH)
N_PROMPTS, N_NEW = 8, 8


@pytest.fixture(scope="module")
def run(tiny_pair, tmp_path_factory) -> Path:
    """A folder with the checkpoints of a training that changed one component after the other."""
    folder, pair = tmp_path_factory.mktemp("run"), tiny_pair
    for step, names in PLANTED.items():
        params = pair.expert if names is None else materialize(pair.base, pair.expert, PatchMask.of(pair.cfg, names))
        save_checkpoint(folder / f"checkpoint-{step}", dataclasses.replace(pair.expert_checkpoint, params=params))
    return folder


def config(run: Path, out: Path, *steps, **changes) -> SweepConfig:
    experts = [str(run / f"checkpoint-{step}") for step in steps or PLANTED]
    arguments = {"components": NAMES, "method": "exact", "metric": "decision", "causal": "skip"} | changes
    return SweepConfig(
        "tiny:base", experts[0], "tiny:title", out, more_experts=tuple(experts[1:]), n_prompts=N_PROMPTS,
        max_new_tokens=N_NEW, **arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def history(run, tmp_path_factory) -> History:
    """Its history; the checkpoints are named in no order. Every program of patches serves all four of them."""
    with compiled() as programs:
        history = run_history(config(run, tmp_path_factory.mktemp("out") / "line.nc", 100, 10, 2, 30))
    assert programs.count("replay") <= 2  # one a kind; none if another test has compiled it
    return history


@pytest.fixture(scope="module")
def ruler(tiny_pair):
    """The prompts, and the metric of the last checkpoint."""
    batch = behaviour("tiny:title").encode(tiny_pair.tokenizer, n_prompts=N_PROMPTS)
    return batch, decision_metric(tiny_pair, batch, max_new_tokens=N_NEW)


def without_times(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.assign_attrs(date="", command="")


def test_a_planted_course_is_found(history):
    """What was the expert's from a step on has its whole effect from then on, and none before."""
    assert history.dataset["step"].values.tolist() == [2, 10, 30, 100]
    assert history.labels == ["2", "10", "30", "100"]
    courses = {course.name: course for course in history.courses()}
    for name, began in ((FIRST, 0), (SECOND, 1), (THIRD, 2), (FOURTH, 3)):
        effects = courses[name].effects
        assert effects[-1] > 0.01, name
        assert np.abs(effects[:began]).max(initial=0) < 1e-6, name
        np.testing.assert_allclose(effects[began:], effects[-1], rtol=1e-4, atol=1e-6)
        assert history.labels[courses[name].since] == str([*PLANTED][began])
        assert courses[name].found
    assert history.share[-1] == 1
    assert history.labels[history.since] == "30"


def test_every_step_is_the_sweep_of_its_pair_by_the_same_metric(history, run, ruler):
    batch, metric = ruler
    final = history.dataset["gap"].values
    for i, step in enumerate(PLANTED):
        pair = load_pair("tiny:base", run / f"checkpoint-{step}")
        own = np.asarray(metric(pair.cfg, pair.expert) - metric(pair.cfg, pair.base), np.float64)
        np.testing.assert_allclose(history.dataset["step_gap"].values[i], own, atol=1e-5)
        assert history.share[i] == pytest.approx(own.mean() / final.mean(), abs=1e-6)
        expected = sweep(pair, batch, metric, components=NAMES, method="exact", gap=final).dataset
        found = history.at(i).dataset
        for name in expected.data_vars:
            if name not in ("flow", "target"):
                np.testing.assert_array_equal(found[name].values, expected[name].values, err_msg=str(name))
        same = {name: found.attrs[name] for name in expected.attrs if name not in ("date", "wall_time_s")}
        assert same == {name: value for name, value in expected.attrs.items() if name in same}
        if step == 30:
            alone = sweep(pair, batch, metric, components=NAMES, method="exact").dataset
            np.testing.assert_array_equal(found["delta"].values, alone["delta"].values)
            np.testing.assert_array_equal(found["q_value"].values, alone["q_value"].values)
            np.testing.assert_allclose(found["effect"] * final.mean(), alone["effect"] * own.mean(), atol=1e-6)


def test_a_line_of_one_expert_is_its_sweep_at_every_step(run, tmp_path):
    """By the whole study of that pair, anchor and screen included."""
    for step in (1, 2):
        shutil.copytree(run / "checkpoint-100", tmp_path / f"checkpoint-{step}")
    changes = {
        "metric": "anchor",
        "method": "screen+exact",
        "components": None,
        "kinds": ("attn",),
        "top": 2,
        "stratum": 1,
    }
    line = run_history(config(tmp_path, tmp_path / "line.nc", 1, 2, **changes))
    alone = config(run, tmp_path / "one.nc", 100, **changes)
    one = run_study(dataclasses.replace(alone, set_score=False, answers=0)).result
    for i in range(2):
        found = line.at(i).dataset
        for name in ("effect", "ci_low", "ci_high", "q_value", "screen", "exact", "sampled", "missed", "anchor_vector"):
            np.testing.assert_array_equal(found[name].values, one.dataset[name].values, err_msg=name)
        for name in ("gap_mean", "noise_floor", "coverage", "metric_layer", "expert_fingerprint", "anchor_acceptance"):
            assert found.attrs[name] == one.dataset.attrs[name], name
        assert line.at(i).top(3) == one.top(3)
        assert found.attrs["expert"] == str(tmp_path / f"checkpoint-{i + 1}")


def test_what_the_last_screen_chose_is_replaced_at_every_step(run, tmp_path):
    changes = {"method": "screen+exact", "components": None, "kinds": ("attn", "mlp"), "top": 2, "stratum": 2}
    line = run_history(config(run, tmp_path / "line.nc", 2, 30, 100, **changes))
    exact = line.dataset["exact"].values
    assert (exact == exact[-1]).all()
    assert exact[-1].sum() == 8
    assert (line.dataset["sampled"].values == line.dataset["sampled"].values[-1]).all()
    assert np.isfinite(line.dataset["screen"].values).all()  # of each step its own
    assert not np.allclose(line.dataset["screen"].values[0], line.dataset["screen"].values[-1])
    effects, kinds = np.abs(line.dataset["effect"].values), line.dataset["kind"].values
    sampled, n = line.dataset["sampled"].values[-1], 0.0
    for kind in ("attn", "mlp"):
        chosen = exact[-1] & ~sampled & (kinds == kind)
        hits = effects[:, sampled & (kinds == kind)].max(0) >= effects[-1, chosen].mean()  # the median of two
        n += hits.mean() * 6  # of each kind 8, and 2 are chosen
    assert line.missed.mean == pytest.approx(n)
    # Where a component was not replaced, as at a stage whose screen did not choose it, its estimate is what is known.
    other = line.dataset.copy(deep=True)
    c = int(np.flatnonzero(exact[-1])[0])
    other["effect"].values[0, c] = np.nan
    course = next(course for course in History(other).courses(99) if course.name == str(other["name"].values[c]))
    assert np.isnan(course.effects[0])
    assert course.known.tolist() == [other["screen"].values[0, c], *other["effect"].values[1:, c]]
    assert "A screen of the last checkpoint chose which were replaced" in dict(line.points)["Ruler"]


def test_an_interrupted_history_goes_on_at_its_step(history, run, tmp_path):
    out, reports = tmp_path / "line.nc", []

    def stop(what, done, total):
        if what == "step 10: exact patches" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_history(config(run, out), stop)
    assert [path.name for path in tmp_path.iterdir()] == [parts_folder(out).name]
    again = run_history(config(run, out, resume=True), lambda what, done, total: reports.append(what))
    xr.testing.assert_identical(without_times(again.dataset), without_times(history.dataset))
    swept = {what.split(": ")[0] for what in reports if ": " in what}
    assert swept == {"step 10", "step 30"}  # steps 100 and 2 were finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["line.nc", "line.png"]
    xr.testing.assert_identical(History.from_netcdf(out).dataset, again.dataset)
    assert repr(wp.open_result(out)).startswith("History of tiny:title over 4 checkpoints: 2 ")


def test_of_stages_each_carries_what_it_added(run, tmp_path, ruler):
    """Each is swept over the one before it; the shares of all of them add up to the whole."""
    stages = run_history(config(run, tmp_path / "stages.nc", 2, 10, 100, stages=True))
    assert stages.labels == ["checkpoint-2", "checkpoint-10", "checkpoint-100"]
    data = stages.dataset
    assert data["base"].values.tolist() == ["tiny:base", *data["expert"].values.tolist()[:2]]
    assert stages.share.sum() == pytest.approx(1, abs=1e-6)
    values = dict(zip(data["name"].values, data["effect"].values.T, strict=True))
    changed = {FIRST: [True, False, False], SECOND: [False, True, False], THIRD: [False, False, True]}
    for name, when in changed.items():
        assert (np.abs(values[name]) > 1e-6).tolist() == when, name
    batch, metric = ruler
    pair = load_pair(run / "checkpoint-10", run / "checkpoint-100")
    alone = sweep(pair, batch, metric, components=NAMES, method="exact")
    np.testing.assert_array_equal(stages.at(2).dataset["delta"], alone.dataset["delta"])
    assert [heading for heading, _ in stages.points] == [*stages.labels, "Ruler"]
    assert len(make_history(stages).axes) == 3


def adapter(folder: Path, scale: float) -> Path:
    """A PEFT adapter of the embedded base: random factors over the queries of two layers."""
    cfg, rng, tensors = load_model("tiny:base").cfg, np.random.default_rng(0), {}
    for layer in (1, 3):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{module}.lora_A.weight"] = rng.standard_normal((2, cfg.d_model), np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.standard_normal((cfg.n_heads * cfg.d_head, 2), np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": scale,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1, 3],
        "base_model_name_or_path": "b",
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def test_checkpoints_of_an_adapter(tmp_path):
    """Alone or with their model before them; each is the sweep of that pair."""
    folders = [adapter(tmp_path / f"checkpoint-{step}", step / 100) for step in (10, 40)]
    experts = str(folders[0]), f"tiny:base+{folders[1]}"
    arguments = {"components": ("L1.head.0", "L3.head.1"), "method": "exact", "metric": "kl", "causal": "skip"}
    arguments["max_new_tokens"] = 4
    out = tmp_path / "line.nc"
    line = run_history(
        SweepConfig("tiny:base", experts[1], "tiny:title", out, more_experts=experts[:1], n_prompts=4, **arguments)
    )
    assert line.dataset["expert"].values.tolist() == [*experts]
    pair, last = load_pair("tiny:base", folders[0]), load_pair("tiny:base", folders[1])
    batch = behaviour("tiny:title").encode(pair.tokenizer, n_prompts=4)
    metric = wp.kl_metric(last, batch, 4)
    alone = sweep(
        pair, batch, metric, components=arguments["components"], method="exact", gap=line.dataset["gap"].values
    )
    np.testing.assert_allclose(line.at(0).dataset["delta"], alone.dataset["delta"], atol=1e-6)
    # As stages, the first of them is, over the base, the base of the second.
    config = SweepConfig(
        "tiny:base", experts[0], "tiny:title", tmp_path / "s.nc", more_experts=experts[1:], n_prompts=4
    )
    stages = run_history(dataclasses.replace(config, stages=True, **arguments))
    assert stages.dataset["base"].values.tolist() == ["tiny:base", f"tiny:base+{folders[0]}"]
    assert stages.share.tolist() == pytest.approx([line.share[0], 1 - line.share[0]], abs=1e-5)


def test_the_step_stands_in_the_state_of_the_trainer_or_in_the_name(tmp_path):
    """`Trainer` writes global_step; else the number counts as a number, not as text."""
    for name, state in (("a-7", {"global_step": 3}), ("b", {"global_step": 20}), ("checkpoint-100", None)):
        (tmp_path / name).mkdir()
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "checkpoint-1000").mkdir()
    line = in_order(expanded([str(tmp_path / "c*"), str(tmp_path / "b"), str(tmp_path / "a-7")]))
    assert [(step, Path(source).name) for step, source in line] == [
        (3, "a-7"), (20, "b"), (100, "checkpoint-100"), (1000, "checkpoint-1000")
    ]  # fmt: skip
    assert [step_of(name) for name in ("org/m@step512", "step-7-merged", "m/iter_0003.gguf", "base+run/ckpt_9")] == [
        512, 7, 3, 9,
    ]  # fmt: skip
    named = in_order(["run/epoch-3", "run/epoch-1", "./run/epoch-20"])  # equal but for it
    assert [step for step, _ in named] == [1, 3, 20]
    both = ("epoch-1-step-500", "checkpoint-2-step-7", "step-7-checkpoint-2", "org/m@stage1-step30-tokens5B", "run/12")
    assert [step_of(name) for name in both] == [500, 7, 7, 30, 12]
    for state in ("{}", "[", '{"global_step": "x"}', '{"global_step": -1}', '{"global_step": true}'):
        (tmp_path / "b" / "trainer_state.json").write_text(state)
        with pytest.raises(CheckpointError, match=r"trainer_state\.json"):
            step_of(str(tmp_path / "b"))


@pytest.mark.parametrize(
    "names",
    [
        ("org/sft-v1", "org/dpo-v2", "org/llama-2"),
        ("checkpoint-1e4", "checkpoint-1e5"),
        ("lr-1e-4", "lr-1e-5"),
        ("m-1.4", "m-1.5"),
        ("checkpoint-1", "writer-2"),
    ],
)
def test_a_version_is_no_step(names):
    with pytest.raises(CheckpointError, match=r"its name says no step; .* or pass --stages"):
        in_order(names)


@pytest.mark.parametrize("name", ["~nosuchuser/checkpoint-1", "checkpoint-1" * 500])
def test_a_name_that_no_file_can_have_is_one_line(name):
    with pytest.raises(CheckpointError, match="cannot be the name of a checkpoint") as caught:
        in_order(["checkpoint-2", name])
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


def test_an_option_takes_several_experts(tmp_path, wpjax, monkeypatch):
    """The shell's expansion, the option repeated, a pattern, a list in a file: one and the same."""
    seen = []
    monkeypatch.setattr("wpjax.cli.sweep.run_history_and_print", lambda config, *_: seen.append(config))
    for name in ("c-1", "c-2", "c-10"):
        (tmp_path / name).mkdir()
    rest = ("--behaviour", "tiny:title", "--out", "r.nc")
    (tmp_path / "w.yaml").write_text("base: b\nbehaviour: tiny:title\nexpert: [c-1, c-10, c-2]")
    assert wpjax("sweep", "--base", "b", "--expert", "c-1", "c-10", "c-2", *rest)[0] == 0
    assert wpjax("sweep", "--base", "b", "--expert", "c-1", "--expert", "c-10", "--expert", "c-2", *rest)[0] == 0
    assert wpjax("sweep", "--config", "w.yaml", "--out", "r.nc")[0] == 0
    assert wpjax("sweep", "--base", "b", "--expert", "c-*", *rest)[0] == 0
    assert [c.experts for c in seen] == [("c-1", "c-10", "c-2")] * 4
    assert (
        seen[0] == seen[1] == seen[2] == read_config(Path("w.yaml"), out=Path("r.nc")) == as_read(as_written(seen[0]))
    )
    assert as_command(seen[0]) == (
        "wpjax sweep --base b --expert c-1 --expert c-10 --expert c-2 --behaviour tiny:title"
    )
    assert wpjax("sweep", "--config", "w.yaml", "--expert", "c-2", "--expert", "c-1", "--out", "r.nc")[0] == 0
    assert seen[-1].experts == ("c-2", "c-1")  # the command line wins
    code, _, error = wpjax("sweep", "--base", "b", "--expert", "c-1", "c-2", "--expert", "c-10", *rest)
    assert code == 2
    assert "--expert is repeated, and 'c-2' stands without it" in error


@pytest.fixture(scope="module")
def odd(run, tmp_path_factory) -> Path:
    """Folders that are wrong in a line of checkpoints."""
    folder = tmp_path_factory.mktemp("odd")
    for name in ("checkpoint-1", "checkpoint-2", "other-step-9", "same-3"):
        shutil.copytree(run / "checkpoint-100", folder / name)
    content = json.loads((folder / "other-step-9" / "config.json").read_text())
    (folder / "other-step-9" / "config.json").write_text(json.dumps(content | {"rms_norm_eps": 0.5}))
    shutil.copytree(run / "checkpoint-2", folder / "final")
    model = load_model("tiny:base")
    few = model.cfg.d_vocab - 8
    embed = {name: leaf[:few] for name, leaf in model.params["embed"].items()}
    small = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, d_vocab=few))
    small = dataclasses.replace(
        small, params=model.params | {"embed": embed}, hf_config={**model.hf_config, "vocab_size": few}
    )
    save_checkpoint(folder / "small", small)
    (folder / "empty-step-4").mkdir()
    save_checkpoint(folder / "base-step-5", load_model("tiny:base"))
    (folder / "link-6").symlink_to(folder / "checkpoint-1")
    adapter(folder / "adapter-7", 1.0)
    (folder / "trainer-8").mkdir()
    return folder


BAD = {
    "nothing": (["nothing-*"], [], "nothing-*: matches nothing here"),
    "one": (["same-*"], [], "same-* matches one checkpoint only"),
    "twice": (["checkpoint-1", "checkpoint-1"], [], "checkpoint-1 stands twice"),
    "twice by a link": (["checkpoint-1", "link-6"], [], "which are one folder"),
    "no step": (["checkpoint-1", "final"], [], "final: no checkpoint of a line"),
    "one step": (["checkpoint-1", "run/checkpoint-1"], [], "both of step 1"),
    "no checkpoint": (["checkpoint-1", "empty-step-4"], [], "empty-step-4: no config.json"),
    "architecture": (["checkpoint-1", "other-step-9"], [], "not of one training: norm_eps"),
    "base": (["checkpoint-1", "tiny:base"], ["--stages"], "tiny:base is the base"),
    "weights of the base": (["checkpoint-1", "base-step-5"], [], "or leave base-step-5 out"),
    "vocabulary": (["checkpoint-1", "checkpoint-2"], ["--stages", "--base", "small"], "rows in small and"),
    "stage over itself": (["checkpoint-1", "checkpoint-2"], ["--stages"], "have equal weights"),
    "adapter as a stage": (["checkpoint-1", "adapter-7"], ["--stages"], "name both, checkpoint-1+adapter-7"),
    "one stage": (["checkpoint-1"], ["--stages"], "stages are two or more"),
    "part": (["checkpoint-1", "checkpoint-2"], ["--part", "1/2", "--shards", "d"], "--part is for one expert"),
    "given": (["checkpoint-1", "checkpoint-2"], ["--given-anchor", "a"], "--given-anchor is for one expert"),
    "profile": (["checkpoint-1", "checkpoint-2"], ["--profile", "p"], "--profile is for one expert"),
    "directions": (["checkpoint-1", "checkpoint-2"], ["--kinds", "delta_direction"], "is for one expert, as each"),
    "race": (["checkpoint-1", "checkpoint-2"], ["--method", "race"], "--method race finds other components"),
    "own words": (["checkpoint-1", "checkpoint-2"], ["--metric", "on_policy"], "reads each model along its own words"),
    "figure": (["checkpoint-1", "checkpoint-2"], ["--out", "r.png"], "the figure goes there"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_one_line_before_the_work(odd, wpjax, monkeypatch, case):
    experts, options, message = BAD[case]
    monkeypatch.chdir(odd)
    (odd / "run").mkdir(exist_ok=True)
    (odd / "run" / "checkpoint-1").mkdir(exist_ok=True)
    code, printed, error = wpjax(
        "sweep", "--base", "tiny:base", "--expert", *experts, "--behaviour", "tiny:title", "--out", "r.nc", *options
    )
    assert (code, printed) == (2, ""), error
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not Path("r.nc").exists()


def test_a_history_is_printed_and_drawn(history, tmp_path, wpjax):
    history.to_netcdf(tmp_path / "line.nc")
    code, printed, _ = wpjax("show", "line.nc")
    assert code == 0
    text = " ".join(printed.split())
    assert "From step 2 on, every checkpoint surely has some of the behaviour, each by its own interval: " in text
    assert f"Half of it is there at step 30: {history.share[2]:.0%} [" in text
    assert f"First Half of their largest effect is there at step 2: {FIRST} (+" in text
    assert f"Then at step 10: {SECOND} (+" in text
    assert f"Last at step 100: {FOURTH} (+" in text
    assert f"{SECOND} 0.0% +" in text  # the row of the table
    assert wpjax("show", "line.nc", "--words")[1] == history.summary + "\n"
    found = json.loads(wpjax("show", "line.nc", "--json", "--top", "2")[1])
    assert [step["step"] for step in found["steps"]] == [*PLANTED]
    assert found["steps"][-1]["share"] == 1
    assert len(found["top"]) == 2
    course = history.courses(1)[0]
    assert found["top"][0]["name"] == course.name
    assert found["top"][0]["effects"] == course.effects.tolist()
    rows = wpjax("show", "line.nc", "--csv", "--kinds", "mlp")[1].splitlines()
    assert len(rows) == 1 + 3 * len(PLANTED)
    assert rows[0].startswith("name,layer,index,kind,step,label,")
    code, _, error = wpjax("show", "line.nc", "--by", "effect")
    assert (code, "--by is for the result of one sweep" in error) == (2, True)
    code, _, error = wpjax("show", "line.nc", "--kinds", "neuron")
    assert (code, "kind 'neuron' was not swept" in error) == (2, True)
    code, printed, _ = wpjax("report", "line.nc", "--out", "line.html")
    assert code == 0
    assert printed == "wrote line.html, line-history.png: open the first in a browser\n"
    page = (tmp_path / "line.html").read_text()
    assert page.count('src="data:image/png;base64,') == 1
    assert FIRST in page
    code, _, error = wpjax("validate", "line.nc")
    assert (code, "holds history, not sweep" in error) == (2, True)


def test_when_is_said_by_all_later_steps(history):
    """Chance may lift one early step above 0; and what is sure may be less than half, or come after it."""

    def when(share, low) -> str:
        return dict(History(history.dataset.assign(share=("step", share), share_low=("step", low))).points)["When"]

    assert when([0.1, 0.2, 0.6, 1.0], [0.05, -0.1, 0.4, 1.0]).startswith("From step 30 on, every checkpoint surely")
    assert when([0.1, 0.2, 0.6, 1.0], [0.05, -0.1, 0.4, 1.0]).endswith("That is half of it or more.")
    early = when([0.6, 0.2, 0.3, 1.0], [-0.1, -0.1, 0.1, 1.0])
    assert early.startswith("From step 30 on")
    assert " Half of it is there at step 2 already: 60% [-10%, " in early
    assert "half of it or more" not in early


def test_a_method_without_tests_says_so(history):
    """As with random masks: no q-value is finite, and sets were replaced, not nothing."""
    data = history.dataset
    nothing = {name: data[name] * np.nan for name in ("effect", "p_value", "q_value")}
    for stages in (0, 1):
        found = History(data.assign(banzhaf=data["effect"], **nothing).assign_attrs(stages=stages))
        assert "his method makes no tests" in found.summary
        assert "q < .05" not in found.summary
        assert "nothing was replaced" not in found.summary
        assert "ranked by banzhaf: none was replaced alone" in found.summary
    estimates = History(data.assign(screen=data["effect"], **nothing))
    assert "They are estimates: nothing was replaced." in estimates.summary


def test_a_checkpoint_that_changes_meanwhile_is_refused(run, tmp_path):
    for step in (2, 100):
        shutil.copytree(run / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")

    def rewrite(what, done, total):
        if what == "reading the checkpoints" and done == total:
            shutil.copytree(run / "checkpoint-30", tmp_path / "checkpoint-2", dirs_exist_ok=True)

    with pytest.raises(CheckpointError, match="checkpoint-2: changed while it was swept"):
        run_history(config(tmp_path, tmp_path / "line.nc", 2, 100), rewrite)
    assert not (tmp_path / "line.nc").exists()


def test_names_on_the_page_are_escaped(history, tmp_path):
    named = history.dataset.assign_coords(expert=("step", np.array(["<b>x</b>"] * len(history), object)))
    write_history_report(History(named), tmp_path / "p.html")
    assert "<b>x</b>" not in (tmp_path / "p.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.drop_vars("share"), "share"),
        (lambda d: d.drop_vars("expert"), "expert"),
        (lambda d: d.assign(effect=d["effect"].transpose("component", "step")), "effect"),
        (lambda d: d.assign_attrs(n_layers=1), "layer"),
        (lambda d: d.assign_attrs(stages="no"), "stages"),
        (lambda d: d.assign(share=d["share"] * np.nan), "share"),
    ],
)
def test_a_damaged_file_is_refused(history, tmp_path, change, message):
    History(change(history.dataset)).to_netcdf(tmp_path / "line.nc")
    with pytest.raises(WpjaxError, match=f"lacks a usable .*{message}"):
        History.from_netcdf(tmp_path / "line.nc")


def test_a_sweep_is_no_history(history, tmp_path):
    history.at(0).to_netcdf(tmp_path / "one.nc")
    assert wp.SweepResult.from_netcdf(tmp_path / "one.nc").top(1)[0].name == history.at(0).top(1)[0].name
    with pytest.raises(OtherResult, match="holds sweep, not history"):
        History.from_netcdf(tmp_path / "one.nc")
