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
2. `choose_strengths` lets the best of them answer a few "fit" prompts at every strength.
3. `steering_tests` lets the best answer the "sweep" prompts, a few queries at a time. It stops as soon as an anchor is
   accepted, or all are rejected. The intervals hold however often one looks (`stats.confidence_sequence`).

Steering changes nothing before the last prompt token. So each model reads the prompts once, and all steered versions of
it go on from there in one program (`evaluation.continued`).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from wpjax.behaviours import PromptBatch
from wpjax.errors import MetricRejected
from wpjax.evaluation.continued import Continued, steer
from wpjax.evaluation.judge import Judge, check_pass_rates_differ
from wpjax.metrics.answers import decision_metric
from wpjax.metrics.diagnostics import MAX_EXCESS_NLL, SteeringTest
from wpjax.models.decoder import Params
from wpjax.models.generate import Generation
from wpjax.pairs import Pair
from wpjax.runtime.progress import Progress, silent
from wpjax.runtime.shards import finished_part
from wpjax.stats import by_query, confidence_sequence

STRENGTHS = (1.0, 1.5, 2.0)
"""How far the base is steered, in units of the way from its own mean state (0) to the expert's (1)."""

N_SCREENED = 12
"""Layers that are screened, at most."""

PROMPTS_A_LOOK = 16
"""Prompts that are answered between two looks at the outcome, about."""


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
        metric = decision_metric(pair, batch, answers.tokens.shape[1], answers)
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


def choose_strengths(judge: Judge, layers: Sequence[int], directions: Directions) -> list[Candidate]:
    """Choose the strength for each of some layers, by answers to a few prompts, and rank the layers.

    Of the strengths whose answers are not degenerate, the one is taken at which the base passes most, the weaker one of
    equals; if all are degenerate, the one whose answers are likeliest.

    Args:
        judge: a few prompts, of queries that the tests do not use.
        layers: 0-based layers.
        directions: directions and states.

    Returns:
        a candidate for each layer, the best first: by the base's gain times the expert's loss.
    """
    steered = [directions.still, *(directions.way(layer, s) for layer in layers for s in STRENGTHS)]
    removed = [directions.still, *(directions.way(layer, 0.0) for layer in layers)]
    passes, nll, _ = _figures(judge, {"base": steered, "expert": removed}, 1).mean(2)
    by_base, by_expert = passes[: len(steered)], passes[len(steered) :]
    gain = (by_base[1:] - by_base[0]).reshape(len(layers), len(STRENGTHS))
    excess = nll[1 : len(steered)].reshape(gain.shape) - nll[len(steered)]
    ranked = []
    for layer, gains, above, left in zip(layers, gain, excess, by_expert[1:], strict=True):
        sound = np.flatnonzero(above <= MAX_EXCESS_NLL)
        at = int(sound[np.argmax(gains[sound])]) if len(sound) else int(np.argmin(above))
        score = gains[at] * (by_expert[0] - left) if len(sound) else -above[at]
        ranked.append((float(score), Candidate(layer, STRENGTHS[at])))
    return [candidate for _, candidate in sorted(ranked, key=lambda r: -r[0])]


