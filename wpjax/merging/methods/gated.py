"""Merging by mechanism: each component takes the changes of the experts that need it, by their scores (ours)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from wpjax.merging.methods.task_vectors import LAMBDA, WEIGHT
from wpjax.merging.registry import MergeMethod, Parameter, register
from wpjax.methods.registry import lazily


def score_gated(
    base: Float[np.ndarray, "*shape"],
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    weight: Sequence[float],
    gates: Callable[[int], Float[np.ndarray, "*shape"]],
    lambda_: float = 1.0,
) -> Float[np.ndarray, "*shape"]:
    """The base plus what the gates let through of each expert's change.

        merged = theta_base + lambda sum_k w_k g_k tau_k

    Args:
        base: a tensor of the base.
        experts: the same tensor of each expert.
        weight: w_k, one for each expert.
        gates: function from the number of an expert to g_k of each weight, which comes from its component's score
            (`wpjax.merging.gates`). So the gates of one expert are in memory at a time.
        lambda_: factor of the sum.

    >>> base, experts = np.zeros(2, np.float32), [np.float32([1, 2]), np.float32([3, 4])]
    >>> open_for = np.float32([[1, 0], [0, 1]])
    >>> score_gated(base, experts, weight=[1, 1], gates=lambda k: open_for[k]).tolist()
    [1.0, 4.0]
    """
    merged = base.copy()
    for k, (w, expert) in enumerate(zip(weight, experts, strict=True)):
        tau = expert - base
        tau *= gates(k)
        tau *= np.float32(lambda_ * w)
        merged += tau
    return merged


def _shared(name: str, help: str, kind: Any, default: Any, **more: Any) -> Parameter:
    return Parameter(name, help, kind, default=default, by_tensor=False, of_preparation=True, **more)


register(
    MergeMethod(
        "score_gated",
        "adds each expert's change at the components that its scores say it needs",
        score_gated,
        (
            WEIGHT._replace(default=1.0),
            LAMBDA,
            _shared(
                "scores",
                "a result of wpjax sweep (.nc), or published scores (.safetensors)",
                "word",
                None,
                per_expert=True,
            ),
            _shared(
                "by",
                "the ranking of a result; its ranking for sets if absent",
                "word",
                None,
                per_expert=True,
                may_lack=True,
            ),
            _shared(
                "kinds",
                "kinds of components, comma-separated; the finest of the scores if absent",
                "word",
                None,
                may_lack=True,
            ),
            _shared(
                "share", "share of the scored parameters that opens", "number", 0.1, per_expert=True, least=0, most=1
            ),
            _shared(
                "gate",
                "top: the best share opens; quantile: the place among all scores; score: the score itself",
                "word",
                "top",
                choices=("top", "quantile", "score"),
            ),
            _shared(
                "conflict",
                "where gates of several experts are open: the largest score takes it, the first expert, or the sum",
                "word",
                "largest",
                choices=("largest", "first", "sum"),
            ),
            _shared("per_parameter", "whether scores are divided by the component's size first", "switch", False),
            _shared("rest", "gate of weights that no scored component owns", "number", 0.0),
            _shared(
                "control",
                "other scores for the same components: none, random numbers, or delta, the mean squared change",
                "word",
                "none",
                choices=("none", "random", "delta"),
            ),
        ),
        "ours",
        prepare=lazily("wpjax.merging.gates", "prepare"),
    )
)
