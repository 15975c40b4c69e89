"""Rank-one edits: against ROME's released formulas in NumPy and torch; the moment of keys; patch files; scores."""

import copy
import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from tests.oracles import NAMES, hf_layers
from tests.tiny import build
from wpjax.checkpoints.checkpoint import load_checkpoint
from wpjax.checkpoints.rewrite import open_model
from wpjax.errors import FactError, PatchError
from wpjax.facts.covariance import KeyMoment, edit_direction, key_moment, key_moments
from wpjax.facts.facts import Fact, continued, encode, load_facts, locate
from wpjax.facts.rank_one import EditSettings, Task, edit_fact, edit_loss, make_task, sample_prefixes
from wpjax.facts.scores import score_edits, target_probabilities
from wpjax.models.decoder import forward
from wpjax.pairs import load_model
from wpjax.patchfiles import apply_patches, load_patch
from wpjax.results.edit_scores import EditScores
from wpjax.runtime.shards import Shards

LAYER, KL, DECAY = 1, 2.0, 0.5
RNG = np.random.default_rng(0)
TASK = Task(  # two prompts of a target of two tokens, and "{} is a"
    jnp.asarray(RNG.integers(0, 61, (3, 8)), jnp.int32),
    jnp.array([3, 4, 1]),
    jnp.array([[4, 5], [6, 7]]),
    jnp.array([[9, 30], [9, 30]]),
    jnp.ones((2, 2), bool),
)


@pytest.fixture(scope="module")
def model():
    return load_model("tiny:expert")


@pytest.fixture(scope="module")
def fact():
    return Fact("Why do {} hunt at", "the owls", "night", "noon", ("When do owls hunt? At",), ("Bats hunt at",))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    words = "owl night sky blue why how do the of a in hunt sing river stone cold warm two red".split()
    rng = np.random.default_rng(3)
    path.write_text("".join(" ".join(rng.choice(words, 9)) + ".\n" for _ in range(160)), encoding="utf-8")
    return path


def hf_expert():
    return AutoModelForCausalLM.from_pretrained(open_model("tiny:expert").path, dtype=torch.float32)


def moment_of(width, seed=5):
    a = np.random.default_rng(seed).standard_normal((3 * width, width))
    return KeyMoment(a.T @ a / len(a), len(a))


@pytest.fixture(scope="module")
def edit(model, fact):
    settings = EditSettings(steps=20, lr=1.0, kl=0.0, decay=0.0, clamp=100.0)  # the tiny model is stubborn
    return edit_fact(model, fact, 0, moment_of(model.cfg.d_mlp), settings=settings, prefixes=["Tell me"])


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa3", "gemma3"])
def test_the_loss_and_its_slope_are_those_of_the_released_code(name, tmp_path):
    """The loss of `compute_v` of kmeng01/rome, in torch with a hook on the down-projection."""
    hf = build(name, tmp_path)
    cfg, params = (own := load_checkpoint(str(tmp_path))).cfg, own.params
    model, lookup = hf.model.double(), TASK.lookup.tolist()
    w_out = hf_layers(model)[LAYER].get_submodule(NAMES[model.config.model_type].w_out)
    delta = torch.tensor(np.random.default_rng(1).standard_normal(cfg.d_model) * 0.3)
    delta.requires_grad_(True)
    stream = forward(cfg, params, TASK.tokens, stop=LAYER, logits=False).resid
    tokens, targets, kept = torch.tensor(np.asarray(TASK.tokens)), torch.tensor([[9, 30], [9, 30]]), {}

    def edit_output(module, args, out):
        kept.setdefault("start", out[0, lookup[0]].detach().clone())
        out = out.clone()
        for i, at in enumerate(lookup):
            out[i, at] += kept.get("delta", 0 * delta)
        return out

    handle = w_out.register_forward_hook(edit_output)
    before = model(tokens).logits[-1, lookup[-1]].detach().log_softmax(-1)
    kept["delta"] = delta
    logits = model(tokens).logits
    handle.remove()
    log_p = logits.log_softmax(2)
    at = [
        [log_p[i, r, t] for r, t in zip(reads, targets[i], strict=True)] for i, reads in enumerate(TASK.reads.tolist())
    ]
    nll = -torch.stack([torch.stack(row).sum() / 2 for row in at]).mean()
    now = log_p[-1, lookup[-1]][None]
    kl = KL * torch.nn.functional.kl_div(before[None], now, log_target=True, reduction="batchmean")
    loss = nll + kl + DECAY * delta.norm() / kept["start"].norm() ** 2
    loss.backward()

    def ours(d):
        start, was = (jnp.asarray(a.numpy(), jnp.float32) for a in (kept["start"], before))
        return edit_loss(cfg, params, TASK, LAYER, stream, d, start, was, KL, DECAY)

    value, slope = jax.value_and_grad(ours)(jnp.asarray(delta.detach().numpy(), jnp.float32))
    off = abs(float(value) - loss.item()), float(np.abs(slope - delta.grad.numpy()).max())
    print(f"{name}: the loss differs by {off[0]:.1e}, its slope by {off[1]:.1e}")
    assert float(value) == pytest.approx(loss.item(), abs=2e-6)
    np.testing.assert_allclose(slope, delta.grad.numpy(), atol=2e-6)
    assert kl.item() > 1e-4


