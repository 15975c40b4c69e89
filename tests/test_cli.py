"""The command line as a user meets it: what it prints, what it leaves behind, and how it refuses."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
import xarray as xr
from safetensors.numpy import load_file, save_file

from wpjax import cli
from wpjax.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from wpjax.checkpoints.convert import hf_tensors
from wpjax.cli.compiled import keep_programs
from wpjax.metrics.anchor import Anchor
from wpjax.pairs import load_model
from wpjax.results.sweep_result import SweepResult

PAIR = ["--base", "tiny:base", "--expert", "tiny:expert", "--behaviour", "tiny:title"]
UNTESTED = [*PAIR, "--causal", "skip"]
CAPITAL = [*PAIR[:-1], "tiny:english_capital", "--causal", "skip"]
SMALL = [*UNTESTED, "--kinds", "head", "--method", "exact", "--n-prompts", "4"]


def assert_refused(result, says, folder, left=()):
    """One line on the error stream, exit code 2, and nothing new in the folder."""
    code, _, err = result
    lines = [line for line in err.splitlines() if not line.startswith(("[", "note: "))]  # progress
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert re.search(says, lines[0]), lines[0]
    assert sorted(p.name for p in folder.iterdir()) == sorted(left)


def test_sweep_report_and_anchor(wpjax, tmp_path):
    code, out, _ = wpjax("anchor", *UNTESTED, "--out", "a.safetensors", "--n-prompts", "8")
    assert code == 0
    assert "layers that pass: " in out
    anchor = Anchor.load(tmp_path / "a.safetensors")
    assert np.linalg.norm(anchor.vector) == pytest.approx(1, abs=1e-6)
    code, out, err = wpjax("sweep", *SMALL, "--anchor", "a.safetensors", "--out", "r.nc", "--show", "3")
    assert code == 0
    assert err.count("note: ") == err.count("note: With 4 queries no p is below 0.12") == 1
    assert len(re.findall(r"^ L\d\.head\.\d ", out, re.MULTILINE)) == 3
    assert "wpjax validate r.nc" in out
    words = wpjax("show", "r.nc", "--words")[1]
    assert all(heading in words for heading in ("What it does", "Where", "How concentrated", "wpjax validate r.nc"))
    assert "On 4 prompts that ask for it and served nothing else, the base shows it on 0" in " ".join(words.split())
    assert not re.search(r"^ L\d\.head\.\d ", words, re.MULTILINE)
    result = SweepResult.from_netcdf("r.nc")
    assert result.dataset.attrs["metric_layer"] == anchor.layer
    assert int(result.dataset["swept"].sum()) == 8 * (anchor.layer + 1)
    assert result.dataset.sizes == {
        "component": 8 * 8, "prompt": 4, "swept_kind": 1, "model_layer": 8, "d_model": 128,
        "target": 1 + 9 * (anchor.layer + 1), "answerer": 3, "shown": 4,
    }  # fmt: skip
    code, out, _ = wpjax("report", "r.nc", "--out", "r.html")
    assert code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["a.safetensors", "r.nc", "r.html"]
        + [f"r-{f}.png" for f in ("overview", "top", "heads", "depth", "flow", "hierarchy", "coverage", "anchor")]
    )
    page = (tmp_path / "r.html").read_text()
    assert result.top(1)[0].name in page
    assert not re.search(r"(src|href)=[\"']?(http|//)|@import|url\(http", page)


def test_curves_of_a_sweep_and_what_executes_it(wpjax, tmp_path):
    """The sweep's ranking validated; what follows the anchor swept from its state, and joined to the report."""
    quick = ["--max-new-tokens", "12", "--n-prompts", "4"]
    assert wpjax("anchor", *UNTESTED, "--layer", "5", "--out", "a.safetensors", "--n-prompts", "8")[0] == 0
    assert (
        wpjax("sweep", *SMALL, "--anchor", "a.safetensors", "--components", "L2.head.0,L3.head.1", "--out", "r.nc")[0]
        == 0
    )
    given = ["--metric", "kl", "--given-anchor", "a.safetensors", "--components", "L6.head.0,L7.mlp"]
    assert wpjax("sweep", *PAIR, *quick, *given, "--method", "exact", "--out", "e.nc")[0] == 0
    assert wpjax("report", "r.nc", "--execution", "e.nc", "--out", "r.html")[0] == 0
    curves = ["validate", "r.nc", *PAIR, *quick, "--points", "2", "--n-random", "1", "--out", "c.nc"]
    code, out, _ = wpjax(*curves)
    assert code == 0
    assert re.search(r"Brought into the base.*effect.*attribution.*delta_norm.*random 1", out, re.DOTALL)
    (page,) = re.findall(r"^Next\n  wpjax (.*)$", out, re.MULTILINE)
    assert wpjax(*shlex.split(page))[0] == 0
    assert "Answers of the validation" in (tmp_path / "c.html").read_text()
    assert {"c.nc", "c-curves.png", "c-calibration.png"} <= {p.name for p in tmp_path.iterdir()}
    assert "the anchor's causal tests: not tested" in out
    assert SweepResult.from_netcdf("e.nc").dataset.attrs["anchor_acceptance"] == "not tested"
    assert SweepResult.from_netcdf("e.nc").dataset.attrs["behaviour_differs"] == "by the checker"
    left = [p.name for p in tmp_path.iterdir()]
    absent = ["sweep", "--base", "tiny:base", "--expert", "tiny:planted", "--behaviour", "tiny:title", *quick]
    assert_refused(wpjax(*absent, "--metric", "kl", "--out", "x.nc"), "no behaviour to find", tmp_path, left)
    SweepResult(SweepResult.from_netcdf("e.nc").dataset.drop_dims("target")).to_netcdf("n.nc")
    left = [p.name for p in tmp_path.iterdir()]
    flowless = ["report", "n.nc", "--execution", "e.nc", "--out", "x.html"]
    assert_refused(wpjax(*flowless), "holds no flow: sweep with a method", tmp_path, left)
    assert_refused(wpjax(*curves), r"c\.nc exists", tmp_path, left)
    assert_refused(
        wpjax("report", "c.nc", "--out", "x.html"), "a page is of a sweep: wpjax report SWEEP.nc c", tmp_path, left
    )
    assert_refused(wpjax("validate", "e.nc", *curves[2:-1], "f.nc", "--by", "ig"), "no ranking 'ig'", tmp_path, left)
    other = ["--base", "tiny:base", "--expert", "tiny:planted", "--behaviour", "tiny:title"]
    assert_refused(wpjax("validate", "r.nc", *other, "--out", "f.nc"), "the result is of the pair", tmp_path, left)
    early = ["sweep", *PAIR, *quick, *given[:4], "--components", "L5.head.0", "--out", "f.nc"]
    assert_refused(wpjax(*early), "L5.head.0: not after layer 5", tmp_path, left)
    alone = ["sweep", *PAIR, "--given-anchor", "a.safetensors", "--out", "f.nc"]
    assert_refused(wpjax(*alone), "--given-anchor needs --metric", tmp_path, left)
    known = ["sweep", *PAIR, "--anchor", "a.safetensors", "--response-tokens", "4", "--out", "f.nc"]
    assert_refused(wpjax(*known), "--response-tokens is for an anchor that is fitted here", tmp_path, left)


