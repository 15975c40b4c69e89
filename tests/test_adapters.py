"""PEFT folders over a base, against what PEFT itself computes: the weights that it merges, the logits of its model."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.tiny import HfModel, build
from wpjax.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from wpjax.checkpoints.convert import flatten
from wpjax.checkpoints.rewrite import open_model
from wpjax.errors import CheckpointError, PairError
from wpjax.models.decoder import forward
from wpjax.pairs import load_pair, make_pair

BASES = ("llama-gqa3", "llama-tied", "llama-biases", "gpt2-tied", "phi3", "gpt-neox", "qwen2", "mixtral", "olmoe")
IDS = np.random.default_rng(0).integers(0, 60, (1, 8))
QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, HfModel]:
    return {name: build(name, tmp_path_factory.mktemp("bases") / name) for name in BASES}


def adapted(folder: Path, to: Path, grown: int = 0, seed: int = 1, save=None, **options):
    """A PEFT model over a base, all of whose trained weights are random, and saved to a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    if grown:
        torch.manual_seed(seed)
        model.resize_token_embeddings(model.config.vocab_size + grown, mean_resizing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **options})).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(to, **(save or {}))
    return model


def over(base: Checkpoint | Path, folder: Path) -> Checkpoint:
    return load_checkpoint(folder, base=base if isinstance(base, Checkpoint) else load_checkpoint(base))


def assert_same(ours: Checkpoint, theirs: Checkpoint) -> None:
    a, b = flatten(ours.params), flatten(theirs.params)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        np.testing.assert_allclose(leaf, b[path], rtol=1e-6, atol=1e-6 * float(jnp.abs(leaf).max()), err_msg=path)


def assert_logits(model, theirs, ids=IDS):
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(forward(model.cfg, model.params, jnp.asarray(ids)).logits, expected, atol=1e-4)


