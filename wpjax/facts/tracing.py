"""Causal tracing: which states of a run carry a fact (Meng et al., arXiv 2202.05262, section 2).

    P(clean)       probability of the answer
    P(corrupted)   the same with the subject corrupted: noise on its embeddings, or another subject in its place
    P(restored)    the corrupted run, in which one state is the clean run's again

    total effect  TE = P(clean) - P(corrupted)        indirect effect of a state  IE = P(restored) - P(corrupted)

ATE and AIE are their means over facts. Noise is normal, with `noise` times the standard deviation of the embeddings of
all subjects; another subject of as many tokens keeps the model on inputs that it knows (arXiv 2309.16042).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from wpjax.checkpoints.checkpoint import Checkpoint
from wpjax.errors import FactError
from wpjax.facts.facts import Fact, Located, check_length, continued, each_fact, locate, padded, pieces
from wpjax.facts.flow import flow, packing
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, forward
from wpjax.models.leaves import lookup
from wpjax.results.tracing import MAPS, FactTrace, Tracing
from wpjax.runtime.cards import public_name
from wpjax.runtime.progress import Progress, silent

Corruption: TypeAlias = Literal["noise", "replacement"]
"""How a subject is corrupted."""

NOISE = 3.0
"""Standard deviation of the noise, in units of that of the embeddings of subjects, unless told otherwise."""

DIGITS = 8
"""Digits to which probabilities are rounded: float32 has no more, and files stay short."""

# Prompts, and the cells of a map, are filled up to multiples of these, so that few programs serve a file of facts.
_WIDTH, _CELLS = 8, 4
_BATCH = 16  # prompts that are read at once


class Known(NamedTuple):
    """A fact that a model knows.

    Attributes:
        fact: the fact.
        at: its prompt in tokens, and where the subject stands.
        answer: the first token of what completes it.
    """

    fact: Fact
    at: Located
    answer: int


def check_tokenizer(model: Checkpoint) -> None:
    """Refuse a model without a tokenizer.

    Raises:
        FactError: it has none.
    """
    if model.tokenizer is None:
        raise FactError(f"{model.source} has no tokenizer, and facts are texts; name a folder that holds one")


def known_facts(model: Checkpoint, facts: Sequence[Fact], progress: Progress = silent) -> list[Known]:
    """The facts that a model knows: decoded greedily, it completes the prompt by the target.

    Args:
        model: the model.
        facts: the facts; without a target, what the model says is the answer.
        progress: called with the number of facts that were read.

    Raises:
        FactError: a subject has no tokens of its own, a target changes those of the prompt, or a prompt is too long.
            All such facts are named.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:expert")
    >>> [known.at.ids.shape for known in known_facts(model, [Fact("How do {} hunt?", "owls")])]
    [(9,)]
    """
    check_tokenizer(model)

    def read(fact: Fact) -> tuple[Located, Int[np.ndarray, " N"]]:
        at = locate(model.tokenizer, fact.prompt, fact.subject)
        target = continued(model.tokenizer, fact.text, fact.target)[1] if fact.target else at.ids[:0]
        check_length(model.cfg, len(at.ids) + len(target), repr(fact.text[:60]))
        return at, target

    rows_of = each_fact(facts, read)
    found = []
    for first in range(0, len(facts), _BATCH):
        progress("facts that the model knows", first, len(facts))
        some = range(first, min(first + _BATCH, len(facts)))
        rows = [np.concatenate([rows_of[i][0].ids, rows_of[i][1]]) for i in some]
        says = np.asarray(_greedy(model.cfg, model.params, jnp.asarray(padded(rows, 16, model.cfg.n_ctx))))
        for i, said in zip(some, says, strict=True):
            at, target = rows_of[i]
            end = len(at.ids) - 1
            if np.array_equal(said[end : end + len(target)], target):
                found.append(Known(facts[i], at, int(said[end])))
    progress("facts that the model knows", len(facts), len(facts))
    return found


def _greedy_tokens(cfg: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """The likeliest next token after every token."""
    return forward(cfg, params, tokens).logits.argmax(-1)  # type: ignore[union-attr]


_greedy = jax.jit(_greedy_tokens, static_argnames="cfg")


def subject_sigma(model: Checkpoint, known: Sequence[Known]) -> float:
    """Standard deviation of the embeddings of the tokens of all subjects, over tokens and dimensions.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:expert")
    >>> 0 < subject_sigma(model, known_facts(model, [Fact("How do {} hunt?", "owls")])) < 1
    True
    """
    ids = np.concatenate([fact.at.ids[fact.at.start : fact.at.stop] for fact in known])
    vectors = np.asarray(lookup(model.params["embed"]["W_E"], jnp.asarray(ids))) * model.cfg.embed_scale
    return float(vectors.std(ddof=1))


def replacements(model: Checkpoint, known: Sequence[Known], seed: int = 0) -> list[tuple[str, Int[np.ndarray, " T"]]]:
    """For each fact another subject of as many tokens, and the tokens of the prompt about it.

    It is the one that the fact names, or the subject of another fact with another answer, chosen at random among those
    that fit.

    Args:
        model: the model.
        known: the facts.
        seed: seed of the choice.

    Raises:
        FactError: the named one has not as many tokens, or no other subject has.
    """
    rng, found = np.random.default_rng(seed), []
    for fact, at, answer in known:
        # One of the same answer would corrupt nothing.
        subjects = list(dict.fromkeys(other.fact.subject for other in known if other.answer != answer))
        options = []
        for subject in [fact.replacement] if fact.replacement else subjects:
            try:
                other = locate(model.tokenizer, fact.prompt, subject)
            except FactError:  # beside the words of this prompt, the other subject has no tokens of its own
                continue
            fits = other[1:] == at[1:] and len(other.ids) == len(at.ids)
            if fits and not np.array_equal(other.ids, at.ids):
                options.append((subject, other.ids))
        n = at.stop - at.start
        if not options and fact.replacement:
            raise FactError(f"{fact.replacement!r} cannot stand in for {fact.subject!r}, which has {n} tokens in "
                            f"{fact.text!r}; name another subject of as many")  # fmt: skip
        if not options:
            raise FactError(f"no other subject has {n} tokens, as {fact.subject!r} has in {fact.text!r}; name one by "
                            '"replacement" in the file')  # fmt: skip
        found.append(options[int(rng.integers(len(options)))])
    return found


def trace_facts(
    model: Checkpoint,
    facts: Sequence[Fact],
    *,
    corruption: Corruption = "noise",
    noise: float = NOISE,
    samples: int = 10,
    maps: Sequence[str] = ("stream", "mlp", "attn"),
    window: int = 10,
    seed: int = 0,
    progress: Progress = silent,
) -> Tracing:
    """Trace facts: corrupt the subject, restore each token's state at each layer, and read the answer's probability.

    Only facts that the model knows are traced. Where an answer has several tokens, the first is read.

    Args:
        model: the model.
        facts: the facts.
        corruption: "noise" on the subject's embeddings, or a "replacement" of the subject by another one.
        noise: standard deviation of the noise, in units of that of the embeddings of all subjects.
        samples: number of corrupted runs with noise; a replacement is one.
        maps: what is restored, names of `results.tracing.MAPS`:

            - "stream": the residual stream after one layer.
            - "mlp", "attn": what these modules add to it, in a window of layers.
            - "severed_mlp", "severed_attn": the stream after one layer, with these modules held at what they add in the
              corrupted run at the restored token, in all layers.
        window: number of layers that are restored together, for modules: from l - window / 2 on, for a layer l.
        seed: seed of the noise, which is the same for every fact, or of the choice of replacements.
        progress: called as facts are traced.

    Raises:
        FactError: the model knows none of the facts; a subject has no tokens of its own; there is no replacement.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:expert")
    >>> found = trace_facts(model, [Fact("Why do {} hunt at", "the owls")], samples=2, maps=["stream"])
    >>> found.facts[0].maps["stream"].shape == (model.cfg.n_layers, len(found.facts[0].tokens))
    True
    """
    for name in maps:
        if name not in MAPS:
            raise FactError(f"there is no map {name!r}; there are {', '.join(MAPS)}")
    if not maps or samples < 1 or window < 1 or noise < 0:
        raise FactError("give at least one map, one sample and a window of one layer, and no negative noise")
    known = known_facts(model, facts, progress)
    if not known:
        raise FactError(
            f"the model knows none of the {len(facts)} facts, the first {facts[0].text!r} -> {facts[0].target!r}; only "
            "what it knows can be traced: leave targets out to trace what it says"
            if facts
            else "there are no facts; give at least one"
        )
    sigma, others = 0.0, [("", fact.at.ids) for fact in known]
    if corruption == "noise":
        sigma = subject_sigma(model, known)
    else:
        others, samples = replacements(model, known, seed), 1
    maps, found, n_done = [name for name in MAPS if name in maps], [], 0
    for fact, (other, corrupted) in zip(known, others, strict=True):
        at, made, ends = fact.at, {}, (0.0, 0.0)
        added = _noise(model.cfg, at, samples, noise * sigma, seed)
        for name in maps:
            progress("tracing", n_done, len(known) * len(maps))
            # What stands before the subject is the same in both runs: to restore it changes nothing.
            ends, made[name] = _map(model, fact, corrupted, added, name, window, at.start, len(at.ids))
            n_done += 1
        tokens = pieces(model.tokenizer, at.ids)
        answer = pieces(model.tokenizer, [fact.answer])[0]
        found.append(
            FactTrace(fact.fact.text, fact.fact.subject, answer, tokens, at.start, at.stop, *ends, made, other)
        )
    progress("tracing", n_done, n_done)
    settings: dict[str, Any] = {"corruption": corruption, "samples": samples, "window": window, "seed": seed}
    settings |= {"noise": noise, "sigma": sigma} if corruption == "noise" else {}
    return Tracing(public_name(model.source), tuple(found), len(facts), settings)


def best_layer(
    model: Checkpoint,
    facts: Sequence[Fact],
    *,
    samples: int = 10,
    window: int = 10,
    seed: int = 0,
    progress: Progress = silent,
) -> int:
    """The layer around which restoring MLPs at the last token of the subject brings most of the answers back.

    An answer is what the model says, whether it is right or not. To be easy to edit there is another question (arXiv
    2301.04213); this is where the paper edits.

    Args:
        model: the model.
        facts: the facts.
        samples: corrupted runs of each, with noise of three standard deviations.
        window: number of layers that are restored together.
        seed: seed of the noise.
        progress: called as facts are traced.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:expert")
    >>> 0 <= best_layer(model, [Fact("Why do {} hunt at", "the owls")], samples=2, window=2) < model.cfg.n_layers
    True
    """
    known = known_facts(model, [dataclasses.replace(fact, target="") for fact in facts], progress)
    if not known:
        raise FactError("there are no facts; give at least one")
    sigma, total = subject_sigma(model, known), np.zeros(model.cfg.n_layers)
    for i, fact in enumerate(known):
        progress("looking for the layer", i, len(known))
        noise = _noise(model.cfg, fact.at, samples, NOISE * sigma, seed)
        (_, low), found = _map(model, fact, fact.at.ids, noise, "mlp", window, fact.at.stop - 1, fact.at.stop)
        total += found[:, fact.at.stop - 1] - low
    progress("looking for the layer", len(known), len(known))
    # What the last layer makes of a subject reaches no later word.
    return int(total[: max(1, model.cfg.n_layers - 1)].argmax())


def _noise(cfg: ModelConfig, at: Located, samples: int, size: float, seed: int) -> Float[np.ndarray, "R W D"]:
    """Normal noise on the tokens of a subject, and none on the others; as wide as the prompt is padded."""
    width = min(-(-len(at.ids) // _WIDTH) * _WIDTH, cfg.n_ctx)  # no prompt is longer (`check_length`)
    noise = np.zeros((samples, width, cfg.d_model), np.float32)
    shape = samples, at.stop - at.start, cfg.d_model
    noise[:, at.start : at.stop] = size * np.random.default_rng(seed).standard_normal(shape)
    return noise


def _map(
    model: Checkpoint,
    known: Known,
    corrupted: Int[np.ndarray, " T"],
    noise: Float[np.ndarray, "R W D"],
    name: str,
    window: int,
    first: int,
    stop: int,
) -> tuple[tuple[float, float], Float[np.ndarray, "L T"]]:
    """One map of one fact, of its tokens from `first` to `stop`.

    Returns:
        probabilities of the clean and of the corrupted run, and of each restoration; at tokens that were not restored,
        that of the corrupted run.
    """
    at, n = known.at, len(known.at.ids)
    cells: Bool[np.ndarray, "C W"] = np.zeros((-(-(stop - first) // _CELLS) * _CELLS, noise.shape[1]), bool)
    cells[np.arange(stop - first), np.arange(first, stop)] = True
    severed = name.removeprefix("severed_") if name.startswith("severed_") else None
    rows = padded([at.ids, corrupted], noise.shape[1])
    found = flow(
        model.cfg,
        model.params,
        jnp.asarray(rows[0]),
        jnp.asarray(np.tile(rows[1], (len(noise), 1))),
        jnp.asarray(noise),
        jnp.asarray(cells),
        packing(cells, n),
        jnp.asarray(n - 1),
        jnp.asarray(known.answer),
        kind="stream" if severed else name,
        window=window,
        severed=severed,
    )
    low = float(np.mean(found.corrupted))
    whole = np.full((model.cfg.n_layers, n), low)
    whole[:, first:stop] = np.asarray(found.restored, np.float64).mean(-1)[:, : stop - first]
    return (round(float(found.clean), DIGITS), round(low, DIGITS)), whole.round(DIGITS)
