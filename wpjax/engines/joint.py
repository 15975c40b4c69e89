"""Joint patches: the metric under many sets of components in one program, the weights shared by all of them.

    x W  ->  where(m, x W_E, x W_B)                         output channels (queries, keys, values, gates, MLP inputs)
    z W  ->  where(m, 0, z) W_B + where(m, z, 0) W_E        input channels (W_O, W_out)

This is exact. `vmap` runs over the masks m alone (docs/method.md, "Joint patches"; ours).

A set costs two matrix products for one. Two shortcuts save most of that:

- If no mask of a batch opens anything of a matrix in a layer, the product with W_E is left out there.
- If the masks together open few channels in a layer, W_E is cut down to these channels there.

Prompts are packed (`engines.packing`). Letters: M masks, L layers, n channels of a layer, K channels that are kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, MutableMapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wpjax.checkpoints.convert import flatten, unflatten
from wpjax.components import LEAVES
from wpjax.engines.memory import bytes_of_row, bytes_per_row, device_budget, rows_together
from wpjax.engines.packing import Packing, pack
from wpjax.metrics.metric import PROMPTS_AT_ONCE, Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, decoder
from wpjax.models.leaves import Blend
from wpjax.patching import PatchedParams, PatchMask, patch
from wpjax.runtime.batching import map_batches
from wpjax.runtime.placement import Placement

MOST_TOUCHED = 0.25
"""The largest share of a layer's channels for which cutting down the donor's weights is worth it."""

TOKENS_AT_ONCE = 16384
"""Prompt tokens of one program, at most; more prompts are scored in several runs."""


class Touched(NamedTuple):
    """The channels of one unit that the masks of a batch open together, in layers where these are at most K.

    Attributes:
        channels: [L, K], the channels of each layer, filled up with 0.
        place: [L, n], the place of each channel in `channels`; of no meaning for channels that are not there.
        fits: [L], true in layers that open at most K channels. None: all layers do.
    """

    channels: Int[np.ndarray | Array, "L K"]
    place: Int[np.ndarray | Array, "L n"]
    fits: Bool[np.ndarray | Array, " L"] | None


def touched(opened: Bool[np.ndarray, "M L n"]) -> Touched | None:
    """The channels that a batch of masks opens together.

    K is chosen so that all layers together take the fewest channels. Each layer takes K of them or, if it needs more,
    all n.

    Args:
        opened: the masks of one unit.

    Returns:
        the channels; None if every layer opens so many that cutting down is not worth it.

    >>> opened = np.zeros((2, 1, 8), bool)
    >>> opened[0, 0, 5] = opened[1, 0, 2] = True  # two masks, each with one channel of eight open
    >>> touched(opened).channels.tolist()
    [[2, 5]]
    """
    union: Bool[np.ndarray, "L n"] = np.asarray(opened.any(0))
    n = union.shape[1]
    counts: Int[np.ndarray, " L"] = np.asarray(np.count_nonzero(union, axis=1))
    widths = {w for w in map(_rounded, counts.tolist()) if w <= max(1, MOST_TOUCHED * n)}
    if not widths:
        return None
    width = min(widths, key=lambda w: (sum(n if count > w else w for count in counts), w))
    fits: Bool[np.ndarray, " L"] = np.asarray(counts <= width)
    channels, place = np.zeros((len(union), width), np.int32), np.zeros(union.shape, np.int32)
    for layer in np.flatnonzero(fits):
        opens = np.flatnonzero(union[layer])
        channels[layer, : len(opens)] = opens
        place[layer, opens] = np.arange(len(opens))
    return Touched(channels, place, None if fits.all() else fits)


def _rounded(count: int) -> int:
    """A count rounded up to a multiple of an eighth of the next power of two: few shapes are few programs."""
    step = max(1, (1 << (max(count, 1) - 1).bit_length()) // 8)
    return max(-(-count // step) * step, 1)


def _narrowed(
    params: PatchedParams, few: Mapping[str, Touched], used: Mapping[str, Bool[Array, " L"]]
) -> PatchedParams:
    """Patched parameters with both shortcuts of this module: see `breadth` and `narrow` of `Blend`.

    Args:
        params: parameters with `Blend` leaves.
        few: unit -> its touched channels, for units that have few of them.
        used: unit -> true in layers where any mask opens a channel of it.
    """

    def narrowed(path: str, leaf: Array | Blend) -> Array | Blend:
        unit, axis = LEAVES[path]
        if not isinstance(leaf, Blend) or unit not in used or axis is None:
            return leaf
        breadth = jnp.asarray(used[unit], jnp.int32)
        if unit not in few:
            return dataclasses.replace(leaf, breadth=breadth)
        channels, place, fits = few[unit]
        expert = jax.vmap(lambda w, i: jnp.take(w, i, axis=axis))(leaf.expert, jnp.asarray(channels))
        cut_down = dataclasses.replace(leaf, expert=expert, channels=jnp.asarray(channels), place=jnp.asarray(place))
        if fits is None:
            return dataclasses.replace(cut_down, breadth=breadth)
        # Per layer: 0 if nothing is open, 1 if the cut-down form will do, 2 if all channels are needed.
        return dataclasses.replace(leaf, narrow=cut_down, breadth=jnp.where(fits, breadth, 2 * breadth))

    return unflatten({path: narrowed(path, leaf) for path, leaf in flatten(params).items()})


@functools.partial(jax.jit, static_argnames="cfg")
def scores_at_once(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    few: Mapping[str, Touched],
    used: Mapping[str, Bool[Array, " L"]],
    metric: Metric,
    packing: Packing | None,
    units: Mapping[str, Bool[Array, "M ..."]],
) -> Float[Array, "M B"]:
    """One batch of `scores_of_sets`: the metric of each prompt with each of M sets, in one program.

    Args:
        cfg: the model.
        host: parameters that receive the patches.
        donor: parameters that the components come from.
        few: unit -> the channels that the sets open together, for units where these are few (`touched`).
        used: unit -> true in layers where any of the sets opens something.
        metric: what is measured, on B prompts.
        packing: the packing of the metric's prompts. None for a metric that holds a state: each prompt then needs a
            row of its own.
        units: unit -> the masks of the M sets, stacked along the first axis. Units that are absent are closed.
    """

    def patched(mask: Mapping[str, Array]) -> PatchedParams:
        return _narrowed(patch(host, donor, PatchMask(mask)), few, used)

    def run(mask: Mapping[str, Array]) -> Float[Array, "B R D"]:
        """The stream at the positions that are read, with one set patched."""
        if packing is None:
            return metric.pick(metric.run(cfg, patched(mask)).resid)
        ids, packed = jnp.asarray(packing.ids), packing.packed
        out = decoder(cfg, patched(mask))(ids, stop=metric.layer + 1, logits=False, layout=packed)
        return packing.pick(out.resid)[0]

    def read(mask: Mapping[str, Array], picked: Float[Array, "B R D"]) -> Float[Array, " B"]:
        """The metric from that stream, for metrics that read logits: a few prompts at a time."""
        params = patched(mask)

        def one(b: Array) -> Float[Array, ""]:
            return metric.take(b[None]).read(cfg, params, picked[b][None])[0]

        return jax.lax.map(one, jnp.arange(len(metric)), batch_size=PROMPTS_AT_ONCE)

    picked = jax.vmap(run)(dict(units))
    if metric.readout.reads_logits:  # set by set, as logits of the whole vocabulary take much memory
        return jax.lax.map(lambda at: read(*at), (dict(units), picked))
    return jax.vmap(lambda mask, x: metric.read(cfg, patched(mask), x))(dict(units), picked)


def scores_of_sets(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    masks: Sequence[PatchMask],
    metric: Metric,
    *,
    budget: int | None = None,
    fits: MutableMapping[str, int] | None = None,
) -> Float[np.ndarray, "M B"]:
    """The metric of each prompt with each of M sets of components taken from the donor.

    Args:
        cfg: the model.
        host: parameters that receive the patches.
        donor: parameters that the components come from.
        masks: the M sets, boolean. Units that are absent are closed.
        metric: what is measured, on B prompts.
        budget: bytes for the activations of the sets that run at once; None to choose from the device.
        fits: the batch sizes that fit into memory, as `map_batches` finds them out. Give one dict to several calls, so
            that later ones know.

    Returns:
        [M, B], F of each patched model and prompt.

    >>> import jax
    >>> from wpjax.behaviours import Tokens
    >>> from wpjax.engines.reference import patched_score
    >>> from wpjax.metrics.readouts import Projection
    >>> from wpjax.models.decoder import init_params
    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 2 layers, D = 16, 4 heads, 2 KV groups
    >>> host = init_params(cfg, jax.random.key(0))
    >>> donor = jax.tree.map(lambda w: 1.5 * w, host)
    >>> tokens, last = Tokens(jnp.arange(8).reshape(2, 4), jnp.array([4, 4])), jnp.full((2, 1), 3)
    >>> metric = Metric(tokens, last, jnp.ones((2, 1)), Projection(jnp.ones(16) / 4), 1, "anchor")  # reads layer 1
    >>> masks = [PatchMask.of(cfg, names) for names in (["L0.head.1", "L1.mlp"], ["L1"])]
    >>> fast = scores_of_sets(cfg, host, donor, masks, metric)
    >>> slow = [patched_score(cfg, host, donor, mask, metric) for mask in masks]
    >>> fast.shape, bool(np.allclose(fast, slow, atol=1e-5))
    ((2, 2), True)
    """
    fits = {} if fits is None else fits
    names = dict.fromkeys(unit for mask in masks for unit in mask.units)
    units: dict[str, Bool[np.ndarray, "M ..."]] = {}
    for name in names:
        shape = next(mask.units[name].shape for mask in masks if name in mask.units)
        stacked = np.stack([np.asarray(mask.units.get(name, np.zeros(shape, bool))) for mask in masks])
        if stacked.any():
            units[name] = stacked
    if not units:  # nothing is patched anywhere: keep one unit, so that the sets can be counted
        units = {"final_norm": np.zeros(len(masks), bool)}

    placement = Placement.of((host, donor))
    layered = [name for name, unit in units.items() if unit.ndim == 3]  # [M, L, n]: heads, KV groups, neurons
    by_unit = [touched(units[name]) for name in layered]
    # Memory that the products with the donor's weights take beside the host's.
    donor_share = MOST_TOUCHED if all(few is not None and few.fits is None for few in by_unit) else 1.0

    def run(rows: Int[np.ndarray, " N"]) -> Float[np.ndarray, "N M"]:
        """All sets on some of the prompts."""
        part = metric if len(rows) == len(metric) else metric.take(jnp.asarray(rows))
        packing = None if metric.held is not None else pack(part)
        n_tokens, n_keys = metric.tokens.ids[rows].size, metric.tokens.ids.shape[1]
        if packing is None:
            plain = bytes_of_row(cfg, n_tokens, n_keys, n_model=placement.n_model)
        else:
            plain = bytes_per_row(cfg, packing, placement.n_model)
        set_bytes = int((1 + donor_share) * plain)
        tokens = n_tokens if packing is None else packing.n_tokens
        available = budget or device_budget()
        most = max(1, available // set_bytes) if available else 2 * (rows_together(set_bytes, tokens) or 1)

        def score(sets: Int[np.ndarray, " N"]) -> Array:
            """Some of the sets, in one program."""
            batch = {name: unit[sets] for name, unit in units.items()}
            few = {name: channels for name in layered if (channels := touched(batch[name])) is not None}
            used = {name: batch[name].any((0, 2)) for name in layered}
            return placement.call(scores_at_once, (cfg,), (host, donor, few, used, part, packing), (batch,))

        return map_batches(len(masks), most, score, what="joint patches", fits=fits, parts=placement.n_patch).T

    return map_batches(len(metric), max(16, TOKENS_AT_ONCE // metric.tokens.ids.shape[1]), run, fits=fits).T
