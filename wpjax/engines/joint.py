"""Joint patches: the metric under many sets of components in one program, the weights shared by all of them.

    x W  ->  where(m, x W_E, x W_B)                         output channels (queries, keys, values, units, inputs)
    z W  ->  where(m, 0, z) W_B + where(m, z, 0) W_E        input channels (W_O, W_out)

exactly, under `vmap` over the masks m alone (docs/method.md, "Joint patches"; ours).
A matrix that no mask of a batch opens in some layer
costs nothing there. Where the masks together touch few channels of a layer, W_E holds those only, so that a set costs
little more there than a plain forward pass, not two; layers where they touch more take all of it. Prompts are packed.
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

MOST_TOUCHED = 0.25
"""Share of a unit's channels in a layer beyond which all of the donor's are used there."""

TOKENS_AT_ONCE = 16384
"""Prompt tokens of a program; more prompts are answered in parts."""


class Touched(NamedTuple):
    """The channels of one unit that any mask of a batch opens, in layers where they are K at most.

    Attributes:
        channels: [L, K], which; filled up with 0.
        slot: [L, n], where in `channels` each one stands; of others, anywhere.
        fits: [L], where they are no more than K; None where that is in every layer.
    """

    channels: Int[np.ndarray | Array, "L K"]
    slot: Int[np.ndarray | Array, "L n"]
    fits: Bool[np.ndarray | Array, " L"] | None


def touched(opened: Bool[np.ndarray, "M L n"]) -> Touched | None:
    """The channels that a batch of units opens; None if they are too many in every layer to be worth it.

    K is what costs least: each layer takes K channels, or, if it needs more, all of its n.
    """
    union: Bool[np.ndarray, "L n"] = np.asarray(opened.any(0))
    n = union.shape[1]
    counts: Int[np.ndarray, " L"] = np.asarray(np.count_nonzero(union, axis=1))
    widths = {w for w in map(_rounded, counts.tolist()) if w <= max(1, MOST_TOUCHED * n)}
    if not widths:
        return None
    width = min(widths, key=lambda w: (sum(n if count > w else w for count in counts), w))
    fits: Bool[np.ndarray, " L"] = np.asarray(counts <= width)
    channels, slot = np.zeros((len(union), width), np.int32), np.zeros(union.shape, np.int32)
    for layer in np.flatnonzero(fits):
        here = np.flatnonzero(union[layer])
        channels[layer, : len(here)] = here
        slot[layer, here] = np.arange(len(here))
    return Touched(channels, slot, None if fits.all() else fits)


def _rounded(count: int) -> int:
    """Up, by an eighth at most: few different shapes are few programs."""
    step = max(1, (1 << (max(count, 1) - 1).bit_length()) // 8)
    return max(-(-count // step) * step, 1)


def _confined(
    params: PatchedParams, few: Mapping[str, Touched], used: Mapping[str, Bool[Array, " L"]]
) -> PatchedParams:
    """Patched parameters whose donor matrices hold the touched channels only where these are few, and cost nothing
    where there are none.
    """

    def confine(path: str, leaf: Array | Blend) -> Array | Blend:
        unit, axis = LEAVES[path]
        if not isinstance(leaf, Blend) or unit not in used or axis is None:
            return leaf
        extent = jnp.asarray(used[unit], jnp.int32)
        if unit not in few:
            return dataclasses.replace(leaf, extent=extent)
        channels, slot, fits = few[unit]
        expert = jax.vmap(lambda w, i: jnp.take(w, i, axis=axis))(leaf.expert, jnp.asarray(channels))
        held = dataclasses.replace(leaf, expert=expert, index=jnp.asarray(channels), slot=jnp.asarray(slot))
        if fits is None:
            return dataclasses.replace(held, extent=extent)
        return dataclasses.replace(leaf, confined=held, extent=jnp.where(fits, extent, 2 * extent))

    return unflatten({path: confine(path, leaf) for path, leaf in flatten(params).items()})


@functools.partial(jax.jit, static_argnames="cfg")
def scores_at_once(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    units: Mapping[str, Bool[Array, "M ..."]],
    few: Mapping[str, Touched],
    used: Mapping[str, Bool[Array, " L"]],
    metric: Metric,
    packing: Packing | None,
) -> Float[Array, "M B"]:
    """One batch of `scores_of_sets`: the metric of each prompt with each of M sets, in one program.

    Args:
        cfg: the model.
        host: parameters that receive the patches.
        donor: parameters that the components come from.
        units: unit -> the M sets' masks, stacked along a leading axis; units that are absent are closed.
        few: unit -> the channels that the sets together open, for units of which they are few (`touched`).
        used: unit -> the layers in which any of the sets opens anything.
        metric: what is measured.
        packing: of its prompts; None where the model is held at a state, which needs every prompt in a row of its own.
    """

    def patched(mask: Mapping[str, Array]) -> PatchedParams:
        return _confined(patch(host, donor, PatchMask(mask)), few, used)

    def run(mask: Mapping[str, Array]) -> Float[Array, "B R D"]:
        if packing is None:
            return metric.pick(metric.run(cfg, patched(mask)).resid)
        ids, packed = jnp.asarray(packing.ids), packing.packed
        out = decoder(cfg, patched(mask))(ids, stop=metric.layer + 1, logits=False, layout=packed)
        return packing.pick(out.resid)[0]

    def read(mask: Mapping[str, Array], picked: Float[Array, "B R D"]) -> Float[Array, " B"]:
        params = patched(mask)

        def one(b: Array) -> Float[Array, ""]:
            return metric.take(b[None]).read(cfg, params, picked[b][None])[0]

        return jax.lax.map(one, jnp.arange(len(metric)), batch_size=PROMPTS_AT_ONCE)

    picked = jax.vmap(run)(dict(units))
    if metric.readout.reads_logits:  # a vocabulary of logits takes its place for few of them at a time
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
    """The metric of each prompt with each of some sets of components taken from the donor.

    Args:
        cfg: the model.
        host: parameters that receive the patches.
        donor: parameters that the components come from.
        masks: boolean; units that are absent are closed.
        metric: what is measured.
        budget: bytes for the activations of the sets that run at once; None to choose from the device.
        fits: what fitted where that was too much, as `map_batches` keeps it; for one call after another.
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

    layered = [name for name, unit in units.items() if unit.ndim == 3]
    found = [touched(units[name]) for name in layered]
    donor_share = MOST_TOUCHED if all(few is not None and few.fits is None for few in found) else 1.0

    def run(rows: Int[np.ndarray, " N"]) -> Float[np.ndarray, "N M"]:
        some = metric if len(rows) == len(metric) else metric.take(jnp.asarray(rows))
        packing = None if metric.held is not None else pack(some)
        n_tokens, n_keys = metric.tokens.ids[rows].size, metric.tokens.ids.shape[1]
        plain = bytes_of_row(cfg, n_tokens, n_keys) if packing is None else bytes_per_row(cfg, packing)
        size = int((1 + donor_share) * plain)
        tokens = n_tokens if packing is None else packing.n_tokens
        fitting = budget or device_budget()
        most = max(1, fitting // size) if fitting else 2 * (rows_together(size, tokens) or 1)

        def score(sets: Int[np.ndarray, " N"]) -> Array:
            here = {name: unit[sets] for name, unit in units.items()}
            few = {name: opened for name in layered if (opened := touched(here[name])) is not None}
            used = {name: here[name].any((0, 2)) for name in layered}
            return scores_at_once(cfg, host, donor, here, few, used, some, packing)

        return map_batches(len(masks), most, score, what="joint patches", fits=fits).T

    return map_batches(len(metric), max(16, TOKENS_AT_ONCE // metric.tokens.ids.shape[1]), run, fits=fits).T
