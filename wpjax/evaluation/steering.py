"""Causal tests of a direction: does it bring the behaviour into the base? Does its removal take it from the expert?

    into the base       h += (z - <h, u>) u,   z = z_B + s (z_E - z_B)         s: strength, 1 for the expert's own state
    out of the expert   h += (z_B - <h, u>) u

u is the direction and h the residual stream after one layer. z_B and z_E are the means of <h, u> in base and expert,
over prompts with the instruction, where the anchor is read. The stream is held there at the last prompt token and at
every new token, and the checker judges the answers (steering: arXiv 2410.12877; the removal and the tests: ours).

The control moves the stream as far along a random direction. Answers of either model are degenerate if their perplexity
under the base is far above that of the expert's own answers. Then the test fails, whatever the checker says.

Answers are dear, so they come last, and no more of them than needed:

1. `screen_layers` ranks layers by the decision log-odds of the steered models, on a few "fit" prompts. Nothing is
   generated for it.
2. `candidates` lets the expert answer a few "fit" prompts without the direction of the best of them, and the base at
   every strength, two layers at a time. As soon as a layer promises to pass, it is tested; further layers are tried
   only if it does not pass.
3. `steering_tests` lets one layer after the other answer the "sweep" prompts, a few queries at a time. It stops as soon
   as a layer is accepted. The intervals hold however often one looks (`stats.confidence_sequence`), and for all layers
   that may be tested (Bonferroni). Layers and strengths are chosen on other prompts than they are tested on.

Steering changes nothing before the last prompt token. So each model reads the prompts once, and all steered versions of
it go on from there in one program (`evaluation.continued`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from wpjax.behaviours import PromptBatch
from wpjax.errors import MetricRejected
from wpjax.evaluation.continued import Continued, steer
from wpjax.evaluation.judge import Judge, check_pass_rates_differ, passes_surely_more
from wpjax.metrics.answers import ExpertAnswers, decision_metric
from wpjax.metrics.diagnostics import MAX_EXCESS_NLL, SteeringTest
from wpjax.models.decoder import Params
from wpjax.models.generate import Generation
from wpjax.pairs import Pair
from wpjax.runtime.progress import Progress, silent
from wpjax.runtime.shards import finished_part
from wpjax.stats import confidence_sequence

STRENGTHS = (1.0, 1.5, 2.0)
"""How far the base is steered, in units of the way from its own mean state (0) to the expert's (1)."""

N_SCREENED = 12
"""Layers that are screened, at most."""

PROMPTS_A_LOOK = 16
"""Prompts that are answered between two looks at the outcome, at most; each of another query."""

N_RANDOM = 2
"""Random directions beside each that is tested."""

HOPELESS = 2
"""A test stops undecided if this many times the queries at hand would not be likely to decide it."""

N_STRENGTHS = 4
"""Layers whose strengths are tried, at most."""

LAYERS_AT_ONCE = 2
"""Layers whose strengths are tried together."""

PROMISING = 0.5
"""A layer promises to pass if it moves this share of what base and expert differ by, in the base and in the expert."""


class Directions(NamedTuple):
    """The direction of every layer, and where the two models stand on it.

    Attributes:
        unit: [L, D], unit direction.
        base: [L], mean projection of the base's state, z_B.
        expert: [L], the same of the expert, z_E.
    """

    unit: Float[np.ndarray, "L D"]
    base: Float[np.ndarray, " L"]
    expert: Float[np.ndarray, " L"]

    def target(self, layer: int, strength: float) -> float:
        """The state at a strength: 0 for the base's, 1 for the expert's."""
        return float(self.base[layer] + strength * (self.expert[layer] - self.base[layer]))

    @property
    def still(self) -> tuple:
        """A way that moves nothing."""
        return self.way(0, 0.0, np.zeros(self.unit.shape[1]))

    def way(self, layer: int, strength: float, write: np.ndarray | None = None) -> tuple:
        """A way to steer, as `steer` takes it; along another direction if `write` is given."""
        unit = self.unit[layer]
        return layer, unit, unit if write is None else write, self.target(layer, strength)


