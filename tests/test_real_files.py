"""Files as people have them: what can be read is read as transformers reads it, and the rest is refused by name.

Every model here is a tiny random one that transformers wrote, and then changed as files in public are. Logits are
compared with transformers' in torch.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.ggufs import TOKENS, write_gguf
from tests.tiny import build
from wpjax.behaviours import (
    TEMPLATE_DATE,
    Behaviour,
    PromptPair,
    behaviour,
    encode_texts,
    parse_checker,
    render,
)
from wpjax.behaviours.checkers import no_comma
from wpjax.checkpoints.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from wpjax.checkpoints.hf_config import unread_attributes
from wpjax.checkpoints.rewrite import open_model
from wpjax.cli import inspect
from wpjax.errors import AnchorRejected, BehaviourError, CheckpointError, ConfigError, PairError, WpjaxError
from wpjax.estimators.sweep import sweep
from wpjax.metrics.anchor import Anchor
from wpjax.models.decoder import forward
from wpjax.models.sites import Site
from wpjax.pairs import load_pair, make_pair
from wpjax.patchfiles import apply_patches, save_patch
from wpjax.patching import PatchMask, materialize

END = "<|endoftext|>"
V = 270
LLAMA: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 250, (2, 9))
QUESTION = "why is the sky blue?"


def byte_level() -> Tokenizer:
    """A byte-level tokenizer of V tokens, the first of which ends texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [QUESTION, "the owl and the bee"] * 4,
        trainers.BpeTrainer(vocab_size=V, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    assert tokenizer.get_vocab_size() == V
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, **config) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(folder: Path, seed: int = 0, family: str = "llama", **changes) -> Path:
    """A random model as transformers saves it, with a byte-level tokenizer; the seed makes another one."""
    config = transformers.AutoConfig.for_model(family, **(GPT2 if family == "gpt2" else LLAMA) | changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    write_tokenizer(folder, byte_level())
    return folder


@pytest.fixture(scope="module")
def models_of(tmp_path_factory):
    """Folders of models that no test may change: "llama", another "llama-2", "tied", "gpt2"."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": write_model(folder / "llama"),
        "llama-2": write_model(folder / "llama-2", seed=1),
        "tied": write_model(folder / "tied", tie_word_embeddings=True),
        "gpt2": write_model(folder / "gpt2", family="gpt2"),
    }


@pytest.fixture
def copy(models_of, tmp_path):
    """A function that copies a model to a folder of its own, to change it."""
    return lambda name, to=None: shutil.copytree(models_of[name], tmp_path / (to or name))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def torch_logits(folder: Path, ids=IDS) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.numpy()


def our_logits(cfg, params, ids=IDS) -> np.ndarray:
    return np.asarray(forward(cfg, params, jnp.asarray(ids)).logits)


def check_logits(folder: Path) -> None:
    model = load_checkpoint(folder)
    np.testing.assert_allclose(our_logits(model.cfg, model.params), torch_logits(folder), atol=1e-4)


# --- config.json


@pytest.mark.parametrize(
    ("family", "changes", "unread"),
    [
        ("llama", {"bias": False, "internal_version": "7b"}, {"bias": False, "internal_version": "7b"}),
        ("llama", {"_commit_hash": "0" * 40, "attn_implementation": "eager"}, None),
        ("llama", {"max_sequence_length": 32, "pad_token_id": -1}, {"max_sequence_length": 32}),
        ("llama", {"max_length": 20, "prefix": None, "pruned_heads": {}, "add_cross_attention": False}, None),
        ("llama", {"quantization_config": None, "sliding_window": None, "is_causal": True}, {}),
        ("llama", {"pretraining_tp": 2}, {}),
        ("llama", {"sliding_window": 32}, {"sliding_window": 32}),
        ("llama", {"layer_types": ["full_attention"] * 2}, None),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"rope_type": "default", "factor": 1.0}},
            {"rope_scaling.factor": 1.0},
        ),
        ("gpt2", {"_num_labels": 1, "author": "a", "output_past": True}, None),
        ("gpt2", {"hidden_size": 16, "use_bfloat16": False, "finetuning_task": None}, {"use_bfloat16": False}),
    ],
)
def test_attributes_that_transformers_does_not_read(copy, family, changes, unread):
    folder = copy(family)
    edit_json(folder / "config.json", **changes)
    check_logits(folder)
    found = unread_attributes(json.loads((folder / "config.json").read_text()))
    assert found == unread if unread is not None else set(found) <= {*changes, *(f"{name}.factor" for name in changes)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"auto_map": {"AutoModel": "x.X"}}, "auto_map: names code inside .*, pass --ignore-config auto_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq, which transformers cannot undo; name"),
        ({"is_causal": False}, "is_causal=False is not implemented"),
        ({"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config=.* is not implemented"),
        ({"model_type": None, "architectures": ["MambaForCausalLM"]}, "model_type None is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved=True is not implemented"),
    ],
)
def test_attributes_that_may_change_the_model_are_refused(copy, changes, says):
    folder = copy("llama")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(folder)
    if changes.get("model_type", 0) is not None:  # the user may know better
        assert load_checkpoint(folder, ignore_config=tuple(changes)).cfg.n_layers == 2


def test_what_a_newer_transformers_declares_is_unknown_unless_it_has_its_default(copy):
    """`use_cache` stands for an attribute that the class declares; here no family knows `scale_attn_weights`."""
    from wpjax.checkpoints.hf_config import parse_config
    from wpjax.models.families import FAMILIES, register

    raw = json.loads((copy("gpt2") / "config.json").read_text())
    gpt2 = FAMILIES["gpt2"]
    older = {name: value for name, value in gpt2.required.items() if name != "scale_attn_weights"}
    register(dataclasses.replace(gpt2, required=older))
    try:
        assert parse_config({**raw, "scale_attn_weights": True}, "config.json").n_layers == 2
        with pytest.raises(CheckpointError, match=r"attribute scale_attn_weights=False .*--ignore-config scale_"):
            parse_config({**raw, "scale_attn_weights": False}, "config.json")
    finally:
        register(gpt2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_architecture_tells_the_model_type(copy, tmp_path, family):
    folder = copy(family)
    raw = json.loads((folder / "config.json").read_text())
    expected = torch_logits(folder)
    del raw["model_type"]
    (folder / "config.json").write_text(json.dumps(raw))
    model = load_checkpoint(folder)
    np.testing.assert_allclose(our_logits(model.cfg, model.params), expected, atol=1e-4)
    save_checkpoint(tmp_path / "again", model)
    np.testing.assert_allclose(torch_logits(tmp_path / "again"), expected, atol=1e-4)


# --- weights


def shards(folder: Path, edit=lambda tensors: None) -> None:
    """Add the weights once more, in two shards with their index."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, members in parts.items():
        save_file({n: tensors[n] for n in members}, folder / file, metadata={"format": "pt"})
    weight_map = {n: file for file, members in parts.items() for n in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_two_sets_of_weights(copy):
    folder = copy("llama")
    shards(folder)
    with pytest.raises(CheckpointError, match=r"two sets of weights, model\.safetensors and the shards of model\."):
        load_checkpoint(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="two sets of weights"):
        load_checkpoint(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    check_logits(folder)  # the index alone is left of the shards


def test_adapters(copy, models_of):
    """Beside a model one is refused, both named; alone it is an expert, and no model without its base."""
    folder = copy("llama")
    about = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    factors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{x}.weight": np.full(shape, 0.02, np.float32)
        for layer in range(2)
        for x, shape in (("A", (4, 16)), ("B", (16, 4)))
    }
    save_file(factors, folder / "adapter_model.safetensors")
    merge = r"PeftModel\.from_pretrained\(AutoModelForCausalLM\.from_pretrained\('org/base'\), 'llama'\)\.merge_and_unl"
    beside = (
        rf"a PEFT adapter \(adapter_config\.json\) beside a model \(model\.saf.*remove the adapter's files; .*{merge}"
    )
    for base in (None, load_checkpoint(models_of["llama"])):
        with pytest.raises(CheckpointError, match=beside):
            load_checkpoint(folder, base=base)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=rf"LORA of org/base\), not a whole model; name it as the .*{merge}"):
        load_checkpoint(folder)
    pair = load_pair(models_of["llama"], folder)
    changed = {norm.unit: norm.n_changed for norm in pair.diff_norms() if norm.n_changed}
    assert changed == {"head": 2 * 16 * 16}  # the queries of both layers
    step = np.asarray(pair.expert["blocks"]["attn"]["W_Q"]) - np.asarray(pair.base["blocks"]["attn"]["W_Q"])
    np.testing.assert_allclose(step, 8 / 4 * 4 * 0.02**2, atol=1e-6)  # s times the sum over the rank


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "m.gguf"])
def test_git_lfs_pointers(copy, name):
    folder = copy("llama")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"
    (folder / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=f"{name}: a git-lfs pointer in place of the file; run `git lfs install`"):
        load_checkpoint(folder / name if name.endswith("gguf") else folder)