def steering_tests(
    judge: Judge,
    candidates: Sequence[Candidate],
    directions: Directions,
    *,
    n_random: int = 2,
    seed: int = 0,
    done: MutableMapping[str, np.ndarray] | None = None,
    progress: Progress = silent,
) -> list[SteeringTest]:
    """Both causal tests at each of some layers, with as many of the prompts as it takes to decide them.

    Args:
        judge: prompts and checker.
        candidates: layers and strengths to test.
        directions: directions and states.
        n_random: number of random directions for each layer.
        seed: seed of the random directions.
        done: finished looks of an earlier attempt; new ones are added.
        progress: function that is called after every look.

    Returns:
        the outcome at each candidate, in their order. The intervals hold for all of them at once (Bonferroni).

    Raises:
        AnchorRejected: base and expert do not differ in the behaviour.
    """
    judge.behaviour.check_checker()
    done = {} if done is None else done
    rng = np.random.default_rng(seed)
    random = rng.standard_normal((len(candidates), n_random, directions.unit.shape[1]))
    random /= np.linalg.norm(random, axis=-1, keepdims=True)
    looks = _looks(judge.batch)
    level, tests = 1 - 0.05 / len(candidates), list[SteeringTest]()
    order, parts = np.concatenate(looks), list[np.ndarray]()
    for i, rows in enumerate(looks):
        progress("steering tests", i, len(looks))
        key, n_versions = f"steering-{i}", 2 * (1 + len(candidates) * (1 + n_random))
        if key not in done:
            done[key] = _look(judge.take(rows), candidates, directions, random)
        parts.append(finished_part(done, key, (3, n_versions, len(rows))))
        figures = np.concatenate(parts, axis=2)
        seen = judge.take(order[: figures.shape[2]])
        tests = _outcomes(seen.batch.queries, figures, candidates, n_random, level, judge.max_new_tokens)
        if tests[0].difference > 0 and _is_decided(tests):
            break
    progress("steering tests", len(looks), len(looks))
    passes = figures[0].astype(bool)
    check_pass_rates_differ(judge.behaviour.name, seen.batch.queries, passes[0], passes[figures.shape[1] // 2])
    return tests


def _is_decided(tests: Sequence[SteeringTest]) -> bool:
    outcomes = [test.outcome for test in tests]
    return "accepted" in outcomes or "undecided" not in outcomes


def _looks(batch: PromptBatch) -> list[Int[np.ndarray, " n"]]:
    """Rows of the prompts of each look: whole queries, in the order of the batch."""
    queries = batch.queries
    looks: list[list[int]] = [[]]
    for query in dict.fromkeys(queries.tolist()):
        of_query = np.flatnonzero(queries == query).tolist()
        if looks[-1] and len(looks[-1]) + len(of_query) > PROMPTS_A_LOOK:
            looks.append([])
        looks[-1] += of_query
    return [np.array(rows) for rows in looks]


def _look(
    judge: Judge, candidates: Sequence[Candidate], directions: Directions, random: Float[np.ndarray, "A R D"]
) -> Float[np.ndarray, "3 V B"]:
    """Answers of all versions of both models to some prompts: whether each passes; its nats per token (NaN
    for random directions); whether it was cut off.

    The V versions are, of the base, then of the expert: the model itself, and for each candidate the version steered
    along its direction, then along each random one.
    """
    # The control reads <h, u> as well but writes along another direction, so the stream is moved as far.
    versions: dict[str, list] = {"base": [directions.still], "expert": [directions.still]}
    for candidate, writes in zip(candidates, random, strict=True):
        for write in (None, *writes):
            versions["base"].append(directions.way(candidate.layer, candidate.strength, write))
            versions["expert"].append(directions.way(candidate.layer, 0.0, write))
    return _figures(judge, versions, 1 + random.shape[1])


def _figures(judge: Judge, versions: Mapping[str, list], every: int) -> Float[np.ndarray, "3 V B"]:
    """Answers of versions of both models: whether each passes; its nats per token; whether it was cut off.

    Args:
        judge: prompts and checker.
        versions: "base" and "expert" -> ways to steer that model; the first leaves it as it is.
        every: after the first, nats per token are asked of every such version; of the others they are NaN.
    """
    pair, prompts = judge.pair, judge.batch.with_instruction
    models = {"base": pair.base, "expert": pair.expert}
    read = {name: Continued(pair.cfg, params, prompts, judge.max_new_tokens) for name, params in models.items()}
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


def _outcomes(
    queries: Int[np.ndarray, " B"],
    figures: Float[np.ndarray, "3 V B"],
    candidates: Sequence[Candidate],
    n_random: int,
    level: float,
    max_new_tokens: int,
) -> list[SteeringTest]:
    """The tests at each candidate, from the figures of all looks so far (see `_look`)."""
    passes, nll, cut = figures
    half = passes.shape[0] // 2
    own_base, own_expert = passes[0], passes[half]

    def interval(values: Float[np.ndarray, " B"]) -> tuple[float, float]:
        _, low, high = confidence_sequence(by_query(queries, values), level)
        return low, high

    tests = []
    for i, candidate in enumerate(candidates):
        first = 1 + i * (1 + n_random)
        along, controls = first, slice(first + 1, first + 1 + n_random)
        steered, steered_random = passes[:half][along], passes[:half][controls].mean(0)
        removed, removed_random = passes[half:][along], passes[half:][controls].mean(0)
        gain_low, gain_high = interval(steered - steered_random)
        drop_low, drop_high = interval(removed_random - removed)
        tests.append(
            SteeringTest(
                layer=candidate.layer,
                strength=candidate.strength,
                steered=float(steered.mean()),
                steered_random=float(steered_random.mean()),
                gain_low=gain_low,
                removed=float(removed.mean()),
                removed_random=float(removed_random.mean()),
                drop_low=drop_low,
                nll=float(nll[along].mean()),
                nll_expert=float(nll[half].mean()),
                nll_removed=float(nll[half + along].mean()),
                gain_high=gain_high,
                drop_high=drop_high,
                difference=float(own_expert.mean() - own_base.mean()),
                n_queries=float(len(np.unique(queries))),
                max_new_tokens=float(max_new_tokens),
                cut=float(cut[half].mean()),
            )
        )
    return tests