def test_a_step_of_an_edit_keeps_no_copy_of_the_weights(model):
    """What the backward pass keeps is activations, a small part of the weights, however many layers there are."""
    task, width = make_task(model, Fact("Why do {} hunt", "owls", new_target="at noon"), ["Say"]), model.cfg.d_model
    stream, one = jnp.zeros((*task.tokens.shape, width)), jnp.ones(width)

    @jax.jit
    def step(params, delta):
        return jax.value_and_grad(
            lambda d: edit_loss(model.cfg, params, task, 1, stream, d, one, jnp.zeros(model.cfg.d_vocab), KL, DECAY)
        )(delta)

    memory = step.lower(model.params, one).compile().memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 2


@pytest.mark.parametrize("how", ["mean", "released"])
def test_the_update_is_the_released_formula(model, fact, how):
    """u, v, W' of `compute_u`, `compute_v` and `rome_main`, in float64 from HF's own keys, with C and v* injected."""
    prefixes = ["Tell me", "In the wood"]
    settings, moment = EditSettings(steps=2, keys=how), moment_of(model.cfg.d_mlp)
    made = edit_fact(model, fact, 4, moment, settings=settings, prefixes=prefixes)
    hf = hf_expert()
    down, seen = hf.model.layers[4].mlp.down_proj, []
    handle = down.register_forward_hook(lambda m, a, out: seen.append((a[0][0].double(), out[0].double())))
    k, out = [], []
    for prefix in ("", *prefixes):
        text = (prefix + ". " if prefix else "") + fact.text
        with torch.no_grad():
            hf(**model.tokenizer(text, return_tensors="pt"))
        last = len(model.tokenizer(text[: text.index("owls") + 4])["input_ids"]) - 1
        k.append(seen[-1][0][last].numpy())
        out.append(seen[-1][1][last].numpy())
    handle.remove()
    u = np.linalg.inv(moment.moment) @ np.mean(k, 0)
    u /= np.linalg.norm(u)
    key, current = (np.mean(k, 0), np.mean(out, 0)) if how == "mean" else (k[0], out[0])
    right = (made.value - current) / (key @ u)
    w = down.weight.detach().numpy().T  # [F, D]
    new = np.asarray(made.apply(model.cfg, model.params)["blocks"]["mlp"]["W_out"][4])
    worst = np.abs(new - (w + np.outer(u, right))).max()
    print(f"{how}: W' differs by {worst:.1e} at most, of a change of up to {np.abs(np.outer(u, right)).max():.1e}")
    assert worst < 1e-5
    assert np.abs(new - w).max() > 1e-3
    # The identity: what the projection makes of the key is v*, whatever the convention.
    np.testing.assert_allclose(key @ new, made.value, atol=1e-4)
    other = model.params["blocks"]["mlp"]["W_out"][3]
    np.testing.assert_array_equal(made.apply(model.cfg, model.params)["blocks"]["mlp"]["W_out"][3], other)