@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_a_tied_model_saved_as_its_head_alone(copy, name):
    folder = copy(name)
    expected = torch_logits(folder)
    embedding = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop(embedding)}))
    model = load_checkpoint(folder)
    np.testing.assert_allclose(our_logits(model.cfg, model.params), expected, atol=1e-4)


def test_heads_for_other_tasks_are_left_out(copy):
    folder = copy("llama")
    edit_tensors(folder, lambda t: t.update({"score.weight": np.zeros((2, 16)), "v_head.summary.bias": np.zeros(1)}))
    assert load_checkpoint(folder).left_out == ("score.weight", "v_head.summary.bias")
    check_logits(folder)


def test_a_tied_expert_with_a_head_of_its_own(copy):
    """transformers unties such a model; here its config.json has to say so, and the base may stay tied."""
    base, expert = copy("tied", "base"), copy("tied", "expert")
    head = np.random.default_rng(1).standard_normal((V, 16)).astype(np.float32)
    edit_tensors(expert, lambda t: t.update({"lm_head.weight": head}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from .* set tie_word_embeddings to false"):
        load_pair(base, expert)
    edit_json(expert / "config.json", tie_word_embeddings=False)
    pair = load_pair(base, expert)
    assert pair.notes == (f"{expert} has a head of its own; that of {base} is its embedding",)
    np.testing.assert_allclose(our_logits(pair.cfg, pair.base), torch_logits(base), atol=1e-4)
    np.testing.assert_allclose(our_logits(pair.cfg, pair.expert), torch_logits(expert), atol=1e-4)


def test_a_checkpoint_in_8_bits(copy):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    folder = copy("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_torch(folder / "model.safetensors")
    save_torch({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {name} .*dequantise"):
        load_checkpoint(folder)


def test_every_quantisation_of_transformers_says_how_to_undo_it(copy):
    """What transformers can undo, by its own classes: by an argument of its configuration, or a method afterwards."""
    import inspect as python

    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    folder = copy("llama")
    (folder / "model.safetensors").unlink()  # what is said, is said before weights are read
    for method, kind in AUTO_QUANTIZATION_CONFIG_MAPPING.items():
        bits = {f"load_in_{n}bit": True for n in (4, 8) if method.endswith(f"_{n}bit")}
        name = method.removesuffix("_4bit").removesuffix("_8bit")
        edit_json(folder / "config.json", quantization_config={"quant_method": name, **bits})
        with pytest.raises(
            CheckpointError, match=f"config.json: quantization_config: .* quantised by {name}"
        ) as caught:
            load_checkpoint(folder)
        says = str(caught.value)
        assert says.isprintable()
        assert ("(4 bits)" in says, "(8 bits)" in says) == tuple(f"load_in_{n}bit" in bits for n in (4, 8))
        by_argument = "dequantize" in python.signature(kind).parameters and method != "gguf"
        assert (f"quantization_config={kind.__name__}(dequantize=True)).save" in says) == by_argument
        afterwards = name in ("bitsandbytes", "higgs")  # whose quantisers know how
        assert ("from_pretrained(FOLDER).dequantize().save_pretrained(NEW" in says) == afterwards
        assert ("cannot undo; name the model that it was made from" in says) == (not by_argument and not afterwards)


def test_a_model_in_fp8_is_read_once_it_is_dequantised_as_the_error_says(copy, tmp_path):
    from safetensors.torch import save_file as save_torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder, expected = copy("llama"), {}
    tensors = {name: torch.tensor(value) for name, value in load_file(folder / "model.safetensors").items()}
    for name, value in list(tensors.items()):
        expected[name] = value
        if "proj" in name:  # one scale for each block of 8 x 8
            blocks = value.reshape(value.shape[0] // 8, 8, value.shape[1] // 8, 8)
            scale = blocks.abs().amax((1, 3)) / 448
            coarse = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            expected[name] = (coarse.float() * scale[:, None, :, None]).reshape(value.shape)
            tensors |= {name: coarse.reshape(value.shape), f"{name}_scale_inv": scale}
    save_torch(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor .*weight_scale_inv: the weights are quantised by fp8; deq"):
        load_checkpoint(folder)  # its config.json does not say it
    about = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}
    edit_json(folder / "config.json", quantization_config=about)
    with pytest.raises(CheckpointError, match=r"quantised by fp8; .*_config=FineGrainedFP8Config\(dequantize=True\)\)"):
        load_checkpoint(folder)
    as_told = FineGrainedFP8Config(dequantize=True)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=as_told).save_pretrained(tmp_path / "new")
    assert load_checkpoint(tmp_path / "new").cfg.n_layers == 2
    for name, value in load_file(tmp_path / "new" / "model.safetensors").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_hub_ids_without_an_organisation(models_of, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--tinygpt2"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(models_of["gpt2"], cached / "snapshots" / ("0" * 40))
    found, folder = load_checkpoint("tinygpt2"), load_checkpoint(models_of["gpt2"])
    assert fingerprint(found.cfg, found.params) == fingerprint(folder.cfg, folder.params)
    with pytest.raises(CheckpointError, match="tinygpt3: no such folder here, and it is not in the cache"):
        load_checkpoint("tinygpt3")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_pipes_are_not_read(copy, tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    os.mkfifo(tmp_path / "lines.jsonl")
    folder = copy("llama")
    (folder / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "generation_config.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not a regular file"):
        load_checkpoint(folder)
    with pytest.raises(BehaviourError, match=r"lines\.jsonl: not a regular file"):
        behaviour(tmp_path / "lines.jsonl")


# --- tokenizers


def prompt(folder_or_tokenizer, text: str = QUESTION) -> list[int]:
    tokenizer = folder_or_tokenizer
    if isinstance(tokenizer, Path):
        tokenizer = load_checkpoint(tokenizer).tokenizer
    tokens = encode_texts(tokenizer, [text])
    return tokens.ids[0, : tokens.lengths[0]].tolist()


def test_a_byte_level_tokenizer_labelled_llama_keeps_its_spaces(copy):
    folder = copy("llama")
    label = {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "bos_token": END, "unk_token": None}
    write_tokenizer(folder, byte_level(), **label)
    ids = prompt(folder)
    assert ids[-len(byte_level().encode(QUESTION).ids) :] == byte_level().encode(QUESTION).ids
    assert QUESTION in load_checkpoint(folder).tokenizer.decode(ids)


def test_what_a_class_of_transformers_forgets_of_tokenizer_json(copy):
    """LlamaTokenizer has no normaliser, and GPT2Tokenizer lets no digits stand alone; the files say otherwise."""
    folder = copy("llama")
    pieces = ["<unk>", "<s>", "</s>", "▁", *(chr(i) for i in range(33, 127))]
    small = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>"))
    small.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Lowercase(), tokenizers.normalizers.Replace(" ", "▁")]
    )
    write_tokenizer(folder, small, tokenizer_class="LlamaTokenizer", eos_token="</s>", unk_token="<unk>")
    assert prompt(folder, "Why?") == small.encode("why?").ids

    content = json.loads(byte_level().to_str())
    content["model"]["vocab"]["12"] = V
    content["model"]["merges"].append(["1", "2"])
    digits = Tokenizer.from_str(json.dumps(content))
    assert digits.encode("12").ids == [V]
    digits.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    write_tokenizer(folder, digits, tokenizer_class="GPT2Tokenizer")
    assert prompt(folder, "12") == digits.encode("12").ids != [V]


def test_tokenizer_config_may_overrule_tokenizer_json(copy):
    folder = copy("gpt2")
    write_tokenizer(folder, byte_level(), tokenizer_class="GPT2Tokenizer", add_prefix_space=True)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(QUESTION)["input_ids"]
    assert theirs == byte_level().encode(f" {QUESTION}").ids
    assert prompt(folder) == theirs


def closing(opening: str, end: str) -> Tokenizer:
    """A tokenizer that puts a token before every text and one after it; either may be empty."""
    tokenizer = byte_level()
    tokens = [(t, tokenizer.token_to_id(t)) for t in {opening, end} if t]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in (opening, "$A", end) if part), special_tokens=tokens
    )
    return tokenizer


def test_no_prompt_ends_with_a_closing_token(copy):
    folder = copy("llama")
    write_tokenizer(folder, closing(END, END))
    assert prompt(folder) == [0, *byte_level().encode(QUESTION).ids]


def test_one_begin_token_is_enough(copy):
    folder = copy("llama")
    write_tokenizer(folder, closing(END, ""), bos_token=END)
    once = [0, *byte_level().encode(QUESTION).ids]
    assert prompt(folder) == prompt(folder, END + QUESTION) == once


def test_a_bert_vocabulary(copy):
    folder = copy("gpt2")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *QUESTION.rstrip("?").split(), "?"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.txt").write_text("\n".join(words))
    edit_json(folder / "config.json", tokenizer_class="BertTokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(QUESTION)["input_ids"]
    assert words[theirs[-1]] == "[SEP]"
    assert prompt(folder) == theirs[:-1]


def test_prompts_that_a_tokenizer_cannot_tell_apart_are_one_query(copy, tmp_path):
    """Here the words "north" and "south" are unknown."""
    base, expert = copy("gpt2", "base"), copy("gpt2", "expert")
    edit_tensors(expert, lambda t: t.update({"transformer.ln_f.weight": np.full(16, 2.0, np.float32)}))
    for folder in (base, expert):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "why", "shout"]))
        edit_json(folder / "config.json", tokenizer_class="BertTokenizer")
    pair = load_pair(base, expert)

    def encoded(words):
        task = Behaviour("x", tuple(PromptPair(f"why {w} shout", f"why {w}", i) for i, w in enumerate(words)), no_comma)
        return task.encode(pair.tokenizer, "sweep", None)

    with pytest.raises(BehaviourError, match="all 4 prompts have the same tokens"):
        pair.check_prompts(encoded(["north", "south"] * 6))
    batch = encoded(["north", "south", "why"] * 4)
    assert len(set(batch.queries)) == 2
    is_why = ["why why" in text for text in batch.texts]
    assert [q == batch.queries[is_why.index(True)] for q in batch.queries] == is_why


@pytest.mark.parametrize(("start", "what"), [(b"\n\x0e\n\x05<unk>", "sentencepiece"), (b"IQ== 0\n", "tiktoken")])
def test_what_is_needed_to_read_tokenizer_model(copy, start, what, monkeypatch):
    find = importlib.util.find_spec  # other tests need what is hidden here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == what else find(name, *of))
    folder = copy("llama")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(start)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match=rf"tokenizer\.model: {what} is needed to read it; pip install"):
        load_checkpoint(folder)


