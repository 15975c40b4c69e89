"""Effects by the definition: the whole model, run with `Blend` leaves, one mask at a time.

This is what the fast sweeps are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from wpjax.components import Component
from wpjax.metrics.metric import Metric, scores
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.patching import PatchMask, patch


def patched_score(
    cfg: ModelConfig, host: Params, donor: Params, mask: PatchMask, metric: Metric
) -> Float[np.ndarray, " B"]:
    """The metric of each prompt with one set of components taken from the donor; one program serves all masks."""
    return scores(cfg, patch(host, donor, mask), metric)


def reference_changes(
    cfg: ModelConfig, host: Params, donor: Params, components: Sequence[Component], metric: Metric
) -> Float[np.ndarray, "C B"]:
    """The change of the metric by each component, one full run each."""
    before = patched_score(cfg, host, donor, PatchMask.empty(cfg), metric)
    after = [patched_score(cfg, host, donor, PatchMask.of(cfg, [c]), metric) for c in components]
    return np.stack(after) - before
