"""Changes of weights that do not change what a model does, to hide the planted ones among."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from wpjax.behaviours import BUILT_IN, Tokens, behaviour
from wpjax.components import enumerate_components, parse_component
from wpjax.models.checkpoint import Checkpoint
from wpjax.models.config import ModelConfig
from wpjax.models.convert import flatten, unflatten
from wpjax.models.decoder import Params, Site, block, forward, take_layer

QUIET = 0.0625
"""Share of the directions of an input, those of least variance, that a quiet change may read from."""


def _second_moments(cfg: ModelConfig, params: Params, tokens: Tokens) -> Float[np.ndarray, "L D D"]:
    """Second moments, over all tokens, of what each layer's attention reads: the normed residual stream."""
    ids, real = jnp.asarray(tokens.ids), np.arange(tokens.ids.shape[1]) < np.asarray(tokens.lengths)[:, None]
    resid = forward(cfg, params, ids, sites=(Site.RESID_PRE,), logits=False).sites[Site.RESID_PRE]
    moments = []
    for i in range(cfg.n_layers):
        x = np.asarray(block(cfg, take_layer(params["blocks"], i)).norm_attn(resid[i]))[real]
        moments.append(x.T @ x / len(x))
    return np.stack(moments)


def _quiet_noise(
    moment: Float[np.ndarray, "n n"], width: int, rng: np.random.Generator
) -> Float[np.ndarray, "n width"]:
    """Unit-norm noise whose rows lie in the quietest directions of an input."""
    _, vectors = np.linalg.eigh(moment)  # ascending
    quiet = vectors[:, : max(1, int(len(moment) * QUIET))]
    noise = quiet @ rng.standard_normal((quiet.shape[1], width))
    return noise / np.linalg.norm(noise)


def _rescaling(norm: float, w_in: np.ndarray, w_out: np.ndarray) -> float:
    """The s > 1 for which (s w_in, w_out / s) lies at a distance `norm` from (w_in, w_out), by bisection."""
    low, high = 1.0, 1e4
    for _ in range(80):
        s = (low * high) ** 0.5
        distance = np.hypot((s - 1) * np.linalg.norm(w_in), (1 / s - 1) * np.linalg.norm(w_out))
        low, high = (s, high) if distance < norm else (low, s)
    return low


def add_inert_changes(base: Checkpoint, trained: Params, planted: Sequence[str], seed: int) -> Params:
    """The trained parameters, with an inert change in every head, KV group and neuron that was not trained.

    Each change has the norm of a randomly chosen trained component of its kind (of any kind, if none of its own was
    trained).
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
    reads = _second_moments(cfg, base.params, tokens)
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
        read_by = ("W_Q",) if c.kind == "head" else ("W_K", "W_V")
        for name in read_by:
            noise = norm / np.sqrt(len(read_by)) * _quiet_noise(reads[at], cfg.d_head, rng)
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
