"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> " Mary".

The task of arXiv 2211.00593: a circuit of 26 heads of GPT-2 small does it. IO is the name that comes once, S the one
that comes twice; the metric is logit(IO) - logit(S) after the last token. The corrupted prompt is the same sentence
with three other names (ABC), which leaves nothing to tell IO from S.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.behaviours.prompts import Tokens
from wpjax.checkpoints.checkpoint import Checkpoint
from wpjax.circuits.contrast import Contrast, single_token, text_tokens, word_ids
from wpjax.engines.contributions import written_by_head
from wpjax.errors import BehaviourError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, decoder, forward, take_layer
from wpjax.models.layouts import Causal
from wpjax.models.sites import Site

TEMPLATES = (
    "Then, {first} and {second} went to the {place}. {giver} gave a {object} to",
    "When {first} and {second} went to the {place}, {giver} gave a {object} to",
    "Then, {first} and {second} had a lot of fun at the {place}. {giver} gave a {object} to",
    "After {first} and {second} got a {object} at the {place}, {giver} decided to give it to",
    "While {first} and {second} were working at the {place}, {giver} gave a {object} to",
    "Afterwards, {first} and {second} went to the {place}. {giver} handed a {object} to",
)
"""Sentences in the manner of the paper's. Each is used in both orders: IO first (ABBA) and S first (BABA)."""

NAMES = tuple(
    "Michael Christopher Jessica Matthew Ashley Jennifer Joshua Amanda Daniel David James Robert John Joseph Andrew "
    "Ryan Brandon Jason Justin Sarah William Jonathan Stephanie Brian Nicole Nicholas Anthony Heather Eric Elizabeth "
    "Adam Megan Melissa Kevin Steven Thomas Timothy Christina Kyle Rachel Laura Lauren Amber Brittany Danielle "
    "Richard Kimberly Jeffrey Amy Crystal Michelle Tiffany Jeremy Benjamin Mark Emily Aaron Charles Rebecca Jacob "
    "Stephen Patrick Sean Erin Kelly Samantha Paul Mary Tom Anna Peter Simon Alice Henry Lucy".split()
)
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station", "market", "park")
OBJECTS = ("ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack", "book", "letter")

GPT2_SMALL: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        "name mover": ((9, 9), (10, 0), (9, 6)),
        "backup name mover": ((10, 10), (10, 6), (10, 2), (10, 1), (11, 2), (9, 7), (9, 0), (11, 9)),
        "negative name mover": ((10, 7), (11, 10)),
        "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
        "induction": ((5, 5), (5, 8), (5, 9), (6, 9)),
        "duplicate token": ((0, 1), (0, 10), (3, 0)),
        "previous token": ((2, 2), (4, 11)),
    }
)
"""The published circuit of GPT-2 small: class -> (layer, head)."""

PUBLISHED = MappingProxyType({"F(M)": 3.56, "|F(M) - F(C)|": 0.46, "IO over S": 0.993})
"""The paper's figures for it, by mean ablation over ABC prompts."""


def published_classes() -> dict[str, str]:
    """Head -> its class, of the published circuit.

    >>> len(published_classes()), published_classes()["L9.head.9"]
    (26, 'name mover')
    """
    return {f"L{layer}.head.{h}": name for name, heads in GPT2_SMALL.items() for layer, h in heads}


class IOI(NamedTuple):
    """Prompts of the task.

    Attributes:
        contrast: clean and ABC prompts, and the logit difference.
        texts: the clean prompts.
        groups: [B], template and order of each prompt: in a group all tokens stand at the same positions.
        positions: [B, 3], where IO, the first S and the second S stand.
    """

    contrast: Contrast
    texts: tuple[str, ...]
    groups: Int[np.ndarray, " B"]
    positions: Int[np.ndarray, "B 3"]


def one_token(tokenizer: Any, words: Sequence[str]) -> list[str]:
    """The words that are one token of their own, with the space before them."""
    ids = {word: word_ids(tokenizer, " " + word) for word in words}
    return [word for word in words if len(ids[word]) == 1 and ids[word][0] != tokenizer.unk_token_id]