class Candidate(NamedTuple):
    """A layer to be tested.

    Attributes:
        layer: 0-based layer.
        strength: how far the base is steered.
    """

    layer: int
    strength: float


def screen_layers(
    pair: Pair, batch: PromptBatch, answers: Generation, layers: Sequence[int], directions: Directions
) -> list[int]:
    """Rank layers by what steering does to the log-odds of the expert's word against the base's, where they part.

    A layer's score is the share of the log-odds that the expert's own state brings into the base, times the share that
    the base's state takes from the expert. Nothing is generated. The log-odds tell layers apart but not strengths: they
    grow with the strength long after the answers have become nonsense.

    Args:
        pair: base and expert.
        batch: a few prompts, of queries that the tests do not use.
        answers: the expert's answers to them.
        layers: 0-based layers, the most promising first; the first `N_SCREENED` are screened.
        directions: directions and states.

    Returns:
        the layers that were screened, the best first. If base and expert part ways on too few prompts, they keep their
        order.
    """
    layers, prompts = list(layers[:N_SCREENED]), batch.with_instruction
    try:
        known = ExpertAnswers(pair, prompts, answers.tokens.shape[1], answers)
        metric = decision_metric(pair, batch, known.max_new_tokens, known)
    except MetricRejected:
        return layers
    step = np.maximum(np.asarray(metric.at) - np.asarray(prompts.last)[:, None], 0)
    words = np.asarray(answers.tokens)[:, : int(step.max()) + 1]

    def scores(params: Params, strength: float) -> Float[np.ndarray, " S"]:
        """Mean log-odds of a model as it is, then with its state at each layer held at a strength."""
        ways = [directions.still, *(directions.way(layer, strength) for layer in layers)]
        return Continued(pair.cfg, params, prompts, words.shape[1]).scores(steer(ways), words, step, metric).mean(1)

    base, expert = scores(pair.base, 1.0), scores(pair.expert, 0.0)
    gap = float(expert[0] - base[0])
    share = ((base[1:] - base[0]) / gap).clip(0, 1) * ((expert[0] - expert[1:]) / gap).clip(0, 1)
    return [layers[i] for i in np.argsort(-share, kind="stable")]


def candidates(
    judge: Judge, layers: Sequence[int], directions: Directions, progress: Progress = silent
) -> Iterator[Candidate]:
    """Layers to be tested, each with its strength: a layer that promises to pass as soon as one is found.

    All is by answers to a few prompts. First the expert answers without the direction, for each layer. The layers at
    which it loses most without degenerate answers come first. Then the strengths of `LAYERS_AT_ONCE` layers are tried
    at a time. A layer promises to pass if its answers are not degenerate, and the base's gain and the expert's loss are
    both at least `PROMISING` times what the two differ by. Further layers are tried when the caller asks for more,
    `N_STRENGTHS` at most. Then the rest come, the best first: by gain times loss.

    Args:
        judge: a few prompts, of queries that the tests do not use.
        layers: 0-based layers, the most promising first.
        directions: directions and states.
        progress: function that is called as layers get tried.
    """
    n_tried = min(N_STRENGTHS, len(layers))
    progress("strengths tried", 0, n_tried)
    removed = [directions.still, *(directions.way(layer, 0.0) for layer in layers)]
    passes, nll, _ = _figures(judge, {"expert": removed}, 1).mean(2)
    own, without = (float(passes[0]), float(nll[0])), passes[1:]
    order = np.lexsort((without, nll[1:] > own[1] + MAX_EXCESS_NLL))[:n_tried].tolist()
    waiting: list[_Tried] = []
    for first in range(0, n_tried, LAYERS_AT_ONCE):
        some = order[first : first + LAYERS_AT_ONCE]
        loss = {layers[i]: float(own[0] - without[i]) for i in some}
        waiting += _try_strengths(judge, loss, own, directions)
        waiting.sort(key=lambda tried: -tried.score)
        # Done for now, if a layer promises to pass.
        progress("strengths tried", n_tried if waiting[0].promises else first + len(some), n_tried)
        while waiting and waiting[0].promises:
            yield waiting.pop(0).candidate
    yield from (tried.candidate for tried in waiting)


