"""Faults: a process that is killed at any moment, a disk that is full, signals, and files that somebody made up.

A process is killed for real: a child is forked, and ends itself without any clean-up as it is about to do its n-th
operation on a file, for every n. Python's audit events tell when that is.
"""

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from tests.helpers import files_of_at_most, in_child, killed_at
from wpjax import SweepConfig, cli, run_study
from wpjax.behaviours import behaviour
from wpjax.checkpoints.checkpoint import Checkpoint, save_checkpoint
from wpjax.errors import AnchorRejected, BehaviourError, CheckpointError, MetricRejected, OutputError, WpjaxError
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.evaluation.validation import check_same_behaviour
from wpjax.metrics.anchor import Anchor, identity_of
from wpjax.pairs import make_pair
from wpjax.report import write_report
from wpjax.results.files import netcdf_bytes
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime import interrupts
from wpjax.runtime.files import atomic_output, atomic_outputs, check_output, recover
from wpjax.runtime.shards import Shards, check_parts, parts_folder

pytestmark = pytest.mark.filterwarnings("ignore:os.fork")  # the children touch files only, never JAX

SAVED = Path(__file__).parent / "data" / "schema4"


@pytest.fixture(scope="module")
def saved():
    return SweepResult.from_netcdf(SAVED / "title.nc")


@pytest.fixture(scope="module")
def anchor():
    return Anchor.load(SAVED / "title.anchor.safetensors")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, text, overwrite=False, marker=None):
    with atomic_output(path, overwrite, marker) as temporary:
        if marker:
            temporary.mkdir()
            (temporary / marker).write_text(text)
            (temporary / "weights").write_text(text)
        else:
            temporary.write_text(text)


def write_set(folder, text, overwrite=False):
    with atomic_outputs([folder / "page", folder / "figure"], overwrite) as temporaries:
        for temporary in temporaries:
            temporary.write_text(text)


