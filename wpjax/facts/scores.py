"""What an edit did, as Meng et al. score it on CounterFact (arXiv 2202.05262, section 3.3, and the released code).

o* is the new target, o the old one; P of a target of several tokens is the geometric mean of theirs.

    ES, PS   efficacy and paraphrase score: share of the prompts with P(o*) > P(o)
    EM, PM   their magnitudes: mean of P(o*) - P(o)
    NS, NM   neighbourhood score and magnitude: share of prompts with P(o) > P(o*), mean of P(o) - P(o*)
    S        harmonic mean of ES, PS and NS
    GE, RS   what the model writes about the subject: does it repeat itself, does it write as texts about subjects of
             which the new target is true (`facts.generation`)

Every fact is edited alone, in the model as it was. A fact's prompts of one kind are averaged first.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from wpjax.checkpoints.checkpoint import Checkpoint
from wpjax.errors import FactError
from wpjax.facts.facts import Fact, check_length, continued, each_fact, encode, padded
from wpjax.facts.generation import TfIdf, entropy, write_on
from wpjax.facts.rank_one import FactEdit
from wpjax.facts.tracing import DIGITS
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, decoder, forward
from wpjax.results.edit_scores import KINDS, WHEN, WRITTEN, EditScores
from wpjax.runtime.progress import Progress, silent

_BATCH = 16


@functools.partial(jax.jit, static_argnames="cfg")
def _log_p(
    cfg: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    reads: Int[Array, "B N"],
    targets: Int[Array, "B N"],
    counted: Float[Array, "B N"],
) -> Float[Array, " B"]:
    """Mean log-probability of the tokens of each row's target."""
    resid = forward(cfg, params, tokens, logits=False).resid
    read = jnp.take_along_axis(resid, reads[..., None], axis=1)
    log_p = jax.nn.log_softmax(decoder(cfg, params).logits(read))
    found = jnp.take_along_axis(log_p, targets[..., None], axis=2)[..., 0]
    return (found * counted).sum(1) / counted.sum(1)


