"""Racing: the components of largest effect, replaced for real, without replacing every one on every prompt (ours).

Prompts come in rounds. After each, a component is out if its effect cannot reach the k largest of its kind any more:

    |mean_c| + w_c  <  k-th largest of |mean| - w        w_c = t(1 - a / 2 C R; n - 1) s_c / sqrt(n)

for C components, R rounds, n queries so far and their standard deviation s_c. By the union bound no component of the
true top k is lost with probability 1 - a, as far as means over queries are normal. A successive elimination
(Even-Dar et al., JMLR 2006) with Student's intervals in place of Hoeffding's, which take no notice of how little
effects vary.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import t as student

from wpjax.components import Component
from wpjax.metrics import Metric
from wpjax.pairs import Pair
from wpjax.sweeps.engine import Engine, placed
from wpjax.sweeps.exact import make_plan

ROUNDS = 4
MIN_QUERIES = 3
"""Fewest queries of a round: from two, no interval means anything."""


class Race(NamedTuple):
    """What a race found.

    Attributes:
        chosen: positions of the k largest of each kind, in order of position.
        mean: [C], change of the metric over the prompts that each component was replaced on.
        share: replacements that were made, with those of the chosen ones on all prompts, of those that a full sweep
            makes.
        undecided: by kind, how many beside the chosen ones were not out after all prompts.
    """

    chosen: list[int]
    mean: Float[np.ndarray, " C"]
    share: float
    undecided: dict[str, int]


def still_in(
    values: Float[np.ndarray, "C n"], top: int, confidence: float, n_tests: int
) -> tuple[Bool[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """Which components may still be among the k of largest mean magnitude, and their means.

    Args:
        values: a value a query; of one query nothing is out.
        top: k.
        confidence: 1 - a.
        n_tests: C R, intervals that must hold together.
    """
    n = values.shape[1]
    mean, size = values.mean(1), np.abs(values.mean(1))
    if len(values) <= top or n < 2:  # of one query there is no spread
        return np.ones(len(values), bool), mean
    width = student.ppf(1 - (1 - confidence) / (2 * n_tests), n - 1) * values.std(1, ddof=1) / np.sqrt(n)
    reached = np.sort(size - width)[-top]
    return size + width >= reached, mean


def race(
    pair: Pair,
    metric: Metric,
    components: Sequence[Component],
    queries: Int[np.ndarray, " B"],
    *,
    top: int,
    confidence: float = 0.95,
    seed: int = 0,
    budget: int | None = None,
    done: MutableMapping[str, np.ndarray],
    progress: Callable[[str, int, int], None],
) -> Race:
    """Replace components in rounds until the k of largest effect of each kind are known, or the prompts are used up.

    Args:
        pair: base and expert.
        metric: what is measured.
        components: that take part.
        queries: query of each prompt; rounds are made of whole queries.
        top: k, of each kind.
        confidence: that none of the true k is lost.
        seed: of the order of queries.
        budget: bytes for a chunk's activations; None to choose from the device.
        done: finished parts, extended.
        progress: called after every chunk.
    """
    kinds = np.array([c.kind for c in components])
    order = np.random.default_rng(seed).permutation(np.unique(queries))
    n_rounds = max(1, min(ROUNDS, len(order) // MIN_QUERIES))
    alive = np.ones(len(components), bool)
    delta = np.full((len(components), len(queries)), np.nan)
    mean = np.zeros(len(components))
    seen = np.zeros(0, order.dtype)
    models, metric = placed(pair, metric)
    for number, some in enumerate(np.array_split(order, n_rounds)):
        rows, here = np.flatnonzero(np.isin(queries, some)), np.flatnonzero(alive)
        running = [c for c, runs in zip(components, alive, strict=True) if runs]
        engine = Engine(pair, metric.take(jnp.asarray(rows)), running, done, progress, models, with_flow=False)
        plan = make_plan(pair.cfg, running, engine.packing, budget)
        for chunk, changes, _ in engine.perform("exact", plan, label=f"race-{number + 1}"):
            delta[np.ix_([here[engine.position[c]] for c in chunk.components], rows)] = changes
        seen = np.concatenate([seen, some])
        by_query = np.stack([delta[:, queries == q].mean(1) for q in seen], axis=1)
        for kind in dict.fromkeys(kinds[here].tolist()):
            mine = np.flatnonzero(alive & (kinds == kind))
            stays, mean[mine] = still_in(by_query[mine], top, confidence, len(components) * n_rounds)
            alive[mine] = stays
        if all(alive[kinds == kind].sum() <= top for kind in dict.fromkeys(kinds.tolist())):
            break
    chosen, undecided = [], {}
    for kind in dict.fromkeys(kinds.tolist()):
        mine = np.flatnonzero(alive & (kinds == kind))
        chosen += mine[np.argsort(-np.abs(mean[mine]), kind="stable")][:top].tolist()
        undecided[kind] = max(0, len(mine) - top)
    share = float(np.isfinite(delta).mean()) + len(chosen) / len(components)
    return Race(sorted(chosen), mean, share, undecided)
