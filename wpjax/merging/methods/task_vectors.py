"""Sums of task vectors: task arithmetic, and what thins the task vectors out first or lets them vote on a sign.

    merged = theta_base + lambda sum_i w_i S(tau_i) c_i / D        tau_i = theta_i - theta_base

S drops elements of a task vector. c_i is 1, or with consensus 1 where w_i S(tau_i) has the elected sign: + where
sum_i w_i S(tau_i) >= 0, else -. D is sum_i w_i c_i where the sum is normalised, else 1; where it is 0, it is 1. This is
the family that mergekit calls generalised task arithmetic; numbers are those of mergekit 0.1.5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from wpjax.merging.registry import MergeError, MergeMethod, Parameter, register
from wpjax.merging.sparsify import (
    Rescale,
    drawn,
    keep_probabilities,
    largest_share,
    rescaled,
    without_outliers,
)

_CHUNK = 2**16
"""Elements that are added up at a time, so that what is in between stays in the processor's cache."""

_NOTHING = 1e-8
"""A sum of weights below this one does not divide, as in mergekit."""


def weighted_sum(
    base: Float[np.ndarray, "*shape"],
    task_vectors: Sequence[Float[np.ndarray, "*shape"]],
    weight: Sequence[float],
    *,
    consensus: bool,
    normalize: bool,
    lambda_: float = 1.0,
) -> Float[np.ndarray, "*shape"]:
    """The formula at the top of this module, for task vectors that have been thinned out.

    Args:
        base: a tensor of the base.
        task_vectors: S(tau_i), one for each expert.
        weight: w_i, one for each expert.
        consensus: whether only elements with the elected sign count.
        normalize: whether the sum is divided by the weights in it.
        lambda_: factor of the sum.

    >>> base, vectors = np.zeros(2, np.float32), [np.float32([3, 1]), np.float32([-1, 1])]
    >>> weighted_sum(base, vectors, [1, 1], consensus=True, normalize=True).tolist()
    [3.0, 1.0]
    """
    merged = np.empty(base.shape, np.float32)
    flat, out, vectors = base.reshape(-1), merged.reshape(-1), [vector.reshape(-1) for vector in task_vectors]
    weights = [np.float32(w) for w in weight]
    total = np.float32(sum(weights))
    divisor: np.ndarray | np.float32 = total if abs(total) >= _NOTHING else np.float32(1)
    for start in range(0, flat.size, _CHUNK):
        at = slice(start, start + _CHUNK)
        parts = [w * vector[at] for w, vector in zip(weights, vectors, strict=True)]
        mixed = parts[0].copy()
        for part in parts[1:]:
            mixed += part
        if consensus:
            is_positive, mixed = mixed >= 0, np.zeros_like(mixed)
            divisor = np.zeros_like(mixed)
            for w, part in zip(weights, parts, strict=True):
                agrees = (part > 0) == is_positive
                agrees &= part != 0
                mixed += part * agrees
                divisor += w * agrees
            divisor[divisor == 0] = 1
        if normalize:
            mixed /= divisor
        if lambda_ != 1:
            mixed *= np.float32(lambda_)
        np.add(flat[at], mixed, out=out[at])
    return merged


def changes(
    base: Float[np.ndarray, "*shape"], experts: Iterable[Float[np.ndarray, "*shape"]]
) -> Iterator[Float[np.ndarray, "*shape"]]:
    """The task vectors, one after the other. Each expert's tensor is let go before the next is read."""
    experts = iter(experts)
    while (expert := next(experts, None)) is not None:
        tau = expert - base
        del expert
        yield tau


