"""Loading large checkpoints: what it takes of memory, what a pair shares, and arrays divided among devices."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.loading.measure import Peak, anonymous
from tests.tiny import build
from wpjax.checkpoints.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from wpjax.checkpoints.convert import flatten, leaves_from_hf, tensor_shapes, unflatten
from wpjax.checkpoints.folder import SafetensorsFolder
from wpjax.checkpoints.placing import Layer, host_rows, put_leaf
from wpjax.checkpoints.weights import WeightsWriter
from wpjax.errors import CheckpointError
from wpjax.models.config import ModelConfig
from wpjax.pairs import load_pair

DIVIDED = ["llama-gqa3", "gpt2-tied", "phi3", "gpt-neox"]
"""Tensors that hold one leaf, or three of them, turned or not, side by side or head by head."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: build(name, tmp_path_factory.mktemp("models") / name).folder for name in DIVIDED}


@pytest.fixture
def expert(folders, tmp_path):
    """Makes an expert of a base by changing some of its tensors."""

    def make(name, edit):
        tensors = load_file(folders[name] / "model.safetensors")
        edit(tensors)
        (tmp_path / "expert").mkdir()
        (tmp_path / "expert" / "config.json").write_text((folders[name] / "config.json").read_text())
        save_file(tensors, tmp_path / "expert" / "model.safetensors")
        return tmp_path / "expert"

    return make


def test_arrays_divided_among_devices(folders, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    rng, shape = np.random.default_rng(0), {"A": (2, 24), "B": (48, 2)}
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format(f): rng.standard_normal(of).astype(np.float32) for f, of in shape.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-m", "tests.divided_loading", tmp_path, folders["llama-gqa3"], *folders.values()]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", DIVIDED)
def test_a_pair_keeps_equal_arrays_once(folders, expert, name):
    """A fine-tune of one MLP matrix of one layer: all other arrays are the base's own."""
    changed = {"gpt2-tied": "mlp.c_proj.weight", "gpt-neox": "mlp.dense_4h_to_h.weight"}
    tensor = f"2.{changed.get(name, 'mlp.down_proj.weight')}"

    def edit(tensors):
        full = next(n for n in tensors if n.endswith(tensor))
        tensors[full] = tensors[full] + np.float32(1)

    folder = expert(name, edit)
    base = load_checkpoint(folders[name])
    model, alone = load_checkpoint(folder, base=base), load_checkpoint(folder)
    ours, theirs = flatten(base.params), flatten(model.params)
    assert [path for path, leaf in theirs.items() if leaf is not ours[path]] == ["blocks/mlp/W_out"]
    assert fingerprint(model.cfg, model.params) == fingerprint(alone.cfg, alone.params)


def test_only_the_same_bytes_are_shared(folders, expert):
    """Not a zero of another sign, not another precision, not a part of the vocabulary."""

    def edit(tensors):
        for name in list(tensors):
            tensors[name] = np.where(tensors[name] == 0, np.float32(-0.0), tensors[name])
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:50]
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:50]
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 0

    folder = expert("llama-gqa3", edit)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    base = load_checkpoint(folders["llama-gqa3"])
    model = flatten(load_checkpoint(folder, base=base).params)
    own = [path for path, leaf in model.items() if leaf is not flatten(base.params)[path]]
    assert own == ["embed/W_E", "final_norm/scale", "unembed/W_U"]
    negative = dataclasses.replace(base, params=jax.tree.map(lambda a: jnp.where(a == 0, 0.0, a), base.params))
    zeros = flatten(load_checkpoint(folder, base=negative).params)["final_norm/scale"]
    assert bool((zeros == 0).all())
    halves = flatten(load_checkpoint(folders["llama-gqa3"], "bfloat16", base=base).params)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in halves.values())


