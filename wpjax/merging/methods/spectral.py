"""Methods on the singular values of the changes: isotropic merging and task singular vectors.

They are for matrices. Other tensors (norms, biases) get the mean of the changes, as in the papers' code.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from wpjax.merging.methods.task_vectors import LAMBDA, changes
from wpjax.merging.registry import MergeMethod, register


def isotropic(
    base: Float[np.ndarray, "*shape"], experts: Iterable[Float[np.ndarray, "*shape"]], *, lambda_: float = 1.0
) -> Float[np.ndarray, "*shape"]:
    """Iso-C: the sum of the changes with all its singular values made equal to their mean (arXiv:2502.04959).

        sum_i tau_i = U diag(s) V^T        merged = theta_base + lambda mean(s) U V^T

    Args:
        base: a tensor of the base.
        experts: the same tensor of each expert.
        lambda_: factor of the change.

    >>> base, experts = np.zeros((2, 2), np.float32), [np.float32([[3, 0], [0, 0]]), np.float32([[0, 0], [0, 1]])]
    >>> print(isotropic(base, experts).round(3))
    [[2. 0.]
     [0. 2.]]
    """
    taus = list(changes(base, experts))
    total = sum(taus[1:], taus[0])
    if base.ndim != 2:
        return base + np.float32(lambda_ / len(taus)) * total
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    return base + np.float32(lambda_ * s.mean(dtype=np.float64)) * (u @ vt)


def tsv(
    base: Float[np.ndarray, "*shape"], experts: Iterable[Float[np.ndarray, "*shape"]], *, lambda_: float = 1.0
) -> Float[np.ndarray, "*shape"]:
    """TSV-M: each expert's first singular vectors, made orthogonal to those of the others (arXiv:2412.00081).

    Of N experts each keeps the first k = floor(r / N) singular vectors of its change, r the smaller side. They stand
    beside each other in U and V, with their values in s. The nearest matrices with orthonormal columns are U' = P Q^T
    of U = P diag(.) Q^T, and V' likewise.

        merged = theta_base + lambda U' diag(s) V'^T

    Args:
        base: a tensor of the base.
        experts: the same tensor of each expert.
        lambda_: factor of the change.

    >>> base, experts = np.zeros((2, 2), np.float32), [np.float32([[3, 0], [0, 1]]), np.float32([[0, 0], [0, 2]])]
    >>> print(tsv(base, experts).round(3))
    [[3. 0.]
     [0. 2.]]
    """
    taus = list(changes(base, experts))
    k = min(base.shape) // len(taus) if base.ndim == 2 else 0
    if k == 0:
        return base + np.float32(lambda_ / len(taus)) * sum(taus[1:], taus[0])
    parts = [np.linalg.svd(tau, full_matrices=False) for tau in taus]
    u = _orthonormal(np.concatenate([part[0][:, :k] for part in parts], axis=1))
    s = np.concatenate([part[1][:k] for part in parts])
    v = _orthonormal(np.concatenate([part[2][:k].T for part in parts], axis=1))
    return base + np.float32(lambda_) * ((u * s) @ v.T)


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """The nearest matrix with orthonormal columns."""
    p, _, qt = np.linalg.svd(columns, full_matrices=False)
    return p @ qt


register(
    MergeMethod(
        "isotropic",
        "makes all singular values of the summed changes equal",
        isotropic,
        (LAMBDA,),
        "arXiv:2502.04959",
    )
)
register(
    MergeMethod(
        "tsv",
        "makes the experts' first singular vectors orthogonal to each other",
        tsv,
        (LAMBDA,),
        "arXiv:2412.00081",
    )
)