class _Tried(NamedTuple):
    """A layer whose strengths were tried: the best of them, how good it is, and whether it promises to pass."""

    candidate: Candidate
    score: float
    promises: bool


def _try_strengths(
    judge: Judge, loss: Mapping[int, float], own: tuple[float, float], directions: Directions
) -> list[_Tried]:
    """Choose the strength for each of some layers.

    Of the strengths whose answers are not degenerate, the one is taken at which the base passes most, the weaker one of
    equals; if all are degenerate, the one whose answers are likeliest.

    Args:
        judge: a few prompts.
        loss: layer -> share of the prompts that the expert loses without the direction.
        own: of the expert's own answers, the share that passes, and their nats per token under the base.
        directions: directions and states.
    """
    ways = [directions.still, *(directions.way(layer, s) for layer in loss for s in STRENGTHS)]
    passes, nll, _ = _figures(judge, {"base": ways}, 1).mean(2)
    gain = (passes[1:] - passes[0]).reshape(len(loss), len(STRENGTHS))
    excess = nll[1:].reshape(gain.shape) - own[1]
    least, tried = PROMISING * (own[0] - float(passes[0])), list[_Tried]()
    for (layer, lost), gains, above in zip(loss.items(), gain, excess, strict=True):
        sound = np.flatnonzero(above <= MAX_EXCESS_NLL)
        at = int(sound[np.argmax(gains[sound])]) if len(sound) else int(np.argmin(above))
        score = float(gains[at] * lost if len(sound) else -above[at])
        promises = bool(len(sound) and least > 0 and min(gains[at], lost) >= least)
        tried.append(_Tried(Candidate(layer, STRENGTHS[at]), score, promises))
    return tried


