"""SCE: select by variance, calculate weights, erase minorities (arXiv:2408.07990)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from wpjax.merging.methods.task_vectors import changes
from wpjax.merging.registry import MergeMethod, Parameter, register
from wpjax.merging.sparsify import largest


def sce(
    base: Float[np.ndarray, "*shape"],
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    select_topk: float = 1.0,
) -> Float[np.ndarray, "*shape"]:
    """SCE: the elements in which the experts differ most, weighted by how much each expert changes there.

    Elements are chosen by the variance of the task vectors over the experts: floor(select_topk n) of the n that vary.
    Of these, the ones with the elected sign count, sign of sum_i tau_i. Expert i has the weight mean(tau_i^2) over the
    tensor, divided by the sum over the experts; the sum is divided by the weights that agree.

    Args:
        base: a tensor of the base.
        experts: the same tensor of each expert.
        select_topk: share of the elements that vary; 1 for all elements.

    >>> base, experts = np.zeros(3, np.float32), [np.float32([2, 0, 1]), np.float32([-1, 0, 1])]
    >>> sce(base, experts, select_topk=0.5).tolist()
    [0.0, 0.0, 0.0]
    >>> sce(base, experts).tolist()
    [2.0, 0.0, 1.0]
    """
    taus = list(changes(base, experts))
    if select_topk < 1:
        mean = sum(taus[1:], taus[0]) / np.float32(len(taus))
        variance = np.zeros_like(base)
        for tau in taus:
            variance += np.square(tau - mean)
        n_chosen = int(np.count_nonzero(variance) * select_topk)
        chosen = largest(variance, n_chosen)
        for tau in taus:
            tau *= chosen
    squares = np.array([np.mean(np.square(tau), dtype=np.float64) for tau in taus])
    total = squares.sum()
    weight = squares / total if total >= 1e-6 else np.full(len(taus), 1 / len(taus))
    return _erased(base, taus, weight)


def _erased(base: np.ndarray, taus: list[np.ndarray], weight: np.ndarray) -> np.ndarray:
    """The base plus the weighted mean of the task vectors that have the elected sign, element by element."""
    is_positive = sum(taus[1:], taus[0].copy()) >= 0
    mixed, divisor = np.zeros_like(base), np.zeros_like(base)
    for tau, w in zip(taus, weight.astype(np.float32), strict=True):
        agrees = ((tau > 0) == is_positive) & (tau != 0)
        mixed += tau * w * agrees
        divisor += w * agrees
    return base + mixed / np.maximum(divisor, np.float32(1e-6))


register(
    MergeMethod(
        "sce",
        "keeps what differs most between the experts, weighted by how much each changes",
        sce,
        (
            Parameter("select_topk", "share of the elements that vary", default=1.0, least=0, most=1),
            Parameter("int8_mask", "mergekit's; without effect here", "switch", default=False, ignored=True),
        ),
        "arXiv:2408.07990",
        in_mergekit=True,
    )
)