def contents(folder):
    """What stands in a folder under names that are not hidden: name -> text."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("[!.]*")
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)}  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "set"])
def test_killed_at_any_moment_an_output_is_whole_old_or_absent(tmp_path, kind, overwrite):
    """And the same run once more mends what is left, without a trace."""

    def make(folder, text, overwrite):
        if kind == "set":
            write_set(folder, text, overwrite)
        else:
            write(folder / "out", text, overwrite, "config.json" if kind == "folder" else None)

    def outputs(text):
        return dict.fromkeys(
            {"file": ["out"], "folder": ["out/config.json", "out/weights"], "set": ["page", "figure"]}[kind], text
        )

    main = "page" if kind == "set" else "out"
    before = outputs("old") if overwrite else {}
    n, seen = 0, set()
    while True:
        folder = tmp_path / str(n)
        folder.mkdir()
        if overwrite:
            make(folder, "old", False)
        if not killed_at(n, lambda folder=folder: make(folder, "new", overwrite)):
            break
        found = contents(folder)
        assert set(found.values()) <= {"old", "new"}  # never half a file
        if kind == "file":
            assert found in (before, outputs("new"))
        recover(folder / main)
        assert contents(folder) in (before, outputs("new"))
        seen.add(str(contents(folder)))
        assert not [name for name in names(folder) if name.startswith(".")]
        make(folder, "newer", True)
        assert contents(folder) == outputs("newer")
        assert not [name for name in names(folder) if name.startswith(".")]
        n += 1
    assert contents(folder) == outputs("new")
    assert len(seen) == 2  # killed before and after it was published
    assert n > 5


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    with atomic_output(tmp_path / "out") as temporary:
        temporary.write_text("at work")
        assert in_child(lambda: recover(tmp_path / "out")) == 0
        assert in_child(lambda: write(tmp_path / "out", "faster")) == 0
        assert temporary.read_text() == "at work"
        (tmp_path / "out").unlink()
    assert names(tmp_path) == ["out"]


def test_nothing_of_others_is_replaced_or_deleted(tmp_path):
    """A file made by something else while ours was made, and hidden folders that only look like ours."""

    def late():
        with atomic_output(tmp_path / "out") as temporary:
            temporary.write_text("ours")
            (tmp_path / "out").write_text("theirs")

    with pytest.raises(OutputError, match="made by another run meanwhile"):
        late()
    (tmp_path / ".out.abcdefgh.partial").mkdir()
    (tmp_path / ".out.abcdefgh.partial" / "thesis").write_text("precious")
    write(tmp_path / "out", "ours", True)
    assert names(tmp_path) == [".out.abcdefgh.partial", "out"]


@pytest.mark.parametrize("made", ["file", "folder", "link"])
def test_an_input_is_not_replaced(tmp_path, made):
    read = tmp_path / "in"
    if made == "folder":
        read.mkdir()
        (read / "config.json").write_text("{}")
    else:
        read.write_text("{}")
    out = read
    if made == "link":
        out = tmp_path / "out"
        out.symlink_to(read)
    with pytest.raises(OutputError, match="is read as an input"):
        check_output(out, True, "config.json" if made == "folder" else None, inputs=(None, "org/name", str(read)))
    check_output(tmp_path / "other", True, inputs=(str(read),))


def test_a_folder_that_holds_an_input_is_not_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("config.json", "prompts.jsonl"):
        (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(OutputError, match="is read as an input"):
        check_output(tmp_path / "run", True, "config.json", inputs=(tmp_path / "run" / "prompts.jsonl",))


def test_a_result_is_published_before_its_parts_go(tmp_path, saved):
    """Killed at any moment, either all parts are there, or the result is whole, with its set score."""
    identity, data = {"seed": 0}, netcdf_bytes(saved.dataset)
    n = 0

    def publish(out):
        with Shards(out, "sweep", identity, resume=True) as shards:
            with atomic_output(out) as temporary:
                temporary.write_bytes(data)
            shards.discard()

    while True:
        out = tmp_path / str(n) / "r.nc"
        out.parent.mkdir()
        with Shards(out, "sweep", identity, resume=False) as shards:
            for i in range(3):
                shards[f"exact-{i}"] = np.full(4, float(i))
        if not killed_at(n, lambda out=out: publish(out)):
            break
        if out.exists():
            assert out.read_bytes() == data
            with pytest.raises(OutputError, match=r"r\.nc exists"):
                check_output(out)
            check_parts(out, "sweep", resume=False)  # what is left of the parts is in nobody's way
        else:
            with Shards(out, "sweep", identity, resume=True) as shards:
                assert [float(shards[f"exact-{i}"][0]) for i in range(3)] == [0, 1, 2]
            publish(out)
        recover(out)
        assert names(out.parent) == ["r.nc"]
        n += 1
    assert SweepResult.from_netcdf(out).set_ranking == "set_score"
    assert names(out.parent) == ["r.nc"]
    assert n > 10


@pytest.mark.parametrize("what", ["result", "curves", "anchor", "model", "page", "part"])
def test_a_full_disk_is_one_line_and_leaves_nothing_new(tmp_path, what, saved, anchor, tiny_pair):
    shards = Shards(tmp_path / "r.nc", "sweep", {}, resume=False)
    shards["first"] = np.zeros(3)

    def fill():
        with files_of_at_most(2000):
            if what == "result":
                saved.to_netcdf(tmp_path / "r.nc")
            elif what == "anchor":
                big = dataclasses.replace(anchor, vector=jnp.eye(4096)[0])
                big.save(tmp_path / "a")
            elif what == "model":
                save_checkpoint(tmp_path / "m", tiny_pair.base_checkpoint)
            elif what == "page":
                write_report(saved, tmp_path / "r.html")
            elif what == "curves":
                with atomic_output(tmp_path / "c.nc") as temporary:
                    temporary.write_bytes(bytes(5000))
            else:
                shards["second"] = np.zeros(5000)

    with pytest.raises(OutputError, match="cannot be written") as refused:
        fill()
    assert "\n" not in str(refused.value)
    assert names(tmp_path) == [".r.nc.sweep"]
    assert shards["first"].shape == (3,)
    assert list(shards) == ["first"]
    shards.discard()


def test_parts_that_are_damaged_swapped_or_of_another_run_are_refused(tmp_path):
    def parts(name, seed):
        with Shards(tmp_path / name, "sweep", {"seed": seed}, resume=True) as shards:
            for key in ("a", "b"):
                shards[key] = np.full(5, float(ord(key)))
        return parts_folder(tmp_path / name)

    ours, theirs = parts("r.nc", 0), parts("s.nc", 1)
    whole = {path: path.read_bytes() for path in ours.glob("*.npy")}
    a, b = sorted(whole)
    damages = {
        "zeroed": lambda: a.write_bytes(bytes(len(whole[a]))),
        "a bit": lambda: a.write_bytes(whole[a][:-20] + bytes([whole[a][-20] ^ 1]) + whole[a][-19:]),
        "short": lambda: a.write_bytes(whole[a][:40]),
        "empty": lambda: a.write_bytes(b""),
        "swapped": lambda: a.write_bytes(whole[b]),
        "another run": lambda: shutil.copy(theirs / "a.npy", a),
    }
    for damage, make in damages.items():
        make()
        with (
            Shards(tmp_path / "r.nc", "sweep", {"seed": 0}, resume=True) as shards,
            pytest.raises(OutputError, match=r"a\.npy is damaged, .*delete it, and pass --resume again"),
        ):
            assert shards["a"] is None, damage
        assert shards["b"][0] == ord("b")
        a.write_bytes(whole[a])
    assert shards["a"][0] == ord("a")


def test_parts_in_nobodys_way_go_and_others_are_refused(tmp_path):
    out, folder = tmp_path / "r.nc", parts_folder(tmp_path / "r.nc")
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")  # an earlier run was killed before its first part
    check_parts(out, "sweep", resume=False)
    assert not folder.exists()
    with Shards(out, "sweep", {"seed": 0, "kinds": ("head",)}, resume=False) as shards:
        shards["a"] = np.zeros(3)
        with pytest.raises(OutputError, match=r"is in use: another run is at work on it"):
            Shards(out, "sweep", {"seed": 0}, resume=True)
    with pytest.raises(OutputError, match="is left from a run that did not finish; pass --resume, or delete it"):
        check_parts(out, "sweep", resume=False)
    check_parts(out, "sweep", resume=True, known={"kinds": ["head"], "seed": 0})
    with pytest.raises(OutputError, match=r"other settings \(seed: 0 there, 1 here\)"):
        check_parts(out, "sweep", resume=True, known={"seed": 1})
    with pytest.raises(OutputError, match="other settings"):
        Shards(out, "sweep", {"seed": 0}, resume=True)
    out.write_text("the result, which is newer")
    check_parts(out, "sweep", resume=False)
    assert names(tmp_path) == ["r.nc"]


def study(folder, **changes):
    first = SweepConfig("tiny:base", "tiny:expert", "tiny:title", folder / "r.nc", causal="skip", n_prompts=4)
    return dataclasses.replace(first, **changes)


def test_arguments_are_checked_before_the_work(tmp_path):
    """Nothing but reading the models is reported as begun, though an anchor would have to be fitted first."""

    def begun(what, done, total):
        if not what.startswith("reading"):
            pytest.fail(f"{what} was begun")

    refused = {
        "L99.head.0: the model has layers L0 to L7": study(tmp_path, components=("L99.head.0",)),
        "goes with --anchor or --given-anchor": study(tmp_path, anchor_behaviour="tiny:title"),
        "an anchor of tiny:title, not of tiny:no_comma": study(
            tmp_path, behaviour="tiny:no_comma", anchor=SAVED / "title.anchor.safetensors"
        ),
        "n_masks=1000000000: at most": study(tmp_path, n_masks=10**9),
    }
    for says, config in refused.items():
        with pytest.raises(WpjaxError, match=says):
            run_study(config, begun)
    with Shards(tmp_path / "r.nc", "sweep", {"seed": 1, "dtype": "float32"}, resume=False) as shards:
        shards["a"] = np.zeros(3)
    with pytest.raises(OutputError, match="pass --resume, or delete it"):
        run_study(study(tmp_path), begun)
    with pytest.raises(OutputError, match=r"other settings \(kinds: None there"):
        run_study(study(tmp_path, resume=True), begun)
    assert names(tmp_path) == [".r.nc.sweep"]


def test_an_anchor_of_another_behaviour_is_used_by_name_only_and_marked(tmp_path, anchor, tiny_pair):
    class Begun(Exception):
        pass

    def begin(what, done, total):
        if not what.startswith("reading"):  # the models are read before it
            raise Begun

    path = SAVED / "title.anchor.safetensors"
    config = study(tmp_path, behaviour="tiny:english_capital", anchor=path, method="exact", components=("L2.head.0",))
    with pytest.raises(AnchorRejected, match="pass --anchor-behaviour tiny:title"):
        run_study(config, begin)
    with pytest.raises(AnchorRejected, match="an anchor of tiny:title, not of tiny:quotation"):
        run_study(dataclasses.replace(config, anchor_behaviour="tiny:quotation"), begin)
    with pytest.raises(Begun):
        run_study(dataclasses.replace(config, anchor_behaviour="tiny:title"), begin)
    batch = behaviour("tiny:english_capital").encode(tiny_pair.tokenizer, n_prompts=4)
    marks = anchor.prepare(tiny_pair, batch).attributes
    assert marks["anchor_behaviour"] == "tiny:title"
    assert marks["anchor_acceptance"] == "not tested: it is an anchor of tiny:title"


def test_an_anchor_of_the_same_name_but_other_prompts_checker_or_base_is_refused(tmp_path, anchor, tiny_pair):
    """Two files of one name, each in a folder of its own. What differs is named; by name the anchor is used after all,
    and does not count as tested.
    """

    class Begun(Exception):
        pass

    def begin(what, done, total):
        if not what.startswith("reading"):  # the models are read before it
            raise Begun

    queries = list(dict.fromkeys(p.without for p in behaviour("tiny:title").pairs))
    for name, chosen in (("a", queries[:16]), ("b", queries[8:24])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"prompt": q, "instruction": "Shout."}) for q in chosen]
        (tmp_path / name / "shouting.jsonl").write_text("\n".join(lines))
    here, elsewhere = (tmp_path / name / "shouting.jsonl" for name in "ab")
    checker = "regex:^[A-Z ]+$"
    identity = identity_of(tiny_pair, behaviour(here, checker))
    fitted = dataclasses.replace(anchor, behaviour="shouting", identity=identity)
    path, other_base = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    fitted.save(path)
    dataclasses.replace(fitted, identity=identity | {"base": "0" * 16, "tokens": "1" * 16}).save(other_base)
    config = study(tmp_path, behaviour=str(here), checker=checker, anchor=path, components=("L2.head.0",))
    with pytest.raises(Begun):
        run_study(config, begin)
    with pytest.raises(Begun):  # without a checker there is nothing to compare
        run_study(dataclasses.replace(config, checker=None), begin)
    for changes, says in (
        ({"behaviour": str(elsewhere)}, "an anchor of shouting with other prompts; fit one"),
        ({"checker": "contains:!"}, r"with the checker regex:\^\[A-Z \]\+\$ \(here contains:!\); fit one"),
        ({"split": "none"}, r"with --split thirds \(here none\); fit one"),
        ({"anchor": other_base}, r"with another base \(fingerprint 0{16}, here .*\), other tokens of the same prompts"),
    ):
        other = dataclasses.replace(config, **changes)
        with pytest.raises(AnchorRejected, match=f"{says}.*pass --anchor-behaviour shouting"):
            run_study(other, begin)
        with pytest.raises(Begun):
            run_study(dataclasses.replace(other, anchor_behaviour="shouting"), begin)


def test_an_anchor_that_is_used_by_name_does_not_count_as_tested(tmp_path, anchor):
    """And one of an earlier version is used with a note, as it says only its behaviour's name."""
    told = []
    config = study(tmp_path, anchor=SAVED / "title.anchor.safetensors", components=("L2.head.0",), answers=0)
    config = dataclasses.replace(config, method="screen", set_score=False)
    run_study(config, tell=told.append)
    assert [("does not say with which prompts" in note) for note in told] == [True]
    changed = dataclasses.replace(anchor, identity={"prompts": "0" * 16})
    changed.save(tmp_path / "a")
    found = run_study(
        dataclasses.replace(config, anchor=tmp_path / "a", anchor_behaviour="tiny:title", out=tmp_path / "s.nc")
    ).result
    assert found.dataset.attrs["anchor_behaviour"] == "tiny:title with other prompts"
    assert found.dataset.attrs["anchor_acceptance"] == "not tested: it is an anchor of tiny:title with other prompts"


