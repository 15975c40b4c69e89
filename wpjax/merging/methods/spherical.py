"""Spherical interpolation between two models: slerp, and nuslerp, which can also turn two task vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from wpjax.merging.methods.task_vectors import WEIGHT
from wpjax.merging.registry import MergeError, MergeMethod, Parameter, register

_PARALLEL = 0.9995
"""Cosine in size above which slerp is a straight line, as in mergekit."""


def slerp(
    base: Float[np.ndarray, "*shape"], experts: Iterable[Float[np.ndarray, "*shape"]], *, t: float
) -> Float[np.ndarray, "*shape"]:
    """Slerp: along the great circle from the base to one expert, both taken as flat vectors (Shoemake 1985).

        merged = sin((1 - t) a) / sin a theta_base + sin(t a) / sin a theta        a: the angle between the two

    Where |cos a| > .9995, it is (1 - t) theta_base + t theta.

    Args:
        base: a tensor of the base.
        experts: the same tensor of the one expert.
        t: how far to go: 0 is the base, 1 the expert.

    >>> print(slerp(np.float32([1, 0]), [np.float32([0, 1])], t=0.5).round(3))
    [0.707 0.707]
    """
    (expert,) = experts
    norms = [float(np.sqrt(np.sum(v * v, dtype=np.float64))) for v in (base, expert)]
    norm_base, norm_expert = (norm if norm > 1e-8 else 1.0 for norm in norms)
    cosine = float(np.sum(base * expert, dtype=np.float64)) / (norm_base * norm_expert)
    if abs(cosine) > _PARALLEL:
        a, b = 1 - t, t
    else:
        angle = np.arccos(np.clip(cosine, -1, 1))
        a, b = (float(np.sin(part * angle) / np.sin(angle)) for part in (1 - t, t))
    return np.float32(a) * base + np.float32(b) * expert


def nuslerp(
    base: Float[np.ndarray, "*shape"] | None,
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    weight: Sequence[float],
    nuslerp_row_wise: bool = False,
    nuslerp_flatten: bool = True,
) -> Float[np.ndarray, "*shape"]:
    """Nuslerp, mergekit's: slerp from the first expert to the second with t = w_2 / (w_1 + w_2).

    With a base it is the task vectors that are interpolated, and their result is added to the base.

    Args:
        base: a tensor of the base, or None.
        experts: the same tensor of two experts.
        weight: w_1 and w_2.
        nuslerp_row_wise: whether, with `nuslerp_flatten` false, vectors lie along the first axis, not the last.
        nuslerp_flatten: whether the whole tensor is one vector.

    >>> print(nuslerp(None, [np.float32([1, 0]), np.float32([0, 1])], weight=[1, 1]).round(3))
    [0.707 0.707]
    """
    t = weight[1] / (weight[0] + weight[1])
    first, second = experts if base is None else (expert - base for expert in experts)
    if nuslerp_flatten:
        turned = _turned(first.reshape(-1), second.reshape(-1), t)
    elif nuslerp_row_wise:
        turned = _turned(first.swapaxes(0, -1), second.swapaxes(0, -1), t).swapaxes(0, -1)
    else:
        turned = _turned(first, second, t)
    turned = turned.reshape(first.shape)
    return turned if base is None else base + turned


def _turned(first: np.ndarray, second: np.ndarray, t: float) -> np.ndarray:
    """Slerp of vectors that lie along the last axis; a straight line where they are parallel."""
    units = [
        v / np.maximum(np.sqrt(np.sum(v * v, axis=-1, keepdims=True, dtype=np.float32)), np.float32(1e-7))
        for v in (first, second)
    ]
    cosine = np.clip(np.sum(units[0] * units[1], axis=-1, keepdims=True, dtype=np.float32), -1, 1)
    is_parallel = 1 - cosine * cosine <= 1e-16
    angle = np.arccos(np.where(is_parallel, np.float32(0), cosine))
    a, b = (
        np.where(is_parallel, np.float32(line), np.sin(np.float32(line) * angle) / np.sin(angle)) for line in (1 - t, t)
    )
    return a * first + b * second


def _check_sum(values: Mapping[str, Any]) -> None:
    if abs(sum(values["weight"])) < 1e-6:
        first, second = values["weight"]
        raise MergeError(f"the weights {first:g} and {second:g} sum to nothing, so they say no direction; change them")


register(
    MergeMethod(
        "slerp",
        "goes along the great circle from the base to an expert",
        slerp,
        (Parameter("t", "how far: 0 is the base, 1 the expert"),),
        "Shoemake 1985",
        n_experts=(1, 1),
        in_mergekit=True,
    )
)
register(
    MergeMethod(
        "nuslerp",
        "goes along the great circle between two experts, or with a base between their changes",
        nuslerp,
        (
            WEIGHT,
            Parameter("nuslerp_row_wise", "whether vectors lie along the first axis", "switch", default=False),
            Parameter("nuslerp_flatten", "whether a whole tensor is one vector", "switch", default=True),
        ),
        "mergekit",
        base="optional",
        n_experts=(2, 2),
        check=_check_sum,
        in_mergekit=True,
    )
)