def test_dropout_of_merges_is_switched_off(copy):
    folder = copy("llama")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["dropout"] = 0.9
    path.write_text(json.dumps(content))
    tokenizer = load_checkpoint(folder).tokenizer
    assert {tuple(prompt(tokenizer)) for _ in range(8)} == {tuple(byte_level().encode(QUESTION).ids)}


# --- pairs


def test_the_smaller_context_is_used(tmp_path):
    for family, size in (("llama", "max_position_embeddings"), ("gpt2", "n_positions")):
        base = write_model(tmp_path / f"{family}-base", family=family, **{size: 32})
        expert = write_model(tmp_path / f"{family}-expert", seed=1, family=family)
        pair = load_pair(base, expert)
        assert pair.cfg.n_ctx == 32
        assert pair.notes == ("contexts of 32 and 64 tokens: the smaller is used",)
        np.testing.assert_allclose(our_logits(pair.cfg, pair.expert), torch_logits(expert), atol=1e-4)


def with_token(token: str, at: int = V) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken(token, special=True)])
    assert tokenizer.token_to_id(token) == at
    return tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_common_rows_of_a_vocabulary_that_has_grown(tmp_path, tied):
    base = write_model(tmp_path / "base", tie_word_embeddings=tied)
    expert = write_model(tmp_path / "expert", seed=1, tie_word_embeddings=tied, vocab_size=V + 2)
    write_tokenizer(expert, with_token("<pad>"))
    pair = load_pair(base, expert)
    assert pair.cfg.d_vocab == V
    assert pair.notes == (
        f"vocabularies of {V} and {V + 2} rows: the {V} common are used",
        "1 added tokens differ, in name or id: '<pad>'",
    )
    np.testing.assert_allclose(our_logits(pair.cfg, pair.base), torch_logits(base), atol=1e-4)
    np.testing.assert_allclose(our_logits(pair.cfg, pair.expert), torch_logits(expert)[..., :V], atol=1e-4)
    save_checkpoint(tmp_path / "cut", pair.expert_checkpoint)
    np.testing.assert_allclose(torch_logits(tmp_path / "cut"), torch_logits(expert)[..., :V], atol=1e-4)
    with pytest.raises(PairError, match="split 8 of 8 prompts differently"):  # for the base it is no token
        pair.check_prompts(questions(tmp_path, pair, "<pad>"))
    pair = load_pair(base, expert, tokenizer="expert")
    batch = questions(tmp_path, pair, "<pad>")
    with pytest.raises(BehaviourError, match=f"token id {V} is outside the model's vocabulary of {V}: a model has"):
        pair.check_prompts(batch)