def test_an_edit_makes_the_model_say_the_new_target(model, fact, edit):
    params = edit.apply(model.cfg, model.params)
    was, now = (target_probabilities(model, p, [fact.text] * 2, ["noon", "night"]) for p in (model.params, params))
    assert was[0] < was[1]
    assert now[0] > now[1]
    assert edit.losses[-1] < edit.losses[0]


def test_the_clamp_holds_the_value_near_where_it_was(model, fact):
    settings = EditSettings(steps=4, clamp=0.25)
    made = edit_fact(model, fact, 4, moment_of(model.cfg.d_mlp), settings=settings, prefixes=[])
    start = made.key @ np.asarray(model.params["blocks"]["mlp"]["W_out"][4])
    assert np.linalg.norm(made.value - start) == pytest.approx(0.25 * np.linalg.norm(start), rel=1e-4)


def test_a_long_target_is_read_token_by_token(model):
    task = make_task(model, Fact("Why do {} hunt", "owls", new_target="in the deep wood"), ["Say"])
    at, target = continued(model.tokenizer, "Say. Why do owls hunt", "in the deep wood")
    assert task.targets[1].tolist() == target.tolist()
    assert task.reads[1].tolist() == list(range(len(at) - 1, len(at) - 1 + len(target)))
    row = np.asarray(task.tokens[1])
    assert row[: len(at) + len(target) - 1].tolist() == [*at, *target[:-1]]


def test_the_moment_of_keys_is_that_of_all_tokens_in_torch_and_is_kept(model, corpus, tmp_path):
    found = key_moment(model, 2, corpus, most_tokens=700, cache=tmp_path)
    ids = model.tokenizer(corpus.read_text(), add_special_tokens=False)["input_ids"][:700]
    hf, seen = hf_expert(), []
    hf.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0][0].double()))
    width = min(256, model.cfg.n_ctx)
    with torch.no_grad():
        for first in range(0, 700, width):
            hf(torch.tensor([ids[first : first + width]]))
    k = torch.cat(seen).numpy()
    assert found.n_tokens == len(k) == 700
    np.testing.assert_allclose(found.moment, k.T @ k / len(k), atol=1e-5 * np.abs(found.moment).max())
    (file,) = tmp_path.iterdir()
    again = key_moment(model, 2, corpus, most_tokens=700, cache=tmp_path, progress=lambda *_: pytest.fail("read again"))
    np.testing.assert_array_equal(again.moment, found.moment)
    file.write_bytes(b"damaged")  # then it is made anew
    np.testing.assert_array_equal(key_moment(model, 2, corpus, most_tokens=700, cache=tmp_path).moment, found.moment)
    assert len({*tmp_path.iterdir()}) == 1
    # Several layers are read together, but for those that are kept.
    both = key_moments(model, [6, 2, 3], corpus, most_tokens=700, cache=tmp_path)
    assert len({*tmp_path.iterdir()}) == 3
    np.testing.assert_array_equal(both[2].moment, found.moment)
    for layer in (3, 6):
        alone = key_moment(model, layer, corpus, most_tokens=700).moment
        np.testing.assert_allclose(both[layer].moment, alone, atol=1e-6 * np.abs(alone).max())


