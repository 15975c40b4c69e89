"""One sweep as its method sees it, what a method finds, and the step that most methods are: estimate, then replace."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from wpjax.columns import EFFECT
from wpjax.components import Component
from wpjax.engines.engine import Engine
from wpjax.engines.exact import Plan
from wpjax.estimators.screens import output_linearised
from wpjax.methods import Estimate, Method
from wpjax.metrics.metric import Metric, Prepared
from wpjax.pairs import Pair
from wpjax.runtime.placement import Placement
from wpjax.runtime.progress import Progress
from wpjax.runtime.shards import finished_part


class Found(NamedTuple):
    """What a method found.

    Attributes:
        changes: by column, the change of the metric by each component on each prompt, [C, B] (or [C, 1], its mean);
            NaN where it was not measured. The result holds their shares of the gap, with intervals where the column has
            one.
        shares: by column, shares of the gap that are made already, with the ends of their intervals, [3, C].
        plan: the patches that were made, which shams and nulls repeat; None for none.
        flow: changes of the metric by way of each target, mean over prompts; None where it was not followed.
        sampled: which components were replaced as a random sample of those that were not chosen.
        chosen_by: the estimates that chose what was replaced.
        attributes: of the result: numbers, or mappings, which are stored as JSON.
    """

    changes: Mapping[str, Float[np.ndarray, "C _"]] = MappingProxyType({})
    shares: Mapping[str, Float[np.ndarray, "3 C"]] = MappingProxyType({})
    plan: Plan | None = None
    flow: Float[np.ndarray, "C U"] | None = None
    sampled: Bool[np.ndarray, " C"] | None = None
    chosen_by: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Job:
    """One sweep: what its method is given. The arguments of `sweep` are there under their names.

    Attributes:
        method: that runs.
        pair: base and expert.
        prepared: what is measured.
        components: C of them, in the order of the result.
        queries: query of each prompt.
        gap: expert minus base of each prompt.
    """

    method: Method
    pair: Pair
    prepared: Prepared
    components: Sequence[Component]
    queries: Int[np.ndarray, " B"]
    gap: Float[np.ndarray, " B"]
    top: int
    stratum: int
    confidence: float
    n_masks: int
    seed: int
    budget: int | None
    done: MutableMapping[str, np.ndarray]
    progress: Progress
    placement: Placement

    @property
    def metric(self) -> Metric:
        """What is read, along fixed words."""
        return self.prepared.metric

    @functools.cached_property
    def engine(self) -> Engine:
        """What replaces components; the models go to the devices when it is first asked for."""
        if self.prepared.make_engine is not None:
            return self.prepared.make_engine(self.components, self.done, self.progress, self.placement)
        return Engine(self.pair, self.metric, self.components, self.done, self.progress, self.placement)

    def estimate(self, estimate: Estimate) -> Float[np.ndarray, "C B"]:
        """What an estimate expects of each component on each prompt; kept among the finished parts."""
        name, n = estimate.column.name, len(self.components)
        self.progress(f"{name} of {n} components", 0, 1)
        if name not in self.done:
            models = self.pair.base, self.pair.expert
            self.done[name] = estimate.compute(self.pair.cfg, *models, self.components, self.metric)
        found = finished_part(self.done, name, (n, len(self.metric)))
        self.progress(f"{name} of {n} components", 1, 1)
        return found

    def choose(self, estimates: Sequence[Float[np.ndarray, "C B"]]) -> tuple[list[int], Bool[np.ndarray, " C"]]:
        """Which components to replace after a screen, and which of them are a random sample of the others.

        Args:
            estimates: the `top` of each kind by each of them are chosen, by the magnitude of their mean over prompts.
        """
        means = [values.mean(1) for values in estimates]
        best = {i for mean in means for i in _highest(self.components, mean, self.top)}
        sampled = np.zeros(len(self.components), bool)
        sampled[_stratum(self.components, best, self.stratum, self.seed)] = True
        return sorted({*best, *np.flatnonzero(sampled).tolist()}), sampled

    def replace(
        self, positions: Sequence[int]
    ) -> tuple[Plan, dict[str, Float[np.ndarray, "C B"]], Float[np.ndarray, "C U"] | None]:
        """Replace components in the cells of the method.

        Args:
            positions: of the components.

        Returns:
            the patches that were made; changes of the metric by cell; and the flow of the weights' own cell, if that is
            among them.
        """
        plan = self.engine.plan([self.components[i] for i in positions], self.budget)
        found = {cell: self.engine.changes(cell, plan) for cell in self.method.cells}
        return plan, {cell: delta for cell, (delta, _) in found.items()}, found.get("exact", (None, None))[1]


def estimate_and_replace(job: Job) -> Found:
    """Make the estimates of a method; if it replaces components, then those that they choose, or all without them."""
    estimates = {estimate.column.name: job.estimate(estimate) for estimate in job.method.estimates}
    if not job.method.cells:
        return Found(estimates)
    positions, sampled = list(range(len(job.components))), None
    if estimates:
        choosing = list(estimates.values())
        beside = None if job.prepared.chooses_too is None else job.prepared.chooses_too()
        if beside is not None:
            pair = job.pair
            choosing.append(output_linearised(pair.cfg, pair.base, pair.expert, job.components, beside))
        positions, sampled = job.choose(choosing)
    plan, cells, flow = job.replace(positions)
    changes = {EFFECT if cell == "exact" else cell: delta for cell, delta in cells.items()}
    return Found(estimates | changes, plan=plan, flow=flow, sampled=sampled, chosen_by=tuple(estimates))


def _highest(components: Sequence[Component], values: Float[np.ndarray, " C"], top: int) -> list[int]:
    """Positions of the `top` largest magnitudes of each kind, in order of position."""
    found: list[int] = []
    for kind in dict.fromkeys(c.kind for c in components):
        mine = [i for i, c in enumerate(components) if c.kind == kind]
        found += sorted(mine, key=lambda i: -abs(values[i]))[:top]
    return sorted(found)


def _stratum(components: Sequence[Component], best: set[int], n: int, seed: int) -> list[int]:
    """Positions of up to n random components of each kind that were not chosen."""
    rng = np.random.default_rng(seed)
    found: list[int] = []
    for kind in dict.fromkeys(c.kind for c in components):
        rest = [i for i, c in enumerate(components) if c.kind == kind and i not in best]
        found += sorted(rng.permutation(rest)[:n].tolist()) if rest else []
    return found
