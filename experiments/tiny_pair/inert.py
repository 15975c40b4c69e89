"""Changes of weights that do not change what a model does, to hide the planted ones among."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from wpjax.behaviours import BUILT_IN, Tokens, behaviour
from wpjax.checkpoints.checkpoint import Checkpoint
from wpjax.checkpoints.convert import flatten, unflatten
from wpjax.components import enumerate_components, parse_component
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, forward, take_layer
from wpjax.models.sites import Site

QUIET = 0.0625
"""Share of the directions of an input, those of least variance, that a quiet change may read from."""


class Traffic(NamedTuple):
    """What passes through one layer's attention, over all tokens.

    Attributes:
        read: [D, D], second moments of the normed residual stream.
        queries: [K, Dh / 2], mean energy in each rotary plane of the queries of each KV group.
        keys: [K, Dh / 2], of the keys.
        written: [K, Dh, Dh], W_O W_O^T of each KV group's heads, summed.
    """

    read: Float[np.ndarray, "D D"]
    queries: Float[np.ndarray, "K P"]
    keys: Float[np.ndarray, "K P"]
    written: Float[np.ndarray, "K Dh Dh"]


def _traffic(cfg: ModelConfig, params: Params, tokens: Tokens) -> list[Traffic]:
    ids, real = jnp.asarray(tokens.ids), np.arange(tokens.ids.shape[1]) < np.asarray(tokens.lengths)[:, None]
    resid = forward(cfg, params, ids, sites=(Site.RESID_PRE,), logits=False).sites[Site.RESID_PRE]
    positions = jnp.arange(ids.shape[1])[None]
    found = []
    for i in range(cfg.n_layers):
        b = block(cfg, take_layer(params["blocks"], i), i)
        x = b.normed(Site.ATTN_INPUT, resid[i])
        q, k = b.attn.queries(x, positions, i), b.attn.keys(x, positions, i)
        energy = [np.square(np.asarray(a)[real]).mean(0) for a in (q, k)]  # [H, Dh], [K, Dh]
        planes = [e.reshape(cfg.n_kv_heads, -1, 2, cfg.d_head // 2).sum((1, 2)) for e in energy]
        w_o = np.asarray(b.attn.W_O.get_value()).reshape(cfg.n_kv_heads, cfg.n_rep, cfg.d_head, -1)
        read = np.asarray(x)[real]
        found.append(Traffic(read.T @ read / len(read), planes[0], planes[1], np.einsum("krid,krjd->kij", w_o, w_o)))
    return found


def _quiet_noise(
    moment: Float[np.ndarray, "n n"], outputs: Float[np.ndarray, "m width"], rng: np.random.Generator
) -> Float[np.ndarray, "n width"]:
    """Unit-norm noise from the quietest directions of an input to the given directions of the output."""
    _, vectors = np.linalg.eigh(moment)  # ascending
    quiet = vectors[:, : max(1, int(len(moment) * QUIET))]
    noise = quiet @ rng.standard_normal((quiet.shape[1], len(outputs))) @ outputs
    return noise / np.linalg.norm(noise)


def _plane(energy: Float[np.ndarray, " P"]) -> Float[np.ndarray, "2 Dh"]:
    """The two axes of the rotary plane that meets least energy."""
    n = len(energy)
    return np.eye(2 * n)[[energy.argmin(), energy.argmin() + n]]


def _rescaling(norm: float, w_in: np.ndarray, w_out: np.ndarray) -> float:
    """The s > 1 for which (s w_in, w_out / s) lies at a distance `norm` from (w_in, w_out), by bisection."""
    low, high = 1.0, 1e4
    for _ in range(80):
        s = (low * high) ** 0.5
        distance = np.hypot((s - 1) * np.linalg.norm(w_in), (1 / s - 1) * np.linalg.norm(w_out))
        low, high = (s, high) if distance < norm else (low, s)
    return low


def add_inert_changes(
    base: Checkpoint, trained: Params, planted: Sequence[str], seed: int, largest: float = np.inf
) -> Params:
    """The trained parameters, with an inert change in every head, KV group and neuron that was not trained.

    Each change has the norm of a randomly chosen trained component of its kind (of any kind, if none of its own was
    trained), but in heads and KV groups at most `largest`: beyond some size nothing that they read is quiet enough.
    """
    cfg, rng = base.cfg, np.random.default_rng(seed)
    ours = {path: np.array(leaf, np.float32) for path, leaf in flatten(base.params).items()}
    theirs = {path: np.array(leaf, np.float32) for path, leaf in flatten(trained).items()}
    truth = [parse_component(cfg, name) for name in planted]
    norms = {
        kind: [_distance(ours, theirs, kind, c.layer, c.index) for c in truth if c.kind == kind]
        for kind in ("head", "kv_group", "neuron")
    }
    every = [norm for some in norms.values() for norm in some]
    prompts = [behaviour(f"tiny:{name}").encode(base.tokenizer, "fit", 32) for name in BUILT_IN]
    tokens = _joined([t for p in prompts for t in (p.with_instruction, p.without)])
    traffic = _traffic(cfg, base.params, tokens)
    for c in enumerate_components(cfg, norms):
        if c in truth:
            continue
        norm, at = rng.choice(norms[c.kind] or every), c.layer
        if c.kind == "neuron":
            w_in, w_out = theirs["blocks/mlp/W_in"][at, :, c.index], theirs["blocks/mlp/W_out"][at, c.index]
            s = _rescaling(norm, w_in, w_out)
            w_in *= s
            w_out /= s
            continue
        here, norm = traffic[at], min(norm, largest)
        if c.kind == "head":
            quiet = {"W_Q": _plane(here.keys[c.index // cfg.n_rep])}
        else:
            quiet = {"W_K": _plane(here.queries[c.index]), "W_V": np.linalg.eigh(here.written[c.index])[1].T[:1]}
        for name, outputs in quiet.items():
            noise = norm / np.sqrt(len(quiet)) * _quiet_noise(here.read, outputs, rng)
            theirs[f"blocks/attn/{name}"][at, :, c.index] += noise
    return unflatten({path: jnp.asarray(leaf) for path, leaf in theirs.items()})


def _distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], kind: str, layer: int, index: int) -> float:
    leaves = {
        "head": [("attn/W_Q", 1), ("attn/W_O", 0)],
        "kv_group": [("attn/W_K", 1), ("attn/W_V", 1)],
        "neuron": [("mlp/W_gate", 1), ("mlp/W_in", 1), ("mlp/W_out", 0)],
    }[kind]
    parts = [
        np.take(theirs[f"blocks/{name}"][layer] - ours[f"blocks/{name}"][layer], index, axis=axis)
        for name, axis in leaves
    ]
    return float(np.sqrt(sum(np.square(p).sum() for p in parts)))


def _joined(parts: Sequence[Tokens]) -> Tokens:
    width = max(p.ids.shape[1] for p in parts)
    ids = [np.pad(np.asarray(p.ids), ((0, 0), (0, width - p.ids.shape[1]))) for p in parts]
    return Tokens(np.concatenate(ids), np.concatenate([np.asarray(p.lengths) for p in parts]))