def test_a_singular_moment_is_refused_unless_a_ridge_is_asked_for():
    a = np.random.default_rng(0).standard_normal((100, 4))
    few, twins = KeyMoment(a[:3].T @ a[:3] / 3, 3), a.copy()
    twins[:, 3] = twins[:, 2]
    dead = a * [1, 1, 1, 0]
    key = np.ones(4)
    cases = [(few, "3 tokens cannot fill 4"), (KeyMoment(twins.T @ twins / 100, 100), "singular"),
             (KeyMoment(dead.T @ dead / 100, 100), "1 neurons are always 0")]  # fmt: skip
    for moment, message in cases:
        with pytest.raises(FactError, match=message):
            edit_direction(moment, key)
        u = edit_direction(moment, key, ridge=0.1)
        c = moment.moment + 0.1 * np.diag(moment.moment).mean() * np.eye(4)
        np.testing.assert_allclose(u, np.linalg.solve(c, key) / np.linalg.norm(np.linalg.solve(c, key)), rtol=1e-9)


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-biases"])
def test_a_saved_edit_goes_in_and_out_again_and_transformers_agrees(name, tmp_path):
    """Both layouts of a down-projection, [F, D] and [D, F]; two edits, the second of the model that has the first."""
    from wpjax.facts.rank_one import FactEdit

    build(name, tmp_path / "base")
    ids, path = RNG.integers(0, 61, (2, 9)), tmp_path / "base"
    for i in range(2):
        own = load_checkpoint(str(path))
        vectors = [RNG.standard_normal(n).astype(np.float32) * 0.3 for n in (own.cfg.d_mlp, own.cfg.d_model)]
        made = FactEdit(Fact("{} a", "b"), i + 1, *vectors, *vectors, (1.0, 0.5), EditSettings())
        patch = made.save(tmp_path / f"{i}.safetensors", own)
        assert patch.info.components == (f"L{i + 1}.mlp",)
        assert patch.info.error == 0
        apply_patches(open_model(path), [load_patch(tmp_path / f"{i}.safetensors")], tmp_path / f"edited{i}")
        path = tmp_path / f"edited{i}"
        params = made.apply(own.cfg, own.params)
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(path)(torch.tensor(ids)).logits.numpy()
        ours = forward(own.cfg, params, jnp.asarray(ids, jnp.int32)).logits
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
        stored = load_checkpoint(str(path)).params["blocks"]["mlp"]["W_out"]
        np.testing.assert_array_equal(stored, params["blocks"]["mlp"]["W_out"])
        assert np.abs(np.asarray(stored) - own.params["blocks"]["mlp"]["W_out"]).max() > 0.1
    for i in (1, 0):
        patch, out = load_patch(tmp_path / f"{i}.safetensors"), tmp_path / f"without{i}"
        apply_patches(open_model(path), [patch], out, undo=True)
        path = out
    assert open_model(path).fingerprint() == open_model(tmp_path / "base").fingerprint()
    with pytest.raises(PatchError, match="not in"):
        apply_patches(open_model(path), [patch], tmp_path / "again", undo=True)


def test_probabilities_are_those_of_torch_token_by_token(model):
    hf = hf_expert()
    prompts, targets = ["Owls hunt at", "Why is the sky"], ["night time", "blue"]
    found = target_probabilities(model, model.params, prompts, targets)
    for p, prompt, target in zip(found, prompts, targets, strict=True):
        ids = encode(model.tokenizer, f"{prompt} {target}")
        n = len(encode(model.tokenizer, prompt))
        with torch.no_grad():
            log_p = hf(torch.tensor(ids[None].astype(np.int64))).logits[0].log_softmax(-1)
        each = [log_p[i - 1, ids[i]].item() for i in range(n, len(ids))]
        assert p == pytest.approx(np.exp(np.mean(each)), rel=1e-4)


def test_scores_are_what_their_names_say():
    """Worked by hand: two facts, the second without neighbours."""
    p = {
        "E": (np.array([[0.6, 0.2]]), np.array([[0.1, 0.3]])),
        "P": (np.array([[0.5, 0.1], [0.1, 0.2]]), np.array([[0.4, 0.3]])),
        "N": (np.array([[0.1, 0.7], [0.3, 0.1]]),),
    }
    table = {name: of.mean for name, of in EditScores(p, p).table().items()}
    expected = {"ES": 0.5, "EM": (0.4 - 0.2) / 2, "PS": 0.75, "PM": (0.15 + 0.1) / 2, "NS": 0.5, "NM": 0.2}
    expected["S"] = 3 / (1 / 0.5 + 1 / 0.75 + 1 / 0.5)
    assert table == pytest.approx(expected)