def test_a_result_of_another_behaviour_is_validated_by_name_only(saved, tmp_path):
    check_same_behaviour(behaviour("tiny:title"), saved)
    with pytest.raises(BehaviourError, match=r"of the behaviour tiny:title, this one is tiny:no_comma; .*--other-beh"):
        check_same_behaviour(behaviour("tiny:no_comma"), saved)
    lines = [json.dumps({"with": f"{i} aloud", "without": f"{i}"}) for i in range(12)]
    (tmp_path / "title.jsonl").write_text("\n".join(lines))
    renamed = SweepResult(saved.dataset.assign_attrs(behaviour="title"))
    with pytest.raises(BehaviourError, match="with other prompts than this one has"):
        check_same_behaviour(behaviour(tmp_path / "title.jsonl"), renamed)


def with_leaf(checkpoint: Checkpoint, module, name, change):
    params = {**checkpoint.params, "blocks": {**checkpoint.params["blocks"]}}
    params["blocks"][module] = {**params["blocks"][module], name: change(params["blocks"][module][name])}
    return dataclasses.replace(checkpoint, params=params)


@pytest.mark.parametrize("value", [1e30, -1e12, np.inf, np.nan])
def test_a_weight_that_no_model_has_is_refused_by_its_place(tiny_pair, value):
    bad = with_leaf(tiny_pair.expert_checkpoint, "mlp", "W_out", lambda w: w.at[3, 5, 7].set(value))
    with pytest.raises(CheckpointError, match=r"tiny:expert: mlp/W_out of layer 3 is .* at \[5, 7\]"):
        make_pair(tiny_pair.base_checkpoint, bad)


