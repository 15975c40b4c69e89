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

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from wpjax.evaluation.judge import Judge, check_behaviour_differs
from wpjax.metrics.anchor import MAX_EXCESS_NLL, SteeringTest
from wpjax.models.decoder import Params
from wpjax.models.edits import ClampTo
from wpjax.models.generate import Generation
from wpjax.runtime.progress import Progress, silent
from wpjax.stats import Resamples, mean_interval, resample

STRENGTHS = (1.0, 1.5, 2.0)
"""How far the base is steered, in units of the way from its own mean state to the expert's."""


def steering_tests(
    judge: Judge,
    layers: Sequence[int],
    unit: Float[np.ndarray, "L D"],
    base_mean: Float[np.ndarray, " L"],
    expert_mean: Float[np.ndarray, " L"],
    *,
    n_random: int = 2,
    seed: int = 0,
    progress: Progress = silent,
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