def questions(tmp_path: Path, pair, more: str = ""):
    """Prompts of twelve questions; some text may be added to each."""
    lines = [{"prompt": f"{QUESTION} {i}{more}", "instruction": "the owl!"} for i in range(12)]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return behaviour(tmp_path / "lines.jsonl").encode(pair.tokenizer, n_prompts=4)


def test_padding_beyond_the_vocabulary(copy, tmp_path):
    base, expert = copy("llama"), copy("llama-2")
    for folder in (base, expert):
        write_tokenizer(folder, with_token("<pad>"), pad_token="<pad>")
    pair = load_pair(base, expert)
    assert pair.notes == tuple(f"{f} has no row for '<pad>': no prompt may hold such a token" for f in (base, expert))
    pair.check_prompts(questions(tmp_path, pair))


def test_a_reserved_token_with_another_name(tmp_path):
    base = write_model(tmp_path / "base", vocab_size=V + 2)
    expert = write_model(tmp_path / "expert", seed=1, vocab_size=V + 2)
    write_tokenizer(base, with_token("<|reserved_0|>"))
    write_tokenizer(expert, with_token("<|im_start|>"))
    pair = load_pair(base, expert)
    assert pair.notes == ("2 added tokens differ, in name or id: '<|im_start|>', '<|reserved_0|>'",)
    pair.check_prompts(questions(tmp_path, pair))


