"""Loading strictly: everything a checkpoint can get wrong is refused by name, and the three sources agree."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.ggufs import write_gguf
from tests.tiny import build
from wpjax.checkpoints.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from wpjax.checkpoints.convert import flatten
from wpjax.errors import CheckpointError, ConfigError, PairError
from wpjax.models.decoder import forward
from wpjax.pairs import load_model, load_pair, make_pair, planted_components

TOKENS = np.random.default_rng(2).integers(0, 61, (2, 9))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build("llama-gqa3", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama, tmp_path):
    """A copy to damage."""
    return shutil.copytree(llama.folder, tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"hidden_act": "mish"}, "activation 'mish' is not implemented"),
        ({"num_key_value_heads": 4}, "cannot share 4 KV heads"),
        ({"num_attention_heads": "six"}, "transformers rejects it"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "beta": 1}}, "unknown beta"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not a size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1 is not a size"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 is not a size"),
        ({"intermediate_size": 10**30}, "intermediate_size=10+ is not a size"),
        ({"rms_norm_eps": float("nan")}, "epsilon of the norms is nan"),
        ({"rope_parameters": {"rope_type": "linear", "factor": {}}}, "factor={} is not a value"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "factor='x' is not a value"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta=0 is not a value"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0]}},
            "no usable frequencies",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1, "factor": 2.0}}, "no usable frequencies"),
    ],
)
def test_configurations_are_refused_by_attribute(folder, changes, says):
    edit_config(folder, **changes)
    with pytest.raises(ConfigError, match=says):
        load_checkpoint(str(folder))


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop(NAME), f"missing tensor {NAME}"),
        (lambda t: t.update(extra=t[NAME]), "unknown tensor extra"),
        (lambda t: t.update({NAME: t[NAME][:-1]}), r"up_proj.weight has shape \(39, 24\), config.json says \(40, 24\)"),
        (lambda t: t.update({NAME: t[NAME].T.copy()}), r"has shape \(24, 40\)"),
        (lambda t: t.update({NAME: np.full_like(t[NAME], np.nan)}), "up_proj.weight holds NaN"),
        (lambda t: t.update({NAME: t[NAME].astype(np.int32)}), "dtype int32"),
        (lambda t: t.update({NAME: np.full(t[NAME].shape, 1e300)}), "up_proj.weight holds NaN or infinity"),
    ],
)
def test_tensors_are_refused_by_name(folder, edit, says):
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(str(folder))


def test_damaged_and_missing_files(folder, tmp_path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_checkpoint(str(folder))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_checkpoint(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a pickle, which is never read"):
        load_checkpoint(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        load_checkpoint(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_checkpoint(str(folder))
    with pytest.raises(CheckpointError, match="no such folder"):
        load_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="name the folder"):
        load_checkpoint(__file__)


def shard(folder, names_of_first):
    """Split the weights in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    first = {n: t for n, t in tensors.items() if n in names_of_first}
    rest = {n: t for n, t in tensors.items() if n not in first}
    save_file(first, folder / "a.safetensors")
    save_file(rest, folder / "b.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(first, "a.safetensors") | dict.fromkeys(rest, "b.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards(llama, folder):
    index = shard(folder, [NAME])
    whole, parts = load_checkpoint(str(llama.folder)), load_checkpoint(str(folder))
    assert fingerprint(whole.cfg, whole.params) == fingerprint(parts.cfg, parts.params)
    save_file({NAME: np.zeros((40, 24), np.float32)}, folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=f"{NAME} stands in more than one file"):
        load_checkpoint(str(folder))
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the shard b\.safetensors .* is missing"):
        load_checkpoint(str(folder))
    index["weight_map"][NAME] = "../model/a.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the folder"):
        load_checkpoint(str(folder))