def test_every_fact_is_scored_in_the_model_with_its_edit_alone(model, fact, edit, tmp_path):
    seen = []

    def make(which):
        seen.append(which)
        return edit

    scores = score_edits(model, [fact, fact], make)
    params = edit.apply(model.cfg, model.params)
    prompts = {"E": [fact.text], "P": list(fact.paraphrases), "N": list(fact.neighbours)}
    for kind, texts in prompts.items():
        for when, weights in (("before", model.params), ("after", params)):
            new, old = (target_probabilities(model, weights, texts, [t] * len(texts)) for t in ("noon", "night"))
            for case in getattr(scores, when)[kind]:
                np.testing.assert_allclose(case, np.stack([new, old], 1), rtol=1e-5, atol=1e-8)
    assert seen == [fact, fact]
    # A run that stops at the second fact keeps the first, and the next one makes only what is not done.
    facts = [fact, dataclasses.replace(fact, new_target="dawn")]

    def stop(which):
        if which.new_target == "dawn":
            raise KeyboardInterrupt
        return make(which)

    with pytest.raises(KeyboardInterrupt), Shards(tmp_path / "s.json", "edit", {}, resume=False) as done:
        score_edits(model, facts, stop, done=done)
    with Shards(tmp_path / "s.json", "edit", {}, resume=True) as done:
        both = score_edits(model, facts, make, done=done)
        assert [f.new_target for f in seen[2:]] == ["noon", "dawn"]
        done = dict(done)
    np.testing.assert_array_equal(both.after["E"][0], scores.after["E"][0])

    # What fails is named, and the others count.
    def refuse(which):
        raise FactError("the loss is not finite")

    half = score_edits(
        model, [fact, dataclasses.replace(fact, where="line 2")], refuse, done={"fact-0": done["fact-0"]}
    )
    assert (half.n_facts, dict(half.failed)) == (1, {f"line 2: {fact.text}": "the loss is not finite"})
    assert f"Not edited: line 2: {fact.text}: the loss is not finite" in half.summary
    with pytest.raises(FactError, match=r"none of the 1 facts could be edited.*not finite"):
        score_edits(model, [fact], refuse)
    with pytest.raises(FactError, match="no target and new_target"):
        score_edits(model, [Fact("{} hunt", "Owls")], make)


def test_prefixes_depend_on_the_seed(model):
    same, other = (sample_prefixes(model, n=2, lengths=(4, 6), seed=seed) for seed in (0, 1))
    assert same == sample_prefixes(model, n=2, lengths=(4, 6), seed=0)
    assert len(same) == 4
    assert same != other


COUNTERFACT = {
    "case_id": 1,
    "requested_rewrite": {"prompt": "{} hunt at", "subject": "Owls", "target_new": {"str": "noon", "id": "Q1"},
                          "target_true": {"str": "night", "id": "Q2"}, "relation_id": "P1"},
    "paraphrase_prompts": ["Out of the wood. Owls hunt at"], "neighborhood_prompts": ["Bats hunt at"],
    "attribute_prompts": [], "generation_prompts": [],
}  # fmt: skip


def test_files_of_facts_are_read_in_all_three_forms(tmp_path):
    path = tmp_path / "facts.json"
    known = {"known_id": 0, "subject": "Owls", "attribute": "night", "template": "{} hunt", "prompt": "Owls hunt at"}
    path.write_text(json.dumps([COUNTERFACT, known]), encoding="utf-8")
    a, b = load_facts(path)
    assert a == Fact("{} hunt at", "Owls", "night", "noon", ("Out of the wood. Owls hunt at",), ("Bats hunt at",))
    assert b == Fact("{} hunt at", "Owls", "night")
    lines = [{"prompt": "{} hunt at", "subject": "Owls", "replacement": "Bats"}, COUNTERFACT]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert load_facts(path) == [Fact("{} hunt at", "Owls", replacement="Bats"), a]