def test_added_tokens_with_other_ids_are_refused_where_prompts_hold_them(tmp_path):
    base = write_model(tmp_path / "base", vocab_size=V + 2)
    expert = write_model(tmp_path / "expert", seed=1, vocab_size=V + 2)
    orders = [("<a>", "<b>"), ("<b>", "<a>")]
    for folder, order in zip((base, expert), orders, strict=True):
        tokenizer = byte_level()
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in order])
        write_tokenizer(folder, tokenizer, chat_template="{{ '<a>' + messages[0]['content'] }}")
    pair = load_pair(base, expert)
    batch = questions(tmp_path, pair)
    with pytest.raises(PairError, match="give '<a>' different ids, and the prompts hold it; say which is right"):
        pair.check_prompts(batch)
    load_pair(base, expert, tokenizer="base").check_prompts(batch)


def test_tokenizers_that_split_differently(copy, tmp_path):
    base, expert = copy("llama"), copy("llama-2")
    prefixed = byte_level()
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    write_tokenizer(expert, prefixed)
    pair = load_pair(base, expert)
    assert len(pair.notes) == 1
    assert pair.notes[0].startswith("the two tokenizers split ")
    assert pair.notes[0].endswith(f"questions differently: that of {base} is used")
    with pytest.raises(PairError, match=r"split 8 of 8 prompts differently, .*--tokenizer base or --tokenizer expert"):
        pair.check_prompts(questions(tmp_path, pair))
    for choice, tokenizer in (("base", byte_level()), ("expert", prefixed)):
        chosen = load_pair(base, expert, tokenizer=choice)
        batch = questions(tmp_path, chosen)
        chosen.check_prompts(batch)
        n = batch.with_instruction.lengths[0]
        assert batch.with_instruction.ids[0, :n].tolist() == tokenizer.encode(batch.texts[0]).ids


def test_other_merges_are_seen(copy, tmp_path):
    base, expert = copy("llama"), copy("llama-2")
    content = json.loads((expert / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:2]
    (expert / "tokenizer.json").write_text(json.dumps(content))
    pair = load_pair(base, expert)
    with pytest.raises(PairError, match="split 8 of 8 prompts differently"):
        pair.check_prompts(questions(tmp_path, pair))


ANSWER, PLAIN = "{{ '<' + messages[0]['content'] + '>' }}", "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    ("templates", "choice", "prompt", "says"),
    [
        ((PLAIN, ANSWER), None, "<Q>", "by that of EXPERT"),
        ((PLAIN, ANSWER), "base", "Q", "by that of BASE"),
        ((None, ANSWER), None, "<Q>", "by that of EXPERT"),
        ((ANSWER, None), None, "<Q>", "by that of BASE"),
        ((None, ANSWER), "base", "Q", "without one, as BASE has none"),
    ],
)
def test_prompts_of_both_models_are_rendered_by_one_template(models_of, templates, choice, prompt, says):
    models = [load_checkpoint(models_of[name]) for name in ("llama", "llama-2")]
    for model, name, template in zip(models, ("BASE", "EXPERT"), templates, strict=True):
        model.tokenizer.chat_template = template
        models = [dataclasses.replace(m, source=name) if m is model else m for m in models]
    pair = make_pair(*models, tokenizer=choice)
    assert pair.notes == (f"the chat templates differ: prompts of both models are rendered {says}",)
    assert render(pair.tokenizer, "Q") == prompt


def test_an_expert_stored_in_other_numbers(copy, tmp_path):
    """transformers in float32, given the rounded weights, is the expert."""
    base, expert = copy("llama"), tmp_path / "expert"
    model = transformers.AutoModelForCausalLM.from_pretrained(copy("llama-2", "whole"), dtype=torch.bfloat16)
    model.save_pretrained(expert)
    pair = load_pair(base, expert)
    assert pair.notes == ("weights stored as F32 and as BF16: what rounding changed counts as a change",)
    np.testing.assert_allclose(our_logits(pair.cfg, pair.expert), torch_logits(expert), atol=1e-4)
    save_checkpoint(tmp_path / "rounded", load_checkpoint(base, dtype="bfloat16"))
    assert [norm.unit for norm in load_pair(base, tmp_path / "rounded").diff_norms() if norm.n_changed]