def ioi_prompts(model: Checkpoint, n_prompts: int = 16, *, seed: int = 0, names: Sequence[str] = NAMES) -> IOI:
    """Make prompts of the task for a model, half of them ABBA and half BABA.

    Names, places and objects that are not one token for the model's tokenizer are left out.

    Args:
        model: the model, from `load_model`.
        n_prompts: number of prompts.
        seed: seed of the choice.
        names: names to choose from.

    Raises:
        BehaviourError: the model has no tokenizer, or too few words are one token for it.

    >>> import wpjax as wp
    >>> words = ("fox", "dog", "owl", "crab", "tiger", "finch")  # the embedded model knows no people
    >>> try:
    ...     wp.ioi_prompts(wp.load_model("tiny:base"), 4, names=words)
    ... except wp.WpjaxError as error:
    ...     print(error)
    tiny:base: 0 of the places are one token for this tokenizer, 1 are needed; use a model with a larger vocabulary
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise BehaviourError(f"{model.source} has no tokenizer; put tokenizer.json beside the weights")
    if n_prompts < 2:
        raise BehaviourError(f"{n_prompts} prompts are too few: ask for 2 or more")
    lists = {"names": (names, 5), "places": (PLACES, 1), "objects": (OBJECTS, 1)}
    usable: dict[str, list[str]] = {}
    for what, (words, least) in lists.items():
        usable[what] = one_token(tokenizer, words)
        if len(usable[what]) < least:
            raise BehaviourError(
                f"{model.source}: {len(usable[what])} of the {what} are one token for this tokenizer, {least} are "
                "needed; use a model with a larger vocabulary"
            )
    rng = random.Random(seed)
    rows: list[tuple[str, str, str, str, int]] = []
    for i in range(n_prompts):
        number = (i // 2) % len(TEMPLATES)
        place, thing = rng.choice(usable["places"]), rng.choice(usable["objects"])
        io, s, *others = rng.sample(usable["names"], 5)
        fill = functools.partial(TEMPLATES[number].format, place=place, object=thing)
        first, second = (io, s) if i % 2 == 0 else (s, io)  # ABBA, BABA
        abc = fill(first=others[0], second=others[1], giver=others[2])
        rows.append((fill(first=first, second=second, giver=s), abc, io, s, 2 * number + i % 2))
    clean, corrupted, ios, subjects, groups = (list(column) for column in zip(*rows, strict=True))
    answers, foils = (np.array([single_token(tokenizer, " " + word) for word in words]) for words in (ios, subjects))
    tokens, other = text_tokens(tokenizer, clean), text_tokens(tokenizer, corrupted)
    contrast = Contrast.of_tokens(model.cfg, tokens, other, answers, foils)
    return IOI(contrast, tuple(clean), np.array(groups), _positions(tokens, answers, foils))


def _positions(tokens: Tokens, ios: np.ndarray, subjects: np.ndarray) -> Int[np.ndarray, "B 3"]:
    ids = np.asarray(tokens.ids)
    at_io = (ids == ios[:, None]).argmax(1)
    at_s = ids == subjects[:, None]
    return np.stack([at_io, at_s.argmax(1), ids.shape[1] - 1 - at_s[:, ::-1].argmax(1)], 1)


@functools.partial(jax.jit, static_argnames=("cfg", "k"))
def copy_scores(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B n"],
    k: int = 5,
) -> Float[Array, "2 L H"]:
    """How surely each head writes the word that it reads, and how surely it writes against it.

    The stream after layer 0 at a name goes through the head's values and output, then through the final norm and the
    unembedding. The copy score is the share of names that are among the k first tokens (arXiv 2211.00593, section
    3.1). The other score is the share that is among the k last: there, a head that attends to a name lowers it.

    Args:
        cfg: the model.
        params: its parameters.
        tokens: the prompts.
        positions: where names stand in each.
        k: how many tokens count as first, or as last (static).
    """
    stream = forward(cfg, params, tokens, sites=(Site.RESID_POST,), stop=1, logits=False).sites[Site.RESID_POST][0]
    at_names = jnp.take_along_axis(stream, positions[..., None], 1)  # [B, n, D]
    names = jnp.take_along_axis(tokens, positions, 1)
    layout, model = Causal.of(positions.shape[1]), decoder(cfg, params)

    def of_layer(layer: Array) -> Float[Array, "H two"]:
        one = block(cfg, take_layer(params["blocks"], layer), layer)(at_names, layout)
        values = jnp.repeat(one.v, cfg.n_rep, axis=2)  # values need no positions
        written = written_by_head(values, one.block.attn.W_O.get_value(), cfg.activation_splits)  # [H, B, n, D]

        def score(o: Float[Array, "B n D"]) -> Float[Array, " two"]:
            logits = model.logits(one.block.normed(Site.ATTN_OUT, o))  # what it adds to the stream
            own = jnp.take_along_axis(logits, names[..., None], -1)
            beyond = jnp.stack([(logits > own).sum(-1), (logits < own).sum(-1)])
            return (beyond < k).astype(jnp.float32).mean((1, 2))

        return jax.lax.map(score, written)

    return jnp.moveaxis(jax.lax.map(of_layer, jnp.arange(cfg.n_layers)), 2, 0)
