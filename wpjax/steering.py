"""Causal tests of a direction: does it bring the behaviour into the base, and does its removal take it from the expert?

    into the base       h += (z - <h, u>) u,   z = z_B + s (z_E - z_B)         s: strength, 1 for the expert's own state
    out of the expert   h += (z_B - <h, u>) u

z_B and z_E are the means of <h, u> in base and expert over the prompts with the instruction, where the anchor is read.
The stream is held there, after one layer, at the last prompt token and at every new one, and the answers are judged by
the checker (arXiv 2410.12877 for steering; the removal and the tests are ours). The control is a random direction
along which the stream is moved as far. Answers, of either model, whose perplexity under the base is far above that of
the expert's own are degenerate, whatever the checker says of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from wpjax.behaviours import Behaviour, PromptBatch, strict
from wpjax.errors import AnchorRejected, BehaviourError
from wpjax.metrics import answer_metric, scores
from wpjax.models.decoder import Params
from wpjax.models.edits import ClampTo, Edit
from wpjax.models.generate import Generation, generate_in_parts
from wpjax.models.sites import Site
from wpjax.pairs import Pair
from wpjax.stats import Resamples, mean_interval, resample

STRENGTHS = (1.0, 1.5, 2.0)
"""How far the base is steered, in units of the way from its own mean state to the expert's."""

MAX_EXCESS_NLL = 1.0
"""Nats a token by which steered answers may be less likely under the base than the expert's own; beyond: degenerate."""


@dataclasses.dataclass(frozen=True)
class SteeringTest:
    """What moving the residual stream along a direction does to answers; shares of prompts that pass the checker.

    Attributes:
        layer: after which the stream is moved.
        strength: of those tried, the one at which the base passes most without being degenerate.
        steered: base, steered by it.
        steered_random: base, moved as far along random directions.
        gain_low: lower end of the 95 % interval of the difference, over queries.
        removed: expert, held at the base's state.
        removed_random: expert, moved as far along random directions.
        drop_low: lower end of the interval of that difference, random minus removed.
        nll: mean negative log-likelihood, in nats a token, of the steered answers under the base.
        nll_expert: the same of the expert's own answers.
        nll_removed: the same of the answers of the expert that is held at the base's state; NaN where it was not read.
    """

    layer: int
    strength: float
    steered: float
    steered_random: float
    gain_low: float
    removed: float
    removed_random: float
    drop_low: float
    nll: float
    nll_expert: float
    nll_removed: float = math.nan

    @property
    def size(self) -> float:
        """What layers are chosen by: gain of the steered base times loss of the expert, both above the control."""
        return max(self.steered - self.steered_random, 0.0) * max(self.removed_random - self.removed, 0.0)

    def verdict(self) -> str:
        """Empty if both tests pass, otherwise the one that does not, with its figure."""
        if not self.nll <= self.nll_expert + MAX_EXCESS_NLL:
            return (
                f"steered answers are degenerate: {self.nll:.2f} nats a token under the base, the expert's own "
                f"{self.nll_expert:.2f}"
            )
        if not self.gain_low > 0:
            return (
                f"steering the base along it passes the checker on {self.steered:.0%} of prompts, a random direction "
                f"on {self.steered_random:.0%}: not surely more"
            )
        if not self.drop_low > 0:
            return (
                f"without it the expert passes on {self.removed:.0%} of prompts, without a random direction on "
                f"{self.removed_random:.0%}: not surely less"
            )
        if self.nll_removed > self.nll_expert + MAX_EXCESS_NLL:
            return (
                f"without it the expert's answers are degenerate: {self.nll_removed:.2f} nats a token under the base, "
                f"before {self.nll_expert:.2f}"
            )
        return ""


class Judge:
    """Answers a pair's models give to some prompts, steered or not, and what the checker says of them.

    Args:
        pair: base and expert.
        behaviour: its checker judges.
        batch: prompts with the instruction.
        max_new_tokens: length of an answer.
    """

    def __init__(self, pair: Pair, behaviour: Behaviour, batch: PromptBatch, max_new_tokens: int = 32):
        self.pair, self.behaviour, self.batch, self.max_new_tokens = pair, behaviour, batch, max_new_tokens

    def answers(self, params: Params, clamp: ClampTo | None = None, layer: int = 0) -> Generation:
        """Greedy answers to the prompts.

        Args:
            params: of the model that answers.
            clamp: holds the stream after `layer`, at the last prompt token and at every new one; None for none.
            layer: 0-based.
        """
        prompts, stop = self.batch.with_instruction, self.pair.stop_tokens
        start = jnp.asarray(prompts.last)
        edits = () if clamp is None else (Edit(Site.RESID_POST, clamp, jnp.asarray(layer), start),)
        return generate_in_parts(self.pair.cfg, params, *prompts, stop, self.max_new_tokens, edits=edits)

    def texts(self, answers: Generation) -> list[str]:
        """Answers as text."""
        decode = self.pair.tokenizer.decode
        return [
            decode(ids[:n], skip_special_tokens=True)
            for ids, n in zip(answers.tokens, np.asarray(answers.lengths).tolist(), strict=True)
        ]

    def passes(self, answers: Generation, how: Callable[..., bool] = strict) -> Bool[np.ndarray, " B"]:
        """Which answers the checker accepts.

        Args:
            answers: to the prompts.
            how: `behaviours.strict`, or `behaviours.loose`.

        Raises:
            BehaviourError: the checker fails on an answer.
        """
        found = []
        for text, prompt in zip(self.texts(answers), self.batch.pairs, strict=True):
            try:
                found.append(bool(how(self.behaviour.checker, text, prompt.args)))
            except BehaviourError:
                raise
            except Exception as error:  # whatever a user's function raises
                raise BehaviourError(
                    f"{self.behaviour.name}: the checker fails on the answer {text[:40]!r} ({type(error).__name__}: "
                    f"{error}); make it return True or False for any text"
                ) from error
        return np.array(found)

    def nll(self, answers: Generation) -> float:
        """Mean negative log-likelihood of answers under the base, nats a token."""
        metric = answer_metric(self.pair.cfg, self.batch.with_instruction, answers)
        return -float(scores(self.pair.cfg, self.pair.base, metric).mean())


