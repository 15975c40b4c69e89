"""Effects by the definition: the whole model, run with `Blend` leaves, one mask at a time.

This is what the fast sweep is tested against, and how any set of components is scored.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wpjax.components import Component
from wpjax.metrics import Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.patching import PatchMask, patch

PROMPTS_AT_ONCE = 16


@functools.partial(jax.jit, static_argnames="cfg")
def _patched_score(
    cfg: ModelConfig, host: Params, donor: Params, mask: PatchMask, metric: Metric
) -> Float[Array, " B"]:
    return metric(cfg, patch(host, donor, mask))


def patched_score(
    cfg: ModelConfig, host: Params, donor: Params, mask: PatchMask, metric: Metric
) -> Float[np.ndarray, " B"]:
    """The metric of each prompt with one set of components taken from the donor; one program serves all masks."""
    n = len(metric)
    if n <= PROMPTS_AT_ONCE:
        return np.asarray(_patched_score(cfg, host, donor, mask, metric))
    parts = []
    for first in range(0, n, PROMPTS_AT_ONCE):
        rows = np.minimum(np.arange(first, first + PROMPTS_AT_ONCE), n - 1)  # the last part is filled up
        scores = _patched_score(cfg, host, donor, mask, metric.take(jnp.asarray(rows)))
        parts.append(np.asarray(scores)[: n - first])
    return np.concatenate(parts)


def reference_changes(
    cfg: ModelConfig, host: Params, donor: Params, components: Sequence[Component], metric: Metric
) -> Float[np.ndarray, "C B"]:
    """The change of the metric by each component, one full run each."""
    before = patched_score(cfg, host, donor, PatchMask.empty(cfg), metric)
    after = [patched_score(cfg, host, donor, PatchMask.of(cfg, [c]), metric) for c in components]
    return np.stack(after) - before