def test_the_anchor_along_the_model_s_own_words(wpjax, tmp_path):
    """On one behaviour the expert stands above the base by it, on another below."""
    assert wpjax("anchor", *CAPITAL, "--layer", "4", "--out", "a.safetensors", "--n-prompts", "16")[0] == 0
    on_policy = [
        "--metric",
        "on_policy",
        "--max-new-tokens",
        "24",
        "--n-prompts",
        "16",
        "--components",
        "L2.head.0,L7.mlp",
    ]
    left = ["a.safetensors"]
    masks = ["sweep", *CAPITAL, *on_policy, "--method", "masks", "--out", "x.nc"]
    assert_refused(wpjax(*masks), "masks needs fixed words", tmp_path, left)
    assert_refused(wpjax("sweep", *UNTESTED, *on_policy, "--out", "x.nc"), "not positive", tmp_path, left)
    anchored = ["sweep", *CAPITAL, *on_policy, "--method", "exact", "--anchor", "a.safetensors", "--out", "o.nc"]
    assert wpjax(*anchored)[0] == 0
    data = SweepResult.from_netcdf("o.nc").dataset
    assert (data.attrs["metric"], data.attrs["metric_layer"], data["target"].values[-1]) == ("on_policy", 4, "rest")
    assert data.attrs["behaviour_differs"] == "not tested"
    assert wpjax("report", "o.nc", "--out", "o.html")[0] == 0
    assert "averaged over the tokens of each model's own answer" in (tmp_path / "o.html").read_text()