def test_scores_that_are_not_finite_are_refused_with_the_layer(tiny_pair, anchor):
    """Weights that are finite, but whose product is not."""
    bad = with_leaf(tiny_pair.expert_checkpoint, "mlp", "W_in", lambda w: w.at[2].set(1e9))
    bad = with_leaf(bad, "mlp", "W_out", lambda w: w.at[2].set(1e9))
    bad = with_leaf(bad, "mlp", "W_gate", lambda w: w.at[2].set(1e9))
    pair = make_pair(tiny_pair.base_checkpoint, bad)
    task = behaviour("tiny:title")
    with pytest.raises(CheckpointError, match=r"stream reaches \S+ at layer 2"):
        fit_anchor(pair, task, n_prompts=8, causal="skip")
    owned = dataclasses.replace(anchor, expert_fingerprint=pair.fingerprints[1])
    with pytest.raises(MetricRejected, match=r"metric of the expert is .* reaches \S+ at layer 2; check its"):
        sweep(pair, task.encode(pair.tokenizer, n_prompts=4), owned, method="screen")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_norm_of_zeros_gives_finite_numbers(tiny_pair, anchor, tmp_path):
    """The stream passes it by. No figure becomes infinite, none divides by zero, and the file can be read."""
    norm = with_leaf(tiny_pair.expert_checkpoint, "norm_attn", "scale", lambda w: w.at[2].set(0))
    pair = make_pair(tiny_pair.base_checkpoint, norm)
    batch = behaviour("tiny:title").encode(pair.tokenizer, n_prompts=4)
    owned = dataclasses.replace(anchor, expert_fingerprint=pair.fingerprints[1])
    found = sweep(pair, batch, owned, components=["L2.head.0", "L2.norm.attn"], method="exact")
    found.to_netcdf(tmp_path / "r.nc")
    again = SweepResult.from_netcdf(tmp_path / "r.nc").dataset
    assert np.isfinite(again["effect"]).all()
    assert np.isfinite(again["delta"]).all()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_pipes_and_devices_are_not_read_as_results_or_anchors(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(WpjaxError, match="not a readable result file"):
            SweepResult.from_netcdf(path)
        with pytest.raises(CheckpointError, match="not an anchor file"):
            Anchor.load(path)


def test_numbers_of_options_have_bounds(monkeypatch, capsys):
    for arguments, says in (
        (["validate", "r.nc", "--n-random", "1000000000"], "--n-random': Input should be less than or equal to 1000"),
        (["validate", "r.nc", "--points", "1000000000"], "--points': Input should be less than or equal to 1000"),
    ):
        monkeypatch.setattr(sys, "argv", ["wpjax", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        assert says in capsys.readouterr().err


def test_nothing_infinite_is_written(saved, tmp_path):
    for change in ({"effect": saved.dataset["effect"] * np.inf}, {"delta": saved.dataset["delta"] + 1e31}):
        with pytest.raises(WpjaxError, match=f"{next(iter(change))}.*infinite, so nothing is written"):
            SweepResult(saved.dataset.assign(change)).to_netcdf(tmp_path / "r.nc")
    with pytest.raises(WpjaxError, match="coverage: infinite"):
        SweepResult(saved.dataset.assign_attrs(coverage=np.inf)).to_netcdf(tmp_path / "r.nc")
    assert not names(tmp_path)


@pytest.mark.parametrize("how", ["external storage", "external link", "soft link", "virtual"])
def test_a_result_that_leads_to_other_files_is_refused(tmp_path, saved, how):
    secret = tmp_path / "secret"
    secret.write_bytes(np.arange(7.0).tobytes() * 100)
    saved.to_netcdf(tmp_path / "r.nc")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["effect"] = np.zeros(7)
    with h5py.File(tmp_path / "r.nc", "r+") as file:
        del file["effect"]
        if how == "external storage":
            file.create_dataset("effect", (7,), "f8", external=[(str(secret), 0, 56)])
        elif how == "external link":
            file["effect"] = h5py.ExternalLink("other.h5", "effect")
        elif how == "soft link":
            file["effect"] = h5py.SoftLink("/gap")
        else:
            layout = h5py.VirtualLayout((7,), "f8")
            layout[:] = h5py.VirtualSource("other.h5", "effect", shape=(7,))
            file.create_virtual_dataset("effect", layout)
    with pytest.raises(WpjaxError, match=r"r\.nc: effect is (a link|read from another file)"):
        SweepResult.from_netcdf(tmp_path / "r.nc")


def test_a_file_that_unpacks_to_more_than_any_result_is_refused(tmp_path):
    with h5py.File(tmp_path / "r.nc", "w") as file:
        file.create_dataset("effect", (10**11,), "f8", chunks=(10**6,), compression="gzip")
    assert (tmp_path / "r.nc").stat().st_size < 10**6
    with pytest.raises(WpjaxError, match="more than any result"):
        SweepResult.from_netcdf(tmp_path / "r.nc")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: d.assign_attrs(metric_layer=1e300), "metric_layer"),
        (lambda d: d.assign_attrs(metric_layer=0.5), "metric_layer"),
        (lambda d: d.assign_attrs(n_layers=10**9), "n_layers"),
        (lambda d: d.assign_attrs(given_layer=-7), "given_layer"),
        (lambda d: d.assign_attrs(gap_mean=1e300), "gap_mean"),
        (lambda d: d.assign_coords(index=d["index"] + 10**7), "layer and index"),
        (lambda d: d.assign_coords(index=d["index"] + 10**5, kind=("component", ["head"] * 7)), "index"),
    ],
)
def test_numbers_that_no_model_has_are_refused(tmp_path, saved, damage, says):
    damage(saved.dataset.copy(deep=True)).to_netcdf(tmp_path / "r.nc", engine="h5netcdf")
    with pytest.raises(WpjaxError, match=f"lacks a usable .*{says}"):
        SweepResult.from_netcdf(tmp_path / "r.nc")


