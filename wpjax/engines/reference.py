"""Effects by their definition: the whole patched model is run, one mask at a time.

It is slow and simple. The fast engines are tested against it.
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
    """The metric of each prompt, F, with one set of components taken from the donor.

    The masks share one compiled program.

    Args:
        cfg: the model.
        host: parameters that receive the patch.
        donor: parameters that the components come from.
        mask: what is patched.
        metric: what is measured, on B prompts.

    Returns:
        [B], in the metric's units.
    """
    return scores(cfg, patch(host, donor, mask), metric)


def reference_changes(
    cfg: ModelConfig, host: Params, donor: Params, components: Sequence[Component], metric: Metric
) -> Float[np.ndarray, "C B"]:
    """How much each component changes the metric, by one full run each.

    Args:
        cfg: the model.
        host: parameters that receive the patches.
        donor: parameters that the components come from.
        components: the C components, each patched alone.
        metric: what is measured, on B prompts.

    Returns:
        [C, B], F(patched) - F(host) for each component and prompt.

    >>> import jax, jax.numpy as jnp
    >>> from wpjax.behaviours import Tokens
    >>> from wpjax.metrics.readouts import Projection
    >>> from wpjax.models.decoder import init_params
    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 2 layers, D = 16, 4 heads, 2 KV groups
    >>> host = init_params(cfg, jax.random.key(0))
    >>> donor = jax.tree.map(lambda w: 1.5 * w, host)
    >>> tokens, last = Tokens(jnp.arange(8).reshape(2, 4), jnp.array([4, 4])), jnp.full((2, 1), 3)
    >>> metric = Metric(tokens, last, jnp.ones((2, 1)), Projection(jnp.ones(16) / 4), 1, "anchor")  # reads layer 1
    >>> reference_changes(cfg, host, donor, [Component("head", 0, 1), Component("mlp", 1)], metric).shape
    (2, 2)
    """
    before = patched_score(cfg, host, donor, PatchMask.empty(cfg), metric)
    after = [patched_score(cfg, host, donor, PatchMask.of(cfg, [c]), metric) for c in components]
    return np.stack(after) - before