def test_compiled_programs_are_kept_where_the_user_says(tmp_path, monkeypatch):
    for name in ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_COMPILATION_CACHE_MAX_SIZE"):
        monkeypatch.setenv(name, "1")  # left as they are
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    keep_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    keep_programs()
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).is_relative_to(tmp_path / "wpjax" / "compiled")
    assert os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == "1"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way")
    keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_an_anchor_that_fails_its_causal_tests(wpjax, tmp_path):
    quick = ["--layer", "3", "--n-steered", "12", "--max-new-tokens", "12", "--out", "a.safetensors"]
    models = ["--base", "tiny:base", "--expert", "tiny:expert", "--behaviour", "tiny:no_comma"]
    code, out, err = wpjax("anchor", *models, *quick)
    assert code == 0  # twelve prompts cannot reject it: it is taken, and says so
    assert re.search(r"\* 3 +\d+%", out)
    assert re.search(r"layer 3: undecided: .*\d+ (queries )?were tried", out)
    assert "steering tests: done" in err
    assert re.search(r"the plan.*anchor  .*tests of the anchor  .*tests of the anchor done in", err, re.DOTALL)
    fooled = [*models[:-1], "tiny:quotation", "--layer", "4", "--n-steered", "12", "--out", "b.safetensors"]
    code, out, err = wpjax("anchor", *fooled)
    assert (code, out) == (2, "")
    assert re.search(r"none passes the causal tests; .*--causal report.*is in b.safetensors.rejected.json", err)
    layers = json.loads((tmp_path / "b.safetensors.rejected.json").read_text())
    assert layers[4]["verdict"].startswith("rejected: steered answers are degenerate")
    assert not (tmp_path / "b.safetensors").exists()


def test_the_decision_metric_counts_what_comes_after_the_anchor(wpjax, tmp_path):
    small = [*UNTESTED, "--metric", "decision", "--n-prompts", "4", "--max-new-tokens", "8", "--show", "3"]
    assert wpjax("sweep", *small, "--kinds", "mlp,final_norm", "--method", "exact", "--out", "r.nc")[0] == 0
    result = SweepResult.from_netcdf("r.nc").dataset
    assert result.attrs["metric"] == "decision"
    assert result["name"].values.tolist() == [*(f"L{i}.mlp" for i in range(8)), "final_norm"]
    assert wpjax("report", "r.nc", "--out", "r.html")[0] == 0
    assert "on the decision metric, in nats" in (tmp_path / "r.html").read_text()


