"""Averages of whole weights: linear, weighted by Fisher information, and model stock."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from wpjax.merging.methods.task_vectors import WEIGHT
from wpjax.merging.registry import MergeError, MergeMethod, Parameter, register


def linear(
    base: Float[np.ndarray, "*shape"] | None,
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    weight: Sequence[float],
    normalize: bool = True,
) -> Float[np.ndarray, "*shape"]:
    """The weighted mean of all models, sum_i w_i theta_i / sum_i w_i (model soups, arXiv:2203.05482).

    Args:
        base: not used; a base that takes part stands among the experts.
        experts: one tensor of each model.
        weight: w_i.
        normalize: whether to divide by the sum of the weights.

    >>> linear(None, [np.float32([1]), np.float32([4])], weight=[2.0, 1.0]).tolist()
    [2.0]
    """
    pairs = ((np.float32(w), expert) for w, expert in zip(weight, experts, strict=True))
    w, expert = next(pairs)
    total, merged = w, w * expert
    for w, expert in pairs:
        merged += w * expert
        total += w
    return np.divide(merged, total, out=merged) if normalize else merged


def fisher(
    base: Float[np.ndarray, "*shape"] | None,
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    weight: Sequence[float],
    fisher: Sequence[Float[np.ndarray, "..."]],
    floor: float = 1e-6,
) -> Float[np.ndarray, "*shape"]:
    """The mean of all models, weighted element by element by Fisher information (arXiv:2111.09832).

        merged = sum_i w_i F_i theta_i / sum_i w_i F_i

    Args:
        base: not used.
        experts: one tensor of each model.
        weight: w_i.
        fisher: F_i, the diagonal of each model's Fisher information: the mean squared gradient of the log-likelihood.
            Of the tensor's shape, or with axes of length 1 where it does not vary.
        floor: least F_i, so that no sum is zero.

    >>> linear_in = [np.float32([1]), np.float32([4])]
    >>> fisher(None, linear_in, weight=[1, 1], fisher=[np.float32([3]), np.float32([1])]).tolist()
    [1.75]
    """
    merged = total = None
    for w, expert, information in zip(weight, experts, fisher, strict=True):
        factor = np.float32(w) * np.maximum(information.astype(np.float32), np.float32(floor))
        merged = factor * expert if merged is None else merged + factor * expert
        total = factor if total is None else total + factor
    assert merged is not None
    return np.asarray(merged / total, np.float32)


def model_stock(
    base: Float[np.ndarray, "*shape"],
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    filter_wise: bool = False,
) -> Float[np.ndarray, "*shape"]:
    """Model stock: between the base and the experts' mean, where their angle says (arXiv:2403.19522).

        merged = t mean_i theta_i + (1 - t) theta_base        t = N c / (1 + (N - 1) c)

    c is the mean cosine between two task vectors. Where the denominator is 0, t is 0, as in mergekit.

    Args:
        base: a tensor of the base.
        experts: the same tensor of each of at least two experts.
        filter_wise: whether each row has a cosine of its own; else the tensor has one.

    >>> base, experts = np.zeros(2, np.float32), [np.float32([1, 0]), np.float32([1, 1])]
    >>> print(model_stock(base, experts).round(3))  # c = .707, t = .828
    [0.828 0.414]
    """
    rows = np.atleast_2d(base) if filter_wise else base.reshape(1, -1)
    taus = [expert.reshape(rows.shape) - rows for expert in experts]
    norms = [np.sqrt(np.sum(tau * tau, axis=-1, dtype=np.float32)) for tau in taus]
    cosines = [
        np.clip(np.sum(a * b, axis=-1, dtype=np.float32) / np.maximum(norm_a * norm_b, np.float32(1e-6)), -1, 1)
        for (a, norm_a), (b, norm_b) in itertools.combinations(zip(taus, norms, strict=True), 2)
    ]
    c = np.asarray(np.mean(cosines, axis=0, dtype=np.float32))[..., None]
    n = np.float32(len(taus))
    denominator = 1 + (n - 1) * c
    is_singular = np.abs(denominator) < 1e-6
    t = np.where(is_singular, np.float32(0), n * c / np.where(is_singular, np.float32(1), denominator))
    mean = taus[0].copy()
    for tau in taus[1:]:
        mean += tau
    mean /= n
    return (rows + t * mean).reshape(base.shape)


def _check_sum(values: Mapping[str, Any]) -> None:
    """Refuse weights that cannot be divided by."""
    total = sum(values["weight"])
    if values["normalize"] and abs(total) < 1e-8:
        raise MergeError(
            f"the weights {', '.join(f'{w:g}' for w in values['weight'])} sum to {total:g}, so they make no mean; "
            "change them, or set normalize: false"
        )


register(
    MergeMethod(
        "linear",
        "takes the weighted mean of all models",
        linear,
        (WEIGHT, Parameter("normalize", "whether to divide by the sum of the weights", "switch", default=True)),
        "arXiv:2203.05482",
        base="none",
        check=_check_sum,
        in_mergekit=True,
    )
)
register(
    MergeMethod(
        "fisher",
        "takes their mean, weighted element by element by Fisher information",
        fisher,
        (
            WEIGHT._replace(default=1.0, least=0),
            Parameter("fisher", "the diagonal of the model's Fisher information", "tensors", per_expert=True),
            Parameter("floor", "least Fisher information", default=1e-6, least=1e-30),
        ),
        "arXiv:2111.09832",
        base="none",
    )
)
register(
    MergeMethod(
        "model_stock",
        "goes from the base towards the experts' mean, as far as their angle says",
        model_stock,
        (Parameter("filter_wise", "whether each row has an angle of its own", "switch", default=False),),
        "arXiv:2403.19522",
        n_experts=(2, None),
        in_mergekit=True,
    )
)
