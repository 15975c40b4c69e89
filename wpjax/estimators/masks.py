"""Random masks: what a component does in the company of others.

    beta_c(p) = E_{S ~ Bernoulli(p)} [ f(S + c) - f(S - c) ],    f(S) = F(base with the components S of the expert)

p -> 0 is the weight patch, p = 1/2 the Banzhaf value, p -> 1 the knock-out (docs/method.md, "Random masks"; ours).
A fall from low to high p
is redundancy, others do the work as well; a rise is synergy, it takes the others. Every mask serves every component
(maximum sample reuse, arXiv 2205.15466):

    beta_c ~ mean of f over masks with c - mean over masks without c
    variance  s_with^2 / n_with + s_without^2 / n_without

with f replaced by f - g.m, and g_c added back, for the slope g of F at m = p (1, ..., 1): a control variate, which has
the same expectation and leaves only what is not linear to chance.
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
from wpjax.estimators.job import Found, Job
from wpjax.estimators.screens import by_component, unit_slopes
from wpjax.metrics.metric import Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.patching import PatchMask
from wpjax.runtime.progress import Progress, silent
from wpjax.runtime.shards import finished_part

SHARES = {"beta_low": 0.1, "banzhaf": 0.5, "beta_high": 0.9}
"""Which p stand for few, half and most of the others."""

MASKS_AT_ONCE = 32
"""Masks of a finished part."""


class MaskEstimate(NamedTuple):
    """beta of every component at one p.

    Attributes:
        beta: [C, B], change of the metric of each prompt.
        se: [C], standard error over masks of the mean over prompts.
    """

    beta: Float[np.ndarray, "C B"]
    se: Float[np.ndarray, " C"]


class UnitMasks:
    """From sets of components to masks, many times.

    Args:
        cfg: the model.
        components: what sets are made of.
    """

    def __init__(self, cfg: ModelConfig, components: Sequence[Component]):
        self.shapes = unit_shapes(cfg)
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        self.ends = np.cumsum([0, *sizes])
        starts = dict(zip(self.shapes, self.ends.tolist(), strict=False))
        found = [
            np.concatenate([starts[unit] + np.atleast_1d(at) for unit, at in unit_positions(cfg, c).items()])
            for c in components
        ]
        rows = np.repeat(np.arange(len(found)), [len(f) for f in found])
        shape = (len(components), int(self.ends[-1]))
        self.opens = csr_array((np.ones(len(rows), np.int32), (rows, np.concatenate(found))), shape=shape)

    def mask(self, weights: Float[np.ndarray, " C"] | Bool[np.ndarray, " C"]) -> PatchMask:
        """The union of a set of components, or a float mask: of a unit that several open, the sum, at most 1."""
        flat = np.minimum(np.asarray(weights, np.float32) @ self.opens, 1.0)
        if np.asarray(weights).dtype == bool:
            flat = flat > 0
        parts = zip(self.shapes.items(), self.ends[:-1], self.ends[1:], strict=True)
        return PatchMask({unit: jnp.asarray(flat[a:b].reshape(shape)) for (unit, shape), a, b in parts})


def draw(n_masks: int, n_components: int, p: float, seed: int) -> Bool[np.ndarray, "T C"]:
    """Independent masks; the same for the same arguments."""
    return np.random.default_rng((seed, round(1000 * p))).random((n_masks, n_components)) < p


def estimate(
    masks: Bool[np.ndarray, "T C"], values: Float[np.ndarray, "T B"], slopes: Float[np.ndarray, "C B"] | None = None
) -> MaskEstimate:
    """beta of every component from the metric under random masks.

    Args:
        masks: which components each mask holds.
        values: the metric of each prompt under each mask.
        slopes: of a control variate; None for none.

    Returns:
        NaN for a component that all masks hold, or none; its error is NaN where one mask only does, or does not.
    """
    z = masks.astype(np.float64)
    rest = values if slopes is None else values - z @ slopes
    rest = rest - rest.mean(0)  # a constant does not matter, its square's rounding would
    n_with, n_without = z.sum(0), len(z) - z.sum(0)

    def sides(x: Float[np.ndarray, "T k"]) -> tuple[np.ndarray, np.ndarray]:
        """Means over the masks that hold each component, and over the others; NaN where there are none."""
        with_it = z.T @ x
        with np.errstate(invalid="ignore", divide="ignore"):
            return with_it / n_with[:, None], (x.sum(0) - with_it) / n_without[:, None]

    inside, outside = sides(rest)
    beta = inside - outside + (0.0 if slopes is None else slopes)
    mean = rest.mean(1, keepdims=True)
    (first_in, first_out), (second_in, second_out) = sides(mean), sides(np.square(mean))
    spread = [  # unknown of one mask
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
    """Run the host under random sets of the donor's components, and say what each component does among them.

    Args:
        cfg: the model.
        host: parameters that receive the patches.
        donor: parameters that the components come from.
        components: what the sets are drawn from.
        metric: what is measured.
        p: chance of each component to be in a set, in (0, 1).
        n_masks: sets.
        seed: of the sets.
        control: whether the slope at p is used as a control variate (one forward and one backward pass).
        budget: bytes for the activations of sets that run at once; None to choose from the device.
        done: finished parts of an earlier attempt.
        progress: called as sets are done.

    Raises:
        WpjaxError: p or the number of sets is out of range, a score is not finite, or a finished part is damaged.
    """
    if not 0 < p < 1 or n_masks < 2:
        raise WpjaxError(f"p={p}, n_masks={n_masks}: p lies between 0 and 1, and it takes at least 2 sets")
    done = {} if done is None else done
    units, masks = UnitMasks(cfg, components), draw(n_masks, len(components), p, seed)
    fits: dict[str, int] = {}
    for first in range(0, n_masks, MASKS_AT_ONCE):
        key = f"masks-{p:g}-{first}"
        if key not in done:
            some = masks[first : first + MASKS_AT_ONCE]
            sets = [units.mask(m) for m in some]
            found = scores_of_sets(cfg, host, donor, sets, metric, budget=budget, fits=fits)
            done[key] = found.astype(np.float64)
        progress(f"random masks, p = {p:g}", min(first + MASKS_AT_ONCE, n_masks), n_masks)
    parts = []
    for first in range(0, n_masks, MASKS_AT_ONCE):
        shape = (min(MASKS_AT_ONCE, n_masks - first), len(metric))
        parts.append(finished_part(done, f"masks-{p:g}-{first}", shape))
    values = np.concatenate(parts)
    if not np.isfinite(values).all():
        raise WpjaxError("a random set gives scores that are not finite; check the checkpoints for NaN")
    slopes = None
    if control:
        at = units.mask(np.full(len(components), p, np.float32))
        slopes = by_component(unit_slopes(cfg, host, donor, metric, at), components)
    return estimate(masks, values, slopes)


def run(job: Job) -> Found:
    """The method: shares of the gap by what each component does in random sets; intervals are over sets."""
    pair, gap, z = job.pair, job.gap.mean(), float(norm.ppf(0.975))
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, p in SHARES.items():
        made = random_masks(
            pair.cfg, pair.base, pair.expert, job.components, job.metric, p,
            n_masks=job.n_masks, seed=job.seed, budget=job.budget, done=job.done, progress=job.progress,
        )  # fmt: skip
        found[name] = made.beta.mean(1) / gap, made.se / gap
    (low, low_se), (high, high_se) = found["beta_low"], found["beta_high"]
    found["redundancy"] = low - high, np.hypot(low_se, high_se)
    return Found(shares={name: np.stack([v, v - z * se, v + z * se]) for name, (v, se) in found.items()})
