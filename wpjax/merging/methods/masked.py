"""Methods that choose, by masks, where each expert's change counts: TALL masks, localize-and-stitch, EMR."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Shaped

from wpjax.merging.methods.task_vectors import LAMBDA, WEIGHT, changes
from wpjax.merging.registry import MergeMethod, Parameter, register
from wpjax.merging.sparsify import largest_share


def tall_mask(
    base: Float[np.ndarray, "*shape"],
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    weight: Sequence[float],
    threshold: Sequence[float],
    agreement: int = 2,
    lambda_: float = 1.0,
) -> Float[np.ndarray, "*shape"]:
    """Consensus merging by TALL masks: only elements that several experts need (arXiv:2405.07813).

        m_i = |tau_i| >= threshold_i |tau_all - tau_i|        tau_all = sum_i w_i tau_i
        merged = theta_base + lambda tau_all where sum_i m_i >= agreement, else theta_base

    The paper chooses each threshold on validation data; here it is given.

    Args:
        base: a tensor of the base.
        experts: the same tensor of each expert.
        weight: w_i.
        threshold: one for each expert; larger ones make smaller masks.
        agreement: number of experts that must need an element: 2 leaves out what none or one of them needs.
        lambda_: factor of the change.

    >>> base, experts = np.zeros(3, np.float32), [np.float32([1, 2, 0]), np.float32([1, 0, 3])]
    >>> tall_mask(base, experts, weight=[1, 1], threshold=[0.5, 0.5]).tolist()
    [2.0, 0.0, 0.0]
    """
    taus = list(changes(base, experts))
    together = np.zeros_like(base)
    for w, tau in zip(weight, taus, strict=True):
        together += np.float32(w) * tau
    n_needing = np.zeros(base.shape, np.int16)
    for tau, least in zip(taus, threshold, strict=True):
        n_needing += np.abs(tau) >= np.float32(least) * np.abs(together - tau)
    return base + np.float32(lambda_) * together * (n_needing >= agreement)


def localize_and_stitch(
    base: Float[np.ndarray, "*shape"],
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    density: Sequence[float],
    mask: Sequence[Shaped[np.ndarray, "..."] | None] = (),
    lambda_: float = 1.0,
) -> Float[np.ndarray, "*shape"]:
    """Localize-and-stitch: each expert's change at its own few elements; their mean where these overlap.

        merged = theta_base + lambda sum_i m_i tau_i / max(1, sum_i m_i)        (arXiv:2408.13656)

    The paper learns the masks on data, or takes the largest changes of the whole model. Here a mask is given, or it
    marks the largest changes of each tensor.

    Args:
        base: a tensor of the base.
        experts: the same tensor of each expert.
        density: share of elements in a mask that is not given, one for each expert.
        mask: m_i of each expert, of the tensor's shape or with axes of length 1 where it does not vary; None, or no
            masks at all, for the largest changes.
        lambda_: factor of the change.

    >>> base, experts = np.zeros(3, np.float32), [np.float32([3, 2, 1]), np.float32([1, 4, 3])]
    >>> localize_and_stitch(base, experts, density=[0.7, 0.7]).tolist()
    [3.0, 3.0, 3.0]
    """
    masks = mask or [None] * len(density)
    changed, n_masks = np.zeros_like(base), np.zeros_like(base)
    for expert, share, own in zip(experts, density, masks, strict=True):
        tau = expert - base
        m = largest_share(tau, share) if own is None else np.broadcast_to(own, tau.shape).astype(np.float32)
        changed += m * tau
        n_masks += m
    return base + np.float32(lambda_) * changed / np.maximum(n_masks, np.float32(1))


def emr(
    base: Float[np.ndarray, "*shape"],
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    weight: Sequence[float],
    task: int = 0,
    lambda_: float = 1.0,
) -> Float[np.ndarray, "*shape"]:
    """EMR: elect one change for all experts; mask and rescale it for one of them (arXiv:2405.17461).

        sign = sign of sum_i w_i tau_i      size = max_i |tau_i| over those with this sign      tau_all = sign size
        task k:  m = tau_k tau_all > 0      merged = theta_base + lambda m tau_all sum |tau_k| / sum |m tau_all|

    In the paper the sums are over the whole model and so one factor a task; here they are over the tensor.

    Args:
        base: a tensor of the base.
        experts: the same tensor of each expert.
        weight: w_i, of which only the election of the sign knows.
        task: 0 for the change of all, with neither mask nor factor; k for that of the k-th expert.
        lambda_: factor of the change.

    >>> base, experts = np.zeros(3, np.float32), [np.float32([3, -1, 1]), np.float32([1, -2, -4])]
    >>> emr(base, experts, weight=[1, 1]).tolist(), emr(base, experts, weight=[1, 1], task=1).tolist()
    ([3.0, -2.0, -4.0], [3.0, -2.0, 0.0])
    """
    taus = list(changes(base, experts))
    total = np.zeros_like(base)
    for w, tau in zip(weight, taus, strict=True):
        total += np.float32(w) * tau
    sign = np.sign(total)
    size = np.zeros_like(base)
    for tau in taus:
        np.maximum(size, tau * sign, out=size)
    together = sign * size
    if task:
        tau = taus[task - 1]
        together *= tau * together > 0
        of_all = float(np.abs(together).sum(dtype=np.float64))
        if of_all > 0:
            together *= np.float32(float(np.abs(tau).sum(dtype=np.float64)) / of_all)
    return base + np.float32(lambda_) * together


_DENSITY = Parameter("density", "share of elements in a mask", default=0.05, per_expert=True, least=0, most=1)

register(
    MergeMethod(
        "tall_mask",
        "adds the changes where several experts need them",
        tall_mask,
        (
            WEIGHT,
            Parameter("threshold", "how large an own change must be beside the others'", default=0.4, per_expert=True),
            Parameter("agreement", "number of experts that must need an element", default=2, least=0),
            LAMBDA,
        ),
        "arXiv:2405.07813",
    )
)
register(
    MergeMethod(
        "localize_and_stitch",
        "adds each expert's change at its own few elements, their mean where these overlap",
        localize_and_stitch,
        (
            _DENSITY,
            Parameter(
                "mask", "where the expert's change counts", "tensors", per_expert=True, may_lack=True, partial=True
            ),
            LAMBDA,
        ),
        "arXiv:2408.13656",
    )
)
register(
    MergeMethod(
        "emr",
        "elects one change for all experts, and can mask and rescale it for one of them",
        emr,
        (
            WEIGHT._replace(default=1.0),
            Parameter("task", "0 for all, k for the k-th expert", default=0, least=0, by_tensor=False),
            LAMBDA,
        ),
        "arXiv:2405.17461",
    )
)
