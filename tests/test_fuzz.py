"""Files that somebody made up, or that a disk spoilt: whatever they hold, reading them ends well or in a WpjaxError.

Every file is made from a good one by a few random changes, of bytes or of values; the seed is fixed. What is still read
is used as commands use it.
"""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import curves_by_hand
from wpjax.behaviours import behaviour
from wpjax.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from wpjax.checkpoints.hf_config import parse_config
from wpjax.errors import WpjaxError
from wpjax.metrics.anchor import Anchor
from wpjax.pairs import load_model, make_pair
from wpjax.report.figures import available, make_figure
from wpjax.report.page import render_page
from wpjax.results.curves import Curves
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.shards import Shards, check_parts

SAVED = Path(__file__).parent / "data" / "schema4"

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 10**7, 10**30, -(10**400), 1e300, -0.5, float("nan"), float("inf"), "", "0", "x" * 3000,
    "\x00", "\ud800", "$\\frac$ [b]<i>", "../../etc/passwd", [], {}, [[]], [1, 2.5], {"a": None},
)  # fmt: skip
"""Values that a file may hold where another is expected."""


def damaged_bytes(rng, data):
    """A copy with one to three spots overwritten, doubled, cut out or cut off."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, n = int(rng.integers(len(data) or 1)), int(rng.choice([1, 1, 1, 2, 8, 64]))
        change = rng.integers(6)
        if change == 0:
            data[at : at + n] = rng.bytes(n)
        elif change == 1:
            data[at : at + n] = bytes([int(rng.choice([0, 255]))]) * n
        elif change == 2 and data:
            data[at] ^= 1 << int(rng.integers(8))
        elif change == 3:
            data[at:at] = data[at : at + n]
        elif change == 4:
            del data[at : at + n]
        elif rng.integers(4) == 0:
            del data[at:]
    return bytes(data)


def damaged_value(rng, value):
    """A copy of a JSON value in which something is replaced, left out or added."""
    if isinstance(value, dict | list) and value and rng.integers(4):
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = list(copy)[rng.integers(len(copy))] if isinstance(copy, dict) else int(rng.integers(len(copy)))
        change = rng.integers(8)
        if change == 0:
            del copy[key]
        elif change == 1 and isinstance(copy, dict):
            copy[str(ODD[rng.integers(len(ODD))])] = copy[key]
        else:
            copy[key] = damaged_value(rng, copy[key])
        return copy
    if isinstance(value, int) and rng.integers(2):
        return int(value) + int(rng.choice([-1, 1, 64, -2 * value, value]))
    return ODD[rng.integers(len(ODD))]


def as_json(value):
    return json.dumps(value).encode("utf-8", "surrogatepass")


def ends_well(read):
    """Whether a function succeeds; it may fail by a WpjaxError and by nothing else."""
    try:
        read()
    except WpjaxError:
        return False
    return True


def test_result_files_with_damaged_bytes(tmp_path):
    """They are refused, or hold what was written: damage may fall where nothing is kept.

    In a process of its own, so that a crash of HDF5 would be seen as one.
    """
    script = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from tests.test_fuzz import damaged_bytes, ends_well; from wpjax.results.sweep_result import SweepResult\n"
        "good, rng, path = SweepResult.from_netcdf(sys.argv[1]), np.random.default_rng(0), Path(sys.argv[2])\n"
        "good.to_netcdf(path); data = path.read_bytes()\n"
        "def read():\n"
        "    assert SweepResult.from_netcdf(path).dataset.identical(good.dataset)\n"
        "meta = data.index(b'OHDR') if b'OHDR' in data else 0\n"
        "def spoilt(i):\n"
        "    if i % 2: return damaged_bytes(rng, data)\n"
        "    at = int(rng.choice(marks)); return data[:at] + damaged_bytes(rng, data[at:at + 400]) + data[at + 400:]\n"
        "marks = [i for i in range(len(data) - 4) if data[i:i + 4] in (b'OHDR', b'TREE', b'HEAP', b'SNOD', b'GCOL', "
        "b'OCHK', b'FRHP', b'BTHD')] or [0]\n"
        "read_well = 0\n"
        "for i in range(120):\n"
        "    path.write_bytes(spoilt(i))\n"
        "    read_well += ends_well(read)\n"
        "assert read_well > 5, read_well\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(SAVED / "title.nc"), str(tmp_path / "r.nc")],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


def damaged_dataset(rng, data):
    """A dataset with one variable, dimension or attribute that is not as it should be."""
    data = data.copy(deep=True)
    name = list(data.variables)[rng.integers(len(data.variables))]
    values = data[name]
    change = rng.integers(8)
    if change == 0:
        return data.drop_vars(name)
    if change == 1:
        dim = list(data.sizes)[rng.integers(len(data.sizes))]
        return data.isel({dim: slice(0, int(rng.integers(0, 3)))})
    if change == 2:
        attribute = list(data.attrs)[rng.integers(len(data.attrs))]
        fits = [v for v in ODD if (isinstance(v, str | bool | float | int) and not isinstance(v, int | bool))
                or (isinstance(v, int) and abs(v) < 2**62)]  # fmt: skip
        value = fits[rng.integers(len(fits))]
        return data.assign_attrs({attribute: "?" if value == "\ud800" else value})
    if change == 3:
        return data.drop_attrs(deep=False).assign_attrs({k: v for k, v in data.attrs.items() if rng.integers(8)})
    if change == 4:
        return data.assign({name: (values.dims, np.full(values.shape, "text", object))})
    if values.dtype.kind not in "fiu" or not values.size:
        return data.assign({name: (values.dims, rng.permutation(values.values.ravel()).reshape(values.shape))})
    spoilt = values.values.astype(np.float64) if rng.integers(2) else values.values.copy()
    spoilt.flat[rng.integers(values.size)] = rng.choice([-1, 0, 3, 10**6, 2**30])
    if spoilt.dtype.kind == "f":
        spoilt.flat[rng.integers(values.size)] = rng.choice([np.nan, np.inf, 1e300, -1e29])
    return data.assign({name: (values.dims, spoilt)})


@pytest.mark.parametrize("kind", ["sweep", "curves"])
def test_result_files_with_other_values(tmp_path, kind, curves):
    """What is read is ranked, laid out on a page and drawn."""
    rng = np.random.default_rng(1)
    good = SweepResult.from_netcdf(SAVED / "title.nc").dataset if kind == "sweep" else curves
    n_read = n_drawn = 0

    def read():
        path.write_bytes(bytes(damaged_dataset(rng, good).to_netcdf(None, engine="h5netcdf")))
        if kind == "curves":
            found = Curves.from_netcdf(path)
            [found.area(m, "restore", 0) for m in found.measures]
            found.calibration()
            assert isinstance(found.summary, str)
            return
        result = SweepResult.from_netcdf(path)
        result.top(5, by=result.set_ranking)
        result.best()
        render_page(result, {}, 10)
        if n_drawn < 3:
            for name in available(result):
                make_figure(result, name)

    path = tmp_path / "r.nc"
    with np.errstate(all="ignore"):
        for _ in range(50 if kind == "sweep" else 40):
            well = ends_well(read)
            n_read += well
            n_drawn += well
    assert n_read > 5  # not everything is noticed; then it does no harm


@pytest.fixture(scope="module")
def curves():
    return curves_by_hand().dataset


def damaged_safetensors(rng, data):
    """A safetensors file whose header says something else, or with damaged bytes."""
    if rng.integers(3) == 0:
        return damaged_bytes(rng, data[:2000]) + data[2000:]
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = list(header)[rng.integers(len(header))]
    header[name] = damaged_value(rng, header[name])
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def test_anchor_files(tmp_path, tiny_pair):
    rng, data, path = np.random.default_rng(2), (SAVED / "title.anchor.safetensors").read_bytes(), tmp_path / "a"

    def read():
        spoilt = damaged_safetensors(rng, data)
        if rng.integers(2):  # the metadata are what a command reads
            size = struct.unpack("<Q", data[:8])[0]
            header = json.loads(data[8 : 8 + size])
            of = header["__metadata__"]
            of["diagnostics"] = as_json(damaged_value(rng, json.loads(of["diagnostics"]))).decode("latin-1")
            key = list(of)[rng.integers(len(of))]
            of[key] = str(damaged_value(rng, of[key])) if rng.integers(2) else of[key]
            text = json.dumps(header).encode()
            spoilt = struct.pack("<Q", len(text)) + text + data[8 + size :]
        path.write_bytes(spoilt)
        anchor = Anchor.load(path)
        anchor.check_belongs(tiny_pair)
        assert isinstance(anchor.acceptance, str)
        assert all(isinstance(d.verdict(), str) for d in anchor.diagnostics)

    read_well = sum(ends_well(read) for _ in range(300))
    assert 0 < read_well < 300


def test_prompt_files(tmp_path):
    rng, path = np.random.default_rng(3), tmp_path / "t.jsonl"
    good = [{"with": f"{i} aloud", "without": f"{i}", "args": {"a": [1]}, "response": "yes"} for i in range(14)]

    def read():
        lines = [as_json(damaged_value(rng, line) if rng.integers(12) == 0 else line) for line in good]
        data = b"\n".join(lines)
        path.write_bytes(damaged_bytes(rng, data) if rng.integers(3) == 0 else data)
        task = behaviour(path)
        for split in ("fit", "sweep", "test"):
            task.select(split, 4)

    read_well = sum(ends_well(read) for _ in range(300))
    assert 0 < read_well < 300


def test_configurations():
    rng = np.random.default_rng(4)
    good = [dict(load_model("tiny:base").hf_config), {
        "model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 4, "vocab_size": 57, "n_positions": 64,
        "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    }]  # fmt: skip
    good.append(good[0] | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }})  # fmt: skip
    for raw in good:
        parse_config(raw, "config.json")
    for i in range(600):
        raw = json.loads(as_json(damaged_value(rng, good[i % 3])))
        if isinstance(raw, dict):
            ends_well(lambda raw=raw: parse_config(raw, "config.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one small layer."""
    import jax

    from wpjax.checkpoints.checkpoint import Checkpoint
    from wpjax.models.decoder import init_params

    raw = {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 24, "vocab_size": 29, "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    }  # fmt: skip
    cfg = parse_config(raw, "config.json")
    path = tmp_path_factory.mktemp("models") / "one"
    save_checkpoint(path, Checkpoint(cfg, init_params(cfg, jax.random.key(0)), None, raw, None, "one"))
    sharded = path.with_name("sharded")
    save_checkpoint(sharded, load_checkpoint(path), max_shard_bytes=3000)
    return path


def test_model_folders(tmp_path, folder):
    rng, good = np.random.default_rng(5), load_checkpoint(folder)
    one, sharded = tmp_path / "one", tmp_path / "sharded"
    shutil.copytree(folder, one)
    shutil.copytree(folder.with_name("sharded"), sharded)
    weights = (one / "model.safetensors").read_bytes()
    index = json.loads((sharded / "model.safetensors.index.json").read_text())

    def read():
        if rng.integers(3):
            (one / "model.safetensors").write_bytes(damaged_safetensors(rng, weights))
            model = load_checkpoint(one)
        else:
            (sharded / "model.safetensors.index.json").write_bytes(as_json(damaged_value(rng, index)))
            model = load_checkpoint(sharded)
        with pytest.raises(WpjaxError, match=r"neither has a tokenizer|is .* at \["):
            make_pair(good, model)

    assert sum(ends_well(read) for _ in range(200)) < 200


def test_adapter_folders(tmp_path, folder):
    from safetensors.numpy import save_file

    rng, base = np.random.default_rng(7), load_checkpoint(folder)
    layer, shapes = "base_model.model.model.layers.0.", {"q_proj": (16, 16), "v_proj": (8, 16)}
    tensors = {
        f"{layer}self_attn.{name}.lora_{x}.weight": np.full(shape, 0.1, np.float32)
        for name, (out, wide) in shapes.items()
        for x, shape in (("A", (2, wide)), ("B", (out, 2)))
    }
    tensors |= {f"{layer}input_layernorm.weight": np.ones(16, np.float32)}
    tensors |= {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, 16), np.float32)
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    good = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"q_.*": 2}, "alpha_pattern": {"v_proj": 1.5},
        "use_rslora": False, "use_dora": False, "init_lora_weights": True, "target_modules": [*shapes],
        "exclude_modules": "o_proj", "layers_to_transform": [0], "layers_pattern": ["layers"], "bias": "none",
        "modules_to_save": ["input_layernorm"], "trainable_token_indices": {"embed_tokens": [0, 28]},
        "ensure_weight_tying": False, "base_model_name_or_path": "org/base",
    }  # fmt: skip

    def read():
        (tmp_path / "adapter_config.json").write_bytes(as_json(damaged_value(rng, good) if rng.integers(3) else good))
        (tmp_path / "adapter_model.safetensors").write_bytes(
            weights if rng.integers(3) else damaged_safetensors(rng, weights)
        )
        expert = load_checkpoint(tmp_path, base=base)
        with pytest.raises(WpjaxError, match=r"neither has a tokenizer|is .* at \["):
            make_pair(base, expert)

    assert 0 < sum(ends_well(read) for _ in range(400)) < 400


def test_finished_parts(tmp_path):
    rng, out = np.random.default_rng(6), tmp_path / "r.nc"
    identity = {"seed": 0, "prompts": ["a", "b"], "kinds": ("head",)}
    with Shards(out, "sweep", identity, resume=False) as shards:
        shards["a"] = np.arange(5.0)
    part, manifest = shards.folder / "a.npy", shards.folder / "manifest.json"
    files = {path: path.read_bytes() for path in (part, manifest)}

    def read():
        for path, data in files.items():
            path.write_bytes(damaged_bytes(rng, data) if rng.integers(2) else data)
        if rng.integers(2):
            manifest.write_bytes(as_json(damaged_value(rng, json.loads(files[manifest]))))
        check_parts(out, "sweep", resume=True, known={"seed": 0, "kinds": ("head",)})
        with Shards(out, "sweep", identity, resume=True) as shards:
            np.testing.assert_array_equal(shards["a"], np.arange(5.0))  # what is read is what was written

    read_well = sum(ends_well(read) for _ in range(300))
    assert 0 < read_well < 300