def test_json(wpjax):
    code, out, _ = wpjax("sweep", *SMALL, "--out", "r.nc", "--json", "--profile", "profile")
    assert code == 0
    (trace,) = Path("profile").rglob("*.xplane.pb")
    for scope in (b"suffix", b"head rows"):  # parts of the program stand in it by name
        assert scope in trace.read_bytes()
    assert np.isfinite(SweepResult.from_netcdf("r.nc").values("set_score")).all()
    assert set(json.loads(out)) == {"ranked_by", "top", "coverage", "verdict", "answers", "anchor_acceptance"}
    code, out, _ = wpjax("sweep", *UNTESTED, "--kinds", "head", "--method", "screen", "--out", "s.nc", "--json")
    assert code == 0
    top = json.loads(out, parse_constant=pytest.fail)["top"]  # NaN is no JSON
    assert top[0]["value"] > top[1]["value"] > 0
    assert top[0]["effect"] is None
    code, out, _ = wpjax("inspect", "tiny:base", "tiny:planted", "--json")
    summary = json.loads(out)
    assert summary["components"]["neuron"] == 8 * 320
    assert {row["unit"] for row in summary["difference"] if row["n_changed"]} == {"head", "kv_group", "neuron"}


def test_inspect_prints_tables(wpjax):
    code, out, _ = wpjax("inspect", "tiny:base", "tiny:expert")
    assert code == 0
    assert re.search(r"kv_group\s+32", out)
    assert "a pair" in out


COMMANDS = ["demo", "inspect", "anchor", "sweep", "collect", "show", "report", "validate", "relax", "extract"]
COMMANDS += ["interference", "circuit", "trace", "edit", "layers", "compare", "export", "apply", "remove", "encode"]
COMMANDS += ["scores", "merge", "finetune"]


def test_help_of_every_command(wpjax, monkeypatch):
    """It has an example, `-h` shows it too, and on 80 columns no name of an option is cut."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = wpjax("--help")
    assert code == 0
    assert re.findall(r"^│ (\w+)  ", out, re.MULTILINE) == COMMANDS
    assert "--install-completion" in out
    code, bare, err = wpjax()
    assert (code, bare.rstrip(), err) == (2, out.rstrip(), "")
    for name, command in typer.main.get_command(cli.make_app()).commands.items():
        code, out, _ = wpjax(name, "--help")
        assert (code, wpjax(name, "-h")[1]) == (0, out)
        assert f"Example: wpjax {name}" in " ".join(out.split())
        for option in (text for param in command.params for text in (*param.opts, *param.secondary_opts)):
            assert not option.startswith("--") or re.search(rf"{option}[ ,│]", out), option
    assert re.findall(r"^╭─ (.*?) ─+╮", wpjax("sweep", "-h")[1], re.MULTILINE) == [
        "Options", "Models and prompts", "What is measured", "What is patched", "Output", "Running",
        "Several processes",
    ]  # fmt: skip


def test_a_shell_completes_commands(wpjax, monkeypatch):
    for name, value in (("_WPJAX_COMPLETE", "complete_bash"), ("COMP_WORDS", "wpjax s"), ("COMP_CWORD", "1")):
        monkeypatch.setenv(name, value)
    assert wpjax()[1].split() == ["sweep", "show", "scores"]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A copy of the embedded base whose weights are cut short."""
    source = tmp_path_factory.mktemp("models") / "cut"
    from importlib import resources

    with resources.as_file(resources.files("wpjax") / "assets" / "tiny" / "base") as folder:
        shutil.copytree(folder, source)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    return source


def test_bad_models(wpjax, tmp_path, damaged):
    refused = ["--expert", "tiny:expert", "--behaviour", "tiny:title", "--out", "r.nc"]
    assert_refused(wpjax("sweep", "--base", "nowhere", *refused), "nowhere: no such folder", tmp_path)
    assert_refused(wpjax("sweep", "--base", str(damaged), *refused), "damaged or truncated", tmp_path)
    assert_refused(wpjax("sweep", "--base", "tiny:expert", *refused), "equal weights", tmp_path)
    assert_refused(wpjax("inspect", "tiny:nothing"), "there are tiny:base", tmp_path)


