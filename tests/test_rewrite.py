"""Models written tensor by tensor: what is not changed stays bit for bit, and transformers loads the folder."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.ggufs import write_gguf
from tests.tiny import build
from wpjax.checkpoints.checkpoint import fingerprint, load_checkpoint
from wpjax.checkpoints.rewrite import open_model, rewrite_folder
from wpjax.errors import CheckpointError, OutputError

TOKENS = torch.tensor(np.random.default_rng(2).integers(0, 61, (2, 9)))
NAME = "model.layers.1.mlp.up_proj.weight"


def same(name, tensor):
    return tensor


def tensors_of(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_bytes_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert tensor.tobytes() == theirs[name].tobytes(), name


def logits(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build("llama-gqa3", tmp_path_factory.mktemp("llama"))


def with_extras(folder, prefix="", **tensors):
    """Change what a folder holds: names without a prefix, and more tensors."""
    old = load_file(folder / "model.safetensors")
    save_file({**{n.removeprefix(prefix): t for n, t in old.items()}, **tensors}, folder / "model.safetensors")


@pytest.mark.parametrize("case", ["gqa", "shards in", "shards out", "bfloat16", "gpt2 with buffers", "phi3", "head"])
def test_what_is_not_changed_stays_bit_for_bit_and_loads_in_transformers(tmp_path, case):
    name = {"gpt2 with buffers": "gpt2-tied", "phi3": "phi3"}.get(case, "llama-gqa3")
    built = build(name, tmp_path / "built")
    folder = tmp_path / "in"
    if case == "bfloat16":
        built.model.to(torch.bfloat16)
    built.model.save_pretrained(folder, max_shard_size="20KB" if case == "shards in" else "1GB")
    if case == "gpt2 with buffers":
        with_extras(folder, "transformer.", **{"h.0.attn.bias": np.ones((1, 1, 64, 64), bool)})
    if case == "head":
        with_extras(folder, **{"score.weight": np.ones((2, 24), np.float16)})
    rewrite_folder(folder, tmp_path / "out", same, max_shard_bytes=20_000 if case == "shards out" else 10**9)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (case == "shards out")
    assert_bytes_equal(tensors_of(tmp_path / "out"), tensors_of(folder))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), rtol=0, atol=0)


def test_a_change_reaches_one_tensor_by_its_full_name(tmp_path):
    """Also where the file leaves out the prefix, and holds a tied embedding twice."""
    folder = build("gpt2-tied", tmp_path / "in").folder
    with_extras(folder, "transformer.")
    embedding = load_file(folder / "model.safetensors")["wte.weight"]
    with_extras(folder, **{"lm_head.weight": embedding})
    rewrite_folder(folder, tmp_path / "out", lambda n, w: 2 * w if n == "transformer.wte.weight" else w)
    old, new = tensors_of(folder), tensors_of(tmp_path / "out")
    np.testing.assert_array_equal(new.pop("wte.weight"), 2 * old.pop("wte.weight"))
    del old["lm_head.weight"]
    assert_bytes_equal(new, old)
    load_checkpoint(str(tmp_path / "out"))  # the two copies do not contradict each other


def test_files_beside_the_weights(tmp_path):
    """Tokenizer and configuration are the source's; code and notes of training are not copied."""
    source = tmp_path / "in"
    rewrite_folder("tiny:expert", source, same)
    for name in ("LICENSE", "modeling_own.py", "trainer_state.json", "generation_config.json"):
        (source / name).write_text("{}")
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    seen = []
    files = {"README.md": ""}

    def change(name, tensor):
        seen.append(name)
        files["README.md"] = f"{len(seen)} tensors"
        return tensor

    rewrite_folder(source, tmp_path / "out", change, files=files)
    out = {path.name for path in (tmp_path / "out").iterdir()}
    assert out == {path.name for path in source.iterdir()} - {"modeling_own.py", "trainer_state.json"} | {"README.md"}
    assert (tmp_path / "out" / "README.md").read_text() == f"{len(seen)} tensors"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert sorted(seen) == sorted(open_model(source).names)
    loaded = load_checkpoint(str(tmp_path / "out"))
    assert loaded.tokenizer.chat_template
    assert fingerprint(loaded.cfg, loaded.params) == fingerprint(*_of(load_checkpoint("tiny:expert")))


def _of(model):
    return model.cfg, model.params


def test_a_gguf_file_becomes_a_folder(llama, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", llama)
    rewrite_folder(path, tmp_path / "out", same, dtype="bfloat16")
    ours, file = (load_checkpoint(str(p), "bfloat16") for p in (tmp_path / "out", path))
    assert fingerprint(*_of(ours)) == fingerprint(*_of(file))
    assert {t.dtype.name for t in tensors_of(tmp_path / "out").values()} == {"bfloat16"}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_what_goes_wrong_leaves_nothing_behind(llama, tmp_path):
    def fail(name, tensor):
        if name == NAME:
            raise CheckpointError("no")
        return tensor

    for change, options, says in (
        (fail, {}, "no"),
        (lambda n, w: w[:1], {}, r"would become one of \(1, 24\)"),
        (lambda n, w: w * 1e6, {"dtype": "float16"}, "NaN or infinity as float16"),
    ):
        with pytest.raises(CheckpointError, match=says):
            rewrite_folder(llama.folder, tmp_path / "out", change, **options)
        assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="lies inside the model"):
        rewrite_folder(llama.folder, llama.folder / "out", same)
    with pytest.raises(OutputError, match="read as an input"):
        rewrite_folder(llama.folder, llama.folder, same, overwrite=True)
    with pytest.raises(CheckpointError, match=r"no tensor model\.norm"):
        open_model(llama.folder).read("model.norm")


def test_memory_holds_one_tensor_at_a_time(tmp_path):
    rewrite_folder("tiny:base", tmp_path / "in", same)
    sizes = [t.nbytes for t in tensors_of(tmp_path / "in").values()]
    tracemalloc.start()
    rewrite_folder(tmp_path / "in", tmp_path / "out", same)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < max(sizes) * 3 + 300_000 < sum(sizes)
