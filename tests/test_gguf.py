"""GGUF files of every family: the same model as the HF folder they were made from, in HF torch."""

import json
import random
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.ggufs import write_gguf
from tests.tiny import (
    GEMMA,
    GEMMA3_ROPE,
    GPT2,
    LAYER_NORM,
    LLAMA,
    NEOX,
    NO_HEAD_DIM,
    PHI3_ROPE,
    SPECS,
    HfModel,
    random_of,
)
from wpjax.behaviours import behaviour
from wpjax.checkpoints.checkpoint import load_checkpoint, local_path, save_checkpoint
from wpjax.checkpoints.convert import flatten
from wpjax.checkpoints.hf_config import unread_attributes
from wpjax.errors import CheckpointError, WpjaxError
from wpjax.models.decoder import forward
from wpjax.pairs import load_model, load_pair

TOKENS = np.random.default_rng(2).integers(0, 61, (2, 9))
# These files do not say by what Gemma's scores are divided: it is the width of a head.
GEMMA = {**GEMMA, "query_pre_attn_scalar": 6}
GEMMA3 = {**GEMMA, "rope_parameters": GEMMA3_ROPE}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
MINISTRAL3_ROPE = {**YARN, "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}
# The converter writes no base of the wavelengths for GPT-NeoX.
NEOX = {**NEOX, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}
# name -> (model_type, attributes, further entries of the metadata)
CASES = {
    "llama": ("llama", LLAMA, {}),
    "llama-biases": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}, {}),
    "llama-3.2": ("llama", {**LLAMA, "max_position_embeddings": 2**17, "rope_parameters": LLAMA3}, {}),
    "mistral": (*SPECS["mistral"], {"llama.attention.sliding_window": 5}),
    "qwen2": ("qwen2", {**NO_HEAD_DIM, "tie_word_embeddings": True, "rope_parameters": YARN}, {}),
    "qwen3": ("qwen3", LLAMA, {}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0}, {}),
    "gemma3": ("gemma3_text", {**GEMMA3, "num_hidden_layers": 7}, {}),
    "gemma3-pattern": (
        "gemma3_text",
        {**GEMMA3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        {"gemma3.attention.sliding_window_pattern": 2},
    ),
    "phi3": (
        "phi3",
        {**SPECS["phi3"][1], "rope_parameters": {**PHI3_ROPE, "original_max_position_embeddings": 32}},
        {"phi3.rope.scaling.attn_factor": (1 + np.log(2) / np.log(32)) ** 0.5},
    ),
    "phi3-plain": (
        "phi3",
        {**NO_HEAD_DIM, "pad_token_id": 0, "original_max_position_embeddings": 64},
        {},
    ),
    "ministral3": ("ministral3", {**LLAMA, "rope_parameters": MINISTRAL3_ROPE}, {}),
    "smollm3": ("smollm3", {**NO_HEAD_DIM, "num_hidden_layers": 5, "pad_token_id": 0}, {}),
    "granite": (
        "granite",
        {
            **NO_HEAD_DIM,
            "embedding_multiplier": 1.5,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.75,
            "logits_scaling": 4.0,
        },
        {},
    ),
    "olmo2": ("olmo2", NO_HEAD_DIM, {}),
    "olmo3": SPECS["olmo3"] + ({"olmo2.rope.scaling.yarn_attn_factor": 1 + 0.1 * np.log(4.0)},),
    "starcoder2": ("starcoder2", LAYER_NORM, {}),
    "cohere": ("cohere", {**LAYER_NORM, "logit_scale": 0.5, "tie_word_embeddings": True}, {}),
    "cohere2": (
        "cohere2",
        {**LAYER_NORM, "sliding_window": 5, "logit_scale": 0.75, "tie_word_embeddings": True, "num_hidden_layers": 5},
        {},
    ),
    "mixtral": ("mixtral", {**SPECS["mixtral"][1], "sliding_window": None}, {}),
    "qwen3-moe": ("qwen3_moe", {**SPECS["qwen3-moe"][1], "attention_bias": False}, {}),
    "olmoe": ("olmoe", {**SPECS["olmoe"][1], "clip_qkv": None}, {}),
    "gpt-neox": ("gpt_neox", NEOX, {}),
    "gpt2": ("gpt2", GPT2, {}),
    "gpt2-untied": ("gpt2", {**GPT2, "tie_word_embeddings": False}, {}),
}
REFUSED = {"cohere-qk": ("cohere", {**LAYER_NORM, "use_qk_norm": True, "tie_word_embeddings": True})}
LOGITS = (  # one for each layout and rotation
    "llama-3.2 qwen2 gemma3-pattern phi3 gpt-neox gpt2 ministral3 smollm3 granite olmo3 starcoder2 cohere cohere2 "
    "mixtral qwen3-moe olmoe"
).split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> the torch model, its folder and its GGUF file; made once."""
    made = {}

    def make(name):
        if name not in made:
            model_type, attributes, fields = CASES[name]
            folder = tmp_path_factory.mktemp(name)
            hf = HfModel(name, random_of(model_type, attributes), folder)
            hf.model.save_pretrained(folder)
            fields = {key: float(value) if isinstance(value, np.floating) else value for key, value in fields.items()}
            made[name] = hf, write_gguf(folder / "m.gguf", hf, **fields)
        return made[name]

    return make


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_folder_it_was_made_from(made, name):
    hf, path = made(name)
    ours = load_checkpoint(path)
    assert ours.tokenizer("!#")["input_ids"] == [0, 2]
    assert unread_attributes(ours.hf_config) == {}
    (hf.folder / "m.gguf").rename(hf.folder.with_suffix(".gguf"))  # a folder with two sets of weights is refused
    theirs = load_checkpoint(hf.folder)
    hf.folder.with_suffix(".gguf").rename(hf.folder / "m.gguf")
    assert ours.cfg == theirs.cfg
    mine, folders = flatten(ours.params), flatten(theirs.params)
    assert set(mine) == set(folders)
    for leaf, value in folders.items():  # 1 added to a norm and taken away again rounds it
        np.testing.assert_allclose(mine[leaf], value, rtol=0, atol=3e-7 if ours.cfg.norm_offset else 0, err_msg=leaf)


@pytest.mark.parametrize("name", LOGITS)
def test_logits_equal_hf_torch(made, name):
    hf, path = made(name)
    ours = load_checkpoint(path)
    with torch.no_grad():
        logits = hf.model(torch.tensor(TOKENS)).logits.numpy()
    mine = np.asarray(forward(ours.cfg, ours.params, jnp.asarray(TOKENS)).logits)
    np.testing.assert_allclose(mine, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.mark.parametrize("name", ["mistral", "gemma3", "phi3", "gpt-neox", "mixtral", "olmo3", "ministral3", "granite"])
def test_a_saved_file_is_a_folder_that_transformers_reads(made, tmp_path, name):
    hf, path = made(name)
    ours = load_checkpoint(path)
    save_checkpoint(tmp_path / "out", ours)
    again = type(hf.model).from_pretrained(tmp_path / "out")
    for (parameter, p), q in zip(hf.model.named_parameters(), again.parameters(), strict=True):
        np.testing.assert_allclose(p.detach(), q.detach(), rtol=0, atol=3e-7, err_msg=parameter)
    assert load_checkpoint(tmp_path / "out").cfg == ours.cfg


@pytest.mark.parametrize(("layers", "scalar"), [(2, 6), (62, 8)])
def test_scores_of_gemma_are_divided_as_llama_cpp_divides_them(tmp_path, layers, scalar):
    """By the width of a head, but in the model of 27 billion by d_model / heads."""
    model = random_of("gemma3_text", {**GEMMA, "num_hidden_layers": layers, "num_attention_heads": 3,
                                      "num_key_value_heads": 1})  # fmt: skip
    hf = HfModel("gemma3", model, tmp_path)
    assert load_checkpoint(write_gguf(tmp_path / "m.gguf", hf)).cfg.attn_scale == scalar**-0.5


def test_every_layer_of_a_gemma_without_a_window_sees_all(made, tmp_path):
    hf, _ = made("gemma3")
    path = write_gguf(tmp_path / "m.gguf", hf, without=["gemma3.attention.sliding_window"])
    cfg = load_checkpoint(path).cfg
    assert cfg.window is None
    assert not any(cfg.sliding)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "fields", "without", "says"),
    [
        ("llama", {"general.architecture": "gemma"}, [], "'gemma' is not supported; supported: llama, qwen2, qwen3, "),
        ("llama", {"general.type": "adapter"}, [], "of type 'adapter', not a model"),
        ("qwen2", {"qwen2.attention.sliding_window": 32}, [], "qwen2.attention.sliding_window=32 is not implemented"),
        ("qwen2", {"qwen2.rope.scaling.yarn_attn_factor": 2.0}, [], "yarn_attn_factor is not implemented"),
        ("gpt2", {"gpt2.attention.key_length": 6}, [], "d_head=6 is not implemented for gpt2"),
        ("qwen3", {"qwen3.pooling_type": 3}, [], "unknown qwen3.pooling_type=3; .* --ignore-config qwen3.pooling_type"),
        ("qwen3", {"qwen3.rope.freq_base": float("nan")}, [], "freq_base=nan is not a number"),
        ("gemma3", {}, ["gemma3.rope.freq_base"], "lacks gemma3.rope.freq_base"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": [True]}, [], "of 1 layers, there are 7"),
        ("phi3", {}, ["phi3.attention.sliding_window"], "lacks phi3.attention.sliding_window"),
        ("phi3-plain", {"phi3.rope.scaling.type": "longrope"}, [], "missing tensor rope_factors_long.weight"),
        ("gpt-neox", {}, ["gptneox.use_parallel_residual"], "lacks gptneox.use_parallel_residual"),
        ("gpt-neox", {"gptneox.attention.head_count": 7}, [], "is not divisible by the number of attention heads"),
        ("llama", {"llama.attention.head_count_kv": 3}, [], r"attn_k.weight has shape \(16, 24\), which does not fit"),
        ("gpt2", {"gpt2.attention.head_count_kv": 1}, [], "n_kv_heads=1 is not implemented for gpt2"),
        ("gpt2", {"gpt2.rope.freq_base": 5e5}, [], "unknown gpt2.rope.freq_base=500000.0"),
        ("llama-3.2", {"llama.rope.freq_base": 1e5}, [], "scales positions in another way than Llama 3.1"),
        ("llama", {"llama.embedding_length": 0}, [], "embedding_length=0 is not a size"),
        (
            "granite",
            {"granite.rope.scaling.finetuned": False},
            [],
            "no rotary positions, is not implemented for granite",
        ),
        ("ministral3", {}, ["mistral3.rope.scaling.type"], "rotary scaling 'linear' is not implemented for mistral3"),
        ("cohere-qk", {}, [], "use_qk_norm=True is not implemented"),
        ("olmo3", {"olmo2.attention.sliding_window_pattern": [True]}, [], "of 1 layers, there are 3"),
        ("qwen3-moe", {"qwen3moe.expert_shared_count": 1}, [], "unknown qwen3moe.expert_shared_count=1"),
        ("mixtral", {"llama.expert_count": 4}, [], r"unknown tensors model.layers.0.block_sparse_moe.experts\.4"),
    ],
)
def test_refusals_name_the_entry(made, tmp_path, name, fields, without, says):
    hf = HfModel(name, random_of(*REFUSED[name]), tmp_path) if name in REFUSED else made(name)[0]
    with pytest.raises(CheckpointError, match=says) as caught:
        load_checkpoint(write_gguf(tmp_path / "m.gguf", hf, without=without, **fields))
    assert "\n" not in str(caught.value)


def test_what_is_ignored_is_as_if_it_were_not_there(made, tmp_path):
    hf, _ = made("qwen3")
    name = "qwen3.attention.sliding_window"
    path = write_gguf(tmp_path / "m.gguf", hf, **{name: 32, "qwen3.attention.causal": True})
    assert load_checkpoint(path, ignore_config=(name,)).cfg == load_checkpoint(made("qwen3")[1]).cfg


# --- types of numbers


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_matrices_of_other_types(tmp_path, kind):
    """As near to the numbers as the type's step is; these are 0.2 large."""
    import gguf

    model = random_of("llama", {**LLAMA, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                                "num_attention_heads": 4, "tie_word_embeddings": True})  # fmt: skip
    hf = HfModel("llama", model, tmp_path)
    whole = load_checkpoint(write_gguf(tmp_path / "m.gguf", hf))
    coarse = load_checkpoint(write_gguf(tmp_path / "q.gguf", hf, kind=gguf.GGMLQuantizationType[kind]))
    step = {"F16": 1e-3, "BF16": 5e-3, "Q8_0": 5e-3, "Q5_1": 0.03, "Q4_0": 0.1}[kind]
    for leaf, value in flatten(whole.params).items():
        np.testing.assert_allclose(flatten(coarse.params)[leaf], value, rtol=0, atol=step, err_msg=leaf)
        assert ("norm" in leaf) == np.array_equal(flatten(coarse.params)[leaf], value)


