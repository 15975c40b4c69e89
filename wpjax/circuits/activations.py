"""Activation patching: the value at one place of the corrupted run put into the clean run, for all places at once.

    effect(place) = F(clean run with the corrupted run's value at the place) - F(clean run)

(causal mediation, arXiv 2004.12265; best practices, arXiv 2309.16042). A map of all heads, or of all layers and
positions, is one compiled program: layer by layer the patched streams run side by side, and only through later layers.
"""

from __future__ import annotations

import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.circuits.contrast import Contrast, Effects
from wpjax.errors import WpjaxError
from wpjax.metrics.metric import Metric, over_prompts
from wpjax.models.block import LayerPass
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, forward, take_layer
from wpjax.models.edits import CHANNELS
from wpjax.models.layouts import Causal
from wpjax.models.sites import Site

PATTERN = "pattern"
"""The place "which tokens a head attends to": its queries and keys are patched, its values are not."""

Place: TypeAlias = Site | Literal["pattern"]

TOKENS_AT_ONCE = 1024
"""Tokens that run side by side, about: enough to be worth the weights that are read for them."""


def rows_at_once(metric: Metric) -> int:
    """Number of versions of a metric's prompts that run side by side."""
    n_prompts, n_tokens = metric.tokens.ids.shape
    return max(1, TOKENS_AT_ONCE // (min(n_prompts, 16) * n_tokens))


def onward(
    cfg: ModelConfig, params: Params, resid: Float[Array, "*n T D"], start: Int[Array, ""] | int, stop: int
) -> Float[Array, "*n T D"]:
    """The stream after layers `start` to `stop - 1`.

    Args:
        cfg: the model.
        params: its parameters.
        resid: the stream before layer `start`.
        start: the first layer to run; it may be traced.
        stop: the layer before which the run ends.
    """
    layout = Causal.of(resid.shape[-2])

    def through(layer: Array, x: Array) -> Array:
        return block(cfg, take_layer(params["blocks"], layer), layer)(x, layout).resid_post

    rows = resid.reshape(-1, *resid.shape[-2:])
    return jax.lax.fori_loop(start, stop, through, rows).reshape(resid.shape)


def read_rows(cfg: ModelConfig, params: Params, metric: Metric, resid: Float[Array, "P B T D"]) -> Float[Array, "P B"]:
    """The metric of P versions of the stream after the layer that it reads."""
    return jax.vmap(lambda x: metric.read(cfg, params, metric.pick(x)))(resid)


def activation_patch(
    cfg: ModelConfig, params: Params, contrast: Contrast, site: Place | str, *, by_position: bool = False
) -> Effects:
    """Patch every layer at a site: each of its heads (KV groups, neurons) alone, if the site has such.

    Args:
        cfg: the model.
        params: its parameters.
        contrast: the prompts and the metric. With `contrast.swapped` the clean values go into the corrupted run.
        site: where: any `Site` or its name, say "resid_pre", "z" (what a head mixes; its result is this by W_O), "q",
            "mlp_out"; or "pattern" for what each head attends to.
        by_position: whether each token position is patched alone. If not, all are patched together. Of prompts of
            different lengths there is only `change`, by prompt, and no `share`.

    Returns:
        the effects. Axes: layer; then head, KV group or neuron, at sites that have them; then position, if
        `by_position`; then prompt.

    Raises:
        WpjaxError: there is no such site.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> two = wp.contrast(model, ["the fox and the"], ["the dog and the"], answers=[" fox"], foils=[" dog"])
    >>> heads = wp.activation_patch(model.cfg, model.params, two, "z")
    >>> stream = wp.activation_patch(model.cfg, model.params, two, "resid_pre", by_position=True)
    >>> heads.share.shape, stream.share.shape == (model.cfg.n_layers, two.clean.tokens.ids.shape[1])
    ((8, 8), True)
    """
    if site != PATTERN and site not in list(Site):
        raise WpjaxError(f"unknown site {site!r}; sites: {', '.join(Site)}, {PATTERN}")
    place: Place = "pattern" if site == PATTERN else Site(site)
    options = {"site": place, "by_position": by_position, "at_once": rows_at_once(contrast.clean)}
    change, clean, corrupted = over_prompts(tuple(contrast), _map, cfg, params, axis=2, **options)
    n_positions = contrast.clean.tokens.ids.shape[1] if by_position else 1
    by_channel = place == PATTERN or place in CHANNELS
    axes = ((change.shape[1] // n_positions,) if by_channel else ()) + ((n_positions,) if by_position else ())
    lengths = np.asarray(contrast.clean.tokens.lengths) if by_position else None
    return Effects(change.reshape(len(change), *axes, change.shape[-1]), clean[0, 0], corrupted[0, 0], lengths)


def patched_value(ours: LayerPass, theirs: LayerPass, place: Place) -> tuple[Site, Array, Array]:
    """The site that a patch of a place sets, and its values in the two runs.

    Args:
        ours: the pass through the layer that is patched.
        theirs: the pass that the patch takes its values from.
        place: the place.
    """
    if place != PATTERN:
        return Site(place), ours.at(Site(place)), theirs.at(Site(place))
    known = {Site.Q: theirs.q, Site.K: theirs.k, Site.V: ours.v}
    return Site.Z, ours.z, ours.block(ours.resid_pre, ours.layout, known=known).z


@functools.partial(jax.jit, static_argnames=("cfg", "site", "by_position", "at_once"))
def _map(
    cfg: ModelConfig,
    params: Params,
    metrics: tuple[Metric, ...],
    *,
    site: Place,
    by_position: bool,
    at_once: int,
) -> tuple[Float[Array, "L P B"], Float[Array, "1 1 B"], Float[Array, "1 1 B"]]:
    """The changes by all places of all layers, and the metrics of the two runs."""
    host = metrics[0]
    stop, n_tokens = host.layer + 1, host.tokens.ids.shape[1]
    layout = Causal.of(n_tokens)
    runs = [m.run(cfg, params, sites=(Site.RESID_PRE,)) for m in metrics]
    scores = [m.read(cfg, params, m.pick(run.resid)) for m, run in zip(metrics, runs, strict=True)]

    def of_layer(layer: Array) -> Float[Array, "P B"]:
        one = block(cfg, take_layer(params["blocks"], layer), layer)
        ours, theirs = (one(run.sites[Site.RESID_PRE][layer], layout) for run in runs)
        where, old, new = patched_value(ours, theirs, site)
        n_channels = old.shape[2] if where in CHANNELS else 1
        n_positions = n_tokens if by_position else 1

        def patched(number: Array) -> Float[Array, "B T D"]:
            """The stream after the layer with patch `number`: channel first, position last."""
            channel, position = number // n_positions, number % n_positions
            chosen = jnp.arange(n_tokens) == position if by_position else jnp.ones(n_tokens, bool)
            chosen = chosen[None, :, None]
            if where in CHANNELS:
                chosen = chosen & (jnp.arange(n_channels) == channel)
            chosen = chosen.reshape(chosen.shape + (1,) * (old.ndim - 3))
            return ours.replaced({where: jnp.where(chosen, new, old)}).resid_post

        def some(numbers: Int[Array, " P"]) -> Float[Array, "P B"]:
            rows = onward(cfg, params, jax.vmap(patched)(numbers), layer + 1, stop)
            return read_rows(cfg, params, host, rows)

        n = n_channels * n_positions
        size = min(at_once, n)
        numbers = jnp.minimum(jnp.arange(-(-n // size) * size), n - 1).reshape(-1, size)  # the last chunk is filled up
        return jax.lax.map(some, numbers).reshape(-1, scores[0].shape[0])[:n]

    changed = jax.lax.map(of_layer, jnp.arange(stop))
    return changed - scores[0], scores[0][None, None], scores[1][None, None]


@functools.partial(jax.jit, static_argnames="cfg")
def attention_pattern(cfg: ModelConfig, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "L B H T S"]:
    """How much each head attends from each token (T) to each token (S): rows sum to 1.

    The mix is linear in the values. So attention to token s is what a head mixes if the value of token s is 1 and all
    others are 0. Attention itself is computed where it always is, with its windows and bounds.

    Args:
        cfg: the model.
        params: its parameters.
        tokens: token ids.

    >>> from wpjax.models.decoder import init_params
    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)
    >>> pattern = attention_pattern(cfg, init_params(cfg, jax.random.key(0)), jnp.arange(6)[None])
    >>> pattern.shape, bool(jnp.allclose(pattern.sum(-1), 1))
    ((2, 1, 4, 6, 6), True)
    """
    before = forward(cfg, params, tokens, sites=(Site.RESID_PRE,), logits=False).sites[Site.RESID_PRE]
    n_rows, n_tokens = tokens.shape
    layout, width = Causal.of(n_tokens), cfg.d_head
    n_chunks = -(-n_tokens // width)
    # One value per source token, `d_head` of them at a time: [chunks, S, Dh].
    ones = jnp.moveaxis(jnp.eye(n_tokens, n_chunks * width).reshape(n_tokens, n_chunks, width), 1, 0)

    def of_layer(layer: Array) -> Float[Array, "B H T S"]:
        one = block(cfg, take_layer(params["blocks"], layer), layer)
        own = one(before[layer], layout)

        def chunk(values: Float[Array, "S Dh"]) -> Float[Array, "B T H Dh"]:
            v = jnp.broadcast_to(values[None, :, None], (n_rows, n_tokens, cfg.n_kv_heads, width))
            return one(before[layer], layout, known={Site.Q: own.q, Site.K: own.k, Site.V: v}).z

        mixed = jnp.moveaxis(jax.lax.map(chunk, ones), 0, 3)  # [B, T, H, chunks, Dh]
        return jnp.moveaxis(mixed.reshape(*mixed.shape[:3], -1)[..., :n_tokens], 2, 1)

    return jax.lax.map(of_layer, jnp.arange(cfg.n_layers))
