"""Causal tracing: against ROME's released trace in HF torch, with the same noise; identities; and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import compiled
from tests.oracles import NAMES, hf_layers, hf_log_p
from tests.tiny import build_pair
from wpjax.checkpoints.rewrite import open_model
from wpjax.errors import FactError, WpjaxError
from wpjax.facts.facts import Fact, continued, encode
from wpjax.facts.flow import flow, packing
from wpjax.facts.tracing import best_layer, known_facts, replacements, subject_sigma, trace_facts
from wpjax.pairs import load_model
from wpjax.report.tracing import make_average, make_fact
from wpjax.results.tracing import ROLES, FactTrace, Tracing

N, PAD, SUBJECT, SAMPLES, WINDOW = 9, 12, (2, 5), 3, 2
RNG = np.random.default_rng(0)
IDS = np.pad(RNG.integers(0, 61, N), (0, PAD - N)).astype(np.int32)
OTHER = IDS.copy()
OTHER[slice(*SUBJECT)] = (IDS[slice(*SUBJECT)] + 7) % 61
ANSWER = 11


@pytest.fixture(scope="module", params=["llama-gqa3"])
def hf_pair(request, tmp_path_factory):
    return build_pair(request.param, tmp_path_factory.mktemp(request.param))


def noise_of(width):
    noise = np.zeros((SAMPLES, PAD, width), np.float32)
    noise[:, slice(*SUBJECT)] = np.random.default_rng(1).standard_normal((SAMPLES, SUBJECT[1] - SUBJECT[0], width))
    return noise


def hf_embedding(model):
    return model.get_input_embeddings()


def hf_module(model, layer, kind):
    """The module whose output ROME restores: a layer, what its MLP adds to the stream, or what its attention adds."""
    one, names = hf_layers(model)[layer], NAMES[model.config.model_type]
    if kind == "stream":
        return one
    own = {"mlp": names.norm_mlp_out or names.mlp, "attn": names.norm_attn_out or names.w_o}[kind]
    return one.get_submodule(own)


@torch.no_grad()
def trace_with_repatch(model, ids, noise, restore, unpatch):
    """`trace_with_repatch` of kmeng01/rome (experiments/causal_trace.py), for modules in place of their names.

    Row 0 is the clean run; noise is added to the embeddings of the others. `restore` and `unpatch` hold (token,
    module): what is given the clean run's value, and what is given the value of a corrupted run without restoration.
    """
    patch, back, first = {}, {}, {}
    for token, module in restore:
        patch.setdefault(module, []).append(token)
    for token, module in unpatch:
        back.setdefault(module, []).append(token)

    def rule(module, args, out):
        h = out[0] if isinstance(out, tuple) else out
        if module is hf_embedding(model):
            h[1:] += torch.tensor(noise)
        elif first_pass:
            first[module] = h.clone()
        else:
            for token in patch.get(module, []):
                h[1:, token] = h[0, token]
            for token in back.get(module, []):
                h[1:, token] = first[module][1:, token]
        return out

    for first_pass in [True, False]:  # noqa: B007  (the hook reads it)
        handles = [m.register_forward_hook(rule) for m in {hf_embedding(model): 0} | patch | back]
        logits = model(torch.tensor(np.tile(ids, (len(noise) + 1, 1)))).logits
        for handle in handles:
            handle.remove()
    p = torch.softmax(logits[:, -1], dim=1)[:, ANSWER]
    return p[0].item(), p[1:].numpy()


def released(model, noise, kind="stream", severed=None):
    """ROME's table of every token and layer; [L, C, R]."""
    n_layers, ids = len(hf_layers(model)), IDS[:N]
    noise = noise[:, :N]
    table = np.zeros((n_layers, N, SAMPLES))
    for token in range(N):
        unpatch = [(token, hf_module(model, layer, severed)) for layer in range(n_layers)] if severed else []
        for layer in range(n_layers):
            span = range(max(0, layer - WINDOW // 2), min(n_layers, layer - (-WINDOW // 2)))
            layers = [layer] if kind == "stream" else span
            restore = [(token, hf_module(model, i, kind)) for i in layers]
            clean, table[layer, token] = trace_with_repatch(model, ids, noise, restore, unpatch)
    return clean, trace_with_repatch(model, ids, noise, [], [])[1], table


def ours(pair, noise, restored, corrupted=IDS, **options):
    found = flow(
        pair.cfg, pair.base, jnp.asarray(IDS), jnp.asarray(np.tile(corrupted, (len(noise), 1))), jnp.asarray(noise),
        jnp.asarray(restored), packing(restored[:, :N], N), jnp.asarray(N - 1), jnp.asarray(ANSWER), window=WINDOW,
        **options,
    )  # fmt: skip
    return jax.tree.map(np.asarray, found)


def each_token(first=0):
    return np.eye(N, PAD, dtype=bool)[first:]


OPTIONS = ({"kind": "stream"}, {"kind": "mlp"}, {"kind": "attn"}, {"severed": "mlp"}, {"severed": "attn"})


CASES = [(name, options) for name in ("llama-gqa3", "gemma3") for options in OPTIONS]
CASES += [("gpt2-tied", OPTIONS[0]), ("gpt-neox", OPTIONS[1])]


@pytest.mark.parametrize(("hf_pair", "options"), CASES, indirect=["hf_pair"], ids=str)
def test_every_cell_is_that_of_the_released_trace(hf_pair, pair, options):
    noise = noise_of(pair.cfg.d_model)
    clean, corrupted, table = released(hf_pair.base.model, noise, **options)
    found = ours(pair, noise, each_token(SUBJECT[0]), **options)
    worst = max(np.abs(found.restored - table[:, SUBJECT[0] :]).max(), np.abs(found.corrupted - corrupted).max())
    print(f"{hf_pair.name} {options}: largest difference {worst:.1e}, effects up to {np.ptp(table):.1e}")
    assert worst < 2e-6
    assert found.clean == pytest.approx(clean, abs=2e-6)
    assert np.ptp(table) > 1e-3
    # What stands before the subject is the same in both runs: to restore it does nothing, so it is not run.
    np.testing.assert_allclose(
        table[:, : SUBJECT[0]], np.broadcast_to(corrupted, table[:, : SUBJECT[0]].shape), atol=1e-6
    )


def test_what_restores_nothing_and_what_restores_all(pair):
    """In the last layer only the last token is read; with all tokens restored, the run is the clean one."""
    cells = np.concatenate([each_token(SUBJECT[0]), np.arange(PAD)[None] < N])
    found = ours(pair, noise_of(pair.cfg.d_model), cells)
    np.testing.assert_array_equal(found.restored[-1, : N - SUBJECT[0] - 1], found.corrupted[None].repeat(6, 0))
    np.testing.assert_allclose(found.restored[:, -1], found.clean, rtol=1e-5)  # all tokens, at any layer
    np.testing.assert_allclose(found.restored[-1, N - SUBJECT[0] - 1], found.clean, rtol=1e-5)  # the last one
    assert np.abs(found.corrupted - found.clean).min() > 1e-4


def test_another_subject_in_its_place_is_a_corruption_too(hf_pair, pair):
    """The corrupted run is that of the other prompt; its states are replaced one by one by those of the first."""
    model, none = hf_pair.base.model, np.zeros((1, PAD, pair.cfg.d_model), np.float32)
    found = ours(pair, none, each_token(SUBJECT[0]), corrupted=OTHER)
    clean, other = (hf_log_p(model, ids[:N])[-1, ANSWER].exp().item() for ids in (IDS, OTHER))
    assert (found.clean, found.corrupted[0]) == pytest.approx((clean, other), abs=1e-6)
    stream = {}

    def keep(module, args, out):
        stream["clean"] = (out[0] if isinstance(out, tuple) else out).clone()

    def restore(module, args, out):
        (out[0] if isinstance(out, tuple) else out)[:, 4] = stream["clean"][:, 4]
        return out

    for rule, ids in ((keep, IDS), (restore, OTHER)):
        handle = hf_layers(model)[1].register_forward_hook(rule)
        p = hf_log_p(model, ids[:N])[-1, ANSWER].exp().item()
        handle.remove()
    assert found.restored[1, 4 - SUBJECT[0], 0] == pytest.approx(p, abs=1e-6)


def test_a_fact_of_like_length_compiles_nothing(model, traced):
    """Prompts and cells are padded, so that few programs serve a file of them; the numbers do not depend on it."""
    shorter = [Fact("Why do {} hunt at", "owls")]
    with compiled() as names:
        found = trace_facts(model, shorter, samples=4, window=2, maps=["mlp", "stream"], seed=3)
    assert len(found.facts[0].tokens) < len(traced.facts[0].tokens)
    assert "flow" not in names
    assert 0 < found.facts[0].clean <= 1


@pytest.fixture(scope="module")
def model():
    return load_model("tiny:expert")


FACTS = [Fact("Why do {} hunt at", "the owls"), Fact("Why do {} sing at", "the larks"), Fact("How do {} swim", "cats")]


@pytest.fixture(scope="module")
def traced(model):
    return trace_facts(model, FACTS[:2], samples=4, window=2, maps=["mlp", "stream"], seed=3)


def test_a_trace_of_facts_is_that_of_torch(model, traced):
    """Through the tokenizer, with the noise drawn as the docstring says."""
    hf = AutoModelForCausalLM.from_pretrained(open_model("tiny:expert").path, dtype=torch.float32)
    known = known_facts(model, FACTS[:2])
    table = hf.get_input_embeddings().weight.detach().numpy()
    sigma = np.concatenate([table[k.at.ids[k.at.start : k.at.stop]] for k in known]).std(ddof=1)
    assert subject_sigma(model, known) == pytest.approx(sigma, rel=1e-5)
    assert traced.settings["sigma"] == pytest.approx(sigma, rel=1e-5)
    assert list(traced.maps) == ["stream", "mlp"]
    for fact, k in zip(traced.facts, known, strict=True):
        log_p = hf_log_p(hf, k.at.ids)[-1]
        assert fact.answer == model.tokenizer.decode([int(log_p.argmax())])
        assert fact.clean == pytest.approx(log_p.max().exp().item(), rel=1e-4)
        noise = 3 * sigma * np.random.default_rng(3).standard_normal((4, k.at.stop - k.at.start, table.shape[1]))

        def corrupt(module, args, out, noise=noise, k=k):
            out[:, k.at.start : k.at.stop] += torch.tensor(noise, dtype=out.dtype)
            return out

        handle = hf.get_input_embeddings().register_forward_hook(corrupt)
        with torch.no_grad():
            logits = hf(torch.tensor(np.tile(k.at.ids, (4, 1)).astype(np.int64))).logits[:, -1]
        handle.remove()
        assert fact.corrupted == pytest.approx(logits.softmax(-1)[:, log_p.argmax()].mean().item(), rel=1e-4)
        assert fact.tokens[fact.start : fact.stop] == tuple(model.tokenizer.decode([i]) for i in
                                                             k.at.ids[k.at.start : k.at.stop])  # fmt: skip


def test_only_what_the_model_knows_is_traced(model):
    says = trace_facts(model, FACTS[:1], samples=1, maps=["stream"]).facts[0].answer
    facts = [dataclasses.replace(FACTS[0], target=says), dataclasses.replace(FACTS[0], target="seven moons")]
    found = trace_facts(model, facts, samples=1, maps=["stream"])
    assert (len(found.facts), found.n_read) == (1, 2)
    with pytest.raises(FactError, match="knows none of the 1 facts, the first 'Why do the owls hunt at' -> 'seven"):
        trace_facts(model, facts[1:])
    # All tokens of a target count: its first alone is not enough.
    _, target = continued(model.tokenizer, FACTS[0].text, f"{says} seven moons")
    assert len(target) > 1
    with pytest.raises(FactError, match="knows none"):
        trace_facts(model, [dataclasses.replace(FACTS[0], target=f"{says} seven moons")])
    with pytest.raises(FactError, match="there is no map 'layers'"):
        trace_facts(model, FACTS, maps=["layers"])


def test_replacements_have_as_many_tokens(model):
    known = known_facts(model, FACTS)
    named = dataclasses.replace(FACTS[0], replacement="the dogs")
    fits = len(encode(model.tokenizer, named.about("the dogs"))) == len(encode(model.tokenizer, named.text))
    assert fits
    ((subject, ids),) = replacements(model, known_facts(model, [named]))
    assert subject == "the dogs"
    np.testing.assert_array_equal(ids, encode(model.tokenizer, named.about("the dogs")))
    with pytest.raises(FactError, match="'the extraordinary hippopotamus' cannot stand in for 'the owls', which has"):
        replacements(
            model, known_facts(model, [dataclasses.replace(named, replacement="the extraordinary hippopotamus")])
        )
    with pytest.raises(FactError, match="no other subject"):
        replacements(model, known[:1])
    with pytest.raises(FactError, match="no other subject"):  # one with the same answer would corrupt nothing
        replacements(
            model, [known[0], known[0]._replace(fact=named.__class__(named.prompt, "the dogs"), answer=known[0].answer)]
        )
    found = trace_facts(model, [named], corruption="replacement", maps=["stream"])
    assert found.facts[0].replacement == "the dogs"
    assert "sigma" not in found.settings


def test_the_layer_to_edit_is_where_mlps_bring_most_back(model, traced):
    at = [fact.effects("mlp")[:, fact.stop - 1] for fact in traced.facts]
    assert best_layer(model, FACTS[:2], samples=4, window=2, seed=3) == np.sum(at, 0).argmax()


def test_averages_are_taken_by_what_tokens_are():
    """Worked by hand: a subject of three tokens, then four; and one whose subject and rest are one token each."""
    long = np.arange(8.0)[None] / 10
    a = FactTrace("a", "s", "x", tuple("abcdefgh"), 1, 4, 0.9, 0.1, {"mlp": long})
    b = FactTrace("b", "s", "x", ("s", "t"), 0, 1, 0.5, 0.3, {"mlp": np.array([[0.5, 0.5]])})
    assert a.roles == ["", *ROLES[:3], ROLES[3], ROLES[4], ROLES[4], ROLES[5]]
    assert b.roles == [ROLES[2], ROLES[5]]
    found = Tracing("m", (a, b), 2, {})
    expected = [0.0, 0.1, ((0.3 - 0.1) + 0.2) / 2, 0.3, (0.4 + 0.5) / 2, ((0.7 - 0.1) + 0.2) / 2]
    np.testing.assert_allclose(found.average("mlp").mean[0], expected)
    assert found.ate.mean == pytest.approx((0.8 + 0.2) / 2)


def made_trace(*facts):
    """A trace whose facts have these probabilities, clean and corrupted; restoring brings half of the cost back."""
    found = []
    for clean, corrupted in facts:
        maps = {"stream": np.array([[corrupted, (clean + corrupted) / 2]])}
        found.append(FactTrace("Owls hunt", "Owls", "x", ("Ow", "ls"), 0, 2, clean, corrupted, maps))
    return Tracing("m", tuple(found), len(found), {})


def test_what_one_fact_or_none_says_is_said_as_it_is():
    """One fact has no interval, in words and in JSON; what costs nothing is not said to be recalled."""
    one = made_trace((0.75, 0.25))
    assert "costs 50.0 points of probability.\n" in one.summary
    assert "layer 0: 25.0 points.\n" in one.summary
    assert one.summary.endswith("One fact: no interval.")
    assert one.as_json["ate"] == {"mean": 0.5, "low": None, "high": None}
    assert one.as_json["aie"]["stream"]["low"] == [[None] * 2]
    assert "[" not in one.summary
    two = made_trace((0.75, 0.25), (0.75, 0.25))
    assert "costs 50.0 points of probability [50.0, 50.0]." in two.summary
    assert "One fact" not in two.summary
    raised = made_trace((0.25, 0.5), (0.25, 0.75))
    assert "costs no probability: it raises the answer's probability (-37.5 points [" in raised.summary
    assert "brings most back" not in raised.summary
    assert "nothing to bring back" in raised.summary
    perhaps = made_trace((0.5, 0.25), (0.5, 0.625), (0.5, 0.625), (0.625, 0.5))
    assert perhaps.ate.low < 0 < perhaps.ate.mean
    assert "which may be chance." in perhaps.summary


def test_all_facts_that_cannot_be_used_are_named(model):
    long = "word " * model.cfg.n_ctx + "{}"
    facts = [Fact("Why do {}ls hunt", "ow", where="line 1"), FACTS[0], Fact(long, "owls", where="line 3")]
    named = r"2 of 3 facts cannot be used: line 1: 'ow' has no tokens.*; line 3: .*shorten"
    with pytest.raises(FactError, match=named):
        known_facts(model, facts)


def test_figures_show_what_was_found(traced):
    fact = traced.facts[0]
    axes = [a for a in make_fact(fact, 2).axes if a.images]
    assert [a.get_title(loc="left") for a in axes] == ["One state restored", "MLPs restored"]
    for shown, name in zip(axes, ("stream", "mlp"), strict=True):
        np.testing.assert_allclose(shown.images[0].get_array(), fact.maps[name].T)
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert [label.endswith("*") for label in labels] == [fact.start <= i < fact.stop for i in range(len(labels))]
    shown = make_average(traced).axes[0]
    np.testing.assert_allclose(shown.images[0].get_array(), traced.average("stream").mean.T)


def test_the_command_writes_a_folder_that_is_read_again(wpjax, workplace):
    lines = [json.dumps({"prompt": fact.prompt, "subject": fact.subject}) for fact in FACTS[:2]]
    (workplace / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = ["trace", "--model", "tiny:expert", "--samples", "2", "--maps", "stream"]
    code, out, err = wpjax(*given, "--facts", "facts.jsonl", "--out", "found", "--pictures", "1")
    assert code == 0, err
    assert "2 of 2 facts traced" in out
    assert sorted(p.name for p in (workplace / "found").iterdir()) == ["average.png", "fact-1.png", "trace.json"]
    again = Tracing.from_json(workplace / "found")
    assert again.as_json == json.loads((workplace / "found" / "trace.json").read_text(encoding="utf-8"))
    code, shown, err = wpjax("show", "found")
    assert code == 0, err
    assert shown.strip() == out[: out.index("wrote found")].strip()
    words = wpjax("show", "found", "--words")[1]
    assert words == again.summary + "\n"
    assert words in shown
    for arguments, message in [
        (["--facts", "facts.jsonl", "--out", "found"], "exists"),
        (["--out", "new"], "give --facts with a file, or --prompt and --subject"),
        (["--prompt", "Why do owls hunt", "--subject", "bats", "--out", "new"], "does not stand in the prompt"),
        (["--prompt", "Why do owls hunt", "--subject", "ow", "--out", "new"], "has no tokens of its own"),
        (["--facts", "none.jsonl", "--out", "new"], "no such file"),
    ]:
        code, _, err = wpjax(*given, *arguments)
        assert code == 2
        assert message in err
    assert not (workplace / "new").exists()
    content = json.loads((workplace / "found" / "trace.json").read_text(encoding="utf-8"))
    damaged = [("what", "sweep", "no trace"), ("facts", [], "damaged"), ("facts", [{}], "damaged")]
    damaged.append(("facts", [content["facts"][0] | {"start": 90}], "damaged"))
    for key, value, message in damaged:
        path = workplace / "damaged.json"
        path.write_text(json.dumps(content | {key: value}), encoding="utf-8")
        with pytest.raises(WpjaxError, match=message):
            Tracing.from_json(path)