def steering_tests(
    judge: Judge,
    candidates: Iterable[Candidate],
    directions: Directions,
    *,
    n_candidates: int = 1,
    n_random: int = N_RANDOM,
    seed: int = 0,
    done: MutableMapping[str, np.ndarray] | None = None,
    progress: Progress = silent,
) -> list[SteeringTest]:
    """Both causal tests at one layer after another, up to the first that is accepted.

    Each is tested with as many queries as it takes to decide it. It is left undecided early if `HOPELESS` times all
    queries would not be likely to.

    Args:
        judge: prompts and checker. Of each query the first prompt is used: others would tell little that is new.
        candidates: layers and strengths to test, in this order. The next is asked for only if it is needed.
        directions: directions and states.
        n_candidates: number of layers that are tested, at most. The intervals hold for so many at once (Bonferroni).
        n_random: number of random directions for each layer.
        seed: seed of the random directions.
        done: finished looks of an earlier attempt; new ones are added.
        progress: function that is called after every look.

    Returns:
        the outcome at each layer that was tested, in their order.

    Raises:
        AnchorRejected: base and expert do not differ in the behaviour.
    """
    judge.behaviour.check_checker()
    done = {} if done is None else done
    judge = judge.take(np.sort(np.unique(judge.batch.queries, return_index=True)[1]))  # of each query the first prompt
    rng, n_queries = np.random.default_rng(seed), len(judge.batch)
    looks = np.array_split(np.arange(n_queries), -(-n_queries // PROMPTS_A_LOOK))
    level, tests = 1 - 0.05 / n_candidates, list[SteeringTest]()
    half = 2 + n_random  # versions of each model: itself, steered, along random directions
    for which, candidate in enumerate(itertools.islice(candidates, n_candidates)):
        random = rng.standard_normal((n_random, directions.unit.shape[1]))
        random /= np.linalg.norm(random, axis=-1, keepdims=True)
        parts = list[np.ndarray]()
        for i, rows in enumerate(looks):
            progress("steering tests", i, len(looks))
            key = f"steering-{which}-{i}"
            if key not in done:
                done[key] = _look(judge.take(rows), candidate, directions, random)
            parts.append(finished_part(done, key, (3, 2 * half, len(rows))))
            figures = np.concatenate(parts, axis=2)
            own = figures[0, ::half].astype(bool)
            queries = np.arange(own.shape[1])
            test = _outcome(figures, candidate, level, judge.max_new_tokens)
            if test.outcome == "undecided":
                if test.queries_needed > HOPELESS * n_queries:
                    break
            elif passes_surely_more(queries, *own):
                break
        check_pass_rates_differ(judge.behaviour.name, queries, *own)
        tests.append(test)
        if test.outcome == "accepted":
            break
    progress("steering tests", len(looks), len(looks))
    return tests


def _look(
    judge: Judge, candidate: Candidate, directions: Directions, random: Float[np.ndarray, "R D"]
) -> Float[np.ndarray, "3 V B"]:
    """Answers of all versions of both models to some prompts: whether each passes; its nats per token (NaN
    for random directions); whether it was cut off.

    The V versions are, of the base, then of the expert: the model itself, the version steered along the direction, and
    those along each random one.
    """
    # The control reads <h, u> as well but writes along another direction, so the stream is moved as far.
    strengths = {"base": candidate.strength, "expert": 0.0}
    versions = {
        name: [directions.still, *(directions.way(candidate.layer, s, write) for write in (None, *random))]
        for name, s in strengths.items()
    }
    return _figures(judge, versions, 1 + len(random))


def _figures(judge: Judge, versions: Mapping[str, list], every: int) -> Float[np.ndarray, "3 V B"]:
    """Answers of versions of one or both models: whether each passes; its nats per token; whether it was cut off.

    Args:
        judge: prompts and checker.
        versions: "base" and "expert" -> ways to steer that model; the first leaves it as it is.
        every: nats per token are asked of the first version, then of every such one; of the others they are NaN.
    """
    pair, prompts = judge.pair, judge.batch.with_instruction
    models = {"base": pair.base, "expert": pair.expert}
    read = {n: Continued(pair.cfg, models[n], prompts, judge.max_new_tokens) for n in {"base": None, **versions}}
    figures = []
    for name, ways in versions.items():
        answers = read[name].answers(steer(ways), pair.stop_tokens)
        by_version = [Generation(*one) for one in zip(answers.tokens, answers.lengths, strict=True)]
        judge.check_not_empty(name, by_version[0])
        passes = np.stack([judge.passes(one) for one in by_version])
        cut = np.stack([judge.cut(one) for one in by_version])
        asked, nll = [0, *range(1, len(ways), every)], np.full(passes.shape, np.nan)
        nll[asked] = read["base"].nll(Generation(answers.tokens[asked], answers.lengths[asked]))
        figures.append(np.stack([passes, nll, cut]).astype(np.float64))
    return np.concatenate(figures, axis=1)


def _outcome(
    figures: Float[np.ndarray, "3 V B"],
    candidate: Candidate,
    level: float,
    max_new_tokens: int,
) -> SteeringTest:
    """The tests at a layer, from the figures of all looks so far (see `_look`)."""
    passes, nll, cut = figures
    half = len(passes) // 2
    (own_base, steered), (own_expert, removed) = passes[:2], passes[half : half + 2]
    steered_random, removed_random = passes[2:half].mean(0), passes[half + 2 :].mean(0)

    _, gain_low, gain_high = confidence_sequence(steered - steered_random, level)
    _, drop_low, drop_high = confidence_sequence(removed_random - removed, level)
    return SteeringTest(
        layer=candidate.layer,
        strength=candidate.strength,
        steered=float(steered.mean()),
        steered_random=float(steered_random.mean()),
        gain_low=gain_low,
        removed=float(removed.mean()),
        removed_random=float(removed_random.mean()),
        drop_low=drop_low,
        nll=float(nll[1].mean()),
        nll_expert=float(nll[half].mean()),
        nll_removed=float(nll[half + 1].mean()),
        gain_high=gain_high,
        drop_high=drop_high,
        difference=float(own_expert.mean() - own_base.mean()),
        n_queries=float(passes.shape[1]),
        max_new_tokens=float(max_new_tokens),
        cut=float(cut[half].mean()),
    )