MERGED = {
    "lora": ("llama-gqa3", {"target_modules": QV}),
    "layers": ("llama-gqa3", {"target_modules": ["up_proj"], "layers_to_transform": [0, 2]}),
    "layers-by-name": (
        "llama-gqa3", {"target_modules": ["up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}
    ),
    "regex": ("llama-gqa3", {"target_modules": r"model\.layers\.[12]\..*\.(o|down)_proj"}),
    "excluded": ("llama-gqa3", {"target_modules": QV, "exclude_modules": r".*\.1\.self_attn\.q_proj"}),
    "ranks": (
        "phi3",
        {"target_modules": ["qkv_proj", "gate_up_proj"], "use_rslora": True,
         "rank_pattern": {"layers.1.self_attn.qkv_proj": 2, "gate_.*": 5},
         "alpha_pattern": {"^model.layers.0.mlp.gate_up_proj": 24, "qkv": 1}},
    ),
    "dora": ("llama-gqa3", {"target_modules": "all-linear", "use_dora": True}),
    "mica": ("llama-gqa3", {"target_modules": QV, "init_lora_weights": "mica"}),
    "conv1d": ("gpt2-tied", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "bias": "all"}),
    "conv1d-dora": ("gpt2-tied", {"target_modules": ["c_attn", "attn.c_proj"], "use_dora": True, "bias": "lora_only"}),
    "positions": ("gpt2-tied", {"target_modules": ["wpe"]}),
    "lora-bias": ("llama-biases", {"target_modules": [*QV, "down_proj"], "lora_bias": True}),
    "routed-experts": (
        "mixtral",
        {"target_modules": ["q_proj"],
         "target_parameters": ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
         "rank_pattern": {r".*\.gate_up_proj": 2}, "alpha_pattern": {r".*\.down_proj": 9}},
    ),
    "some-experts": (
        "olmoe", {"target_modules": ["v_proj"], "use_rslora": True,
                  "target_parameters": ["layers.1.mlp.experts.down_proj", "mlp.gate.weight"]},
    ),
    "biases": ("qwen2", {"target_modules": ["k_proj"], "bias": "all"}),
    "head-by-another-name": ("gpt-neox", {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]}),
    "saved": ("llama-gqa3", {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]}),
    "saved-block": ("llama-gqa3", {"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
    "embedding": ("llama-gqa3", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding-dora": ("llama-gqa3", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tokens": (
        "llama-gqa3", {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [1]}}
    ),
    "tokens-of-tied": ("llama-tied", {"target_modules": QV, "trainable_token_indices": [3, 5]}),
    "tied-copies": ("llama-tied", {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", MERGED)
def test_the_weights_are_those_that_peft_merges(bases, tmp_path, name):
    of, options = MERGED[name]
    model = adapted(bases[of].folder, tmp_path / "adapter", **options)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    base = load_checkpoint(bases[of].folder)
    expert, merged = over(base, tmp_path / "adapter"), load_checkpoint(tmp_path / "merged")
    assert_same(expert, merged)
    was, now, theirs = (flatten(m.params) for m in (base, expert, merged))
    changed = {path for path in theirs if path not in was or not np.array_equal(was[path], theirs[path])}
    copied = {path for path, leaf in now.items() if leaf is not was.get(path)}
    assert copied == changed, "other leaves are the base's own"


def test_an_expert_takes_the_memory_of_what_it_changed(bases, tmp_path):
    adapted(bases["llama-gqa3"].folder, tmp_path, target_modules=["k_proj"])
    base = load_checkpoint(bases["llama-gqa3"].folder)
    before = {id(leaf) for leaf in jax.live_arrays()}
    expert = over(base, tmp_path)
    more = sum(leaf.nbytes for leaf in jax.live_arrays() if id(leaf) not in before)
    assert more == expert.params["blocks"]["attn"]["W_K"].nbytes < base.params["embed"]["W_E"].nbytes


TIED = {
    "factors": ({"target_modules": ["embed_tokens"]}, False),
    "factors-of-the-head": ({"target_modules": ["lm_head"]}, False),
    "factors-ensured": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "saved": ({"target_modules": QV, "modules_to_save": ["embed_tokens"]}, False),
    "saved-ensured": ({"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
}


@pytest.mark.parametrize("name", TIED)
def test_over_a_tied_base_the_expert_computes_what_peft_trained(bases, tmp_path, name):
    """`merge_and_unload` would add a change of one of embedding and head to both, or twice."""
    options, tied = TIED[name]
    base = load_checkpoint(bases["llama-tied"].folder)
    model = adapted(bases["llama-tied"].folder, tmp_path / "adapter", **options)
    expert = over(base, tmp_path / "adapter")
    assert expert.cfg.tied == tied
    assert_logits(expert, model)
    save_checkpoint(tmp_path / "again", expert)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    assert_logits(expert, again)


GROWN = {
    "saved-along": ("llama-gqa3", {"target_modules": QV}),
    "saved-along-tied": ("llama-tied", {"target_modules": QV}),
    "factors": ("llama-gqa3", {"target_modules": ["embed_tokens", "lm_head"]}),
    "factors-of-tied": ("llama-tied", {"target_modules": ["embed_tokens"]}),
    "trained": ("llama-gqa3", {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tokens": ("llama-gqa3", {"target_modules": QV, "trainable_token_indices": [61, 64]}),
    "tokens-of-tied": ("llama-tied", {"target_modules": QV, "trainable_token_indices": [61, 64]}),
}


@pytest.mark.parametrize("name", GROWN)
def test_a_grown_vocabulary(bases, tmp_path, name):
    of, options = GROWN[name]
    model = adapted(bases[of].folder, tmp_path, grown=4, save={"save_embedding_layers": True}, **options)
    base = load_checkpoint(bases[of].folder)
    expert = over(base, tmp_path)
    assert expert.cfg.d_vocab == base.cfg.d_vocab + 4
    assert expert.hf_config["vocab_size"] == expert.cfg.d_vocab
    assert expert.cfg.tied == (of == "llama-tied" and name != "factors-of-tied")
    assert_logits(expert, model, np.append(IDS, [[61, 64]], axis=1))


def test_in_bfloat16_the_sum_is_rounded_once(bases, tmp_path):
    adapted(bases["llama-gqa3"].folder, tmp_path, target_modules=["down_proj"])
    base = load_checkpoint(bases["llama-gqa3"].folder, "bfloat16x2")
    expert = over(base, tmp_path)
    assert expert.cfg == base.cfg
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for layer in range(base.cfg.n_layers):
        a, b = (tensors[f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_{x}.weight"] for x in "AB")
        exact = np.asarray(base.params["blocks"]["mlp"]["W_out"][layer], np.float64) + 2 * (b.astype(float) @ a).T
        ours = expert.params["blocks"]["mlp"]["W_out"][layer]
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, jnp.asarray(exact.astype(np.float32)).astype(jnp.bfloat16))


def rename(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


def write(folder: Path, **changes) -> None:
    """Change tensors of the adapter; None takes one away."""
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in {**load_file(file), **changes}.items() if tensor is not None}
    save_file(tensors, file)


def configure(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    adapted(bases["llama-gqa3"].folder, folder, target_modules=QV)
    return folder


@pytest.fixture
def copy(plain, tmp_path) -> Path:
    return shutil.copytree(plain, tmp_path / "copy")


def test_folders_as_people_have_them(bases, plain, copy):
    """Names of a model without its head, a head for another task, files of the trainer, the base's configuration."""
    base = load_checkpoint(bases["llama-gqa3"].folder)
    rename(copy, lambda name: name.replace("model.model.model.", "model.model."))
    write(copy, **{"base_model.model.score.weight": np.ones(3)})
    configure(copy, base_model_name_or_path="org/other-bnb-4bit", new_option=None)
    shutil.copy(bases["llama-gqa3"].folder / "config.json", copy)
    (copy / "training_args.bin").write_bytes(b"pickle")
    expert = over(base, copy)
    assert_same(expert, over(base, plain))
    assert expert.left_out == ("score.weight",)
    assert expert.notes[0].endswith("is an adapter: LoRA of rank 3 on q_proj, v_proj in layers 0-2")
    assert re.search("names 'org/other-bnb-4bit' as its base, which is quantised", expert.notes[1])
    assert expert.tokenizer is None
    assert expert.stop_tokens == base.stop_tokens


def test_the_text_tower_of_an_adapter_for_images_and_text(bases, plain, copy):
    base = load_checkpoint(bases["llama-gqa3"].folder)
    rename(copy, lambda name: name.replace(".model.layers.", ".model.language_model.layers."))
    write(copy, **{f"base_model.model.model.visual.blocks.0.lora_{x}.weight": np.ones((3, 3)) for x in "AB"})
    expert = over(base, copy)
    assert_same(expert, over(base, plain))
    assert expert.left_out == ("visual (2 tensors)",)
    rename(copy, lambda name: name.replace(".model.language_model.layers.", ".model.visual.layers."))
    with pytest.raises(CheckpointError, match=r"changes nothing that says the next token, only visual \(\d+ tensors\)"):
        over(base, copy)


Q1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
BAD_CONFIGS = {
    "another-kind": ({"peft_type": "IA3"}, r"peft_type='IA3' is not implemented, only 'LORA'; if PEFT can, merge it: "),
    "changed-base": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base"),
    "more-layers": ({"layer_replication": [[0, 2], [1, 3]]}, r"layer_replication=\[\[0, 2\], \[1, 3\]\] is not impl"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\] is not implemented"),
    "parameters": ({"target_parameters": ["mlp.w"]}, "target_parameters=.* is not implemented"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config=.* is not implemented"),
    "of-the-future": ({"use_xlora": True}, "use_xlora=True is not implemented"),
    "rank": ({"r": 2.5}, "2.5 is no r; correct it"),
    "alpha": ({"alpha_pattern": {"q_proj": "8"}}, "'8' is no lora_alpha"),
    "pattern": ({"rank_pattern": {"(": 4}}, r"'\(' is not a regular expression"),
    "list": ({"rank_pattern": [4]}, "is not a table of numbers"),
    "names": ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' is not a list of names"),
    "another-rank": ({"r": 4}, r"layers\.0\.self_attn\.q_proj\.lora_A\.weight has shape \(3, 24\), .* with \(4, 24\)"),
    "magnitude": ({"use_dora": True}, r"layers\.0\.self_attn\.q_proj lacks a magnitude, .* use_dora=True"),
    "not-saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, which the file does not hold"),
    "not-there": ({"target_modules": [*QV, "o_proj"]}, r"names model\.layers\.0\.self_attn\.o_proj of "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configurations_that_are_refused(bases, copy, name):
    changes, says = BAD_CONFIGS[name]
    configure(copy, **changes)
    with pytest.raises(CheckpointError, match=says) as error:
        over(bases["llama-gqa3"].folder, copy)
    assert "\n" not in str(error.value)


BAD_FILES = {
    "half": ({Q1 + "B.weight": None}, r"q_proj\.lora_A\.weight is there, and its partner lora_B is not"),
    "layer": ({Q1 + "A.weight": None, Q1 + "B.weight": None}, r"target_modules names model\.layers\.1\.self_attn\.q"),
    "unknown": ({"base_model.model.model.layers.0.mlp.w1.lora_A.weight": np.ones(3)}, r"w1\.lora_A\.weight belongs"),
    "no-ending": ({Q1 + "E": np.ones(3)}, r"q_proj\.lora_E belongs to no weight"),
    "bias": ({Q1 + "B.bias": np.ones(48)}, "is a bias, and its module has none"),
    "nan": ({Q1 + "A.weight": np.full((3, 24), np.nan, np.float32)}, "lora_A.weight holds NaN"),
    "integers": ({Q1 + "A.weight": np.ones((3, 24), np.int32)}, "lora_A.weight has dtype int32"),
    "twice": ({"base_model.model.model.norm.weight": np.ones(24), "model.norm.weight": np.ones(24)}, "the same tensor"),
    "rows": ({"base_model.model.lm_head.weight": np.ones((65, 24))}, "tokens.weight would have 61 rows and lm_head"),
    "tokens": (
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((1, 24))},
        "trainable_token_indices=None of model.embed_tokens are no tokens of the 61",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_refused(bases, copy, name):
    changes, says = BAD_FILES[name]
    write(copy, **changes)
    with pytest.raises(CheckpointError, match=says) as error:
        over(bases["llama-gqa3"].folder, copy)
    assert "\n" not in str(error.value)


def test_two_adapters_of_one_base_are_a_pair(bases, tmp_path):
    """Each written as MODEL+ADAPTER: the weights that PEFT merges, in memory and tensor by tensor; nothing twice."""
    whole, sources = bases["llama-gqa3"].folder, []
    for i, targets in enumerate((QV, ["o_proj", "v_proj"])):
        model = adapted(whole, tmp_path / f"adapter{i}", seed=i, target_modules=targets)
        model.merge_and_unload().save_pretrained(tmp_path / f"merged{i}")
        sources.append(f"{whole}+{tmp_path / f'adapter{i}'}")
    base = load_checkpoint(sources[0])
    models = base, load_checkpoint(sources[1], base=base)
    assert [model.source for model in models] == sources
    for i, model in enumerate(models):
        assert_same(model, load_checkpoint(tmp_path / f"merged{i}"))
        stored = open_model(sources[i])
        for name, w in load_file(tmp_path / f"merged{i}" / "model.safetensors").items():
            np.testing.assert_allclose(stored.read(name), w, rtol=1e-5, atol=1e-6, err_msg=name)
    ours, theirs = (flatten(model.params) for model in models)
    assert {path for path in ours if ours[path] is not theirs[path]} == {f"blocks/attn/W_{w}" for w in "QVO"}
    for source in (f"{whole}+{whole}", f"{whole}+", f"+{whole}"):
        with pytest.raises(CheckpointError, match="is no PEFT adapter"):
            load_checkpoint(source)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_checkpoint(f"{whole}+{tmp_path / 'nowhere'}")


def test_factors_of_routed_experts_that_are_refused(bases, tmp_path):
    base = load_checkpoint(bases["mixtral"].folder)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted(bases["mixtral"].folder, tmp_path, target_modules=["q_proj"], target_parameters=targets)
    file, raw = tmp_path / "adapter_model.safetensors", json.loads((tmp_path / "adapter_config.json").read_text())
    whole, inner = load_file(file), "base_model.model.model.layers.1.mlp.experts.base_layer.lora_"
    a, without = whole[inner + "A.weight"], {name: w for name, w in whole.items() if not name.startswith(inner)}
    for tensors, changes, says in (
        (without, {}, r"names model\.layers\.1\.mlp\.experts\.gate_up_proj, for which the file holds nothing"),
        (without | {inner + "A.weight": a}, {}, "only one of lora_A and lora_B is there"),
        (whole | {inner + "A.weight": a[:12]}, {}, r"\(12, 24\) and .* fit no tensor of 5 experts"),
        (whole, {"rank_pattern": {"gate_up_proj": 4}}, r"gate_up_proj are of rank 3, and .* says 4"),
        (whole, {"target_parameters": [*targets, "norm.weight"]}, "is not implemented but for routed experts"),
    ):
        save_file(tensors, file, metadata={"format": "pt"})
        (tmp_path / "adapter_config.json").write_text(json.dumps(raw | changes))
        with pytest.raises(CheckpointError, match=says):
            load_checkpoint(tmp_path, base=base)


def test_an_adapter_of_another_base_is_refused_by_what_differs(bases, plain, tmp_path):
    """Narrower, deeper, of another family; and a depth that shows only in what the adapter lacks."""
    config = transformers.AutoConfig.from_pretrained(bases["llama-gqa3"].folder).to_dict()
    for changes, says in (
        ({"hidden_size": 12}, r"q_proj\.lora_A\.weight has shape \(3, 24\), and fits .* only with \(3, 12\)"),
        ({"num_hidden_layers": 2}, "is of layer 2, and .* has 2 layers; the adapter was trained over another base"),
        ({"num_hidden_layers": 4}, r"target_modules names model\.layers\.3\.self_attn\.q_proj"),
    ):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**config, **changes}))
        model.save_pretrained(tmp_path / str(changes))
        with pytest.raises(CheckpointError, match=says):
            over(tmp_path / str(changes), plain)
    with pytest.raises(CheckpointError, match="belongs to no weight of"):
        over(bases["gpt2-tied"].folder, plain)


def test_pickles_and_adapters_given_as_a_base(bases, copy):
    with pytest.raises(CheckpointError, match="not a whole model; name it as the expert, and what it was trained over"):
        load_pair(copy, bases["llama-gqa3"].folder)
    configure(copy, peft_type="VERA")
    with pytest.raises(CheckpointError, match="peft_type='VERA' is not implemented"):
        load_pair("no such base", copy)  # said before the base is read
    configure(copy, peft_type="LORA")
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.bin: a pickle, which is never read; save the adapter as"
    ):
        over(bases["llama-gqa3"].folder, copy)
    (copy / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        over(bases["llama-gqa3"].folder, copy)


def test_a_pair_with_an_adapter(tmp_path):
    """It has the base's tokenizer, and says what the adapter changes. One that was not trained is no expert."""
    save_checkpoint(tmp_path / "base", load_pair("tiny:base", "tiny:expert").base_checkpoint)
    adapted(tmp_path / "base", tmp_path / "adapter", target_modules=QV, layers_to_transform=[1, 2, 5])
    pair = load_pair("tiny:base", tmp_path / "adapter")
    assert pair.tokenizer is pair.base_checkpoint.tokenizer
    assert pair.notes[0].endswith("is an adapter: LoRA of rank 3 on q_proj, v_proj in layers 1-2, 5")
    assert pair.notes[1].endswith("/base' as its base, not tiny:base")
    assert pair.fingerprints == load_pair(tmp_path / "base", tmp_path / "adapter").fingerprints
    assert make_pair(pair.base_checkpoint, pair.expert_checkpoint, "expert").tokenizer is pair.tokenizer
    zeros = {
        n: 0 * t for n, t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items() if "lora_B" in n
    }
    write(tmp_path / "adapter", **zeros)
    with pytest.raises(PairError, match="have equal weights"):
        load_pair("tiny:base", tmp_path / "adapter")