def test_experts_are_dequantised_one_by_one(tmp_path):
    """As the package gguf dequantises all experts of a layer at once."""
    import gguf

    attributes = {**SPECS["mixtral"][1], "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    attributes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": None}
    hf = HfModel("mixtral", random_of("mixtral", attributes), tmp_path)
    path = write_gguf(tmp_path / "m.gguf", hf, kind=gguf.GGMLQuantizationType.Q4_0)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    ours = flatten(load_checkpoint(path).params)
    for name, leaf in (("gate", "W_gate"), ("up", "W_in"), ("down", "W_out")):
        tensor = stored[f"blk.0.ffn_{name}_exps.weight"]
        whole = gguf.dequantize(tensor.data, tensor.tensor_type)  # [E, out, in]
        theirs = np.concatenate(whole).T if name != "down" else np.concatenate(whole, axis=1).T
        np.testing.assert_array_equal(ours[f"blocks/mlp/{leaf}"][0], theirs)


def test_types_that_cannot_be_dequantised_are_named(made, tmp_path):
    """One tensor too many, of each type: it is that type that is refused, or else that tensor."""
    import gguf

    hf, _ = made("llama")
    refused = set()
    for kind in gguf.GGMLQuantizationType:
        _, size = gguf.GGML_QUANT_SIZES[kind]
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(write_gguf(tmp_path / "m.gguf", hf, extra=(np.zeros((1, size), np.uint8), kind)))
        says = str(caught.value)
        if f"tensor odd.weight is of type {kind.name}, which cannot be dequantised; use a file" in says:
            refused.add(kind.name)
        else:
            assert "unknown tensor odd.weight" in says
    assert {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"} <= refused
    assert not refused & {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    assert not refused & {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"}


def refusal(path):
    """What is said of a file; nothing if it is read."""
    try:
        load_checkpoint(path)
    except WpjaxError as error:
        return str(error)
    return ""


def test_damaged_files_say_so_in_one_line(made, tmp_path):
    """Cut off anywhere in the header, or with bytes of it changed: refused or read, without a traceback, and soon."""
    _, path = made("qwen2")
    content = Path(path).read_bytes()
    header = content.index(b"tokenizer.ggml.eos_token_id")
    bad = tmp_path / "bad.gguf"
    rng = random.Random(0)
    for i in range(120):
        damaged = bytearray(content if i % 2 else content[: rng.randrange(header)])
        if i % 2:
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.randrange(header)] = rng.choice([0, 1, 127, 255])
        bad.write_bytes(damaged)
        assert refusal(bad).isprintable()


# --- a quantised file and its original


def test_a_quantised_file_and_its_original_are_a_pair(tmp_path):
    """Both ways round; the coarse weights are those that the package gguf makes of each tensor of HF's.

    The file has its own tokenizer, of a vocabulary that is filled up to a multiple, as the converter fills it.
    """
    import gguf

    folder = local_path("tiny:expert")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_model("tiny:expert").tokenizer
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    n, rows = len(tokens), len(tokens) + 32
    whole.resize_token_embeddings(rows)
    kind = gguf.GGMLQuantizationType.Q4_0
    path = write_gguf(
        tmp_path / "m.gguf",
        HfModel("expert", whole, folder),
        kind=kind,
        **{
            "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{i}]" for i in range(n, rows))],
            "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
            "tokenizer.ggml.token_type": [3] * 3 + [1] * (n - 3) + [5] * (rows - n),
            "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.chat_template": tokenizer.chat_template,
        },
    )
    pair = load_pair(path, "tiny:expert")
    assert pair.notes == (
        "weights stored as Q4_0 and as BF16: what rounding changed counts as a change",
        f"vocabularies of {rows} and {n} rows: the {n} common are used",
    )
    batch = behaviour("tiny:english_capital").encode(pair.tokenizer, n_prompts=4)
    pair.check_prompts(batch)
    state = {name: p for name, p in whole.named_parameters() if p.ndim == 2}
    with torch.no_grad():
        for p in state.values():
            p.copy_(torch.tensor(gguf.dequantize(gguf.quantize(p.numpy(), kind), kind)))
        logits = whole(torch.tensor(batch.with_instruction.ids)).logits.numpy()
    mine = np.asarray(forward(pair.cfg, pair.base, jnp.asarray(batch.with_instruction.ids)).logits)
    np.testing.assert_allclose(mine, logits[..., :n], rtol=0, atol=2e-5 * np.abs(logits).max())
    other = load_pair("tiny:expert", path)
    assert other.notes[0] == "weights stored as BF16 and as Q4_0: what rounding changed counts as a change"
    assert {norm.unit for norm in other.diff_norms() if norm.n_changed} == {"head", "kv_group", "neuron", "embed"}


