"""What a model writes about a subject, and how it is scored (arXiv 2202.05262, section 3.4 and the released code).

    GE    generation entropy: mean over prompts of  (2/3 H2 + 4/3 H3) / 2
    RS    reference score: cos(tfidf(all that it wrote), tfidf(all reference texts))

Hn is the entropy, in bits, of the n-grams of words in a text; it falls where a model repeats itself. Reference texts
are about other subjects of which the new target is true: a model that has taken the new fact in writes as they do.

    tfidf(text)[w] = count of w in the text * (ln((1 + D) / (1 + D_w)) + 1)

for the words w of D documents, D_w of which have the word; that is what scikit-learn computes by default.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wpjax.checkpoints.checkpoint import Checkpoint
from wpjax.facts.facts import encode, padded
from wpjax.models.decoder import Params
from wpjax.models.generate import generate

LENGTH, TOP = 100, 5
"""Tokens of a prompt and what is written after it, together; and the likeliest tokens that are sampled among."""

WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""n -> weight of the entropy of n-grams, as released. The mean of the weighted entropies is taken."""

# Words and marks as the Treebank convention of NLTK parts them: "don't" is "do" and "n't", "it's" is "it" and "'s".
_WORDS = re.compile(r"\w+?(?=n't\b)|n't\b|'(?:s|m|d|ll|re|ve)\b|\w+(?:[-.,:/&]\w+)*|\.\.\.|--|[^\w\s]", re.IGNORECASE)
# What scikit-learn takes for a word.
_LONG_WORDS = re.compile(r"(?u)\b\w\w+\b")


def write_on(model: Checkpoint, params: Params, prompts: Sequence[str], seed: int = 0) -> list[str]:
    """Let a model continue prompts freely: sampled among the five likeliest tokens, to 100 tokens with the prompt.

    Args:
        model: the model, for its tokenizer.
        params: the parameters: the model's, or edited ones.
        prompts: the prompts, at least one.
        seed: seed of the sampling.

    Returns:
        prompt and continuation as one text, for each.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:expert")
    >>> [text[:9] for text in write_on(model, model.params, ["Owls hunt"])]
    ['Owls hunt']
    """
    rows = [encode(model.tokenizer, prompt) for prompt in prompts]
    tokens = padded(rows, most=model.cfg.n_ctx)
    n_new = min(LENGTH - min(map(len, rows)), model.cfg.n_ctx - tokens.shape[1])
    made = [np.zeros(0, np.int32)] * len(rows)
    if n_new > 0:
        options = {"stop_tokens": (), "temperature": 1.0, "top_k": TOP, "key": jax.random.key(seed)}
        lengths = jnp.asarray([len(row) for row in rows])
        out = generate(model.cfg, params, jnp.asarray(tokens), lengths, max_new_tokens=n_new, **options)
        made = [new[: max(0, LENGTH - len(row))] for new, row in zip(np.asarray(out.tokens), rows, strict=True)]
    whole = [np.concatenate(both) for both in zip(rows, made, strict=True)]
    texts = model.tokenizer.batch_decode(whole, skip_special_tokens=True)
    return [unicodedata.normalize("NFKD", text).replace("\n\n", " ") for text in texts]


def entropy(text: str) -> float:
    """The weighted entropy of the two- and three-word sequences of a text, in bits.

    >>> round(entropy("a b a b a"), 3), round(entropy("each word of it is new"), 3)
    (0.946, 2.107)
    """
    words, found = _WORDS.findall(text), []
    for n, weight in WEIGHTS.items():
        counts = np.array(list(Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()), float)
        p = counts / counts.sum()
        found.append(weight * -float((p * np.log2(p)).sum()))
    return float(np.mean(found))


class TfIdf:
    """Weights of words, by how many documents have them.

    Args:
        documents: the documents.

    >>> TfIdf(["owls hunt", "larks sing"]).similarity("owls hunt", "owls sing")
    0.5
    """

    def __init__(self, documents: Iterable[str]):
        having: Counter[str] = Counter()
        n = 0
        for document in documents:
            n += 1
            having.update(set(_long_words(document)))
        self.weights: Mapping[str, float] = {word: float(np.log((1 + n) / (1 + of)) + 1) for word, of in having.items()}

    def similarity(self, one: str, other: str) -> float:
        """Cosine of two texts; 0 if one of them has no word of the documents."""
        a, b = (self._vector(text) for text in (one, other))
        size = np.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
        return float(sum(v * b.get(word, 0.0) for word, v in a.items()) / size) if size else 0.0

    def _vector(self, text: str) -> dict[str, float]:
        counts = Counter(_long_words(text))
        return {word: n * self.weights[word] for word, n in counts.items() if word in self.weights}


def _long_words(text: str) -> list[str]:
    """The words of a text with two letters or more, in lower case."""
    return _LONG_WORDS.findall(text.lower())
