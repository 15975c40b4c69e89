"""Effects by the definition: the whole model up to the anchor, run with `Blend` leaves, one mask at a time.

This is what the fast sweep is tested against, and how any set of components is scored.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from wpjax.anchors import Anchor
from wpjax.behaviours import PromptBatch, Tokens
from wpjax.components import Component
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.patching import PatchMask, patch


@functools.partial(jax.jit, static_argnames="cfg")
def _patched_score(
    cfg: ModelConfig, host: Params, donor: Params, mask: PatchMask, anchor: Anchor, tokens: Tokens
) -> Float[Array, " B"]:
    return anchor.score(cfg, patch(host, donor, mask), tokens)


def patched_score(
    cfg: ModelConfig, host: Params, donor: Params, mask: PatchMask, anchor: Anchor, batch: PromptBatch
) -> Float[np.ndarray, " B"]:
    """Anchor score of each prompt with one set of components taken from the donor; one program serves all masks."""
    return np.asarray(_patched_score(cfg, host, donor, mask, anchor, batch.with_instruction))


def reference_changes(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    components: Sequence[Component],
    anchor: Anchor,
    batch: PromptBatch,
) -> Float[np.ndarray, "C B"]:
    """The change of the anchor score by each component, one full run each."""
    before = patched_score(cfg, host, donor, PatchMask.empty(cfg), anchor, batch)
    after = [patched_score(cfg, host, donor, PatchMask.of(cfg, [c]), anchor, batch) for c in components]
    return np.stack(after) - before
