"""What a method gets (`SweepJob`) and returns (`MethodOutput`), and the step of most: estimate, then replace."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from wpjax.columns import EFFECT
from wpjax.components import Component
from wpjax.engines.engine import Engine
from wpjax.engines.plan import Plan
from wpjax.estimators.screens import output_linearised
from wpjax.methods import Estimate, Method
from wpjax.metrics.metric import Metric, PreparedMetric
from wpjax.pairs import Pair
from wpjax.runtime.farm import made
from wpjax.runtime.progress import Progress


class MethodOutput(NamedTuple):
    """What a method returns.

    Attributes:
        changes: column name -> [C, B], change of the metric by each component on each prompt, or [C, 1], its mean over
            prompts; NaN where nothing was measured. The result divides it by the gap, and adds an interval if the
            column has one.
        shares: column name -> [3, C], shares of the gap that need no more computation: the estimate, and the lower and
            the upper end of its interval.
        plan: the patches that were made; shams and nulls repeat some of them. None if no component was replaced.
        flow: [C, U], change of the metric by way of each target, mean over prompts; None if it was not followed.
        sampled: [C], True for components that were replaced as a random sample of those that no estimate chose.
        chosen_by: names of the estimates that chose which components to replace.
        attributes: attributes to add to the result: numbers, or mappings, which are stored as JSON.
    """

    changes: Mapping[str, Float[np.ndarray, "C _"]] = MappingProxyType({})
    shares: Mapping[str, Float[np.ndarray, "3 C"]] = MappingProxyType({})
    plan: Plan | None = None
    flow: Float[np.ndarray, "C U"] | None = None
    sampled: Bool[np.ndarray, " C"] | None = None
    chosen_by: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class SweepJob:
    """One sweep, as its method gets it. The other attributes are arguments of `sweep` under the same names.

    Attributes:
        method: the method that runs.
        pair: base and expert.
        prepared: the metric, ready for this pair and these prompts.
        components: the C components to sweep, in the order of the result.
        queries: [B], index of each prompt's query.
        gap: [B], metric of the expert minus that of the base, for each prompt; or another gap, if one was given.
        like: name of each component that is to be replaced -> whether it is of the random sample; None to choose them.
    """

    method: Method
    pair: Pair
    prepared: PreparedMetric
    components: Sequence[Component]
    queries: Int[np.ndarray, " B"]
    gap: Float[np.ndarray, " B"]
    top: int
    stratum: int
    confidence: float
    n_masks: int
    seed: int
    like: Mapping[str, bool] | None
    budget: int | None
    done: MutableMapping[str, np.ndarray]
    progress: Progress

    @property
    def metric(self) -> Metric:
        """The metric along fixed words."""
        return self.prepared.metric

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine that replaces components."""
        if self.prepared.make_engine is not None:
            return self.prepared.make_engine(self.components, self.done, self.progress)
        return Engine(self.pair, self.metric, self.components, self.done, self.progress)

    def estimate(self, estimate: Estimate) -> Float[np.ndarray, "C B"]:
        """The change of the metric that an estimate expects of each component on each prompt.

        It is kept in `done`, so that a resumed sweep does not make it again.
        """
        return self._kept(estimate.column.name, estimate.compute, self.metric)

    def _kept(self, name: str, compute: Callable[..., np.ndarray], metric: Metric) -> Float[np.ndarray, "C B"]:
        """An estimate by its name, from `done` or made anew."""
        self.progress(name, 0, 1)
        arguments = self.pair.cfg, self.pair.base, self.pair.expert, self.components, metric
        changes = made(self.done, name, lambda: compute(*arguments), (len(self.components), len(metric)))
        self.progress(name, 1, 1)
        return changes

    def screen_of(self, name: str, metric: Metric) -> Float[np.ndarray, "C B"]:
        """The output-linearised change of another metric of the same prompts by each component; kept as `estimate`."""
        return self._kept(name, output_linearised, metric)

    def choose(self, estimates: Sequence[Float[np.ndarray, "C B"]]) -> tuple[list[int], Bool[np.ndarray, " C"]]:
        """Which components to replace after a screen: the best by any estimate, and a random sample of the others.

        Args:
            estimates: changes of the metric by each component. Of each kind, the `top` components of largest mean
                magnitude by each estimate are chosen.

        Returns:
            positions of the components to replace, in order; and [C], True for those in the random sample.
        """
        if self.like is not None:
            at = {c.name: i for i, c in enumerate(self.components)}
            sampled = np.zeros(len(self.components), bool)
            sampled[[at[name] for name, is_sampled in self.like.items() if is_sampled]] = True
            return sorted(at[name] for name in self.like), sampled
        means = [values.mean(1) for values in estimates]
        best = {i for mean in means for i in _highest(self.components, mean, self.top)}
        sampled = np.zeros(len(self.components), bool)
        sampled[_stratum(self.components, best, self.stratum, self.seed)] = True
        return sorted({*best, *np.flatnonzero(sampled).tolist()}), sampled

    def replace(
        self, positions: Sequence[int]
    ) -> tuple[Plan, dict[str, Float[np.ndarray, "C B"]], Float[np.ndarray, "C U"] | None]:
        """Replace components for real, in each cell of the 2x2 that the method names.

        Args:
            positions: positions of the components among `components`.

        Returns:
            the patches that were made; cell -> changes of the metric; and the flow of weight patches, None if the
            method has no such cell ("exact").
        """
        plan = self.engine.plan([self.components[i] for i in positions], self.budget)
        by_cell = {cell: self.engine.changes(cell, plan) for cell in self.method.cells}
        return plan, {cell: delta for cell, (delta, _) in by_cell.items()}, by_cell.get("exact", (None, None))[1]