def test_a_result_that_can_be_read_but_is_not_what_was_written_is_refused(tmp_path, saved):
    """One number, one letter or one attribute is another; a file of before has no checksum, and is read."""
    saved.to_netcdf(tmp_path / "r.nc")
    whole = (tmp_path / "r.nc").read_bytes()

    def spoil(change):
        (tmp_path / "r.nc").write_bytes(whole)
        with h5py.File(tmp_path / "r.nc", "r+") as file:
            change(file)
        return SweepResult.from_netcdf(tmp_path / "r.nc")

    def another_name(file):
        file["name"][0] = "L1.mlp"

    def another_number(file):
        file["effect"][1] += 1e-9

    for change in (another_name, another_number, lambda file: file.attrs.__setitem__("coverage", 0.5)):
        with pytest.raises(WpjaxError, match=r"r\.nc: what it holds is not what was written \(its checksum differs\)"):
            spoil(change)

    def as_before(file):
        del file.attrs["checksum"]

    xr.testing.assert_identical(spoil(as_before).dataset, saved.dataset)
    assert "checksum" not in saved.dataset.attrs


def test_an_anchor_that_can_be_read_but_is_not_what_was_written_is_refused(tmp_path, anchor):
    path = tmp_path / "a"
    anchor.save(path)
    np.testing.assert_array_equal(Anchor.load(path).vector, anchor.vector)
    whole = path.read_bytes()
    at = len(whole) - 4 * anchor.vector.size  # the vector stands at the end
    for place, byte in ((at + 8, whole[at + 8] ^ 1), (whole.index(b"tiny:title") + 5, ord("T"))):
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="its checksum differs"):
            Anchor.load(path)