def task_arithmetic(
    base: Float[np.ndarray, "*shape"],
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    weight: Sequence[float],
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Float[np.ndarray, "*shape"]:
    """Task arithmetic: the base plus a weighted sum of the task vectors (arXiv:2212.04089).

    Args:
        base: a tensor of the base.
        experts: the same tensor of each expert.
        weight: one factor for each expert.
        normalize: whether to divide by the sum of the weights.
        lambda_: factor of the sum.

    >>> base, experts = np.zeros(2, np.float32), [np.float32([1, 0]), np.float32([0, 2])]
    >>> task_arithmetic(base, experts, weight=[1.0, 0.5]).tolist()
    [1.0, 1.0]
    """
    vectors = list(changes(base, experts))
    return weighted_sum(base, vectors, weight, consensus=False, normalize=normalize, lambda_=lambda_)


def ties(
    base: Float[np.ndarray, "*shape"],
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Float[np.ndarray, "*shape"]:
    """TIES: of each task vector the largest elements, of these the ones with the elected sign (arXiv:2306.01708).

    Args:
        base: a tensor of the base.
        experts: the same tensor of each expert.
        weight: one factor for each expert.
        density: share of elements that is kept, one for each expert: the max(1, floor(density n)) largest of n.
        normalize: whether to divide by the weights that agree.
        lambda_: factor of the sum.

    >>> base, experts = np.zeros(3, np.float32), [np.float32([4, 1, 2]), np.float32([-2, 3, 4])]
    >>> ties(base, experts, weight=[1, 1], density=[0.7, 0.7]).tolist()
    [4.0, 3.0, 3.0]
    """
    vectors = [_thinned(tau, largest_share, d) for tau, d in zip(changes(base, experts), density, strict=True)]
    return weighted_sum(base, vectors, weight, consensus=True, normalize=normalize, lambda_=lambda_)


def breadcrumbs(
    base: Float[np.ndarray, "*shape"],
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool = False,
    lambda_: float = 1.0,
    consensus: bool = False,
) -> Float[np.ndarray, "*shape"]:
    """Model breadcrumbs: task vectors without their largest and their smallest elements (arXiv:2312.06795).

    Args:
        base: a tensor of the base.
        experts: the same tensor of each expert.
        weight: one factor for each expert.
        density: share of elements that is kept, one for each expert. With 1 nothing is dropped, outliers neither.
        gamma: share of elements that is dropped as the largest, one for each expert.
        normalize: whether to divide by the sum of the weights.
        lambda_: factor of the sum.
        consensus: whether only elements with the elected sign count, as in TIES.

    >>> base, expert = np.zeros(4, np.float32), np.float32([4, 3, 2, 1])
    >>> breadcrumbs(base, [expert], weight=[1], density=[0.5], gamma=[0.25]).tolist()
    [0.0, 3.0, 2.0, 0.0]
    """
    vectors = [
        _thinned(tau, without_outliers, d, g) for tau, d, g in zip(changes(base, experts), density, gamma, strict=True)
    ]
    return weighted_sum(base, vectors, weight, consensus=consensus, normalize=normalize, lambda_=lambda_)


def dare(
    base: Float[np.ndarray, "*shape"],
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    rng: np.random.Generator,
    consensus: bool,
    epsilon: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: Rescale = "l1",
    lambda_: float = 1.0,
) -> Float[np.ndarray, "*shape"]:
    """DARE and DELLA: a random part of each task vector, made larger for what was dropped.

    DARE (arXiv:2311.03099) keeps each element with one probability; DELLA (arXiv:2406.11617) keeps large ones rather
    than small ones, by `sparsify.keep_probabilities`.

    Args:
        base: a tensor of the base.
        experts: the same tensor of each expert.
        weight: one factor for each expert.
        density: probability to keep an element, one for each expert; with 1 nothing is dropped.
        rng: where random numbers come from: `rng.random`, one expert after the other (`sparsify.drawn`).
        consensus: whether only elements with the elected sign count, as in TIES.
        epsilon: of DELLA, how far probabilities go from the density, one for each expert; None for DARE.
        normalize: whether to divide by the sum of the weights.
        rescale: whether to make what is kept larger.
        rescale_by: how: "l1" as mergekit, "density" as the papers (`sparsify.rescaled`).
        lambda_: factor of the sum.

    >>> base, expert = np.zeros(4, np.float32), np.ones(4, np.float32)
    >>> rng = np.random.default_rng(0)
    >>> dare(base, [expert], weight=[1], density=[0.5], rng=rng, consensus=False).tolist()
    [0.0, 0.0, 0.0, 4.0]
    """
    vectors = []
    how: Rescale = rescale_by if rescale else "none"
    for i, tau in enumerate(changes(base, experts)):
        if density[i] >= 1:
            vectors.append(tau)
            continue
        p = density[i] if epsilon is None or density[i] <= 0 else keep_probabilities(tau, density[i], epsilon[i])
        vectors.append(rescaled(tau, drawn(p, tau.shape, rng), how, p) if density[i] > 0 else np.zeros_like(tau))
    return weighted_sum(base, vectors, weight, consensus=consensus, normalize=normalize, lambda_=lambda_)


def _thinned(tau: np.ndarray, mark: Callable[..., np.ndarray], density: float, *more: float) -> np.ndarray:
    """A task vector, which is ours, without the elements that are not marked."""
    if density < 1:
        tau *= mark(tau, density, *more)
    return tau


WEIGHT = Parameter("weight", "factor of the expert's change", per_expert=True)
"""The parameter of the methods that weigh task vectors."""

LAMBDA = Parameter("lambda", "factor of the sum of all changes", default=1.0)
"""The parameter of the methods that scale the sum of task vectors."""

_DENSITY = Parameter(
    "density", "share of the change's elements that is kept", default=1.0, per_expert=True, least=0, most=1
)
_GAMMA = Parameter("gamma", "share that is dropped as the largest", default=0.01, per_expert=True, least=0, most=1)
_EPSILON = Parameter(
    "epsilon", "how far probabilities go from the density", default=0.15, per_expert=True, least=0, most=0.5
)
_RESCALE = (
    Parameter("rescale", "whether what is kept is made larger for what is dropped", "switch", default=True),
    Parameter(
        "rescale_by",
        "how: l1 keeps the sum of sizes of the tensor (mergekit), density divides by the probability (the papers)",
        "word",
        default="l1",
        choices=("l1", "density"),
    ),
)
_INT8 = Parameter("int8_mask", "mergekit's, to save memory; without effect here", "switch", default=False, ignored=True)


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", "whether the sum is divided by the weights in it", "switch", default=default)


def _entry(
    name: str,
    help: str,
    merge: Callable[..., np.ndarray],
    source: str,
    *extra: Parameter,
    normalize: bool = False,
    random: bool = False,
) -> None:
    parameters = (WEIGHT, *extra, _normalize(normalize), LAMBDA, _INT8)
    check = _check_epsilon if _EPSILON in extra else None
    register(MergeMethod(name, help, merge, parameters, source, random=random, check=check, in_mergekit=True))


def _check_epsilon(values: Mapping[str, Any]) -> None:
    """Refuse probabilities that are none."""
    for density, epsilon in zip(values["density"], values["epsilon"], strict=True):
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise MergeError(
                f"density {density:g} with epsilon {epsilon:g}: probabilities from {density - epsilon:g} to "
                f"{density + epsilon:g} must lie between 0 and 1; give a smaller epsilon"
            )


_ARITHMETIC, _TIES, _DARE, _DELLA, _CRUMBS = (
    f"arXiv:{number}" for number in ("2212.04089", "2306.01708", "2311.03099", "2406.11617", "2312.06795")
)
_LINEARLY, _AGREEING = functools.partial(dare, consensus=False), functools.partial(dare, consensus=True)
_entry("task_arithmetic", "adds a weighted sum of the changes to the base", task_arithmetic, _ARITHMETIC)
_entry(
    "ties", "keeps the largest changes, and of these the ones that agree in sign", ties, _TIES, _DENSITY, normalize=True
)
_entry("dare_linear", "adds a random part of the changes", _LINEARLY, _DARE, _DENSITY, *_RESCALE, random=True)
_entry("dare_ties", "adds what agrees in sign of a random part", _AGREEING, _DARE, _DENSITY, *_RESCALE, random=True)
_entry(
    "della_linear",
    "adds a random part of the changes, of large ones more",
    _LINEARLY,
    _DELLA,
    _DENSITY,
    _EPSILON,
    *_RESCALE,
    random=True,
)
_entry(
    "della",
    "adds what agrees in sign of a random part, of large changes more",
    _AGREEING,
    _DELLA,
    _DENSITY,
    _EPSILON,
    *_RESCALE,
    normalize=True,
    random=True,
)
_entry("breadcrumbs", "adds the changes without the largest and smallest", breadcrumbs, _CRUMBS, _DENSITY, _GAMMA)
_entry(
    "breadcrumbs_ties",
    "adds what agrees in sign of these",
    functools.partial(breadcrumbs, consensus=True),
    _CRUMBS,
    _DENSITY,
    _GAMMA,
)
