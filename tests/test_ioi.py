"""Prompts of indirect object identification, copy scores against torch, and the command."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from tests.oracles import hf_final_norm, hf_layers
from tests.tiny import LLAMA
from wpjax.checkpoints.checkpoint import load_checkpoint
from wpjax.circuits.circuit import Circuit
from wpjax.circuits.contrast import single_token
from wpjax.circuits.ioi import (
    NAMES,
    OBJECTS,
    PLACES,
    TEMPLATES,
    copy_scores,
    ioi_prompts,
    one_token,
    published_classes,
)
from wpjax.circuits.ioi_study import Head, IOIStudy, ioi_study
from wpjax.circuits.measures import Curve, Faithfulness
from wpjax.cli.circuit import print_study
from wpjax.errors import BehaviourError
from wpjax.metrics.metric import scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random Llama with a tokenizer in which each word of the task is one token, and one that knows no task."""
    path = tmp_path_factory.mktemp("ioi")
    fixed = {w.strip(",.") for t in TEMPLATES for w in t.split() if "{" not in w} | {",", "."}
    words = sorted(fixed | set(NAMES[:12]) | set(PLACES[:3]) | set(OBJECTS[:3]))
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{w: i + 1 for i, w in enumerate(words)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    config = transformers.AutoConfig.for_model("llama", **{**LLAMA, "vocab_size": len(words) + 1})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.15 * torch.randn_like(p))
        # An answer must be told from ABC prompts: layer 1 attends evenly, and its first head copies the embedding.
        embed = model.model.embed_tokens.weight
        embed.copy_(torch.randn_like(embed))
        model.lm_head.weight.copy_(embed)
    model.save_pretrained(path)
    return path, model


def test_prompts_have_one_name_once_and_one_twice(folder):
    model = load_checkpoint(str(folder[0]))
    prompts = ioi_prompts(model, 14, seed=3)
    clean, corrupted = prompts.contrast.clean, prompts.contrast.corrupted
    words = [text.replace(",", " ,").replace(".", " .").split() for text in prompts.texts]
    for i, row in enumerate(words):
        names = [w for w in row if w in NAMES]
        (io,) = [n for n in names if names.count(n) == 1]
        s = names[-1]
        assert names.count(s) == 2
        assert names[0] == (io if i % 2 == 0 else s)  # ABBA, BABA
        ids = model.tokenizer.convert_tokens_to_ids([io, s])
        assert [int(clean.readout.tokens[i, 0]), int(clean.readout.foils[i, 0])] == ids
        at = prompts.positions[i]
        assert [row[p] for p in at] == [io, s, s]
        assert at[1] < at[2]
        assert clean.at[i, 0] == len(row) - 1
        # ABC: the same sentence with three other names.
        differ = np.flatnonzero(clean.tokens.ids[i] != corrupted.tokens.ids[i])
        assert differ.tolist() == sorted(at.tolist())
        others = model.tokenizer.convert_ids_to_tokens(corrupted.tokens.ids[i, differ].tolist())
        assert len({*others, io, s}) == 5
    for group in set(prompts.groups.tolist()):  # in a group, positions mean the same
        assert len({tuple(p) for p in prompts.positions[prompts.groups == group].tolist()}) == 1
    assert ioi_prompts(model, 14, seed=3).texts == prompts.texts
    assert ioi_prompts(model, 14, seed=4).texts != prompts.texts