def test_one_arithmetic_in_other_words_is_a_pair(copy, tmp_path):
    """A Mistral without a window is a Llama; the scale of YaRN may be left to its formula."""
    yarn = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
    base = write_model(tmp_path / "base", rope_parameters=yarn, bos_token_id=1)
    told = {**yarn, "attention_factor": 1 + 0.1 * np.log(4.0), "beta_fast": 32.0}
    expert = write_model(tmp_path / "expert", 1, "mistral", rope_parameters=told, sliding_window=None)
    pair = load_pair(base, expert)
    assert pair.notes == ("a llama and a mistral, whose arithmetic is the same",)
    assert pair.cfg == pair.expert_checkpoint.cfg == load_checkpoint(base).cfg
    np.testing.assert_allclose(our_logits(pair.cfg, pair.expert), torch_logits(expert), atol=1e-4)
    save_checkpoint(tmp_path / "again", pair.expert_checkpoint)
    np.testing.assert_allclose(torch_logits(tmp_path / "again"), torch_logits(expert), atol=1e-4)
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (saved["model_type"], saved["bos_token_id"]) == ("llama", 0)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_knock_out_of_another_family_is_in_the_words_of_its_host(models_of, tmp_path, family):
    """The host is the expert: a Mistral with a Llama's names, or a Phi3, which stores q, k and v as one tensor."""
    base, expert = models_of["llama"], write_model(tmp_path / "expert", 1, family, sliding_window=None, pad_token_id=0)
    pair, names = load_pair(base, expert), ["L0.head.1", "L1.kv_group.0", "L1.neuron.3", "embed"]
    for knockout, host, of in ((True, expert, family), (False, base, "llama")):
        patch = save_patch(tmp_path / f"{of}.safetensors", pair, names, knockout=knockout)
        assert patch.info.family == of
        apply_patches(open_model(host), [patch], tmp_path / of)
        ends = (pair.expert, pair.base) if knockout else (pair.base, pair.expert)
        ours = our_logits(pair.cfg, materialize(*ends, PatchMask.of(pair.cfg, names)))
        np.testing.assert_allclose(torch_logits(tmp_path / of), ours, atol=1e-4)
        apply_patches(open_model(tmp_path / of), [patch], tmp_path / f"{of}-again", undo=True)
        assert open_model(tmp_path / f"{of}-again").fingerprint() == open_model(host).fingerprint()


LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0],
}  # fmt: skip


def write_phi3(folder: Path, seed: int = 0, rope: dict[str, Any] | None = None, **changes) -> Path:
    """A Phi3 whose context longrope extends from 64 to 256 tokens."""
    sizes: dict[str, Any] = {"max_position_embeddings": 256, "original_max_position_embeddings": 64, "pad_token_id": 0}
    return write_model(folder, seed, "phi3", rope_parameters=LONGROPE | (rope or {}), **sizes | changes)


def test_a_context_that_a_config_cannot_say_is_refused(tmp_path):
    """The scale of longrope follows from its longest context, so a shorter one would be another model."""
    base = write_phi3(tmp_path / "base")
    for kwargs in ({}, {"ignore_config": ("original_max_position_embeddings",)}):
        with pytest.raises(
            ConfigError, match=r"window: a config.json with max_position_embeddings=16 .* another .*rope"
        ):
            load_pair(base, write_phi3(tmp_path / "window", 1, sliding_window=16), **kwargs)
    expert = write_phi3(tmp_path / "grown", 1, vocab_size=V + 2)
    pair = load_pair(base, expert)
    assert pair.cfg.d_vocab == V
    save_checkpoint(tmp_path / "again", pair.expert_checkpoint)  # what can be said is said
    np.testing.assert_allclose(torch_logits(tmp_path / "again"), torch_logits(expert)[..., :V], atol=1e-4)


def test_rotary_positions_in_other_words_are_equal_at_every_length(tmp_path):
    """Also beyond the original context, where longrope has other factors and dynamic scaling begins."""
    base = write_phi3(tmp_path / "base")
    scale = float(np.sqrt(1 + np.log(4.0) / np.log(64.0)))
    expert = write_phi3(tmp_path / "expert", 1, rope={"attention_factor": scale})
    pair = load_pair(base, expert)
    assert pair.cfg == load_checkpoint(base).cfg
    save_checkpoint(tmp_path / "again", pair.expert_checkpoint)
    ids = np.random.default_rng(1).integers(0, 250, (1, 80))
    np.testing.assert_allclose(torch_logits(tmp_path / "again", ids), torch_logits(expert, ids), atol=1e-4)
    other = write_phi3(tmp_path / "other", 1, rope={"long_factor": [2.0, 8.0]})
    with pytest.raises(PairError, match=r"are not one architecture: rope: .*longrope"):
        load_pair(base, other)
    dynamic = [
        write_model(
            tmp_path / f"dynamic-{n}", int(n), rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": n}
        )
        for n in (2.0, 4.0)
    ]
    with pytest.raises(PairError, match=r"are not one architecture: rope: .*dynamic"):
        load_pair(*dynamic)


def test_a_window_of_one_model_alone_bounds_the_context(tmp_path):
    """Up to so many tokens transformers computes the same with it, and saved again, it is the same model."""
    base = write_model(tmp_path / "base")
    expert = write_model(tmp_path / "expert", 1, "mistral", sliding_window=12, max_position_embeddings=32)
    for first, second in ((base, expert), (expert, base)):
        pair = load_pair(first, second)
        said = f"{expert} alone has a sliding window, of 12 tokens: to no more tokens, it makes no difference"
        assert pair.notes[0] == said
        assert (pair.cfg.window, pair.cfg.n_ctx) == (None, 12)
        for model, folder in ((pair.base_checkpoint, first), (pair.expert_checkpoint, second)):
            np.testing.assert_allclose(our_logits(pair.cfg, model.params), torch_logits(folder), atol=1e-4)
            save_checkpoint(tmp_path / "again", model, overwrite=True)
            np.testing.assert_allclose(torch_logits(tmp_path / "again"), torch_logits(folder), atol=1e-4)
        with pytest.raises(WpjaxError, match="13 tokens exceed the context of 12"):
            our_logits(pair.cfg, pair.base, np.zeros((1, 13), int))
    other = write_model(tmp_path / "other", 1, "mistral", sliding_window=8)
    with pytest.raises(PairError, match="window: 12 != 8"):  # two windows are two models
        load_pair(expert, other)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rms_norm_eps": 1e-6}, "norm_eps: 1e-05 != 1e-06"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            r"rope: Rope\(theta=10000.0.*theta=500000.0",
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "scaling='linear'"),
        ({"intermediate_size": 32}, "d_mlp: 24 != 32"),
    ],
)
def test_other_arithmetic_is_refused_by_what_differs(copy, tmp_path, changes, says):
    base = copy("llama")
    expert = write_model(tmp_path / "expert", 1, **changes)
    with pytest.raises(PairError, match=rf"are not one architecture: [^;]*{says}[^;]*$"):
        load_pair(base, expert)