@pytest.mark.parametrize(("content", "message"), [
    ("", "holds no facts"),
    ("[", "not JSON"),
    ('{"subject": "x"}\n{}', "line 1: no prompt"),
    ('{"prompt": "Owls hunt", "subject": "Bats"}', "line 1: 'Bats' does not stand in the prompt 'Owls hunt'"),
    ('{"prompt": "Owls hunt Owls", "subject": "Owls"}', "stands 2 times"),
    ('{"prompt": "{} hunt", "subject": " "}', "has no subject"),
    ('{"prompt": "{} hunt", "subject": "Owls", "taget": "x"}', "unknown key 'taget'"),
    ('{"prompt": "{} hunt", "subject": 7}', "subject is to be a text"),
    ('{"prompt": "{} hunt", "subject": "Owls", "paraphrases": "x"}', "paraphrases is to be a list of texts"),
    ('[{"requested_rewrite": {"prompt": "{}"}}]', "entry 1: an entry of CounterFact or of known facts, but not whole"),
    ('{"prompt": "{} hunt", "subject": "Owls", "neighbours": [""]}', "one of the neighbours is empty"),
    ('{"prompt": "{} hunt", "subject": "\\ud800"}', "half of a character"),
    ("[3]", "not an object"),
])  # fmt: skip
def test_a_file_that_holds_no_facts_is_refused(tmp_path, content, message):
    path = tmp_path / "facts.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(FactError, match=message):
        load_facts(path)


def test_a_tokenizer_that_closes_texts_does_not_close_prompts(model):
    """As T5's or some Llama's: its end of text comes after every text, and must not come before an answer."""
    closing = copy.deepcopy(model.tokenizer)
    end = closing.eos_token
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, closing.eos_token_id)]
    )
    assert closing("Owls hunt")["input_ids"][-1] == closing.eos_token_id
    for find in (lambda t: encode(t, "Owls hunt at"), lambda t: locate(t, "Why do {} hunt at", "the owls").ids):
        np.testing.assert_array_equal(find(closing), find(model.tokenizer))
    assert encode(closing, "").tolist() == encode(model.tokenizer, "").tolist()


def test_an_edit_that_cannot_reach_the_answer_is_refused(model):
    last = model.cfg.n_layers - 1
    with pytest.raises(FactError, match=f"layer {last} is the last one"):
        edit_fact(
            model,
            Fact("Why do {} hunt at", "the owls", new_target="noon"),
            last,
            moment_of(model.cfg.d_mlp),
            prefixes=["Tell me"],
        )


def test_a_subject_without_tokens_of_its_own_is_refused(model):
    with pytest.raises(FactError, match="'ow' has no tokens of its own in 'Why do owls hunt"):
        locate(model.tokenizer, "Why do {}ls hunt?", "ow")
    with pytest.raises(FactError, match="has no target"):
        continued(model.tokenizer, "Why", " ")
    with pytest.raises(FactError, match="layer 8: tiny:expert has layers 0 to 7"):
        edit_fact(model, Fact("{} hunt", "Owls", new_target="x"), 8, moment_of(4))