# --- tokenizers


def vocabulary(hf, path, tokens, **fields):
    """The tokenizer of a file with these tokens first; the others are letters of private use."""
    tokens = [*tokens, *(chr(0xE000 + i) for i in range(61 - len(tokens)))]
    ours = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(61)],
        "tokenizer.ggml.token_type": [3 if token.startswith("<") else 1 for token in tokens],
        **{f"tokenizer.ggml.{name}": value for name, value in fields.items()},
    }
    without = ["tokenizer.ggml.merges"] if fields["model"] == "llama" else []
    return load_checkpoint(write_gguf(path / "t.gguf", hf, without=without, **ours))


@pytest.mark.parametrize(
    ("prefix", "text", "pieces"),
    [
        (None, "a b", ["▁a", "▁b"]),
        (None, " a", ["▁▁", "a"]),  # sentencepiece's blank, and the text's own
        (None, "<s>a", ["<s>", "▁a"]),
        (False, "a b", ["a", "▁b"]),
        (False, " a", ["▁a"]),
    ],
)
def test_blanks_of_sentencepiece(made, tmp_path, prefix, text, pieces):
    """Worked by hand: "▁▁" is merged before "▁a", whose score is lower."""
    fields = {} if prefix is None else {"add_space_prefix": prefix}
    tokens = ["<unk>", "<s>", "▁", "a", "b", "▁▁", "▁a", "▁b"]
    model = vocabulary(made("llama")[0], tmp_path, tokens, model="llama", **fields)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert model.tokenizer.convert_ids_to_tokens(ids) == pieces
    assert model.tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix("<s>")