def test_saving_in_shards_loads_in_transformers(llama, tmp_path):
    save_checkpoint(tmp_path / "out", load_checkpoint(str(llama.folder)), max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    with torch.no_grad():
        ours, theirs = (
            m(torch.tensor(TOKENS)).logits for m in (type(llama.model).from_pretrained(tmp_path / "out"), llama.model)
        )
    torch.testing.assert_close(ours, theirs)


def test_a_tied_checkpoint_may_repeat_its_embedding_but_not_contradict_it(tmp_path):
    tied = build("llama-tied", tmp_path / "tied").folder
    edit_tensors(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    load_checkpoint(str(tied))
    edit_tensors(tied, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs .* set tie_word_embeddings to false"):
        load_checkpoint(str(tied))


def test_gpt2_checkpoints_without_prefix_and_with_mask_buffers(tmp_path):
    gpt2 = build("gpt2-tied", tmp_path / "gpt2").folder
    before = load_checkpoint(str(gpt2))

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)

    edit_tensors(gpt2, strip)
    after = load_checkpoint(str(gpt2))
    assert fingerprint(before.cfg, before.params) == fingerprint(after.cfg, after.params)


def test_a_hub_id_is_found_in_the_cache_and_missing_ones_are_explained(llama, tmp_path, monkeypatch):
    """The layout of the hub's own cache; the network is off in all tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(llama.folder, cached / "snapshots" / ("0" * 40))
    found = load_checkpoint("org/name")
    assert found.source == "org/name"
    assert fingerprint(found.cfg, found.params) == fingerprint(*_loaded(llama.folder))
    with pytest.raises(CheckpointError, match="org/other: no such folder here, and it is not in the cache"):
        load_checkpoint("org/other")
    with pytest.raises(CheckpointError, match="not a hub id"):
        load_checkpoint("a b/c")


def _loaded(folder):
    model = load_checkpoint(str(folder))
    return model.cfg, model.params


def test_gguf_equals_the_folder(llama, tmp_path):
    ours = load_checkpoint(write_gguf(tmp_path / "m.gguf", llama))
    folder = load_checkpoint(str(llama.folder))
    chex.assert_trees_all_equal(ours.params, folder.params)
    assert ours.cfg == folder.cfg
    assert ours.tokenizer('!#!"')["input_ids"] == [0, 2, 60]
    save_checkpoint(tmp_path / "out", ours)
    with torch.no_grad():
        logits = type(llama.model).from_pretrained(tmp_path / "out")(torch.tensor(TOKENS)).logits
    np.testing.assert_allclose(forward(ours.cfg, ours.params, jnp.asarray(TOKENS)).logits, logits, atol=1e-4)


def test_bad_gguf(llama, tmp_path):
    good = write_gguf(tmp_path / "m.gguf", llama)
    (tmp_path / "short.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:500])
    (tmp_path / "text.gguf").write_text("hello, this is not a model")
    for name in ("short", "text"):
        with pytest.raises(CheckpointError, match="not a readable GGUF"):
            load_checkpoint(str(tmp_path / f"{name}.gguf"))
    scaled = write_gguf(tmp_path / "scaled.gguf", llama, **{"llama.rope.scaling.type": "dynamic"})
    with pytest.raises(CheckpointError, match="rotary scaling 'dynamic'"):
        load_checkpoint(scaled)
    assert load_checkpoint(good).cfg.n_rep == 3


def test_bfloat16(llama):
    model = load_checkpoint(str(llama.folder), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    whole = load_checkpoint(str(llama.folder))
    coarse, fine = (forward(m.cfg, m.params, jnp.asarray(TOKENS)).logits for m in (model, whole))
    assert coarse.dtype == jnp.float32
    assert 0 < np.abs(coarse - fine).max() < 0.05 * np.abs(fine).max()

    twice = load_checkpoint(str(llama.folder), dtype="bfloat16x2")
    assert twice.cfg.activation_splits == 2
    assert fingerprint(twice.cfg, twice.params) == fingerprint(model.cfg, model.params)
    exact = forward(whole.cfg, jax.tree.map(lambda a: a.astype("float32"), model.params), jnp.asarray(TOKENS)).logits
    close = forward(twice.cfg, twice.params, jnp.asarray(TOKENS)).logits
    assert 0 < np.abs(close - exact).max() < 1e-4 * np.abs(exact).max()
    with pytest.raises(CheckpointError, match="unknown dtype 'float16'; there are float32, bfloat16, bfloat16x2"):
        load_checkpoint(str(llama.folder), dtype="float16")


def test_a_fingerprint_sees_one_changed_number(llama):
    cfg, params = _loaded(llama.folder)
    changed = jax.tree.map(lambda a: a, params)
    changed["blocks"]["mlp"]["W_in"] = params["blocks"]["mlp"]["W_in"].at[1, 2, 3].add(1e-3)
    assert fingerprint(cfg, params) == fingerprint(cfg, jax.tree.map(jnp.copy, params))
    assert fingerprint(cfg, params) != fingerprint(cfg, changed)


@pytest.fixture(scope="module")
def tiny_base():
    return load_model("tiny:base")


def test_pairs_must_be_pairs(tiny_base, tmp_path, llama):
    import dataclasses

    from transformers import PreTrainedTokenizerFast

    with pytest.raises(PairError, match=r"not one architecture: n_layers: 8 != 3"):
        make_pair(tiny_base, load_checkpoint(str(llama.folder)))
    with pytest.raises(PairError, match="equal weights"):
        load_pair("tiny:base", "tiny:base")
    other = json.loads(tiny_base.tokenizer.backend_tokenizer.to_str())
    vocab = other["model"]["vocab"]
    vocab["Ġthe"], vocab["The"] = vocab["The"], vocab["Ġthe"]
    from tokenizers import Tokenizer

    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(other)))
    expert = load_model("tiny:expert")
    with pytest.raises(
        PairError, match=r"2 tokens with different ids \(e\.g\. 'The'|2 tokens with different ids \(e\.g\. 'Ġthe'"
    ):
        make_pair(tiny_base, dataclasses.replace(expert, tokenizer=swapped))
    bigger = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_base.tokenizer.backend_tokenizer.to_str())
    )
    bigger.add_tokens(["<new>"])
    assert (
        make_pair(tiny_base, dataclasses.replace(expert, tokenizer=bigger))
        .notes[0]
        .endswith("has no row for '<new>': no prompt may hold such a token")
    )
    vocab["Ġordinary"] = len(tiny_base.tokenizer)
    longer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(other)))
    with pytest.raises(PairError, match="tokenizer has 1409 tokens, the model 1408"):
        make_pair(tiny_base, dataclasses.replace(expert, tokenizer=longer))
    with pytest.raises(PairError, match="neither has a tokenizer"):
        make_pair(dataclasses.replace(tiny_base, tokenizer=None), dataclasses.replace(expert, tokenizer=None))
    with pytest.raises(CheckpointError, match="there are tiny:base, tiny:expert, tiny:planted"):
        load_model("tiny:nothing")


def test_difference_norms(tiny_base):
    """The planted expert changed heads, KV groups and neurons, and nothing else."""
    pair = load_pair("tiny:base", "tiny:planted")
    norms = {row.unit: row for row in pair.diff_norms()}
    assert {unit for unit, row in norms.items() if row.n_changed} == {"head", "kv_group", "neuron"}
    base, expert = (flatten(p) for p in (pair.base, pair.expert))
    delta = {path: np.asarray(expert[path]) - np.asarray(base[path]) for path in base}
    by_hand = np.sqrt(sum(np.square(delta[f"blocks/attn/{w}"]).sum() for w in ("W_K", "W_V")))
    assert norms["kv_group"].delta == pytest.approx(by_hand, rel=1e-5)
    assert sum(row.n_params for row in norms.values()) == sum(leaf.size for leaf in base.values())
    from wpjax.components import Component

    q, o = delta["blocks/attn/W_Q"][3, :, 5], delta["blocks/attn/W_O"][3, 5]
    expected = np.sqrt(np.square(q).sum() + np.square(o).sum())
    assert pair.delta_norms([Component("head", 3, 5)])[0] == pytest.approx(expected, rel=1e-5)
    assert len(planted_components()) == 22


def test_more_layers_than_tensors_are_refused_before_their_names_are_made(folder):
    edit_config(folder, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match="cannot make the 1000000000 layers"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_json_that_nests_too_deep_is_not_readable(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not readable as JSON"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({}, "no weight_map"),
        ({"weight_map": []}, "no weight_map"),
        ({"weight_map": {"a": 1, "b": "x"}}, "no weight_map"),
        ({"weight_map": {"a": ["x"]}}, "no weight_map"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside the folder"),
        ({"weight_map": {"a": ".."}}, "outside the folder"),
        ({"weight_map": {"a": "x" * 5000, "b": "config.json"}}, "two sets of weights"),
    ],
)
def test_bad_indices(folder, index, says):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["x" * 5000, "~no-such-user/model"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(CheckpointError, match="cannot be a folder or a file"):
        load_checkpoint(name)


@pytest.mark.parametrize("ids", ["x", 1.5, [None], {"a": 1}, 10**12])
def test_stop_tokens_are_ids(folder, ids):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id=.* is not a token id"):
        load_checkpoint(str(folder))