def test_copy_scores_are_those_of_torch_modules(folder):
    path, model = folder
    ours = load_checkpoint(str(path))
    prompts = ioi_prompts(ours, 6)
    ids, dh = prompts.contrast.clean.tokens.ids, model.config.head_dim
    expected = np.zeros((2, 3, 6))
    with torch.no_grad():
        stream = model(torch.tensor(ids).long(), output_hidden_states=True).hidden_states[1]
        for i, layer in enumerate(hf_layers(model)):
            v = layer.self_attn.v_proj(layer.input_layernorm(stream))
            for h in range(6):
                mine = v[..., h // 3 * dh : (h // 3 + 1) * dh]
                o = mine @ layer.self_attn.o_proj.weight[:, h * dh : (h + 1) * dh].T
                logits = model.lm_head(hf_final_norm(model)(o))
                for end, ranked in enumerate((logits, -logits)):
                    best = ranked.topk(5).indices
                    hits = [ids[b, t] in best[b, t] for b in range(6) for t in prompts.positions[b]]
                    expected[end, i, h] = np.mean(hits)
    got = copy_scores(ours.cfg, ours.params, jnp.asarray(ids), jnp.asarray(prompts.positions))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert len(np.unique(expected)) > 2


def test_the_command_writes_what_it_prints(folder, wpjax, tmp_path):
    """Prompts are those of the first seed for which this random model prefers IO."""
    path, _ = folder
    model, seed = load_checkpoint(str(path)), None
    for seed in range(20):
        clean, abc = (scores(model.cfg, model.params, m).mean() for m in ioi_prompts(model, 4, seed=seed + 1).contrast)
        if clean > max(abc, 0):
            break
    arguments = ["circuit", "ioi", "--model", path, "--out", "ioi.json", "--n-prompts", 4, "--steps", 1, "--seed", seed]
    code, printed, error = wpjax(*arguments)
    assert code == 0, error
    content = json.loads((tmp_path / "ioi.json").read_text())
    assert (tmp_path / "ioi.png").stat().st_size > 10_000
    assert content["logit_difference"] == pytest.approx(clean, rel=1e-4)
    assert f"logit difference {clean:.2f}, on ABC prompts {abc:.2f}" in printed
    assert len(content["heads"]) == 18
    assert [(c["level"], c["absolute"]) for c in content["curves"]] == [
        (level, absolute) for level in ("edges", "nodes") for absolute in (False, True)
    ]
    for curve in content["curves"]:
        assert f"Circuits of {curve['level']}: CPR {curve['cpr']:.3f}, CMD {curve['cmd']:.3f}" in printed
        assert curve["f"][-1] == pytest.approx(1)
    assert wpjax(*arguments)[0] == 2  # the files exist
    shown = wpjax("show", "ioi.json")
    assert shown[0] == 0, shown[2]
    assert shown[1].strip() == printed[: printed.index("\nwrote ioi.json")].strip()
    assert json.loads(wpjax("show", "ioi.json", "--json")[1]) == content
    words = wpjax("show", "ioi.json", "--words")[1]
    assert f"the mean logit difference is {clean:.2f}." in words
    assert f"A circuit of {len(content['circuit']['members'])} heads" in words
    code, _, error = wpjax("show", "ioi.json", "--csv")
    assert code == 2
    assert "ioi.json holds no sweep" in error
    for change, message in (({"schema": 1}, "make it again"), ({"heads": [{}]}, "damaged (KeyError: 'name')")):
        (tmp_path / "bad.json").write_text(json.dumps(content | change))
        code, _, error = wpjax("show", "bad.json")
        assert code == 2
        assert message in error
        assert error.count("bad.json") == 1


def test_the_published_circuit_stands_beside_the_papers_figures(capsys):
    """A study of GPT-2 small, made by hand: 26 heads of 7 classes, of which two are shown."""
    classes = published_classes()
    assert len(classes) == 26
    assert len(set(classes.values())) == 7
    heads = (Head("L9.head.9", 0.3, 0.3, 0.6, 0.1, 0.99, 0.0), Head("L10.head.7", -0.2, -0.2, 0.5, 0.1, 0.0, 1.0))
    faithful = Faithfulness(3.5, 3.1, 0.0, "mean")
    curve = Curve((0.5, 1.0), (1, 2), (0.5, 1.0), "edges", True, "resample", "EAP")
    circuit = Circuit("nodes", ("L9.head.9",), "0", ("head",))
    study = IOIStudy(
        ("gpt2", "0"), 4, 0, (3.5, 0.1, 1.0), heads, circuit, {1: 0.9}, faithful, (), (), (curve,),
        (("L9.head.9", "logits", -1.0),), (1.0, 1.0, 1.0), faithful,
    )  # fmt: skip
    assert [h.name for h in study.name_movers] == ["L9.head.9"]
    assert [h.name for h in study.negative] == ["L10.head.7"]
    print_study(study)
    printed = capsys.readouterr().out
    assert "F(M) 3.50 (paper 3.56), |F(M) - F(C)| 0.40 (paper 0.46)" in printed
    assert "L10.head.7" in printed


def test_words_of_tokenizers_that_put_a_blank_before_a_text():
    """As Llama 2's: alone, " Mary" is two tokens; inside a text it is one."""
    pieces = ["<unk>", "▁", "▁Mary", "▁to", "\n", *"Mary"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert len(tokenizer(" Mary", add_special_tokens=False)["input_ids"]) == 2
    assert one_token(tokenizer, ["Mary", "May"]) == ["Mary"]
    inside = tokenizer("Mary to Mary", add_special_tokens=False)["input_ids"]
    assert single_token(tokenizer, " Mary") == inside[-1]
    with pytest.raises(BehaviourError, match="'Mary' is 4 tokens"):  # without a blank it goes on as letters
        single_token(tokenizer, "Mary")


def test_what_cannot_do_the_task_is_refused(folder, tiny_pair):
    model = load_checkpoint(str(folder[0]))
    with pytest.raises(BehaviourError, match="of the names are one token for this tokenizer, 5 are needed"):
        ioi_prompts(tiny_pair.base_checkpoint, 4)
    for seed in range(20):
        clean, abc = (scores(model.cfg, model.params, m).mean() for m in ioi_prompts(model, 4, seed=seed + 1).contrast)
        if clean <= max(abc, 0):
            with pytest.raises(BehaviourError, match="does not do the task: its mean logit difference of IO and S is"):
                ioi_study(model, n_prompts=4, seed=seed)
            return
    pytest.fail("every seed does the task")