def test_an_anchor_that_names_no_expert_is_neither_written_nor_read(tmp_path, anchor):
    with pytest.raises(CheckpointError, match="does not say which expert"):
        dataclasses.replace(anchor, expert_fingerprint="").save(tmp_path / "a")
    dataclasses.replace(anchor, expert_fingerprint="?").save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="does not say which expert"):
        Anchor.load(tmp_path / "a")


def test_a_signal_is_noted_wherever_it_comes(tmp_path):
    """Also inside a callback of the garbage collection, which swallows exceptions."""

    def interrupt(phase, info):
        if phase == "start":
            os.kill(os.getpid(), signal.SIGINT)

    started_with = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    before = signal.getsignal(signal.SIGINT)
    with interrupts.listening(lambda: None):
        gc.callbacks.append(interrupt)
        gc.collect()
        gc.callbacks.remove(interrupt)
        for _ in range(2):  # swallowed once, it comes again
            with pytest.raises(KeyboardInterrupt):
                interrupts.check()
        assert interrupts.account() == "interrupted; nothing was written"
        write(tmp_path / "out", "whole")
        with Shards(tmp_path / "r.nc", "sweep", {}, resume=False) as shards:
            shards["a"] = np.zeros(2)
        kept = "finished parts are kept: go on with --resume"
        assert interrupts.account() == f"interrupted; written and whole: {tmp_path / 'out'}; {kept}"
        assert interrupts.exit_code() == 130
    assert signal.getsignal(signal.SIGINT) is before
    with interrupts.listening(lambda: None):
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.came()
        assert (interrupts.account(), interrupts.exit_code()) == ("terminated; nothing was written", 143)
    with interrupts.listening(lambda: None):
        interrupts.check()
    signal.signal(signal.SIGINT, started_with)


