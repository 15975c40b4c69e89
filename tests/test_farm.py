"""Farms: processes that share a folder and nothing else give what one process gives, whoever dies on the way."""

import contextlib
import dataclasses
import itertools
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import xarray as xr
from typer.main import get_command

from tests.helpers import files_of_at_most, killed_at
from wpjax import SweepConfig, cli
from wpjax.arguments import as_command, as_read
from wpjax.behaviours import behaviour
from wpjax.engines.on_policy import OnPolicy
from wpjax.errors import OutputError, WpjaxError
from wpjax.estimators.sweep import sweep
from wpjax.evaluation.fit_anchor import fit_anchor
from wpjax.metrics.answers import kl_metric
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.farm import Farm, Part, Unfinished, check_farm, made
from wpjax.runtime.shards import Shards

pytestmark = pytest.mark.filterwarnings("ignore:os.fork")  # the children touch files only, never JAX

NAMES = [f"L{layer}.head.{i}" for layer in (1, 2, 4) for i in (0, 3, 6)]


@pytest.fixture(scope="module")
def setting(tiny_pair):
    task = behaviour("tiny:english_capital")
    return tiny_pair, task.encode(tiny_pair.tokenizer, n_prompts=8), fit_anchor(tiny_pair, task, causal="skip")


def without_times(dataset):
    attrs = {name: value for name, value in dataset.attrs.items() if name not in ("date", "wall_time_s")}
    return dataset.drop_attrs(deep=False).assign_attrs(attrs)


def squares(farm, n=7):
    """Work that takes no model: what a part of a sweep does with its folder."""
    made(farm, "shared", lambda: np.arange(3.0))
    for i in farm.share(range(n), lambda i: f"square-{i}" in farm):
        if f"square-{i}" not in farm:
            farm[f"square-{i}"] = np.array([float(i**2)])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


METHODS = {"screen+exact": {"top": 3, "stratum": 2}, "masks": {"n_masks": 40}, "race": {"top": 2}}


@pytest.mark.parametrize("method", METHODS)
def test_the_parts_of_a_sweep_make_the_sweep_of_one_process(setting, tmp_path, method):
    """Bit for bit. Each part makes some pieces, none makes another's; a race needs the parts again in every round."""
    arguments = {"components": NAMES, "method": method, **METHODS[method]}

    def run(part):
        return sweep(*setting, **arguments, done=Farm(tmp_path, part, {}, {})).dataset

    whole = sweep(*setting, **arguments).dataset
    makers, n_turns, collected = [], 0, None
    while collected is None:
        n_turns += 1
        assert n_turns == 1 or (method == "race" and n_turns < 6)
        for i in (1, 2, 3):
            before = {*contents(tmp_path)}
            with pytest.raises(Unfinished, match=rf"part {i}/3: all of its \d+ pieces"):
                run(Part(i, 3))
            makers += [(i, name) for name in {*contents(tmp_path)} - before]
        with contextlib.suppress(Unfinished):
            collected = run(None)
    xr.testing.assert_identical(without_times(collected), without_times(whole))
    pieces = [i for i, name in makers if re.match(r"(exact|sham|permuted|masks|race)-", name)]
    assert min(pieces.count(i) for i in (1, 2, 3)) > 0
    assert max(pieces.count(i) for i in (1, 2, 3)) < len(pieces) - 1
    # A part that is done once more, by any other process, makes the same bytes.
    finished = contents(tmp_path)
    for name in [name for i, name in makers if i == 2]:
        (tmp_path / name).unlink()
    with pytest.raises(Unfinished, match="and so are those of all other parts"):
        run(Part(2, 3))
    assert contents(tmp_path) == finished


def test_scores_along_words_are_farmed(setting, tmp_path):
    """The anchor along each model's own answer, and the divergence from the expert, which holds a whole model."""
    pair, batch, anchor = setting
    for name, metric in (("on_policy", OnPolicy(anchor, 8)), ("kl", kl_metric(pair, batch, 8))):
        arguments = {"components": NAMES[::4], "method": "exact"}
        whole = sweep(pair, batch, metric, **arguments).dataset
        for i in (1, 2):
            with pytest.raises(Unfinished):
                sweep(pair, batch, metric, **arguments, done=Farm(tmp_path / name, Part(i, 2), {}, {}))
        collected = sweep(pair, batch, metric, **arguments, done=Farm(tmp_path / name, None, {}, {})).dataset
        xr.testing.assert_identical(without_times(collected), without_times(whole))


STUDY = [
    "--base=tiny:base", "--expert=tiny:expert", "--behaviour=tiny:title", "--causal=skip", "--n-prompts=4",
    "--method=exact", "--components=L1.head.0,L2.head.0,L4.head.2", "--no-set-score", "--answers=0",
]  # fmt: skip