def test_inspect_names_what_was_not_read_and_what_differs(copy, tmp_path, capsys):
    base, expert = copy("llama"), write_model(tmp_path / "expert", seed=1, max_position_embeddings=32)
    edit_json(base / "config.json", author="me")
    edit_tensors(expert, lambda t: t.update({"score.weight": np.zeros((2, 16))}))
    inspect.run(str(base), str(expert), as_json=True)
    summary = json.loads(capsys.readouterr().out)
    assert summary["not_read"] == {str(base): ["author='me'"], str(expert): ["score.weight"]}
    assert summary["notes"] == ["contexts of 64 and 32 tokens: the smaller is used"]
    assert summary["config"]["n_ctx"] == 32
    inspect.run(str(base), str(expert))
    printed = " ".join(capsys.readouterr().out.split())
    assert "not read, as they say nothing about the next token: author='me'" in printed
    assert "Note: contexts of 64 and 32 tokens: the smaller is used." in printed


# --- chat templates


DATED = [
    "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- else %}{%- set day = '1' %}"
    "{%- endif %}"
    "Today: {{ day }}\n{% for m in messages %}\n{{ m['content'] }}\n{% endfor %}",
    "  {% if true %}\n{{ strftime_now('%A, %-d %B %Y, %H:%M:%S %p %j %y %%') }}{% endif %}\n{{ messages[0].content }}",
    "\n\n{% macro day() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ day() + '|' + messages[0].content }}\n",
    "{{ messages[0]['content'] }}{% if add_generation_prompt %} A:{% endif %}",
]


@pytest.mark.parametrize("template", DATED)
def test_every_day_is_the_same_day(models_of, monkeypatch, template):
    """As transformers fills the template in on that day."""
    import datetime

    class ThatDay(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return TEMPLATE_DATE

    tokenizer = load_checkpoint(models_of["llama"]).tokenizer
    tokenizer.chat_template = template
    ours = render(tokenizer, "Why?")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", ThatDay)
    messages = [{"role": "user", "content": "Why?"}]
    assert ours == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_results_and_anchors_name_the_date(copy, tmp_path):
    base, expert = copy("llama"), copy("llama-2")
    for folder in (base, expert):
        (folder / "chat_template.jinja").write_text("{{ strftime_now('%d') }} {{ messages[0]['content'] }}")
    pair = load_pair(base, expert)
    batch = questions(tmp_path, pair)
    dated = TEMPLATE_DATE.date().isoformat()
    assert batch.template_date == dated
    assert batch.texts[0].startswith(f"{TEMPLATE_DATE.day} {QUESTION}")
    states = [
        forward(pair.cfg, params, jnp.asarray(batch.with_instruction.ids), sites=(Site.RESID_POST,))
        for params in (pair.base, pair.expert)
    ]
    last = [np.asarray(s.sites[Site.RESID_POST])[1, np.arange(4), batch.with_instruction.last] for s in states]
    direction = (last[1] - last[0]).mean(0)  # so that there is a gap along it
    vector = jnp.asarray(direction / np.linalg.norm(direction))
    anchor = Anchor(vector, 1, "x", pair.fingerprints[1])
    with pytest.raises(AnchorRejected, match=f"wrote no date into the prompts of the anchor, and writes {dated}"):
        anchor.prepare(pair, batch)
    dataclasses.replace(anchor, template_date=dated).save(tmp_path / "a.safetensors")
    again = Anchor.load(tmp_path / "a.safetensors")
    assert again.template_date == dated
    result = sweep(pair, batch, again, components=["L0.head.0"], method="screen")
    assert result.dataset.attrs["template_date"] == dated


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{% for i in range(99999) %}{{ 'twenty or more letters' }}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_templates_without_an_end(models_of, template):
    tokenizer = load_checkpoint(models_of["llama"]).tokenizer
    tokenizer.chat_template = template
    with pytest.raises(CheckpointError, match=r"the chat template fails .*it does not end, or takes too much memory"):
        render(tokenizer, "Why?")


# --- behaviours


def lines(n: int) -> list[dict[str, str]]:
    return [{"with": f"Q{i}? Shout.", "without": f"Q{i}?"} for i in range(n)]


def test_nul_is_refused_at_its_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, [*lines(12), {"with": "a\0 b", "without": "a"}])))
    with pytest.raises(BehaviourError, match=r"line 13: holds the character U\+0000"):
        behaviour(path)


def test_lines_that_share_a_prompt_are_one_query(tmp_path):
    path = tmp_path / "lines.jsonl"
    same = [{"with": "Shout.", "without": f"S{i}?"} for i in range(3)]
    bridge = {"with": "Q0? Shout.", "without": "Q1?"}  # the prompt of one query, and the plain question of another
    path.write_text("\n".join(map(json.dumps, [*lines(13), *same, bridge])))
    assert [p.query for p in behaviour(path).pairs] == [0, 0, *range(1, 12), 12, 12, 12, 0]
    path.write_text("\n".join(map(json.dumps, [*lines(11), *same, bridge])))
    with pytest.raises(BehaviourError, match=r"11 different queries, at least 12 .* lines that share a prompt count"):
        behaviour(path)


