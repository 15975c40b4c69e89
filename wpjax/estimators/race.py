"""Racing: the components of largest effect, replaced for real, without replacing every one on every prompt (ours).

Prompts come in rounds. After each, a component is out if its effect cannot reach the k largest of its kind any more:

    |mean_c| + w_c  <  k-th largest of |mean| - w        w_c = t(1 - a / 2 C R; n - 1) s_c / sqrt(n)

for C components, R rounds, n queries so far and their standard deviation s_c. By the union bound no component of the
true top k is lost with probability 1 - a, as far as means over queries are normal. A successive elimination
(Even-Dar et al., JMLR 2006) with Student's intervals in place of Hoeffding's, which take no notice of how little
effects vary. Rounds are of one shape, as many prompts in as many packed tokens, so that they run in one program a kind.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import t as student

from wpjax.columns import EFFECT
from wpjax.components import Component
from wpjax.engines.engine import Engine, placed
from wpjax.engines.exact import cut, make_plan
from wpjax.engines.packing import common_shape, pack
from wpjax.estimators.job import Found, Job
from wpjax.metrics.metric import Metric
from wpjax.pairs import Pair
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.placement import Placement
from wpjax.runtime.progress import Progress

ROUNDS = 4
MIN_QUERIES = 3
"""Fewest queries of a round: from two, no interval means anything."""
ROWS = 16
"""Most rows of a program on a device: later rounds have few components a layer, and cost all rows, filled or not."""


class Race(NamedTuple):
    """What a race found.

    Attributes:
        chosen: positions of the k largest of each kind, in order of position.
        mean: [C], change of the metric over the prompts that each component was replaced on; NaN of kinds without a
            race, that are no more than k.
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


def eliminated(
    kinds: Sequence[str],
    n_rounds: int,
    measure: Callable[[int, Int[np.ndarray, " n"]], Float[np.ndarray, "n q"]],
    top: int,
    confidence: float,
) -> tuple[Bool[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """Which components are left after the rounds, and means over the queries that each was measured on.

    A kind is measured until k of it are left; one with no more than that from the start is not, and its means are NaN.

    Args:
        kinds: of each component.
        n_rounds: R.
        measure: takes the number of a round and which components it is about, returns a value for each of its queries.
        top: k, of each kind.
        confidence: 1 - a, of all kinds together.
    """
    members = [np.array([kind == k for k in kinds]) for kind in dict.fromkeys(kinds)]
    left, mean, values = np.ones(len(kinds), bool), np.full(len(kinds), np.nan), np.zeros((len(kinds), 0))
    for number in range(n_rounds):
        members = [some for some in members if (left & some).sum() > top]
        if not members:
            break
        here = np.flatnonzero(left & np.any(members, axis=0))
        found = measure(number, here)
        new = np.full((len(kinds), found.shape[1]), np.nan)
        new[here] = found
        values = np.concatenate([values, new], axis=1)
        for some in members:
            mine = np.flatnonzero(left & some)
            left[mine], mean[mine] = still_in(values[mine], top, confidence, len(kinds) * n_rounds)
    return left, mean


def rounds_of(queries: Int[np.ndarray, " B"], seed: int = 0) -> list[Int[np.ndarray, " _"]]:
    """The queries of each round: all in random order, in as many rounds as they make."""
    order = np.random.default_rng(seed).permutation(np.unique(queries))
    return np.array_split(order, max(1, min(ROUNDS, len(order) // MIN_QUERIES)))


def filled_up(rounds: Sequence[Int[np.ndarray, " _"]]) -> Int[np.ndarray, "R N"]:
    """Prompts of rounds, each filled up to the largest with its last one, so that one program serves all."""
    size = max(len(rows) for rows in rounds)
    return np.stack([rows[np.minimum(np.arange(size), len(rows) - 1)] for rows in rounds])


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
    progress: Progress,
    placement: Placement | None = None,
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
        placement: the devices that share every chunk; None for one.
    """
    kinds, rounds = [c.kind for c in components], rounds_of(queries, seed)
    placement = Placement.single() if placement is None else placement
    models, metric = placed(placement, pair, metric)
    prompts = [np.flatnonzero(np.isin(queries, some)) for some in rounds]
    metrics = [metric.take(jnp.asarray(rows)) for rows in filled_up(prompts)]
    shape = common_shape(*metrics)
    delta = np.full((len(components), len(queries)), np.nan)
    packing = pack(metrics[0], shape)
    plan = make_plan(pair.cfg, components, packing, budget, ROWS, placement)  # of the first round; all take its rows

    def measure(number: int, here: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n q"]:
        running, some = [components[i] for i in here], prompts[number]
        engine = Engine(pair, metrics[number], running, done, progress, placement, models, with_flow=False, shape=shape)
        waiting = plan.with_chunks(cut(running, plan.rows))
        for chunk, changes, _ in engine.perform("exact", waiting, label=f"race-{number + 1}"):
            delta[np.ix_([here[engine.position[c]] for c in chunk.components], some)] = changes[:, : len(some)]
        return np.stack([delta[np.ix_(here, queries == q)].mean(1) for q in rounds[number]], axis=1)

    left, mean = eliminated(kinds, len(rounds), measure, top, confidence)
    chosen, undecided = [], {}
    for kind in dict.fromkeys(kinds):
        mine = np.flatnonzero(left & np.array([k == kind for k in kinds]))
        chosen += mine[np.argsort(-np.abs(mean[mine]), kind="stable")][:top].tolist()
        undecided[kind] = max(0, len(mine) - top)
    share = float(np.isfinite(delta).mean()) + len(chosen) / len(components)
    return Race(sorted(chosen), mean, share, undecided)


def run(job: Job) -> Found:
    """The method: race, then replace the chosen ones on all prompts."""
    raced = race(
        job.pair, job.metric, job.components, job.queries,
        top=job.top, confidence=job.confidence, seed=job.seed, budget=job.budget, done=job.done, progress=job.progress,
        placement=job.placement,
    )  # fmt: skip
    plan, cells, flow = job.replace(raced.chosen)
    changes = {"race": raced.mean[:, None], EFFECT: cells["exact"]}
    attributes: dict[str, Any] = {
        "race_share": raced.share,
        "race_confidence": job.confidence,
        "race_undecided": raced.undecided,
    }
    return Found(changes, plan=plan, flow=flow, attributes=attributes)


def note(result: SweepResult) -> str:
    """What a race cost, and what it left open."""
    left = ", ".join(f"{n} {kind}s" for kind, n in result.attribute("race_undecided").items() if n)
    made = f"the race made {result.attribute('race_share'):.0%} of the replacements of a full sweep"
    return made + (f"; {left} beside the top are not surely out" if left else "")
