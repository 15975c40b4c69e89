"""Contrasts: prompts in two versions, clean and corrupted, and the number by which the two differ.

Activation patching, path patching and circuits compare two runs of ONE model: on the clean prompts, where it does what
is studied, and on corrupted ones, where it cannot. A part of the model matters if it carries the difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from wpjax.behaviours.prompts import Tokens, prompt_ids
from wpjax.checkpoints.checkpoint import Checkpoint
from wpjax.errors import BehaviourError, WpjaxError
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import LogOdds
from wpjax.models.config import ModelConfig


class Contrast(NamedTuple):
    """B prompts in two versions whose tokens stand at the same positions, and a metric of each.

    Attributes:
        clean: the metric on the clean prompts; its `tokens` are these prompts. Patches are made in this run.
        corrupted: the same metric on the corrupted prompts. Patches take their values from this run.

    >>> import numpy as np
    >>> import wpjax as wp
    >>> from wpjax.behaviours import Tokens
    >>> cfg = wp.ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)
    >>> clean, corrupted = Tokens(np.array([[5, 6, 7]]), np.array([3])), Tokens(np.array([[5, 8, 7]]), np.array([3]))
    >>> pair = wp.Contrast.of_tokens(cfg, clean, corrupted, answers=np.array([6]), foils=np.array([8]))
    >>> len(pair.clean), pair.swapped.clean.tokens.ids.tolist()
    (1, [[5, 8, 7]])
    """

    clean: Metric
    corrupted: Metric

    @classmethod
    def of(cls, metric: Metric, corrupted: Tokens) -> Contrast:
        """A contrast by any metric: an anchor's projection, for example.

        Args:
            metric: the metric on the clean prompts.
            corrupted: the corrupted prompts.

        Raises:
            BehaviourError: the two versions of a prompt have different lengths.
            WpjaxError: the metric holds a state.
        """
        clean = metric.tokens
        n_clean, n_corrupted = np.asarray(clean.lengths), np.asarray(corrupted.lengths)
        if len(n_clean) != len(n_corrupted):
            raise BehaviourError(
                f"{len(n_clean)} clean and {len(n_corrupted)} corrupted prompts: each needs its counterpart"
            )
        if (n_clean != n_corrupted).any():
            i = int(np.argmax(n_clean != n_corrupted))
            raise BehaviourError(
                f"prompt {i} has {n_clean[i]} tokens clean and {n_corrupted[i]} corrupted: positions must align, so "
                "reword it until both have the same number"
            )
        if metric.held is not None:
            raise WpjaxError("a metric from a given state cannot be patched here; use one without `held`")
        ids = np.asarray(corrupted.ids)
        ids = np.pad(ids, ((0, 0), (0, max(clean.ids.shape[1] - ids.shape[1], 0))))[:, : clean.ids.shape[1]]
        return cls(metric, dataclasses.replace(metric, tokens=Tokens(ids.astype(np.int32), n_corrupted)))

    @classmethod
    def of_tokens(
        cls,
        cfg: ModelConfig,
        clean: Tokens,
        corrupted: Tokens,
        answers: Int[np.ndarray, " B"],
        foils: Int[np.ndarray, " B"],
    ) -> Contrast:
        """A contrast by the logit difference after the last token: logit(answer) - logit(foil), in nats.

        Args:
            cfg: the model.
            clean: the clean prompts.
            corrupted: the corrupted prompts.
            answers: the token that the clean prompt asks for.
            foils: the token that it is measured against.

        Raises:
            BehaviourError: as `of`; a token is not in the vocabulary; or a prompt is longer than the context.
        """
        ids = np.concatenate([np.asarray(x).ravel() for x in (clean.ids, corrupted.ids, answers, foils)])
        if ids.min() < 0 or ids.max() >= cfg.d_vocab:
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise BehaviourError(f"token {bad} is outside the model's vocabulary of {cfg.d_vocab}; use its tokenizer")
        if clean.ids.shape[1] > cfg.n_ctx:
            raise BehaviourError(f"a prompt of {clean.ids.shape[1]} tokens exceeds the context of {cfg.n_ctx}")
        if not len(answers) == len(foils) == len(clean.lengths):
            raise BehaviourError(
                f"{len(clean.lengths)} prompts, {len(answers)} answers and {len(foils)} foils: give one of each"
            )
        readout = LogOdds(*(jnp.asarray(np.asarray(a)[:, None]) for a in (answers, foils)))
        last, ones = jnp.asarray(clean.last)[:, None], jnp.ones((len(clean.lengths), 1))
        metric = Metric(clean, last, ones, readout, cfg.n_layers - 1, "logit_difference")
        return cls.of(metric, corrupted)

    @property
    def swapped(self) -> Contrast:
        """The same prompts the other way round: clean values are patched into the corrupted run (denoising)."""
        return Contrast(self.corrupted, self.clean)

    def take(self, rows: Sequence[int] | Int[np.ndarray, " N"]) -> Contrast:
        """The contrast of some of the prompts."""
        return Contrast(*(metric.take(jnp.asarray(rows)) for metric in self))

    @property
    def n_layers(self) -> int:
        """Number of layers that run: those up to the one that the metric reads."""
        return self.clean.layer + 1


class Effects(NamedTuple):
    """What patches change. The axes in front of the prompts are those of the function that made it.

    Attributes:
        change: [*axes, B], metric of the clean run with the patch, minus the clean metric.
        clean: [B], the metric of the clean run.
        corrupted: [B], the metric of the corrupted run.
        lengths: [B], tokens of the prompts, if one of the axes is positions; else None.

    >>> effects = Effects(np.array([[-1.0, -3.0]]), np.array([4.0, 4.0]), np.array([0.0, -4.0]))
    >>> effects.share.tolist()  # the patch does a third of what the corruption does
    [0.3333333333333333]
    """

    change: Float[np.ndarray, "*axes B"]
    clean: Float[np.ndarray, " B"]
    corrupted: Float[np.ndarray, " B"]
    lengths: Int[np.ndarray, " B"] | None = None

    @property
    def share(self) -> Float[np.ndarray, "*axes"]:
        """Mean change as a share of the gap: 0 is the clean run, 1 is the corrupted run.

        Raises:
            WpjaxError: the two runs have the same mean metric; or it is by position, and prompts have different
                lengths, so that a position is another word in each.
        """
        if self.lengths is not None and (self.lengths != self.lengths[0]).any():
            i = int(np.argmax(self.lengths != self.lengths[0]))
            raise WpjaxError(
                f"prompt 0 has {self.lengths[0]} tokens and prompt {i} has {self.lengths[i]}, so a position is another "
                "word in each and has no mean: take prompts of one length (`Contrast.take`), or `change`, by prompt"
            )
        gap = float((self.corrupted - self.clean).mean())
        if gap == 0:
            raise WpjaxError("clean and corrupted prompts have the same mean metric, so nothing is a share of the gap")
        return np.asarray(self.change.mean(-1) / gap)


def contrast(
    model: Checkpoint, clean: Sequence[str], corrupted: Sequence[str], answers: Sequence[str], foils: Sequence[str]
) -> Contrast:
    """A contrast of texts, by the logit difference after the last token: logit(answer) - logit(foil), in nats.

    The texts are read as they are, without a chat template.

    Args:
        model: the model, from `load_model`; its tokenizer is used.
        clean: B texts.
        corrupted: B texts, each with as many tokens as its clean version.
        answers: the word that goes on after the clean text, with its leading space if it has one. One token each.
        foils: the word that it is measured against, likewise.

    Raises:
        BehaviourError: a word is not one token, the versions of a prompt have different lengths, or numbers of texts
            and words differ.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> two = wp.contrast(model, ["the fox and the"], ["the dog and the"], answers=[" fox"], foils=[" dog"])
    >>> len(two.clean)
    1
    """
    ours, theirs = (text_tokens(model.tokenizer, texts) for texts in (clean, corrupted))
    wanted, other = (np.array([single_token(model.tokenizer, word) for word in words]) for words in (answers, foils))
    return Contrast.of_tokens(model.cfg, ours, theirs, wanted, other)


def text_tokens(tokenizer: object, texts: Sequence[str]) -> Tokens:
    """Texts as tokens, without a chat template, padded on the right with 0.

    Args:
        tokenizer: a tokenizer of the library transformers.
        texts: B texts.

    Raises:
        BehaviourError: there are no texts, or one has no tokens.
    """
    rows = [prompt_ids(tokenizer, text, False) for text in texts]
    if not rows or not all(rows):
        raise BehaviourError("there are no prompts, or one has no tokens; give at least one word each")
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return Tokens(ids, lengths)


def word_ids(tokenizer: object, word: str) -> list[int]:
    """The tokens of a word inside a text, which may be others than those of the word alone.

    Some tokenizers put a blank before every text (Llama 2): alone, " Mary" would have one more token there.

    Args:
        tokenizer: a tokenizer of the library transformers.
        word: the word, with its leading space if it has one.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[operator]

    before, both = ids("\n"), ids("\n" + word)  # no word is joined with the end of a line
    return both[len(before) :] if both[: len(before)] == before else ids(word)


def single_token(tokenizer: object, word: str) -> int:
    """The id of a word that is one token inside a text.

    Raises:
        BehaviourError: the tokenizer splits the word.
    """
    ids = word_ids(tokenizer, word)
    if len(ids) != 1:
        raise BehaviourError(f"{word!r} is {len(ids)} tokens for this tokenizer; use a word that is one")
    return int(ids[0])