def test_commands_of_a_farm_give_what_one_command_gives(wpjax, tmp_path):
    assert wpjax("sweep", *STUDY, "--out", "one.nc")[0] == 0
    code, out, err = wpjax("sweep", *STUDY, "--part", "2/2", "--shards", "parts")
    assert code == 0, err
    assert re.match(r"part 2/2: all of its \d+ pieces .* of all \d+ pieces \d+ are missing, of part 1 of 2\n", out)
    code, _, err = wpjax("collect", "parts", "--out", "r.nc")
    again = err.splitlines()[-1].partition("; run it: wpjax ")[2]
    assert (code, again.split()[-4:]) == (2, ["--part", "1/2", "--shards", "parts"])
    code, said, _ = wpjax(*again.split())
    n = re.search("([0-9]+) are missing", out)[1]
    assert (code, said) == (
        0,
        f"part 1/2: all of its {n} pieces of work are in parts, and so are those of all other parts\n"
        "when all parts have ended: wpjax collect parts --out r.nc\n",
    )
    assert wpjax("collect", "parts", "--out", "r.nc")[0] == 0
    one, collected = (SweepResult.from_netcdf(name).dataset for name in ("one.nc", "r.nc"))
    xr.testing.assert_identical(without_times(collected), without_times(one))
    assert {path.name for path in tmp_path.iterdir()} == {"one.nc", "r.nc", "parts"}
    # What other parts were told to do, and files that are not theirs, is refused before any work.
    for arguments, says in (
        (["--n-prompts=8", "--part=1/2"], r"n_prompts: 4 there, 8 here\); go on with the same, or name another"),
        (["--seed=1", "--part=1/2"], r"seed: 0 there, 1 here"),
        (["--part=3/2"], "--part 3/2: the parts of 2 are 1/2 to 2/2"),
        (["--part=0/2"], "--part 0/2: the parts of 2"),
        (["--part=two"], "--part 'two' is not a part; write i/n"),
        (["--part=1/2", "--out=x.nc"], "--out does not go with --part"),
        ([], "--shards needs --part; to put finished parts together: wpjax collect parts"),
        (["--base=tiny:planted", "--part=1/2"], r"models: \['\w+', '\w+'\] there"),
    ):
        code, out, err = wpjax("sweep", *STUDY, "--shards=parts", *arguments)
        lines = [line for line in err.splitlines() if not line.startswith("[")]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert re.search(says, lines[0]), err
    assert (
        wpjax("sweep", *STUDY, "--part=1/2")[2] == "error: --part needs --shards: name a folder that all parts share\n"
    )
    # The folder is data: it may not choose code, and what it says is checked.
    manifest = json.loads((tmp_path / "parts" / "manifest.json").read_text())
    for change, says in (
        ({"checker": "os:system"}, "which is code, and a folder is not trusted to choose code"),
        ({"seed": "x"}, "manifest.json is damaged"),
        ({"kinds": 3}, "manifest.json is damaged"),
    ):
        asked = {**manifest["arguments"]["config"], **change}
        changed = {**manifest, "arguments": {**manifest["arguments"], "config": asked}}
        (tmp_path / "parts" / "manifest.json").write_text(json.dumps(changed))
        code, _, err = wpjax("collect", "parts", "--out", "s.nc")
        assert (code, len(err.splitlines())) == (2, 1), err
        assert re.search(says, err)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("milk")
    with pytest.raises(OutputError, match=r"notes holds other files \(todo.txt\); name a new folder"):
        Farm(tmp_path / "notes", Part(1, 2), {}, {})
    for folder in ("notes", "nothing"):
        with pytest.raises(OutputError, match=r"holds no parts of a sweep \(manifest.json is not there\)"):
            check_farm(tmp_path / folder, {})
    Farm(tmp_path / "a", Part(1, 2), {"seed": 0}, {})
    with pytest.raises(OutputError, match=r"other settings \(seed: 0 there, 1 here\)"):
        Farm(tmp_path / "a", Part(2, 2), {"seed": 1}, {})
    (tmp_path / "a" / "manifest.json").write_text("{}")
    with pytest.raises(OutputError, match=r"manifest.json is damaged"):
        Farm(tmp_path / "a", Part(2, 2), {"seed": 0}, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        Farm(tmp_path / "file", Part(1, 2), {}, {})


def test_pieces_that_are_damaged_or_of_another_sweep_are_refused(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        squares(Farm(tmp_path / name, Part(1, 1), {"seed": seed}, {}))
    path = tmp_path / "a" / "square-2.npy"
    whole = path.read_bytes()
    for damage in (whole[:-7], b"", (tmp_path / "b" / "square-2.npy").read_bytes()):
        path.write_bytes(damage)
        with pytest.raises(OutputError, match=r"square-2\.npy is damaged, or of another run .*; delete it, and run"):
            squares(Farm(tmp_path / "a", Part(1, 1), {"seed": 0}, {}))
    path.unlink()
    farm = Farm(tmp_path / "a", None, {"seed": 0}, {})
    squares(farm)
    with pytest.raises(Unfinished, match=r"lacks 1 of 7 pieces of work, of part 1 of 1; run it: .*--part 1/1"):
        farm.conclude()
    squares(Farm(tmp_path / "a", Part(1, 1), {"seed": 0}, {}))
    assert path.read_bytes() == whole


def test_the_first_of_two_counts(tmp_path):
    one, two = (Farm(tmp_path, Part(i, 2), {}, {}) for i in (1, 2))
    one["x"], two["x"] = np.zeros(3), np.ones(3)
    for farm in (one, two):
        np.testing.assert_array_equal(made(farm, "x", lambda: np.full(3, 2.0)), np.zeros(3))
    with pytest.raises(Unfinished, match=r"lacks the beginning of the work \(y\), of part 1 of 2; run it"):
        made(Farm(tmp_path, None, {}, {}), "y", lambda: np.zeros(3))


def test_killed_before_any_step_a_part_is_done_by_running_it_again(tmp_path):
    """Killed for real, before every operation on a file in turn, while another part's pieces are there."""
    squares(Farm(tmp_path / "whole", Part(1, 2), {"seed": 0}, {}))
    squares(Farm(tmp_path / "whole", Part(2, 2), {"seed": 0}, {}))
    whole, n = contents(tmp_path / "whole"), 0
    while True:
        folder = tmp_path / str(n)
        squares(Farm(folder, Part(1, 2), {"seed": 0}, {}))
        theirs = contents(folder)
        ended = not killed_at(n, lambda folder=folder: squares(Farm(folder, Part(2, 2), {"seed": 0}, {})))
        assert theirs.items() <= contents(folder).items() <= whole.items()
        squares(Farm(folder, Part(2, 2), {"seed": 0}, {}))
        assert contents(folder) == whole
        collected = Farm(folder, None, {"seed": 0}, {})
        squares(collected)
        collected.conclude()
        assert {path.name for path in folder.iterdir()} == {*whole}  # what was being written is gone, too
        shutil.rmtree(folder)
        if ended:
            break
        n += 1
    assert n > 10


def test_a_full_disk_is_one_line_and_keeps_what_is_finished(tmp_path):
    farm = Farm(tmp_path, Part(1, 1), {}, {})
    squares(farm)
    before = contents(tmp_path)
    with files_of_at_most(500), pytest.raises(OutputError, match=r"big\.npy: cannot be written .* run the part again"):
        farm["big"] = np.zeros(1000)
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_the_command_that_a_part_names_asks_for_the_same():
    """As the shell and the command line read it."""
    config = SweepConfig(
        "a b", "tiny:expert", "x.jsonl", checker="regex:^'$", kinds=("head", "mlp"), components=("L1.mlp",), seed=3,
        set_score=False, quick=True, ignore_config=("x", "y"), memory_mb=2.5,
    )  # fmt: skip
    command = get_command(cli.make_app()).commands["sweep"]
    words = shlex.split(as_command(dataclasses.replace(config, part="1/2", overwrite=True)))[2:]
    parsed = command.make_context("sweep", words).params
    assert parsed["kinds"] == "head,mlp"
    assert (parsed["base"], parsed["checker"], parsed["ignore_config"]) == ("a b", "regex:^'$", ["x", "y"])
    assert (parsed["set_score"], parsed["quick"], parsed["memory_mb"], parsed["seed"]) == (False, True, 2.5, 3)
    assert (parsed["part"], parsed["overwrite"], parsed["top"]) == (None, False, config.top)
    with pytest.raises(WpjaxError, match="these are no arguments of a sweep"):
        as_read({"base": "a"})


class Killed(BaseException):
    """Work that is cut off where it stands; nothing may be caught or tidied up."""


@pytest.mark.parametrize("mode", ["one process", "farm"])
def test_work_that_is_cut_off_at_random_moments_goes_on_to_the_same_result(setting, tmp_path, mode):
    """20 times in a row, each time after some reports of progress. (`experiments/machines` does it with kill -9.)"""
    arguments = {"components": NAMES, "top": 3, "stratum": 2, "budget": 1}  # one patch a chunk
    whole = sweep(*setting, **arguments).dataset
    rng, n_killed, collected = np.random.default_rng(0), 0, None
    parts = itertools.cycle((Part(1, 2), Part(2, 2)) if mode == "farm" else (None,))
    while collected is None:
        left = [int(rng.integers(0, 4)) if n_killed < 20 else 10**9]

        def die(what, done, total, left=left):
            if left[0] == 0:
                raise Killed
            left[0] -= 1

        with contextlib.suppress(Killed, Unfinished):
            try:
                if mode == "farm":
                    sweep(*setting, **arguments, done=Farm(tmp_path, next(parts), {}, {}), progress=die)
                else:
                    with Shards(tmp_path / "r.nc", "sweep", {}, resume=True) as done:
                        collected = sweep(*setting, **arguments, done=done, progress=die).dataset
            except Killed:
                n_killed += 1
                raise
        if mode == "farm" and n_killed == 20:
            with contextlib.suppress(Unfinished):
                collected = sweep(*setting, **arguments, done=Farm(tmp_path, None, {}, {})).dataset
    assert n_killed == 20
    xr.testing.assert_identical(without_times(collected), without_times(whole))