def check_behaviour_differs(judge: Judge, base: Generation, expert: Generation) -> None:
    """Refuse a behaviour that the base already has, or that the expert does not show, and models that say nothing.

    Raises:
        AnchorRejected: with the rates at which both pass.
    """
    name = judge.behaviour.name
    for which, answers in (("base", base), ("expert", expert)):
        if not any(text.strip() for text in judge.texts(answers)):
            raise AnchorRejected(
                f"{name}: the {which}'s answers are all empty; check its chat template and stop tokens"
            )
    ours, theirs = judge.passes(base), judge.passes(expert)
    more = theirs.astype(float) - ours
    _, low, _ = mean_interval(more, resample(judge.batch.queries))
    if not low > 0:
        raise AnchorRejected(
            f"{name}: the base passes the checker on {ours.mean():.0%} of {len(ours)} prompts, the expert on "
            f"{theirs.mean():.0%}: not surely more, so there is no behaviour to find; check the pair and the checker"
        )


def steering_tests(
    judge: Judge,
    layers: Sequence[int],
    unit: Float[np.ndarray, "L D"],
    base_mean: Float[np.ndarray, " L"],
    expert_mean: Float[np.ndarray, " L"],
    *,
    n_random: int = 2,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[SteeringTest]:
    """Both causal tests of the direction at some layers.

    Args:
        judge: prompts and checker.
        layers: candidates.
        unit: a unit direction a layer.
        base_mean: mean projection of the base's state on it.
        expert_mean: likewise of the expert's.
        n_random: random directions a layer.
        seed: of the random directions.
        progress: called after every set of answers.

    Raises:
        AnchorRejected: the behaviour does not tell base and expert apart.
    """
    judge.behaviour.check_checker()
    pair, rng = judge.pair, np.random.default_rng(seed)
    own = judge.answers(pair.expert)
    check_behaviour_differs(judge, judge.answers(pair.base), own)
    nll_expert, resamples = judge.nll(own), resample(judge.batch.queries, seed=seed)
    total = len(layers) * (len(STRENGTHS) + 1 + 2 * n_random)
    made = 0

    def answered(params: Params, layer: int, write: np.ndarray, target: float) -> Generation:
        nonlocal made
        read = jnp.asarray(unit[layer], jnp.float32)
        clamp = ClampTo(read, jnp.asarray(write, jnp.float32), jnp.asarray(target, jnp.float32))
        answers = judge.answers(params, clamp, layer)
        made += 1
        progress("steering tests", made, total)
        return answers

    return [
        _test_layer(judge, layer, answered, unit, base_mean, expert_mean, nll_expert, resamples, n_random, rng)
        for layer in layers
    ]


def _test_layer(
    judge: Judge,
    layer: int,
    answered: Callable[[Params, int, np.ndarray, float], Generation],
    unit: Float[np.ndarray, "L D"],
    base_mean: Float[np.ndarray, " L"],
    expert_mean: Float[np.ndarray, " L"],
    nll_expert: float,
    resamples: Resamples,
    n_random: int,
    rng: np.random.Generator,
) -> SteeringTest:
    base, expert = judge.pair.base, judge.pair.expert
    here, way = float(base_mean[layer]), float(expert_mean[layer] - base_mean[layer])
    tries = []
    for strength in STRENGTHS:
        answers = answered(base, layer, unit[layer], here + strength * way)
        tries.append((strength, judge.passes(answers), judge.nll(answers)))
    sound = [t for t in tries if t[2] <= nll_expert + MAX_EXCESS_NLL]
    strength, steered, nll = max(sound or tries, key=lambda t: (t[1].mean(), -t[0]))
    without = answered(expert, layer, unit[layer], here)
    removed = judge.passes(without)
    random = rng.standard_normal((n_random, unit.shape[1]))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    moved = np.mean([judge.passes(answered(base, layer, w, here + strength * way)) for w in random], axis=0)
    kept = np.mean([judge.passes(answered(expert, layer, w, here)) for w in random], axis=0)
    return SteeringTest(
        layer=layer,
        strength=strength,
        steered=float(steered.mean()),
        steered_random=float(moved.mean()),
        gain_low=mean_interval(steered - moved, resamples).low,
        removed=float(removed.mean()),
        removed_random=float(kept.mean()),
        drop_low=mean_interval(kept - removed, resamples).low,
        nll=nll,
        nll_expert=nll_expert,
        nll_removed=judge.nll(without),
    )
