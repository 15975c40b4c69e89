"""AIM: activation-informed merging (arXiv:2502.02421)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from wpjax.merging.methods.task_vectors import LAMBDA, WEIGHT, task_arithmetic
from wpjax.merging.registry import MergeMethod, Parameter, register


def relaxed(
    base: Float[np.ndarray, "*shape"],
    merged: Float[np.ndarray, "*shape"],
    activations: Float[np.ndarray, "..."],
    omega: float,
) -> Float[np.ndarray, "*shape"]:
    """A merged tensor that stays nearer to the base where the base is much used.

        base + (merged - base) (1 - (1 - omega) |a| / max |a|)

    Args:
        base: a tensor of the base.
        merged: the same tensor after any merge.
        activations: a, the mean size of what the base puts into each input channel: [in] for a matrix that lies as
            [out, in], or anything that broadcasts to the tensor. Of zeros alone, nothing changes.
        omega: what is left of a change at the most used channel; 1 leaves the merge as it is.

    >>> base, merged = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
    >>> relaxed(base, merged, np.float32([2, 1]), omega=0.5).tolist()
    [[0.5, 0.75]]
    """
    used = np.abs(activations).astype(np.float32)
    most = used.max(initial=np.float32(0))
    if most <= 0:
        return merged
    return base + (merged - base) * (1 - np.float32(1 - omega) * used / most)


def aim(
    base: Float[np.ndarray, "*shape"],
    experts: Iterable[Float[np.ndarray, "*shape"]],
    *,
    weight: Sequence[float],
    activations: Float[np.ndarray, "..."] | None,
    omega: float = 0.4,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Float[np.ndarray, "*shape"]:
    """Task arithmetic, relaxed by the base's activations (`relaxed`).

    The paper puts AIM on top of any method. `relaxed` does; this method has task arithmetic below.

    Args:
        base: a tensor of the base.
        experts: the same tensor of each expert.
        weight: one factor for each expert.
        activations: as for `relaxed`; None for a tensor of which none are known, which is not relaxed.
        omega: as for `relaxed`.
        normalize: whether to divide by the sum of the weights.
        lambda_: factor of the sum.
    """
    merged = task_arithmetic(base, experts, weight=weight, normalize=normalize, lambda_=lambda_)
    return merged if activations is None else relaxed(base, merged, activations, omega)


register(
    MergeMethod(
        "aim",
        "adds the changes, less where the base is much used",
        aim,
        (
            WEIGHT,
            Parameter(
                "activations", "mean size of what goes into each input channel of the base", "tensors", partial=True
            ),
            Parameter("omega", "what is left of a change at the most used channel", default=0.4, least=0, most=1),
            Parameter("normalize", "whether the sum is divided by the weights", "switch", default=False),
            LAMBDA,
        ),
        "arXiv:2502.02421",
    )
)