def test_bad_names(wpjax, tmp_path):
    assert_refused(wpjax("sweep", *SMALL, "--kinds", "heads", "--out", "r.nc"), "did you mean head", tmp_path)
    assert_refused(wpjax("sweep", *SMALL, "--components", "L0.head.99", "--out", "r.nc"), "has head 0 to 7", tmp_path)
    assert_refused(
        wpjax("sweep", *SMALL, "--components", "L7.head.0", "--out", "r.nc"),
        "after layer 6, which the anchor",
        tmp_path,
    )
    assert_refused(wpjax("sweep", *SMALL, "--kinds", "unembed", "--out", "r.nc"), "nothing to sweep", tmp_path)
    assert_refused(wpjax("sweep", *PAIR[:-1], "shouting", "--out", "r.nc"), "unknown behaviour 'shouting'", tmp_path)
    assert_refused(wpjax("sweep", *SMALL, "--method", "best", "--out", "r.nc"), "'best' is not one of", tmp_path)
    assert_refused(wpjax("sweep", *SMALL, "--nprompts", "4", "--out", "r.nc"), "No such option", tmp_path)
    assert_refused(wpjax("swep"), "No such command", tmp_path)
    for option, value in (("--seed", "-1"), ("--memory-mb", "inf"), ("--components", f"L{'9' * 5000}.mlp")):
        says = "not a component name" if option == "--components" else f"Invalid value for '{option}'"
        assert_refused(wpjax("sweep", *SMALL, option, value, "--out", "r.nc"), says, tmp_path)
    for option, value in (("--lr", "nan"), ("--lr", "-1"), ("--weight-decay", "inf")):
        arguments = ["finetune", *PAIR[:2], *PAIR[4:], "--out", "x", option, value]
        assert_refused(wpjax(*arguments), f"Invalid value for '{option}'", tmp_path)
    assert_refused(wpjax("anchor", *UNTESTED, "--layer", "8", "--out", "a"), "layers 0 to 7", tmp_path)


