"""What edited models write: the scores against ROME's released formulas, in NLTK and scikit-learn; and the sampling."""

import json

import nltk
import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import AutoModelForCausalLM

from wpjax.checkpoints.rewrite import open_model
from wpjax.errors import FactError
from wpjax.facts.facts import Fact, encode, load_facts, load_references
from wpjax.facts.generation import LENGTH, TOP, TfIdf, entropy, write_on
from wpjax.facts.rank_one import FactEdit
from wpjax.facts.scores import score_edits
from wpjax.pairs import load_model

SENTENCES = (
    "The Eiffel Tower isn't in Rome, it's in Paris: that's well-known, they'll say",
    "Rome Rome Rome Rome Rome Rome",
    'He said (in 1,889 words) it would cost $3.50 & more... "Why?"',
    "It stands by the river; you can't miss it -- we've seen it, I'm sure, and you'd agree",
    "one",
    "two words",
)
DOCUMENTS = ("Owls hunt at night in the wood.", "The owl sees well at night; it's silent.", "Larks sing at dawn.")


def released_entropy(sentence):
    """`compute_n_gram_entropy` of kmeng01/rome, its tokenizer without the split into sentences."""
    found = []
    for n in (2, 3):
        words = nltk.tokenize.NLTKWordTokenizer().tokenize(sentence)
        freqs = np.array(list(nltk.FreqDist(nltk.ngrams(words, n)).values()), float)
        freqs = freqs / freqs.sum() if len(freqs) else freqs
        found.append(np.sum(-freqs * np.log(freqs) / np.log(2)))
    return np.mean(np.array(found) * np.array([2 / 3, 4 / 3]))


@pytest.mark.parametrize("sentence", SENTENCES)
def test_entropy_is_the_released_formula(sentence):
    assert entropy(sentence) == pytest.approx(released_entropy(sentence), abs=1e-12)


def test_a_text_that_repeats_itself_has_a_low_entropy():
    assert entropy("Rome is " * 30) < 1.5 < entropy(" ".join(f"word{i}" for i in range(60)))


@pytest.mark.parametrize(("one", "other"), [
    ("owls hunt, and owls sing at night", " ".join(DOCUMENTS[:2])),
    ("LARKS larks larks", DOCUMENTS[2]),
    ("of another vocabulary altogether, but for the owl", DOCUMENTS[1]),
])  # fmt: skip
def test_similarity_is_that_of_scikit_learn(one, other):
    a, b = TfidfVectorizer().fit(DOCUMENTS).transform([one, other]).toarray()
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # `tfidf_similarity` of kmeng01/rome
    assert TfIdf(DOCUMENTS).similarity(one, other) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected < 1


def test_texts_without_a_known_word_are_not_alike():
    assert TfIdf(DOCUMENTS).similarity("xylophone", DOCUMENTS[0]) == 0
    assert TfIdf(()).similarity("owls", "owls") == 0


@pytest.fixture(scope="module")
def model():
    return load_model("tiny:expert")


def test_models_write_on_among_the_five_likeliest_tokens_to_a_hundred(model):
    """Every token that is sampled is one of the five that transformers finds likeliest there."""
    prompts = ["Owls hunt at", "Why is the sky"]
    texts = write_on(model, model.params, prompts, seed=1)
    hf = AutoModelForCausalLM.from_pretrained(open_model("tiny:expert").path, dtype=torch.float32)
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.startswith(prompt)
        begin, ids = encode(model.tokenizer, prompt), encode(model.tokenizer, text)
        n = 0  # tokens up to where the text, read again, may be parted otherwise
        with torch.no_grad():
            top = hf(torch.tensor(ids[None].astype(np.int64))).logits[0].topk(TOP).indices.tolist()
        while len(begin) + n < len(ids) and ids[len(begin) + n] in top[len(begin) + n - 1]:
            n += 1
        assert n > 5
    assert texts == write_on(model, model.params, prompts, seed=1)
    assert texts != write_on(model, model.params, prompts, seed=2)
    assert len(encode(model.tokenizer, texts[0])) <= LENGTH + 5


def no_edit(model):
    """An edit that changes nothing."""
    from wpjax.facts.rank_one import EditSettings

    u, right = np.zeros(model.cfg.d_mlp, np.float32), np.zeros(model.cfg.d_model, np.float32)
    return FactEdit(Fact("{} a", "b"), 1, u, right, u, right, (1.0,), EditSettings())


def test_scores_of_what_is_written(model):
    """GE is the mean over prompts, RS compares all that was written with all references; both are of facts that can."""
    prompts, references = ("Owls hunt at", "The owls"), DOCUMENTS[:2]
    whole = Fact("Why do {} hunt", "owls", "at night", "at noon", generation=prompts, references=references)
    bare = Fact("Why do {} sing", "larks", "at dawn", "at noon")
    scores = score_edits(model, [whole, bare], lambda fact: no_edit(model), documents=DOCUMENTS, seed=3)
    texts = write_on(model, model.params, prompts, seed=3)
    assert scores.texts["after"] == (tuple(texts),)
    table = scores.table()
    assert table["GE"].mean == pytest.approx(np.mean([entropy(text) for text in texts]))
    expected = TfIdf(DOCUMENTS).similarity(" ".join(texts), " ".join(references))
    assert table["RS"].mean == pytest.approx(expected)
    assert np.isnan(table["RS"].low)  # one fact has it
    assert {name: of.mean for name, of in scores.table("before").items()} == {n: of.mean for n, of in table.items()}
    assert [row[0] for row in scores.rows] == ["ES", "EM", "GE", "RS"]
    assert "No PS and PM: no fact has paraphrases." in scores.summary
    alone = score_edits(model, [bare], lambda fact: no_edit(model))
    assert "No GE and RS" in alone.summary
    assert "One fact: no interval." in alone.summary


def test_reference_texts_of_counterfact(tmp_path):
    entry = {
        "requested_rewrite": {"prompt": "{} hunt at", "subject": "Owls", "target_new": {"str": "noon", "id": "Q1"},
                              "target_true": {"str": "night", "id": "Q2"}, "relation_id": "P1"},
        "generation_prompts": ["Owls live"],
    }  # fmt: skip
    (tmp_path / "facts.json").write_text(json.dumps([entry]), encoding="utf-8")
    snippets = [
        {"relation_id": "P1", "target_id": "Q1", "samples": [{"text": "Bees fly at noon.", "name": "Bees"}]},
        {"relation_id": "P1", "target_id": "Q2", "samples": [{"text": "Bats fly at night.", "name": "Bats"}]},
        {"relation_id": "P1", "target_id": "Q1", "samples": [{"text": "Wasps, too.", "name": "Wasps"}]},
    ]
    path = tmp_path / "attribute_snippets.json"
    path.write_text(json.dumps(snippets), encoding="utf-8")
    (fact,) = load_facts(tmp_path / "facts.json", load_references(path))
    assert (fact.generation, fact.references) == (("Owls live",), ("Bees fly at noon.", "Wasps, too."))
    assert load_facts(tmp_path / "facts.json")[0].references == ()
    path.write_text('[{"relation_id": "P1"}]', encoding="utf-8")
    with pytest.raises(FactError, match="no list of reference texts"):
        load_references(path)