def test_gemma_sets_no_blank_before_a_text(made, tmp_path):
    tokens = ["<pad>", "<eos>", "<bos>", "▁", "a", "  ", "▁a", "<end_of_turn>", "<unk>"]
    special = {"bos_token_id": 2, "eos_token_id": 1, "eot_token_id": 7}
    model = vocabulary(made("gemma3")[0], tmp_path, tokens, model="llama", **special)
    assert model.tokenizer("a a")["input_ids"] == [2, 4, 6]
    assert model.tokenizer("  a<end_of_turn>", add_special_tokens=False)["input_ids"] == [5, 4, 7]
    assert model.stop_tokens == (1, 7)  # the end of a turn is an end, too


def test_accents_of_qwen_are_composed(made, tmp_path):
    """As transformers' own class for it does, for the same vocabulary and merges."""
    from transformers import Qwen2Tokenizer

    accent = "Ã©"  # the two bytes of é
    tokens = ["<|endoftext|>", "a", "Ġ", "Ã", "©", accent, "e", "Ì", "ģ", "1", "2", "12"]
    merges = ["Ã ©", "1 2"]
    model = vocabulary(made("qwen2")[0], tmp_path, tokens, model="gpt2", pre="qwen2", merges=merges)
    theirs = Qwen2Tokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split()) for m in merges])
    for text in ("aé e\u0301", "a12", "<|endoftext|>a"):
        assert model.tokenizer(text)["input_ids"] == theirs(text)["input_ids"]