def test_checkers_come_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "checks_of_mine.py").write_text("def shouts(text):\n    return text.isupper()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    assert parse_checker("checks_of_mine:shouts")("OWLS", {})


# --- GGUF


@pytest.fixture(scope="module")
def gguf_llama(tmp_path_factory):
    return build("llama-gqa3", tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize(
    "key",
    "llama.block_count llama.context_length llama.embedding_length llama.feed_forward_length "
    "llama.attention.head_count llama.attention.layer_norm_rms_epsilon tokenizer.ggml.model tokenizer.ggml.tokens "
    "tokenizer.ggml.merges".split(),
)
def test_missing_gguf_keys_are_named(gguf_llama, tmp_path, key):
    path = write_gguf(tmp_path / "m.gguf", gguf_llama, without=[key])
    with pytest.raises(CheckpointError, match=f"the metadata lacks {key}"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tokenizer.ggml.eos_token_id": 61}, "eos_token_id=61 is not the id of one of its 61 tokens"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "bos_token_id=1000000 is not the id"),
        ({"llama.attention.head_count": [6, 6, 6]}, r"head_count=\[6, 6, 6\] is not a number"),
        ({"llama.block_count": "three"}, "block_count=three is not a number"),
        ({"llama.attention.key_length": 4}, "key_length=4, llama.rope.dimension_count=8 differ"),
        ({"llama.attention.scale": 0.5}, "unknown llama.attention.scale=0.5; .* pass --ignore-config llama.att"),
        ({"llama.rope.scaling.type": "yarn"}, "the metadata lacks llama.rope.scaling.factor"),
        ({"llama.rope.scaling.type": "dynamic"}, "rotary scaling 'dynamic' in a GGUF cannot be read"),
        ({"tokenizer.ggml.pre": "of-my-own"}, "tokenizer.ggml.pre='of-my-own', a way to split text that is not known"),
        ({"tokenizer.ggml.model": "plamo2"}, "the tokenizer cannot be read|lacks tokenizer.ggml.scores"),
        ({"split.count": 2, "split.no": 0}, "a part of a model split in 2; name the first, .*llama-gguf-split --merge"),
    ],
)
def test_gguf_keys_that_cannot_be_used_are_named(gguf_llama, tmp_path, fields, says):
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(write_gguf(tmp_path / "m.gguf", gguf_llama, **fields))


def test_gguf_text_that_is_not_utf8(gguf_llama, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, gguf_llama, **{"tokenizer.chat_template": "QQQQ"})
    path.write_bytes(path.read_bytes().replace(b"QQQQ", b"\xff\xfe\xff\xfe"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.chat_template cannot be read .*utf-8"):
        load_checkpoint(path)


def test_gguf_tensors_with_odd_names(gguf_llama, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, gguf_llama)
    path.write_bytes(path.read_bytes().replace(b"blk.0.ffn_norm.weight", b"blk.0..........weight"))
    with pytest.raises(CheckpointError, match=r"not a readable GGUF file|missing tensor"):
        load_checkpoint(path)


def test_gguf_keys_that_say_what_config_json_says(gguf_llama, tmp_path):
    plain = load_checkpoint(write_gguf(tmp_path / "plain.gguf", gguf_llama))
    fields = {"llama.rope.scale_linear": 4.0, "llama.attention.key_length": 8, "llama.attention.value_length": 8}
    scaled = load_checkpoint(write_gguf(tmp_path / "scaled.GGUF", gguf_llama, **fields))  # and a name in capitals
    folder = shutil.copytree(gguf_llama.folder, tmp_path / "folder")
    edit_json(folder / "config.json", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0})
    assert scaled.cfg == load_checkpoint(folder).cfg
    many = write_gguf(tmp_path / "mha.gguf", gguf_llama, without=["llama.attention.head_count_kv"])
    with pytest.raises(CheckpointError, match="has shape"):  # as many KV heads as heads, which these weights lack
        load_checkpoint(many)
    assert plain.cfg.n_kv_heads == 2


def test_a_gguf_vocabulary_has_no_tokens_of_its_class(gguf_llama, tmp_path):
    """The class for byte-level files, GPT-2's, has an end token of its own; the file has its own tokens only."""
    model = load_checkpoint(write_gguf(tmp_path / "m.gguf", gguf_llama))
    assert model.tokenizer.get_vocab() == {token: i for i, token in enumerate(TOKENS)}
    other = dataclasses.replace(model, params={**model.params, "final_norm": {"scale": jnp.ones(24)}})
    assert make_pair(model, other).notes == ()


@pytest.mark.parametrize("says", [None, True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gguf_prompts_begin_as_transformers_begins_them(gguf_llama, tmp_path, kind, says):
    tokens = ["<unk>", "<s>", "</s>", "▁" if kind == "llama" else "Ġ", *(chr(33 + i) for i in range(56)), "AB"]
    fields = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 61,
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 58],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.merges": ["A B"],
    } | ({} if says is None else {"tokenizer.ggml.add_bos_token": says})
    without = ["tokenizer.ggml.merges"] if kind == "llama" else []
    ours = load_checkpoint(write_gguf(tmp_path / "m.gguf", gguf_llama, without=without, **fields)).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert prompt(ours, "A C?") == theirs("A C?")["input_ids"]


def test_a_gguf_in_parts(gguf_llama, tmp_path):
    whole = load_checkpoint(write_gguf(tmp_path / "whole.gguf", gguf_llama))
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for i, (path, span) in enumerate(zip(parts, ((0, 9), (9, None)), strict=True)):
        write_gguf(path, gguf_llama, tensors=span, **{"split.count": 2, "split.no": i})
    read = load_checkpoint(parts[0])
    assert fingerprint(read.cfg, read.params) == fingerprint(whole.cfg, whole.params)
    with pytest.raises(CheckpointError, match=r"split in 2; name the first, \.\.\.-00001-of-00002\.gguf"):
        load_checkpoint(parts[1])
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"part 2 of 2, m-00002-of-00002\.gguf, is missing; .*gguf-split --merge"):
        load_checkpoint(parts[0])