@pytest.mark.parametrize(("grace", "signals", "code"), [(0.1, [signal.SIGTERM], 143), (60.0, [signal.SIGINT] * 2, 130)])
def test_work_that_does_not_look_is_ended(grace, signals, code):
    """After the grace, or at a second signal, at once."""
    script = (
        "import time; from wpjax.runtime import interrupts\n"
        f"interrupts.GRACE = {grace}\n"
        "with interrupts.listening(lambda: print(interrupts.account(), flush=True)):\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert out.endswith("; nothing was written\n")


@pytest.mark.parametrize(
    ("module", "command", "code", "says"),
    [
        ("lazy_loader", "wpjax", 130, "interrupted; nothing was written\n"),  # the package itself is imported
        ("wpjax.cli", "wpjax", 130, "interrupted; nothing was written\n"),
        ("typer", "/usr/bin/wpjax", 130, "interrupted; nothing was written\n"),  # the command listens already
        ("lazy_loader", "notebook", 1, None),  # another program has its own way
    ],
)
def test_ctrl_c_while_python_imports_is_one_line(module, command, code, says):
    """The signal comes as a module is about to be imported, in a process that is called as the command is."""
    script = (
        "import os, signal, sys\n"
        f"sys.argv = [{command!r}, '--version']\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from wpjax.cli import main\n"
        "main()\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode in ((code,) if says else (code, -signal.SIGINT))
    assert run.stderr == says if says else "Traceback" in run.stderr
    assert run.stdout == ""


def test_an_interrupted_command_says_what_it_has_written(tmp_path, monkeypatch):
    """Ctrl-C comes while the page is put in its place: the files are whole, and the command says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wpjax", "report", str(SAVED / "title.nc"), "--out", "r.html"])
    monkeypatch.setattr(sys, "stderr", (tmp_path / "said").open("w"))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background it may be ignored

    def run():
        def hook(event, arguments):
            if event == "os.rename" and str(arguments[1]).endswith("r.html"):
                os.kill(os.getpid(), signal.SIGINT)

        sys.addaudithook(hook)
        cli.main()

    assert in_child(run) == 130
    said = (tmp_path / "said").read_text()
    assert said.startswith("interrupted; written and whole: r.html, r-overview.png, ")
    assert len(list(tmp_path.glob("r-*.png"))) == said.count(".png")


def start(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "wpjax", *arguments], stderr=subprocess.PIPE, text=True, check=False, **options
    )


def test_output_that_nobody_reads_or_that_has_no_room():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        closed = start("sweep", "--help", stdout=pipe)
    assert (closed.returncode, closed.stderr) == (141, "")  # as of other tools
    with Path("/dev/full").open("w") as full:
        none = start("--help", stdout=full)
        assert none.returncode == 2
        assert none.stderr == "error: the output cannot be printed (No space left on device)\n"


def test_work_goes_on_when_its_messages_have_no_room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = ["--base", "tiny:base", "--expert", "tiny:expert", "--behaviour", "tiny:title", "--n-prompts=4"]
    anchored = ["--anchor", str(SAVED / "title.anchor.safetensors"), "--components=L2.head.0", "--no-set-score"]
    monkeypatch.setattr(sys, "argv", ["wpjax", "sweep", *models, *anchored, "--method=screen", "--out=r.nc"])
    with (
        Path("/dev/full").open("w", buffering=1) as out,
        Path("/dev/full").open("w", buffering=1) as err,
        monkeypatch.context() as streams,
    ):
        streams.setattr(sys, "stdout", out)
        streams.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert left.value.code == 2  # the table could not be printed
    assert SweepResult.from_netcdf(tmp_path / "r.nc").top(1, by="screen")[0].name == "L2.head.0"
    assert names(tmp_path) == ["r.nc"]


def test_a_device_that_is_not_there_is_one_line():
    run = start("inspect", "tiny:base", stdout=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "abacus"})
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert "abacus" in line
    assert line.startswith("error: ")


def test_a_dataset_of_xarray_is_the_same_after_memory(tmp_path, saved):
    saved.to_netcdf(tmp_path / "r.nc")
    xr.testing.assert_identical(SweepResult.from_netcdf(tmp_path / "r.nc").dataset, saved.dataset)