def test_bad_files(wpjax, tmp_path):
    lines = tmp_path / "one.jsonl"
    lines.write_text('{"with": "a b", "without": "a"}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    left = ["one.jsonl", "empty.jsonl"]
    models = ["--base", "tiny:base", "--expert", "tiny:expert", "--out", "r.nc"]
    assert_refused(
        wpjax("sweep", *models, "--behaviour", "one.jsonl"), "1 different query, at least 12", tmp_path, left
    )
    assert_refused(wpjax("sweep", *models, "--behaviour", "empty.jsonl"), "0 different queries", tmp_path, left)
    assert_refused(wpjax("sweep", *models, "--behaviour", "no.jsonl"), "cannot be read", tmp_path, left)
    (tmp_path / "long.jsonl").write_text(
        "\n".join(json.dumps({"with": f"{i} " * 200, "without": str(i)}) for i in range(12))
    )
    left.append("long.jsonl")
    assert_refused(wpjax("sweep", *models, "--behaviour", "long.jsonl"), "the model takes 192; shorten", tmp_path, left)
    assert_refused(wpjax("report", "one.jsonl"), "not a readable result file", tmp_path, left)
    assert_refused(wpjax("report", "none.nc"), "not a readable result file", tmp_path, left)
    xr.Dataset({"x": 1}).to_netcdf("other.nc", engine="h5netcdf")
    left.append("other.nc")
    assert_refused(wpjax("report", "other.nc"), "schema None", tmp_path, left)
    anchor = ["--anchor", "one.jsonl"]
    assert_refused(wpjax("sweep", *SMALL, *anchor, "--out", "r.nc"), "not an anchor file", tmp_path, left)


def test_bad_outputs_are_refused_before_any_work(wpjax, tmp_path):
    (tmp_path / "r.nc").write_text("mine")
    assert_refused(wpjax("sweep", *SMALL, "--out", "r.nc"), "r.nc exists; .*--overwrite", tmp_path, ["r.nc"])
    assert_refused(wpjax("sweep", *SMALL, "--out", "no/r.nc"), "does not exist; create it", tmp_path, ["r.nc"])
    assert_refused(wpjax("demo", "--out", "r.nc"), "exists", tmp_path, ["r.nc"])
    assert_refused(wpjax("finetune", *PAIR[:2], *PAIR[4:], "--out", "r.nc"), "exists", tmp_path, ["r.nc"])
    assert (tmp_path / "r.nc").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(wpjax, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_refused(wpjax("sweep", *SMALL, "--out", "locked/r.nc"), "no permission", tmp_path, ["locked"])


def test_a_full_disk_is_one_line(tmp_path):
    """/dev/full answers every write with ENOSPC: the folder of the result is a link to it."""
    from wpjax.errors import OutputError
    from wpjax.runtime.files import atomic_output

    def write():
        with atomic_output(tmp_path / "x") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("data" * 10_000)

    with pytest.raises(OutputError, match="No space left"):
        write()
    assert not list(tmp_path.iterdir())


def test_an_expert_that_does_not_carry_the_behaviour_is_rejected(wpjax, tmp_path):
    """The planted expert learnt capitals only: its anchor for titles has no gap."""
    models = ["--base", "tiny:base", "--expert", "tiny:planted", "--behaviour", "tiny:title", "--out", "r.nc"]
    assert_refused(wpjax("sweep", *models), "anchor for tiny:title rejected: .*gap .* is not positive", tmp_path)


def test_an_anchor_of_another_expert_is_rejected(wpjax, tmp_path):
    assert wpjax("anchor", *UNTESTED, "--out", "a", "--n-prompts", "8")[0] == 0
    models = ["--base", "tiny:base", "--expert", "tiny:planted", "--behaviour", "tiny:english_capital"]
    assert_refused(
        wpjax("sweep", *models, "--anchor", "a", "--out", "r.nc"), "fitted in another expert", tmp_path, ["a"]
    )


def test_finetune_writes_a_folder_that_loads(wpjax, tmp_path):
    arguments = ["--base", "tiny:base", "--behaviour", "tiny:quotation", "--steps", "2", "--eval-prompts", "2"]
    code, out, err = wpjax(
        "finetune", *arguments, "--max-new-tokens", "8", "--out", "q", "--components", "L0.mlp", "--json"
    )
    assert code == 0, err
    assert set(json.loads(out)["pass_rate"]) == {"base", "expert"}
    assert load_checkpoint(str(tmp_path / "q")).cfg == load_model("tiny:base").cfg
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q"]
    assert_refused(
        wpjax("finetune", *arguments, "--components", "L0.mpl", "--out", "p"), "not a component name", tmp_path, ["q"]
    )


def start(folder, *arguments):
    """The command as a process of its own, which hears Ctrl-C even where the tests run in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "wpjax", *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_shards(folder, n):
    deadline = time.monotonic() + 240
    while len(list(folder.glob(".r.nc.sweep/exact-*.npy"))) < n:
        assert time.monotonic() < deadline, "the sweep did not get going"
        time.sleep(0.02)


LONG = [*UNTESTED, "--kinds=head,neuron", "--method=exact", "--n-prompts=4", "--memory-mb=4", "--out=r.nc"]


def test_interrupted_and_killed_sweeps_resume_to_the_same_result(wpjax, tmp_path):
    """Ctrl-C says so and exits 130; kill -9 says nothing; --resume ends with what an uninterrupted run gives."""
    process = start(tmp_path, "sweep", *LONG)
    wait_for_shards(tmp_path, 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert [line for line in err.splitlines() if not line.startswith("[")] == [
        "interrupted; finished parts are kept: go on with --resume"
    ]
    assert not (tmp_path / "r.nc").exists()
    assert_refused(wpjax("sweep", *LONG), "pass --resume, or delete it", tmp_path, [".r.nc.sweep"])
    assert_refused(wpjax("sweep", *LONG, "--resume", "--seed", "1"), "other settings", tmp_path, [".r.nc.sweep"])
    n = len(list(tmp_path.glob(".r.nc.sweep/exact-*.npy")))
    process = start(tmp_path, "sweep", *LONG, "--resume")
    wait_for_shards(tmp_path, n + 3)
    process.kill()
    process.communicate()
    code, _, err = wpjax("sweep", *LONG, "--resume")
    assert code == 0, err
    assert [p.name for p in tmp_path.iterdir()] == ["r.nc"]
    resumed = SweepResult.from_netcdf("r.nc").dataset
    assert wpjax("sweep", *LONG, "--overwrite")[0] == 0
    whole = SweepResult.from_netcdf("r.nc").dataset
    for dataset in (resumed, whole):
        for name in ("date", "wall_time_s"):
            del dataset.attrs[name]
    xr.testing.assert_identical(resumed, whole)


def test_an_error_never_steers_the_terminal(wpjax, tmp_path):
    code, _, err = wpjax("inspect", "no\x1b[31m\x00\n/such")
    assert code == 2
    assert (
        err == "error: no\\x1b[31m\\x00 /such: no such folder or .gguf file, and not a hub id like gpt2 or org/name\n"
    )


@pytest.mark.parametrize("error", [MemoryError("big"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_out_of_memory_is_one_line(wpjax, tmp_path, monkeypatch, error):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr("wpjax.pairs.load_model", load)
    assert_refused(wpjax("inspect", "tiny:base"), "out of memory .* ask for less", tmp_path)


def test_an_adapter_is_swept_as_the_model_that_it_makes(wpjax, tmp_path):
    """The best low-rank part of what the expert changed, once as a PEFT folder and once added to the base's file."""
    base, expert = (load_model(f"tiny:{name}") for name in ("base", "expert"))
    save_checkpoint(tmp_path / "merged", base)
    merged, factors, rank = load_file(tmp_path / "merged" / "model.safetensors"), {}, 16
    for name, trained in hf_tensors(expert.cfg, expert.params):
        if "_proj" in name:
            u, s, v = np.linalg.svd(trained - merged[name])
            a, b = v[:rank].copy(), u[:, :rank] * s[:rank]
            merged[name] = merged[name] + b @ a
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(merged, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(about))
    sweep = ["sweep", "--base", "tiny:base", "--behaviour", "tiny:title", *SMALL[len(PAIR) :], "--answers", "0"]
    found = {}
    for folder in ("adapter", "merged"):
        code, _, err = wpjax(*sweep, "--expert", folder, "--out", f"{folder}.nc")
        assert code == 0, err
        found[folder] = SweepResult.from_netcdf(f"{folder}.nc").dataset
    np.testing.assert_allclose(found["adapter"]["effect"], found["merged"]["effect"], atol=1e-5)
    assert "LoRA of rank 16 on down_proj, gate_proj, " in found["adapter"].attrs["pair_notes"]
    # Later commands read the adapter again, by the name in the result.
    code, _, err = wpjax("export", "adapter.nc", "--top", "3", "--out", "top3")
    assert code == 0, err
    code, out, err = wpjax("inspect", "tiny:base", "adapter")
    assert code == 0, err
    out = " ".join(out.split())
    assert "Note: adapter is an adapter: LoRA of rank 16" in out
    assert "names 'org/base' as its base, not tiny:base" in out
    left = sorted(p.name for p in tmp_path.iterdir())
    assert_refused(wpjax("inspect", "adapter"), "a PEFT adapter .LORA of org/base., not a whole model", tmp_path, left)
    assert_refused(wpjax("sweep", *PAIR, "--base", "adapter", "--out", "x.nc"), "not a whole model", tmp_path, left)