def test_the_command_edits_and_scores(wpjax, workplace, corpus):
    """The command: a patch that `apply` takes; a table of scores; and what it refuses before any work."""
    given = ["--model", "tiny:expert", "--text", corpus, "--layer", "4", "--ridge", "0.1", "--steps", "6"]
    given += ["--cache", workplace / "keys", "--prefix", "Tell me", "--most-tokens", "400"]
    one = ["--prompt", "Why do the owls hunt at", "--subject", "the owls", "--target", " noon"]
    code, out, err = wpjax("edit", *given, *one, "--out", "edit.safetensors")
    assert code == 0, err
    assert "'Why do the owls hunt at' -> ' noon': probability 0." in out
    assert "wpjax apply --base tiny:expert --patch edit.safetensors" in out
    info = load_patch("edit.safetensors").info
    assert info.behaviour == "Why do the owls hunt at -> noon"
    # All that it can be made again from.
    made_from = {name: info.measured[name] for name in ("prefixes", "n_prefixes", "n_tokens", "text", "seed")}
    of_text = hashlib.blake2b(corpus.read_bytes(), digest_size=16).hexdigest()
    wanted = {"prefixes": ["Tell me"], "n_prefixes": 1, "n_tokens": 400, "text": of_text, "seed": 0}
    assert made_from == wanted
    settings = {"keys": "mean", "steps": 6, "lr": 0.5, "kl": 0.0625, "ridge": 0.1}
    assert info.measured["settings"].items() >= settings.items()
    assert "over 400 tokens, fewer than 10 a neuron" in err
    facts = workplace / "facts.json"
    facts.write_text(json.dumps([COUNTERFACT]), encoding="utf-8")
    code, out, err = wpjax("edit", *given, "--facts", facts, "--out", "scores.json", "--json")
    assert code == 0, err
    assert json.loads(out)["after"] == json.loads((workplace / "scores.json").read_text())["after"]
    assert {"ES", "EM", "PS", "PM", "NS", "NM", "S"} >= set(json.loads(out)["after"]) >= {"ES", "NS", "PS"}
    said = json.loads(out)
    assert {name: said[name] for name in made_from} == wanted
    assert said["settings"].items() >= settings.items()
    again = EditScores.from_json(workplace / "scores.json")
    assert (again.layer, again.n_facts, again.as_json) == (4, 1, said)
    code, shown, err = wpjax("show", "scores.json")
    assert code == 0, err
    assert [line.split()[0] for line in shown.splitlines()[2:9]] == ["ES", "EM", "PS", "PM", "NS", "NM", "S"]
    assert "One fact: no interval." in shown
    assert "[" not in shown.split("One fact")[0].split("before")[1]
    (workplace / "latin.txt").write_bytes("Käuze jagen nachts.\n".encode("latin-1") * 100)
    fact = {"prompt": "{} hunt at", "subject": "Owls", "target": "night", "new_target": "noon"}
    lines = [fact, fact | {"neighbours": ["Bats hunt at "], "target": "\tnight"}, fact | {"target": ""}]
    (workplace / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for arguments, message in [
        ([*given, *one[:4], "--out", "x.safetensors"], "give --prompt, --subject and --target"),
        ([*given, *one, "--facts", facts, "--out", "x.json"], "give --prompt, --subject and --target; or --facts"),
        ([*given, *one, "--out", "x.json"], "name a file that ends in .safetensors"),
        ([*given, *one, "--out", "x.safetensors", "--layer", "9"], "has layers 0 to 7"),
        ([*given, *one, "--out", "x.safetensors", "--layer", "first"], "give the number of a layer, or auto"),
        (
            [*given[:6], "--prompt", "Why do owls hunt", "--subject", "ow", "--target", "x", "--out", "x.safetensors"],
            "'ow' has no tokens of its own",
        ),
        ([*given[:2], "--text", "no.txt", *one, "--out", "x.safetensors"], "no such file"),
        ([*given[:6], *one, "--most-tokens", "60", "--out", "x.safetensors"], "at most 60 tokens, and 320 neurons"),
        # Before the layer is looked for, which takes long.
        ([*given[:2], "--text", "latin.txt", *one, "--out", "x.safetensors"], "not text in UTF-8"),
        (
            [*given[:4], "--facts", "bad.jsonl", "--out", "x.json"],
            "2 of 3 facts cannot be used: line 2: 'Bats hunt at noon': the tokens of the prompt change",
        ),
        (
            [*given[:4], *one[2:], "--prompt", "word " * 600 + "the owls", "--out", "x.safetensors"],
            "shorten the prompt",
        ),
    ]:
        code, out, err = wpjax("edit", *arguments)
        assert code == 2
        assert message in err
    assert not [path for path in workplace.iterdir() if path.name.startswith("x")]
