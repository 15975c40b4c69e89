"""Random masks: what does a component do in the company of others?

    beta_c(p) = E_{S ~ Bernoulli(p)} [ f(S + c) - f(S - c) ],    f(S) = F(base with the components S of the expert)

p -> 0 is the weight patch, p = 1/2 the Banzhaf value, p -> 1 the knock-out (docs/method.md, "Random masks"; ours). If
beta falls from low to high p, the component is redundant: others do the work as well. If beta rises, there is synergy:
the component needs the others.

Every mask serves every component (maximum sample reuse, arXiv 2205.15466):

    beta_c ~ mean of f over masks with c - mean over masks without c
    variance  s_with^2 / n_with + s_without^2 / n_without

A control variate makes the variance smaller. g is the slope of F at the mask m = p (1, ..., 1). The means are taken of
f - g.m instead of f, and g_c is added to beta_c at the end. This does not change the expectation. The linear part of
beta_c is then g_c itself, and chance is left only in the rest.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import csr_array
from scipy.stats import norm

from wpjax.components import Component, unit_positions, unit_shapes
from wpjax.engines.joint import scores_of_sets
from wpjax.errors import WpjaxError
from wpjax.estimators.job import MethodOutput, SweepJob
from wpjax.estimators.unit_slopes import by_component, unit_slopes
from wpjax.metrics.metric import Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.patching import PatchMask
from wpjax.runtime.farm import shared_out
from wpjax.runtime.progress import Progress, silent
from wpjax.runtime.shards import finished_part

PROBABILITIES = {"beta_low": 0.1, "banzhaf": 0.5, "beta_high": 0.9}
"""Column -> p: few, half and most of the other components are in a set."""

MASKS_AT_ONCE = 32
"""Masks in one finished part."""


class MaskEstimate(NamedTuple):
    """beta of every component at one p.

    Attributes:
        beta: [C, B], beta for each prompt, in the units of the metric.
        se: [C], standard error of beta's mean over prompts; its source is the choice of masks.
    """

    beta: Float[np.ndarray, "C B"]
    se: Float[np.ndarray, " C"]


class UnitMasks:
    """Turns sets of components into masks; quick when there are many sets.

    The units of the model are laid out as one flat vector of length n. A sparse matrix, [C, n], says which of them each
    component opens, so a set becomes a mask by one product.

    Args:
        cfg: architecture of the model.
        components: the C components that sets are made of.
    """

    def __init__(self, cfg: ModelConfig, components: Sequence[Component]):
        self.shapes = unit_shapes(cfg)
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        self.ends = np.cumsum([0, *sizes])  # unit i lies from ends[i] to ends[i + 1]
        starts = dict(zip(self.shapes, self.ends.tolist(), strict=False))
        opened = [
            np.concatenate([starts[unit] + np.atleast_1d(at) for unit, at in unit_positions(cfg, c).items()])
            for c in components
        ]
        rows = np.repeat(np.arange(len(opened)), [len(positions) for positions in opened])
        shape = (len(components), int(self.ends[-1]))
        self.opens = csr_array((np.ones(len(rows), np.int32), (rows, np.concatenate(opened))), shape=shape)

    def mask(self, weights: Float[np.ndarray, " C"] | Bool[np.ndarray, " C"]) -> PatchMask:
        """The mask of a set of components.

        Args:
            weights: [C]. Booleans say which components are in the set, and the mask opens every unit of theirs. Floats
                are how far each component is open; where several open one unit, they add up to 1 at most.
        """
        flat = np.minimum(np.asarray(weights, np.float32) @ self.opens, 1.0)
        if np.asarray(weights).dtype == bool:
            flat = flat > 0
        parts = zip(self.shapes.items(), self.ends[:-1], self.ends[1:], strict=True)
        return PatchMask({unit: jnp.asarray(flat[a:b].reshape(shape)) for (unit, shape), a, b in parts})


def draw_masks(n_masks: int, n_components: int, p: float, seed: int) -> Bool[np.ndarray, "T C"]:
    """Random sets of components: each component is in each set with probability p, independently.

    Args:
        n_masks: number of sets, T.
        n_components: number of components, C.
        p: the probability.
        seed: seed of the draws; equal arguments give equal sets.
    """
    # p is part of the seed, so that the sets of two shares are independent.
    return np.random.default_rng((seed, round(1000 * p))).random((n_masks, n_components)) < p


def estimate_beta(
    masks: Bool[np.ndarray, "T C"], values: Float[np.ndarray, "T B"], slopes: Float[np.ndarray, "C B"] | None = None
) -> MaskEstimate:
    """beta of every component, from the metric under random masks.

    Args:
        masks: [T, C], True where a component is in a mask.
        values: [T, B], metric of each prompt under each mask.
        slopes: [C, B], slope of the metric in each component, for the control variate; None for no control variate.

    Returns:
        beta and its standard error. beta is NaN for a component that is in all masks or in none. The error is also NaN
        for a component that is in exactly one mask, or in all but one.

    >>> import numpy as np
    >>> from wpjax.estimators.masks import estimate_beta
    >>> masks = np.array([[True, False], [False, True], [True, True], [False, False]])
    >>> values = masks @ np.array([[2.0], [5.0]])  # two components that add 2 and 5 on one prompt
    >>> estimate_beta(masks, values).beta[:, 0].tolist()
    [2.0, 5.0]
    """
    z = masks.astype(np.float64)
    rest = values if slopes is None else values - z @ slopes
    # A constant cancels in beta. In the squares below it would cost precision.
    rest = rest - rest.mean(0)
    n_with, n_without = z.sum(0), len(z) - z.sum(0)

    def sides(x: Float[np.ndarray, "T k"]) -> tuple[np.ndarray, np.ndarray]:
        """[C, k] each: mean of x over the masks with each component, and over those without; NaN if there are none."""
        with_it = z.T @ x
        with np.errstate(invalid="ignore", divide="ignore"):
            return with_it / n_with[:, None], (x.sum(0) - with_it) / n_without[:, None]

    inside, outside = sides(rest)
    beta = inside - outside + (0.0 if slopes is None else slopes)
    mean = rest.mean(1, keepdims=True)
    (first_in, first_out), (second_in, second_out) = sides(mean), sides(np.square(mean))
    # Squared standard error of each side's mean, s^2 / n; of a single mask there is no spread.
    spread = [
        np.maximum(second - np.square(first), 0)[:, 0] / np.where(n > 1, n - 1, np.nan)
        for first, second, n in ((first_in, second_in, n_with), (first_out, second_out, n_without))
    ]
    return MaskEstimate(beta, np.sqrt(spread[0] + spread[1]))


def random_masks(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    components: Sequence[Component],
    metric: Metric,
    p: float,
    *,
    n_masks: int = 256,
    seed: int = 0,
    control: bool = True,
    budget: int | None = None,
    done: MutableMapping[str, np.ndarray] | None = None,
    progress: Progress = silent,
) -> MaskEstimate:
    """Run the host with random sets of the donor's components, and estimate what each component does among the others.

    Args:
        cfg: architecture of both models.
        host: parameters of the model that receives the patches.
        donor: parameters of the model that the components come from.
        components: components that the sets are drawn from.
        metric: the metric F.
        p: probability of each component to be in a set, in (0, 1).
        n_masks: number of sets.
        seed: seed of the sets.
        control: whether the slope at p is used as a control variate; it takes one forward and one backward pass.
        budget: bytes for the activations of sets that run at once; None to choose from the device.
        done: finished parts of an earlier attempt; new parts are added.
        progress: function that is called as sets are done.

    Raises:
        WpjaxError: p or the number of sets is out of range, a score is not finite, or a finished part is damaged.
    """
    if not 0 < p < 1 or n_masks < 2:
        raise WpjaxError(f"p={p}, n_masks={n_masks}: p lies between 0 and 1, and it takes at least 2 sets")
    done = {} if done is None else done
    units, masks = UnitMasks(cfg, components), draw_masks(n_masks, len(components), p, seed)
    fits: dict[str, int] = {}
    values = np.full((n_masks, len(metric)), np.nan)
    for first in shared_out(done, range(0, n_masks, MASKS_AT_ONCE), lambda first: f"masks-{p:g}-{first}" in done):
        key, rows = f"masks-{p:g}-{first}", slice(first, min(first + MASKS_AT_ONCE, n_masks))
        if key not in done:
            sets = [units.mask(m) for m in masks[rows]]
            values_of_part = scores_of_sets(cfg, host, donor, sets, metric, budget=budget, fits=fits)
            done[key] = values_of_part.astype(np.float64)
        values[rows] = finished_part(done, key, values[rows].shape)
        if not np.isfinite(values[rows]).all():
            raise WpjaxError("a random set gives scores that are not finite; check the checkpoints for NaN")
        progress(f"random masks, p = {p:g}", rows.stop, n_masks)
    if np.isnan(values).any():  # other parts make the rest
        return MaskEstimate(np.full((len(components), len(metric)), np.nan), np.full(len(components), np.nan))
    slopes = None
    if control:
        at = units.mask(np.full(len(components), p, np.float32))
        slopes = by_component(cfg, unit_slopes(cfg, host, donor, metric, at), components)
    return estimate_beta(masks, values, slopes)


def run(job: SweepJob) -> MethodOutput:
    """The step of method "masks": beta at each p of `PROBABILITIES`, as shares of the gap.

    `redundancy` is beta at the smallest p minus beta at the largest. Intervals are over random sets, not over prompts.
    """
    pair, gap, z = job.pair, job.gap.mean(), float(norm.ppf(0.975))
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # name -> value and standard error, [C] each
    for name, p in PROBABILITIES.items():
        betas = random_masks(
            pair.cfg, pair.base, pair.expert, job.components, job.metric, p,
            n_masks=job.n_masks, seed=job.seed, budget=job.budget, done=job.done, progress=job.progress,
        )  # fmt: skip
        columns[name] = betas.beta.mean(1) / gap, betas.se / gap
    (low, low_se), (high, high_se) = columns["beta_low"], columns["beta_high"]
    columns["redundancy"] = low - high, np.hypot(low_se, high_se)  # the sets of the two p are independent
    return MethodOutput(shares={name: np.stack([v, v - z * se, v + z * se]) for name, (v, se) in columns.items()})
