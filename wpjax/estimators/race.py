"""Racing: finds the components of largest effect without replacing every component on every prompt (ours).

Prompts come in rounds. After each round, components that can no longer be among the k largest of their kind are out:

    |mean_c| + w_c  <  k-th largest of |mean| - w        w_c = t(1 - a / 2 C R; n - 1) s_c / sqrt(n)

C is the number of components, R the number of rounds, n the number of queries so far, and s_c the standard deviation of
the component's effect over them. By the union bound, no component of the true top k is lost with probability 1 - a, as
far as means over queries are normal.

This is successive elimination (Even-Dar et al., JMLR 2006) with Student's intervals. Hoeffding's intervals, used there,
ignore how little effects vary, and are wider.

All rounds have one shape: the same number of prompts, in the same number of packed tokens. So one compiled program for
each kind serves them all.
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
from wpjax.engines.engine import Engine
from wpjax.engines.packing import common_shape, pack
from wpjax.engines.plan import agreed_plan, cut, make_plan
from wpjax.estimators.job import MethodOutput, SweepJob
from wpjax.metrics.metric import Metric
from wpjax.pairs import Pair
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.farm import conclude
from wpjax.runtime.progress import Progress

ROUNDS = 4
"""Rounds of a race, at most."""

MIN_QUERIES = 3
"""Fewest queries of a round; an interval from two queries means nothing."""

ROWS = 16
"""Rows (patches) of one program on a device, at most. Later rounds fill few of them, and an empty row costs as much."""


class Race(NamedTuple):
    """Outcome of a race.

    Attributes:
        chosen: positions of the k components of largest effect of each kind, in order of position.
        mean: [C], mean change of the metric over the queries on which a component was replaced. NaN for kinds of at
            most k components, which need no race.
        share: number of replacements, as a share of those of a full sweep. It counts the chosen components twice: in
            the race, and on all prompts afterwards.
        undecided: kind -> number of components that were not out after all prompts, without the chosen ones.
    """

    chosen: list[int]
    mean: Float[np.ndarray, " C"]
    share: float
    undecided: dict[str, int]


def still_in(
    values: Float[np.ndarray, "C n"], top: int, confidence: float, n_tests: int
) -> tuple[Bool[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """Which components may still be among the k of largest mean magnitude.

    Args:
        values: [C, n], mean change of the metric on each query. After a single query no component is out.
        top: k.
        confidence: 1 - a.
        n_tests: C R, number of intervals that must hold together.

    Returns:
        [C], True for components that are still in; and [C], the means.

    >>> import numpy as np
    >>> from wpjax.estimators.race import still_in
    >>> values = np.array([[9.0, 9.1, 9.0, 9.1], [5.0, 5.1, 5.0, 5.1], [0.1, 0.0, 0.1, 0.0]])
    >>> still_in(values, top=2, confidence=0.95, n_tests=12)[0].tolist()
    [True, True, False]
    """
    n = values.shape[1]
    mean, size = values.mean(1), np.abs(values.mean(1))
    if len(values) <= top or n < 2:  # a single query has no spread
        return np.ones(len(values), bool), mean
    width = student.ppf(1 - (1 - confidence) / (2 * n_tests), n - 1) * values.std(1, ddof=1) / np.sqrt(n)
    lowest_of_top = np.sort(size - width)[-top]
    return size + width >= lowest_of_top, mean


def eliminated(
    kinds: Sequence[str],
    n_rounds: int,
    measure: Callable[[int, Int[np.ndarray, " n"]], Float[np.ndarray, "n q"]],
    top: int,
    confidence: float,
) -> tuple[Bool[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """Run the rounds. Kinds race side by side, each until k of its components are left.

    Args:
        kinds: kind of each component.
        n_rounds: R.
        measure: function of the number of a round and of positions of n components. It returns [n, q], the mean change
            of the metric on each of the round's q queries.
        top: k, for each kind.
        confidence: 1 - a, for all kinds together.

    Returns:
        [C], True for components that are left; and [C], mean over the queries on which a component was measured. A kind
        that has at most k components is not measured: all of them are left, and their means are NaN.
    """
    members = [np.array([kind == k for k in kinds]) for kind in dict.fromkeys(kinds)]
    left, mean, values = np.ones(len(kinds), bool), np.full(len(kinds), np.nan), np.zeros((len(kinds), 0))
    for number in range(n_rounds):
        # `members` holds one boolean mask, [C], for each kind that is not decided yet.
        members = [of_kind for of_kind in members if (left & of_kind).sum() > top]
        if not members:
            break
        racing = np.flatnonzero(left & np.any(members, axis=0))
        measured = measure(number, racing)
        new = np.full((len(kinds), measured.shape[1]), np.nan)
        new[racing] = measured
        values = np.concatenate([values, new], axis=1)
        for of_kind in members:
            # Components that are left were measured in every round so far, so their values hold no NaN.
            rows = np.flatnonzero(left & of_kind)
            left[rows], mean[rows] = still_in(values[rows], top, confidence, len(kinds) * n_rounds)
    return left, mean


def rounds_of(queries: Int[np.ndarray, " B"], seed: int = 0) -> list[Int[np.ndarray, " _"]]:
    """The queries of each round, in random order.

    There are at most `ROUNDS` rounds, of at least `MIN_QUERIES` queries each if there are so many.

    Args:
        queries: [B], index of each prompt's query.
        seed: seed of the order.
    """
    order = np.random.default_rng(seed).permutation(np.unique(queries))
    return np.array_split(order, max(1, min(ROUNDS, len(order) // MIN_QUERIES)))


def filled_up(rounds: Sequence[Int[np.ndarray, " _"]]) -> Int[np.ndarray, "R N"]:
    """Positions of the prompts of R rounds, [R, N]; shorter rounds repeat their last prompt.

    So all rounds have N prompts, and one compiled program serves them.
    """
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
) -> Race:
    """Replace components in rounds until the k of largest effect of each kind are known, or the prompts are used up.

    Args:
        pair: base and expert.
        metric: the metric F.
        components: components that take part.
        queries: [B], index of each prompt's query; rounds are made of whole queries.
        top: k, for each kind.
        confidence: probability that none of the true top k is lost.
        seed: seed of the order of queries.
        budget: bytes for the activations of patches that run at once; None to choose from the device.
        done: finished parts of an earlier attempt; new parts are added.
        progress: function that is called after every chunk of patches.
    """
    kinds, rounds = [c.kind for c in components], rounds_of(queries, seed)
    prompts = [np.flatnonzero(np.isin(queries, members)) for members in rounds]
    metrics = [metric.take(jnp.asarray(rows)) for rows in filled_up(prompts)]
    shape = common_shape(*metrics)
    delta = np.full((len(components), len(queries)), np.nan)
    packing = pack(metrics[0], shape)
    # The plan is made once, with all components, so that every round runs programs with the same number of rows.
    plan = agreed_plan(make_plan(pair.cfg, components, packing, budget, ROWS, pair.placement), components, done)

    def measure(number: int, racing: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n q"]:
        running, columns = [components[i] for i in racing], prompts[number]
        engine = Engine(pair, metrics[number], running, done, progress, with_flow=False, shape=shape)
        waiting = plan.with_chunks(cut(running, plan.rows))
        label = f"race-{number + 1}"
        for chunk, changes, _ in engine.perform("exact", engine.own("exact", waiting, label), label=label):
            rows = [racing[engine.position[c]] for c in chunk.components]
            delta[np.ix_(rows, columns)] = changes[:, : len(columns)]  # without the prompts that fill up the round
        if np.isnan(delta[np.ix_(racing, columns)]).any():  # who is out depends on what other parts measure
            conclude(done)
        return np.stack([delta[np.ix_(racing, queries == q)].mean(1) for q in rounds[number]], axis=1)

    left, mean = eliminated(kinds, len(rounds), measure, top, confidence)
    chosen, undecided = [], {}
    for kind in dict.fromkeys(kinds):
        remaining = np.flatnonzero(left & np.array([k == kind for k in kinds]))
        chosen += remaining[np.argsort(-np.abs(mean[remaining]), kind="stable")][:top].tolist()
        undecided[kind] = max(0, len(remaining) - top)
    share = float(np.isfinite(delta).mean()) + len(chosen) / len(components)
    return Race(sorted(chosen), mean, share, undecided)


def run(job: SweepJob) -> MethodOutput:
    """The step of method "race": race, then replace the chosen components on all prompts."""
    raced = race(
        job.pair, job.metric, job.components, job.queries,
        top=job.top, confidence=job.confidence, seed=job.seed, budget=job.budget, done=job.done, progress=job.progress,
    )  # fmt: skip
    plan, cells, flow = job.replace(raced.chosen)
    changes = {"race": raced.mean[:, None], EFFECT: cells["exact"]}
    attributes: dict[str, Any] = {
        "race_share": raced.share,
        "race_confidence": job.confidence,
        "race_undecided": raced.undecided,
    }
    return MethodOutput(changes, plan=plan, flow=flow, attributes=attributes)


def note(result: SweepResult) -> str:
    """A line for the command line: what the race cost, and which kinds it left open."""
    left = ", ".join(f"{n} {kind}s" for kind, n in result.attribute("race_undecided").items() if n)
    made = f"the race made {result.attribute('race_share'):.0%} of the replacements of a full sweep"
    return made + (f"; {left} beside the top are not surely out" if left else "")