def target_probabilities(
    model: Checkpoint, params: Params, prompts: Sequence[str], targets: Sequence[str]
) -> Float[np.ndarray, " N"]:
    """Probability of each target after its prompt; of several tokens, the geometric mean.

    Args:
        model: the model, for its tokenizer.
        params: the parameters: the model's, or edited ones.
        prompts: N prompts.
        targets: N targets.

    Raises:
        FactError: a target is empty, or changes the tokens of its prompt.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> bool(0 < target_probabilities(model, model.params, ["Owls hunt at"], ["night"])[0] < 1)
    True
    """
    both = [continued(model.tokenizer, *one) for one in zip(prompts, targets, strict=True)]
    found: list[Float[np.ndarray, " N"]] = []
    for first in range(0, len(both), _BATCH):
        some = both[first : first + _BATCH]
        some += some[:1] * (_BATCH - len(some))  # filled up, so that one program serves all batches of a length
        n = -(-max(len(target) for _, target in some) // 4) * 4
        rows = padded([np.concatenate([ids, target]) for ids, target in some], 16, model.cfg.n_ctx)
        reads = np.array([[len(ids) - 1 + min(i, len(target) - 1) for i in range(n)] for ids, target in some])
        ids = np.stack([np.pad(target, (0, n - len(target))) for _, target in some])
        counted = np.array([[i < len(target) for i in range(n)] for _, target in some], np.float32)
        arrays = map(jnp.asarray, (rows, reads, ids, counted))
        found.append(np.exp(np.asarray(_log_p(model.cfg, params, *arrays), np.float64)))
    return np.concatenate(found)[: len(both)] if both else np.zeros(0)


def score_edits(
    model: Checkpoint,
    facts: Sequence[Fact],
    make: Callable[[Fact], FactEdit],
    *,
    documents: Sequence[str] = (),
    seed: int = 0,
    done: MutableMapping[str, np.ndarray] | None = None,
    progress: Progress = silent,
) -> EditScores:
    """Edit each fact alone, and score what the edit did.

    A fact whose edit fails is left out, and named in the result.

    Args:
        model: the model.
        facts: facts with a target and a new target; paraphrases, neighbours, prompts for generation and reference texts
            where there are any.
        make: makes the edit of a fact, such as `lambda fact: edit_fact(model, fact, layer, moment)`.
        documents: texts over which words are weighted for RS; without any, the reference texts of the facts.
        seed: seed of what is written.
        done: finished facts of an earlier attempt, to which those of this one are added (`runtime.shards.Shards`).
        progress: called with the number of facts that are done.

    Raises:
        FactError: facts that cannot be scored, all of them named, before the first is edited; or every edit fails.

    >>> import wpjax as wp
    >>> from wpjax.facts.covariance import KeyMoment
    >>> model, fact = wp.load_model("tiny:expert"), wp.Fact("Why do {} hunt at", "the owls", "night", "noon")
    >>> even, quick = KeyMoment(np.eye(model.cfg.d_mlp), 10**6), wp.EditSettings(steps=3)
    >>> scores = score_edits(model, [fact], lambda f: wp.edit_fact(model, f, 2, even, settings=quick, prefixes=[]))
    >>> list(scores.table())
    ['ES', 'EM']
    """
    check_scored(model, facts)
    done = {} if done is None else done
    words = TfIdf(documents or [text for fact in facts for text in fact.references])
    found: dict[str, dict[str, list[np.ndarray]]] = {when: {k: [] for k in (*KINDS, *WRITTEN)} for when in WHEN}
    texts: dict[str, list[tuple[str, ...]]] = {when: [] for when in WHEN}
    failed: dict[str, str] = {}
    for i, fact in enumerate(facts):
        progress("facts that are edited", i, len(facts))
        try:
            if f"fact-{i}" not in done:
                done[f"fact-{i}"] = _packed(_scored(model, fact, make, words, seed))
        except FactError as error:  # of one edit; the others may be made
            failed[f"{fact.where}: {fact.text}" if fact.where else fact.text] = str(error)
            continue
        said = json.loads(done[f"fact-{i}"].tobytes())
        for when in WHEN:
            for kind, numbers in said[when].items():
                found[when][kind].append(np.array(numbers, float))
            if fact.generation:
                texts[when].append(tuple(said["texts"][when]))
    progress("facts that are edited", len(facts), len(facts))
    if len(failed) == len(facts):
        where, why = next(iter(failed.items()))
        raise FactError(f"none of the {len(facts)} facts could be edited, the first, {where!r}: {why}")
    before, after = ({kind: tuple(of) for kind, of in found[when].items()} for when in WHEN)
    said_texts = {when: tuple(of) for when, of in texts.items()} if any(texts.values()) else {}
    return EditScores(before, after, failed, said_texts)


def _scored(model: Checkpoint, fact: Fact, make: Callable[[Fact], FactEdit], words: TfIdf, seed: int) -> dict[str, Any]:
    """What one fact's edit did: kind -> numbers, "before" and "after"."""
    kinds, prompts = zip(*_prompts(fact), strict=True)
    twice = [prompt for prompt in prompts for _ in range(2)]
    targets = [fact.new_target, fact.target] * len(prompts)

    def of(params: Params) -> tuple[dict[str, Any], list[str]]:
        p = target_probabilities(model, params, twice, targets).reshape(-1, 2).round(DIGITS)
        numbers = {kind: p[[k == kind for k in kinds]].tolist() for kind in KINDS if kind in kinds}
        texts = write_on(model, params, fact.generation, seed) if fact.generation else []
        if texts:
            numbers["GE"] = [round(float(np.mean([entropy(text) for text in texts])), DIGITS)]
            if fact.references:
                numbers["RS"] = [round(words.similarity(" ".join(texts), " ".join(fact.references)), DIGITS)]
        return numbers, texts

    both = [of(params) for params in (model.params, make(fact).apply(model.cfg, model.params))]
    return {
        **{when: numbers for when, (numbers, _) in zip(WHEN, both, strict=True)},
        "texts": {when: texts for when, (_, texts) in zip(WHEN, both, strict=True)},
    }


def _packed(value: Any) -> UInt8[np.ndarray, " N"]:
    """A value of JSON as bytes, as parts of a run are kept."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _prompts(fact: Fact) -> list[tuple[str, str]]:
    """The prompts after which targets are read, each with its kind."""
    return [("E", fact.text), *(("P", prompt) for prompt in fact.paraphrases), *(("N", p) for p in fact.neighbours)]


def check_scored(model: Checkpoint, facts: Sequence[Fact]) -> None:
    """Refuse facts that cannot be scored, before any work; all of them are named.

    Args:
        model: the model.
        facts: the facts.

    Raises:
        FactError: there are none; or one has no target or new target, a target changes the tokens of one of its
            prompts, or a prompt is too long.
    """
    if not facts:
        raise FactError("there are no facts; give at least one")

    def check(fact: Fact) -> None:
        if not fact.target or not fact.new_target:
            raise FactError(f"{fact.text!r} has no target and new_target; scores compare the two")
        for _, prompt in _prompts(fact):
            for target in (fact.target, fact.new_target):
                ids, added = continued(model.tokenizer, prompt, target)
                check_length(model.cfg, len(ids) + len(added), repr(prompt[:60]))
        for prompt in fact.generation:
            check_length(model.cfg, len(encode(model.tokenizer, prompt)) + 1, repr(prompt[:60]))

    each_fact(facts, check)
