"""Path patching: the effect of a sender on a metric by way of what chosen receivers read of it (arXiv 2211.00593).

    1. Run the model on the clean and on the corrupted prompts.
    2. Run it on the clean prompts with the sender's output of the corrupted run. All other heads keep the values of the
       clean run. MLPs are computed anew ("live", as in the paper) or keep them ("frozen"). Record what the receivers
       read of the stream.
    3. Run it on the clean prompts with the queries, keys, values or MLPs that the receivers make of what was recorded.
       Everything else is live. Read the metric.

For the receiver "logits" the metric is read at the end of step 2. With frozen MLPs the path is one edge: from the
sender straight into the receiver.

The rows of a whole matrix of senders and receivers run in one compiled program. Step 2 starts anew for each sender,
and step 3 at the receiver's layer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wpjax.circuits.activations import read_rows, rows_at_once
from wpjax.circuits.contrast import Contrast, Effects
from wpjax.circuits.nodes import Receiver, Sender, parse_receiver, parse_sender, precedes
from wpjax.errors import WpjaxError
from wpjax.metrics.metric import Metric, over_prompts
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, block, take_layer
from wpjax.models.layouts import Causal
from wpjax.models.sites import Site

MLPs = Literal["live", "frozen"]
"""What MLPs do between sender and receiver."""


class _From(NamedTuple):
    """Senders as arrays.

    Attributes:
        layer: the layer of each; -1 for the embedding.
        head: its head; -1 for MLPs and the embedding.
    """

    layer: Int[np.ndarray | Array, "*S"]
    head: Int[np.ndarray | Array, "*S"]


class _Into(NamedTuple):
    """Which inputs are patched, for each of G groups of receivers and each of A layers."""

    q: Bool[np.ndarray | Array, "*G A H"]
    k: Bool[np.ndarray | Array, "*G A K"]
    v: Bool[np.ndarray | Array, "*G A K"]
    mlp: Bool[np.ndarray | Array, "*G A"]
    logits: Bool[np.ndarray | Array, "*G"]


def path_patch(
    cfg: ModelConfig,
    params: Params,
    contrast: Contrast,
    senders: Sequence[str] | str,
    receivers: Sequence[str | Sequence[str]] | str,
    *,
    mlps: MLPs = "live",
) -> Effects:
    """The effect of every sender by way of every receiver.

    Args:
        cfg: the model.
        params: its parameters.
        contrast: the prompts and the metric.
        senders: names: "embed", heads such as "L3.head.5", MLPs such as "L3.mlp"; or one name.
        receivers: names: "L3.head.5.q", "L3.kv_group.1.k", "L3.kv_group.1.v", "L3.mlp", "logits"; or one name. Several
            names in a list of their own are patched together, as the paper does with all heads of one class.
        mlps: "live" computes MLPs between sender and receiver anew; "frozen" keeps their clean values.

    Returns:
        the effects, [S, R, B]. NaN where a receiver cannot read what the sender writes.

    Raises:
        ComponentError: the model has no such node.
        WpjaxError: a sender comes after all receivers, or a receiver before all senders.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> two = wp.contrast(model, ["the fox and the"], ["the dog and the"], answers=[" fox"], foils=[" dog"])
    >>> senders = ["embed", "L0.head.3", "L1.mlp"]
    >>> wp.path_patch(model.cfg, model.params, two, senders, ["L2.head.0.q", "logits"]).change.shape
    (3, 2, 1)
    """
    sent = [parse_sender(cfg, name) for name in ([senders] if isinstance(senders, str) else senders)]
    named = [receivers] if isinstance(receivers, str) else receivers
    read = [[parse_receiver(cfg, name) for name in ([r] if isinstance(r, str) else r)] for r in named]
    stop = contrast.n_layers
    if not sent or not read or not all(read):
        raise WpjaxError("path patching needs at least one sender and one receiver")
    for group in read:
        if len(group) > 1 and any(r.kind == "logits" for r in group):
            raise WpjaxError(
                "logits is the end of all paths: it is no receiver together with others; name it by itself"
            )
    nodes: list[Sender | Receiver] = [*sent, *(r for group in read for r in group if r.kind != "logits")]
    for node in nodes:
        if node.layer >= stop:
            raise WpjaxError(f"{node.name} comes after layer {stop - 1}, which the metric reads")
    possible = np.array([[any(precedes(cfg, s, r) for r in group) for group in read] for s in sent])
    for s, reads in zip(sent, possible, strict=True):
        if not reads.any():
            raise WpjaxError(f"{s.name} writes after every receiver has read; name a later receiver")
    for group, feeds in zip(read, possible.T, strict=True):
        if not feeds.any():
            raise WpjaxError(f"{group[0].name} reads before any sender has written; name an earlier sender")
    size = min(rows_at_once(contrast.clean), len(sent))
    filled = np.minimum(np.arange(-(-len(sent) // size) * size), len(sent) - 1).reshape(-1, size)
    change, clean, corrupted = over_prompts(
        tuple(contrast), _matrix, cfg, params, _senders(sent, filled), _receivers(cfg, read, stop), axis=2, mlps=mlps
    )
    change = np.where(possible[..., None], change[: len(sent)], np.nan)
    return Effects(change, clean[0, 0], corrupted[0, 0])


def _senders(sent: Sequence[Sender], filled: Int[np.ndarray, "C c"]) -> _From:
    layer = np.array([s.layer for s in sent])
    head = np.array([s.index if s.kind == "head" else -1 for s in sent])
    return _From(jnp.asarray(layer[filled]), jnp.asarray(head[filled]))


def _receivers(cfg: ModelConfig, groups: Sequence[Sequence[Receiver]], stop: int) -> _Into:
    widths = {"q": (cfg.n_heads,), "k": (cfg.n_kv_heads,), "v": (cfg.n_kv_heads,), "mlp": ()}
    masks = {kind: np.zeros((len(groups), stop, *width), bool) for kind, width in widths.items()}
    logits = np.array([any(r.kind == "logits" for r in group) for group in groups])
    for g, group in enumerate(groups):
        for r in group:
            if r.kind == "mlp":
                masks["mlp"][g, r.layer] = True
            elif r.kind != "logits":
                masks[r.kind][g, r.layer, r.index] = True
    return _Into(**{kind: jnp.asarray(mask) for kind, mask in masks.items()}, logits=jnp.asarray(logits))


class _Kept(NamedTuple):
    """What is kept of a run, for each of A layers: [A, B, T, ...]."""

    resid_pre: Array
    resid_mid: Array
    z: Array
    mlp_out: Array


@functools.partial(jax.jit, static_argnames=("cfg", "mlps"))
def _matrix(
    cfg: ModelConfig, params: Params, senders: _From, receivers: _Into, metrics: tuple[Metric, ...], *, mlps: MLPs
) -> tuple[Float[Array, "S R B"], Float[Array, "1 1 B"], Float[Array, "1 1 B"]]:
    """The changes by all senders (in C chunks of c) and all groups of receivers, and the metrics of the two runs."""
    clean = metrics[0]
    stop = clean.layer + 1
    sites = tuple(Site(name) for name in _Kept._fields)
    runs = [m.run(cfg, params, sites=sites) for m in metrics]
    kept = [_Kept(*(run.sites[site] for site in sites)) for run in runs]
    scores = [m.read(cfg, params, m.pick(run.resid)) for m, run in zip(metrics, runs, strict=True)]
    layout = Causal.of(clean.tokens.ids.shape[1])
    ours, theirs = kept

    def one_layer(layer: Array) -> functools.partial:
        return functools.partial(block(cfg, take_layer(params["blocks"], layer), layer), layout=layout)

    after = jnp.concatenate([ours.resid_pre[1:], runs[0].resid[None]])  # the clean stream after each layer

    def sent(sender: _From, first: Array) -> tuple[Array, Array, Array]:
        """Step 2: the stream before each layer and before each MLP, [A, B, T, D], and after the last layer.

        Before layer `first` it is that of the clean run.
        """

        def through(x: Array, layer: Array) -> tuple[Array, tuple[Array, Array]]:
            return jax.lax.cond(
                layer < first,
                lambda: (after[layer], (ours.resid_pre[layer], ours.resid_mid[layer])),
                lambda: run(x, layer),
            )

        def run(x: Array, layer: Array) -> tuple[Array, tuple[Array, Array]]:
            here = sender.layer == layer
            from_donor = here & (jnp.arange(cfg.n_heads) == sender.head)[:, None]  # [H, 1]
            z = jnp.where(from_donor, theirs.z[layer], ours.z[layer])
            one = one_layer(layer)(x, known={Site.Z: z})
            written = one.mlp_out if mlps == "live" else ours.mlp_out[layer]
            written = jnp.where(here & (sender.head < 0), theirs.mlp_out[layer], written)
            return one.replaced({Site.MLP_OUT: written}).resid_post, (x, one.resid_mid)

        start = jnp.where(sender.layer < 0, theirs.resid_pre[0], ours.resid_pre[0])
        last, (pre, mid) = jax.lax.scan(through, start, jnp.arange(stop))
        return pre, mid, last

    def received(receiver: _Into, recorded: tuple[Array, Array, Array]) -> Float[Array, "c B"]:
        """Step 3, for the recordings of c senders."""
        pre, mid, last = recorded
        at_layer = receiver.mlp | receiver.q.any(-1) | receiver.k.any(-1) | receiver.v.any(-1)  # [A]
        first = jnp.where(at_layer.any(), jnp.argmax(at_layer), stop)
        # One more entry, for "logits" alone: then no layer runs.
        before = jnp.concatenate([ours.resid_pre, runs[0].resid[None]])[first]

        def through(layer: Array, x: Float[Array, "c B T D"]) -> Float[Array, "c B T D"]:
            one = one_layer(layer)

            def patched(x: Array, pre: Array, mid: Array) -> Array:
                own, made = one(x), one(pre, known={Site.RESID_MID: mid})
                chosen = {Site.Q: receiver.q, Site.K: receiver.k, Site.V: receiver.v}
                new = {
                    site: jnp.where(mask[layer][:, None], made.at(site), own.at(site)) for site, mask in chosen.items()
                }
                own = own.replaced(new)
                written = jnp.where(receiver.mlp[layer], made.mlp_out, own.mlp_out)
                return own.replaced({Site.MLP_OUT: written}).resid_post

            return jax.lax.cond(
                at_layer[layer],
                lambda: jax.vmap(patched)(x, pre[:, layer], mid[:, layer]),
                lambda: jax.vmap(lambda x: one(x).resid_post)(x),
            )

        x = jnp.broadcast_to(before, last.shape)
        x = jax.lax.fori_loop(first, stop, through, x)
        return read_rows(cfg, params, clean, jnp.where(receiver.logits, last, x))

    def chunk(some: _From) -> Float[Array, "R c B"]:
        recorded = jax.vmap(sent, in_axes=(0, None))(some, some.layer.min())
        return jax.lax.map(lambda receiver: received(receiver, recorded), receivers)

    made = jnp.swapaxes(jax.lax.map(chunk, senders), 1, 2)  # [C, c, R, B]
    return made.reshape(-1, *made.shape[2:]) - scores[0], scores[0][None, None], scores[1][None, None]