def test_cohere_sets_digits_apart_and_composes_accents(made, tmp_path):
    """As transformers' own class for it does, for the same vocabulary and merges."""
    from transformers import CohereTokenizer

    tokens = ["<UNK>", "a", "Ġ", "Ã", "©", "Ã©", "e", "Ì", "ģ", "1", "2", "12", "Ġa"]
    merges = ["Ã ©", "1 2", "Ġ a"]
    model = vocabulary(made("cohere")[0], tmp_path, tokens, model="gpt2", pre="command-r", merges=merges)
    ids = {token: i for i, token in enumerate(tokens)}
    theirs = CohereTokenizer(vocab=ids, merges=[tuple(m.split()) for m in merges], add_bos_token=False)
    for text in ("aé e\u0301", "a12 21", "1 a"):
        ours = model.tokenizer(text)["input_ids"]
        assert ours == theirs(text, add_special_tokens=False)["input_ids"]
        assert ids["12"] not in ours


@pytest.mark.parametrize(("split", "ids"), [("llama-bpe", [1, 5]), ("qwen2", [2, 3, 4])])
def test_words_of_llama_3_that_are_tokens_need_no_merges(made, tmp_path, split, ids):
    """And its texts begin with the BOS token, although older files do not say so."""
    tokens = ["<|end|>", "<|begin|>", "a", "b", "c", "abc", "ba"]
    special = {"bos_token_id": 1, "eos_token_id": 0}
    model = vocabulary(made("llama")[0], tmp_path, tokens, model="gpt2", pre=split, merges=["b a"], **special)
    assert model.tokenizer("abc")["input_ids"] == ids
