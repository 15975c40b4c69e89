"""Causal tests of a direction: does it bring the behaviour into the base? Does its removal take it from the expert?

    into the base       h += (z - <h, u>) u,   z = z_B + s (z_E - z_B)         s: strength, 1 for the expert's own state
    out of the expert   h += (z_B - <h, u>) u

u is the direction and h the residual stream after one layer. z_B and z_E are the means of <h, u> in base and expert,
over prompts with the instruction, where the anchor is read. The stream is held there at the last prompt token and at
every new token, and the checker judges the answers (steering: arXiv 2410.12877; the removal and the tests: ours).

The control moves the stream as far along a random direction. Answers of either model are degenerate if their perplexity
under the base is far above that of the expert's own answers. Then the test fails, whatever the checker says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from wpjax.evaluation.judge import Judge, check_behaviour_differs
from wpjax.metrics.diagnostics import MAX_EXCESS_NLL, SteeringTest
from wpjax.models.decoder import Params
from wpjax.models.edits import ClampTo
from wpjax.models.generate import Generation
from wpjax.runtime.progress import Progress, silent
from wpjax.stats import Resamples, mean_interval, resample

STRENGTHS = (1.0, 1.5, 2.0)
"""How far the base is steered, in units of the way from its own mean state (0) to the expert's (1)."""


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
    """Both causal tests of a direction at each of some layers.

    Args:
        judge: prompts and checker.
        layers: 0-based layers to test.
        unit: [L, D], unit direction of every layer.
        base_mean: [L], mean projection of the base's state on the layer's direction, z_B.
        expert_mean: [L], the same for the expert, z_E.
        n_random: number of random directions for each layer.
        seed: seed of the random directions and of resampling.
        progress: function that is called after every set of answers.

    Returns:
        the outcome at each of `layers`, in their order.

    Raises:
        AnchorRejected: base and expert do not differ in the behaviour.
    """
    judge.behaviour.check_checker()
    pair, rng = judge.pair, np.random.default_rng(seed)
    own = judge.answers(pair.expert)
    check_behaviour_differs(judge, judge.answers(pair.base), own)
    nll_expert, resamples = judge.nll(own), resample(judge.batch.queries, seed=seed)
    # For each layer: the base at every strength, the expert without the direction, and both along random ones.
    total = len(layers) * (len(STRENGTHS) + 1 + 2 * n_random)
    n_done = 0

    def answered(params: Params, layer: int, write: np.ndarray, target: float) -> Generation:
        """Answers with h += (target - <h, u>) write after a layer."""
        nonlocal n_done
        read = jnp.asarray(unit[layer], jnp.float32)  # u; `write` is u too, or a random direction
        clamp = ClampTo(read, jnp.asarray(write, jnp.float32), jnp.asarray(target, jnp.float32))
        answers = judge.answers(params, clamp, layer)
        n_done += 1
        progress("steering tests", n_done, total)
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
    """Both causal tests at one layer; arguments as in `steering_tests`, with what all layers share."""
    base, expert = judge.pair.base, judge.pair.expert
    z_base, way = float(base_mean[layer]), float(expert_mean[layer] - base_mean[layer])
    tries = []
    for strength in STRENGTHS:
        answers = answered(base, layer, unit[layer], z_base + strength * way)
        tries.append((strength, judge.passes(answers), judge.nll(answers)))
    sound = [t for t in tries if t[2] <= nll_expert + MAX_EXCESS_NLL]
    strength, steered, nll = max(sound or tries, key=lambda t: (t[1].mean(), -t[0]))  # of equals the weakest
    without = answered(expert, layer, unit[layer], z_base)
    removed = judge.passes(without)
    # The control reads <h, u> as before but writes along another direction, so the stream is moved as far.
    random = rng.standard_normal((n_random, unit.shape[1]))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    # For each prompt, the share of random directions with which its answer passes.
    steered_random = np.mean([judge.passes(answered(base, layer, w, z_base + strength * way)) for w in random], axis=0)
    removed_random = np.mean([judge.passes(answered(expert, layer, w, z_base)) for w in random], axis=0)
    return SteeringTest(
        layer=layer,
        strength=strength,
        steered=float(steered.mean()),
        steered_random=float(steered_random.mean()),
        gain_low=mean_interval(steered - steered_random, resamples).low,
        removed=float(removed.mean()),
        removed_random=float(removed_random.mean()),
        drop_low=mean_interval(removed_random - removed, resamples).low,
        nll=nll,
        nll_expert=nll_expert,
        nll_removed=judge.nll(without),
    )