def estimate_and_replace(job: SweepJob) -> MethodOutput:
    """The step of most methods: make the method's estimates, then replace components in its cells.

    A method without cells only estimates. A method without estimates replaces every component.
    """
    estimates = {estimate.column.name: job.estimate(estimate) for estimate in job.method.estimates}
    if not job.method.cells:
        return MethodOutput(estimates)
    positions, sampled = list(range(len(job.components))), None
    if estimates:
        choosing = list(estimates.values())
        second = None if job.prepared.second_metric is None else job.prepared.second_metric()
        if second is not None:  # it chooses only: its estimate is no column of the result
            choosing.append(job.screen_of(f"screen-of-{second.name}", second))
        positions, sampled = job.choose(choosing)
    plan, cells, flow = job.replace(positions)
    # In the result, changes by weight patches are the column `effect`; other cells have columns of their own names.
    changes = {EFFECT if cell == "exact" else cell: delta for cell, delta in cells.items()}
    return MethodOutput(estimates | changes, plan=plan, flow=flow, sampled=sampled, chosen_by=tuple(estimates))


def _highest(components: Sequence[Component], values: Float[np.ndarray, " C"], top: int) -> list[int]:
    """Positions of the components of largest magnitude, `top` of each kind, in order of position."""
    highest: list[int] = []
    for kind in dict.fromkeys(c.kind for c in components):
        of_kind = [i for i, c in enumerate(components) if c.kind == kind]
        highest += sorted(of_kind, key=lambda i: -abs(values[i]))[:top]
    return sorted(highest)


def _stratum(components: Sequence[Component], best: set[int], n: int, seed: int) -> list[int]:
    """Positions of random components that are not among the best, up to n of each kind."""
    rng = np.random.default_rng(seed)
    drawn: list[int] = []
    for kind in dict.fromkeys(c.kind for c in components):
        rest = [i for i, c in enumerate(components) if c.kind == kind and i not in best]
        drawn += sorted(rng.permutation(rest)[:n].tolist()) if rest else []
    return drawn