def test_a_shared_array_stays_shared_in_a_pair_of_other_contexts(tmp_path):
    """The embedded pair with a shorter context in the expert, and another final norm."""
    base = load_checkpoint("tiny:base")
    params = {**base.params, "final_norm": {"scale": base.params["final_norm"]["scale"] * 2}}
    config = {**base.hf_config, "max_position_embeddings": base.cfg.n_ctx // 2}
    cfg = dataclasses.replace(base.cfg, n_ctx=base.cfg.n_ctx // 2)
    save_checkpoint(tmp_path / "expert", dataclasses.replace(base, cfg=cfg, params=params, hf_config=config))
    pair = load_pair("tiny:base", tmp_path / "expert")
    theirs = flatten(pair.expert)
    own = [path for path, leaf in flatten(pair.base).items() if leaf is not theirs[path]]
    assert own == ["final_norm/scale"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model of 160 MiB in bfloat16; its largest leaf is 32 MiB."""
    cfg = ModelConfig("llama", 4, 512, 4, 2, 128, 8192, 8192, 64)
    folder, pool = tmp_path_factory.mktemp("wide"), np.random.default_rng(0).standard_normal(2**20, np.float32)
    with WeightsWriter(folder, tensor_shapes(cfg)) as weights:
        for i, (name, shape) in enumerate(tensor_shapes(cfg).items()):
            weights.add(name, np.resize(pool[i:], shape).astype(jnp.bfloat16))
    return cfg, folder


def test_memory_of_loading(wide):
    """Above the arrays that stay, a leaf is made in the memory that stays; of each that goes, only one is there."""
    cfg, folder = wide
    largest = 4 * 512 * 8192 * 2
    before, sizes = anonymous(), []
    with Peak() as dropped:
        for _, leaf in leaves_from_hf(cfg, SafetensorsFolder(folder), "bfloat16"):
            sizes.append(leaf.nbytes)
            del leaf
    assert max(sizes) == largest
    assert dropped.bytes - before < 1.15 * largest
    before = anonymous()
    with Peak() as kept:
        leaves = dict(leaves_from_hf(cfg, SafetensorsFolder(folder), "bfloat16"))
    assert kept.bytes - before < sum(sizes) + 0.15 * largest
    twins = anonymous()
    with Peak() as shared:
        again = dict(leaves_from_hf(cfg, SafetensorsFolder(folder), "bfloat16", like=unflatten(leaves)))
    assert all(again[path] is leaf for path, leaf in leaves.items())
    assert shared.bytes - twins < 1.15 * largest + 2**24


def test_a_cast_needs_no_copy_of_a_tensor(wide):
    cfg, folder = wide
    before, sizes = anonymous(), []
    with Peak() as peak:
        for _, leaf in leaves_from_hf(cfg, SafetensorsFolder(folder), "float32"):
            sizes.append(leaf.nbytes)
            del leaf
    assert peak.bytes - before < 1.15 * max(sizes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_float_is_cast_and_checked(dtype):
    """Rows beyond the piece that is copied at once; NaN and infinity in the last of them."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((300, 40)).astype(jnp.dtype(dtype))
    for turned in (values, values.T):
        leaf = put_leaf((1, *turned.shape), np.dtype("float32"), [Layer("w", turned)], where="file")
        np.testing.assert_array_equal(np.asarray(leaf[0]), turned.astype(np.float32))
    for bad in (np.nan, -np.inf):
        values[-1, -1] = bad
        with pytest.raises(CheckpointError, match="file: tensor w holds NaN or infinity"):
            put_leaf(values.T.shape, np.dtype("float32"), [Layer("w", values.T)], where="file")
        assert not bool(jnp.isfinite(put_leaf(values.shape, np.dtype("float32"), [Layer("w", values)])).all())


def test_rows_of_arrays_on_several_kinds_of_memory():
    values = np.arange(12.0).reshape(4, 3)
    for array in (values, jnp.asarray(values)):
        np.testing.assert_array_equal(host_rows(array, 1, 3), values[1:3])


def test_a_truncated_shard_is_named(tmp_path):
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file({"a": np.zeros(4)}, tmp_path / names[0])
    save_file({"b": np.zeros(400)}, tmp_path / names[1])
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    whole = (tmp_path / names[1]).read_bytes()
    for size in (len(whole) - 1, 100, 7, 0):
        (tmp_path / names[1]).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"{names[1]}: damaged or truncated .*; download it again") as error:
            SafetensorsFolder(tmp_path)
        assert "\n" not in str(error.value)
