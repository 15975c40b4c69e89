"""Scores of edges: by how much the metric changes if one edge carries what it carries in the corrupted run.

    exact                F(clean run with the edge patched) - F(clean run)
    first order          <write_s(corrupted) - write_s(clean), slope of F by x_r>

x_r is the stream that receiver r reads. An edge that helps the clean answer has a negative score. The methods differ in
where the slope is taken, and in its rules (`METHODS`):

    eap                  gradient, at the clean run                                                (arXiv 2310.10348)
    eap-ig               gradient, mean over runs whose embedding lies between the two prompts     (arXiv 2403.17806)
    eap-ig-activations   gradient, mean over runs in which what the sender's module writes lies between its values in
                         the two runs (the embedding, the heads of one layer together, an MLP)     (arXiv 2504.13151)
    relp, attnlrp        relevance, at the clean run (`models.relevance`)              (arXiv 2508.21258, 2402.05602)

The slope at one run takes one run forward and backward, whatever the number of edges. EAP-IG takes one for each step,
and by activations one for each step and module. The steps stand at the middle of equal parts of the way (midpoint
rule; ours). By activations, the code released with MIB takes the mean over the runs of all modules for every edge; here
each sender has those of its own, as in the paper, so that scores are exact in a linear model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wpjax.circuits.activations import rows_at_once
from wpjax.circuits.contrast import Contrast, Effects
from wpjax.circuits.nodes import Graph
from wpjax.circuits.scores import EdgeScores
from wpjax.circuits.wiring import embedding, patched, shifted, writes
from wpjax.errors import WpjaxError
from wpjax.metrics.metric import Metric, over_prompts
from wpjax.models.config import Backward, ModelConfig
from wpjax.models.decoder import Params
from wpjax.models.edits import Edit, Set
from wpjax.models.sites import Site

SlopeAt: TypeAlias = Callable[..., Array]
"""Function of what is embedded, [B, T, D], and of edits: the slopes by what every receiver reads, [R, B, T, D]."""


class Run(NamedTuple):
    """What is known of a run: of the clean one, or of the corrupted one.

    Attributes:
        start: [B, T, D], what is embedded.
        writes: [S, B, T, D], what every sender writes.
        added: site -> [L, B, T, D], what attention (`attn_out`) and MLPs (`mlp_out`) add to the stream.
    """

    start: Float[Array, "B T D"]
    writes: Float[Array, "S B T D"]
    added: Mapping[Site, Float[Array, "L B T D"]]


def _between(clean: Array, corrupted: Array, share: Array) -> Array:
    return corrupted + share * (clean - corrupted)


def _carried(change: Float[Array, "s B T D"], slopes: Float[Array, "R B T D"]) -> Float[Array, "B s R"]:
    """What a change of what senders write makes of the metric, by way of each receiver."""
    return jnp.einsum("sbtd,rbtd->bsr", change, slopes, precision=jax.lax.Precision.HIGHEST)


def _at_clean(slope: SlopeAt, clean: Run, corrupted: Run, steps: int) -> Float[Array, "B S R"]:
    return _carried(corrupted.writes - clean.writes, slope(clean.start))


def _over_inputs(slope: SlopeAt, clean: Run, corrupted: Run, steps: int) -> Float[Array, "B S R"]:
    mean = _mean(lambda share: slope(_between(clean.start, corrupted.start, share)), steps)
    return _carried(corrupted.writes - clean.writes, mean)


def _over_activations(slope: SlopeAt, clean: Run, corrupted: Run, steps: int) -> Float[Array, "B S R"]:
    """Each module's writes times the mean slope over runs in which they are between the two.

    So the edges of a module sum to the effect of patching it, up to the steps.
    """
    n_layers = len(clean.added[Site.ATTN_OUT])
    change = corrupted.writes - clean.writes
    by_layer = change[1:].reshape(n_layers, -1, *change.shape[1:])  # heads, then the MLP

    def of_layer(layer: Array) -> Array:
        def held(site: Site) -> Array:
            def at(share: Array) -> Array:
                value = _between(clean.added[site][layer], corrupted.added[site][layer], share)
                return slope(clean.start, (Edit(site, Set(value), layer),))

            return _mean(at, steps)

        own = by_layer[layer]
        return jnp.concatenate(
            [_carried(own[:-1], held(Site.ATTN_OUT)), _carried(own[-1:], held(Site.MLP_OUT))], axis=1
        )

    embedded = _mean(lambda share: slope(_between(clean.start, corrupted.start, share)), steps)
    layers = jnp.moveaxis(jax.lax.map(of_layer, jnp.arange(n_layers)), 0, 1)  # [B, L, H + 1, R]
    layers = layers.reshape(len(layers), -1, layers.shape[-1])
    return jnp.concatenate([_carried(change[:1], embedded), layers], axis=1)


def _mean(slope: Callable[[Array], Array], steps: int) -> Array:
    """Mean over shares in the middle of equal parts of the way, one after the other."""
    shares = jnp.asarray((np.arange(steps) + 0.5) / steps, jnp.float32)
    zero = jnp.zeros(jax.eval_shape(slope, shares[0]).shape)
    total, _ = jax.lax.scan(lambda sum_, share: (sum_ + slope(share), None), zero, shares)
    return total / steps


class Attribution(NamedTuple):
    """A first-order method. To add one, add an entry to `METHODS`.

    Attributes:
        title: what results call it; "{steps}" stands for the number of steps.
        scores: function of (`SlopeAt`, clean `Run`, corrupted `Run`, steps): scores of all edges, [B, S, R].
        backward: how slopes are made (`ModelConfig.backward`).
    """

    title: str
    scores: Callable[[SlopeAt, Run, Run, int], Array]
    backward: Backward = "gradient"


METHODS: Mapping[str, Attribution] = MappingProxyType(
    {
        "eap": Attribution("EAP", _at_clean),
        "eap-ig": Attribution("EAP-IG, {steps} steps", _over_inputs),
        "eap-ig-activations": Attribution("EAP-IG by activations, {steps} steps", _over_activations),
        "relp": Attribution("RelP", _at_clean, "relp"),
        "attnlrp": Attribution("AttnLRP", _at_clean, "attnlrp"),
    }
)
"""The first-order methods by name."""


def score_edges(
    cfg: ModelConfig, params: Params, contrast: Contrast, method: str = "eap-ig", *, steps: int = 5
) -> EdgeScores:
    """First-order scores of all edges at once.

    Args:
        cfg: the model.
        params: its parameters.
        contrast: the prompts and the metric.
        method: "eap", "eap-ig", "eap-ig-activations", "relp" or "attnlrp" (see this module).
        steps: number of runs between corrupted and clean, of the methods that average over such.

    Raises:
        WpjaxError: there is no such method, or less than one step.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> two = wp.contrast(model, ["the fox and the"], ["the dog and the"], answers=[" fox"], foils=[" dog"])
    >>> scores = wp.score_edges(model.cfg, model.params, two, "relp")
    >>> scores.n_members, len(scores.listed(3))
    (4557, 3)
    """
    if method not in METHODS:
        raise WpjaxError(f"unknown method {method!r}; methods: {', '.join(METHODS)}")
    if steps < 1:
        raise WpjaxError(f"{steps} steps: give 1 or more; for the slope at the clean run alone, method 'eap'")
    chosen, graph = METHODS[method], Graph.of(cfg, contrast.n_layers)
    slopes_of = dataclasses.replace(cfg, backward=chosen.backward)
    scores = over_prompts(tuple(contrast), _attribution, slopes_of, params, method=method, steps=steps)
    return EdgeScores(graph, np.where(graph.exists, scores, 0), chosen.title.format(steps=steps))


@functools.partial(jax.jit, static_argnames=("cfg", "method", "steps"))
def _attribution(
    cfg: ModelConfig, params: Params, metrics: tuple[Metric, ...], *, method: str, steps: int
) -> Float[Array, "B S R"]:
    clean = metrics[0]
    n_layers = clean.layer + 1
    ours, theirs = (_run(cfg, params, metric, n_layers) for metric in metrics)
    nothing = jnp.zeros((len(Graph.of(cfg, n_layers).receivers), *ours.start.shape))

    def score(shifts: Array, start: Array, edits: Sequence[Edit]) -> Array:
        """The sum over prompts, whose gradient has each prompt's own: prompts do not act on each other."""
        resid = shifted(cfg, params, start, shifts, n_layers, edits)
        return clean.read(cfg, params, clean.pick(resid)).sum()

    def slope(start: Array, edits: Sequence[Edit] = ()) -> Array:
        return jax.grad(score)(nothing, start, edits)

    return METHODS[method].scores(slope, ours, theirs, steps)


def _run(cfg: ModelConfig, params: Params, metric: Metric, n_layers: int) -> Run:
    sites = (Site.ATTN_OUT, Site.MLP_OUT)  # what no method reads is not computed
    tokens = jnp.asarray(metric.tokens.ids)
    made = writes(cfg, params, tokens, n_layers)[1]
    return Run(embedding(cfg, params, tokens), made, metric.run(cfg, params, sites=sites).sites)


def edge_patch(
    cfg: ModelConfig, params: Params, contrast: Contrast, edges: Sequence[tuple[str, str]], *, together: bool = False
) -> Effects:
    """The exact effect of patching edges: each alone, or all together.

    Args:
        cfg: the model.
        params: its parameters.
        contrast: the prompts and the metric.
        edges: names of sender and receiver of each edge.
        together: whether all of them are patched at once.

    Returns:
        the effects, [E, B]; with `together`, [1, B].

    Raises:
        ComponentError: the model has no such edge.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> two = wp.contrast(model, ["the fox and the"], ["the dog and the"], answers=[" fox"], foils=[" dog"])
    >>> edges = [("embed", "L0.head.3.q"), ("L0.mlp", "L5.kv_group.1.v")]
    >>> wp.edge_patch(model.cfg, model.params, two, edges).change.shape
    (2, 1)
    """
    graph = Graph.of(cfg, contrast.n_layers)
    ends = np.array([graph.edge(*edge) for edge in edges])
    masks = np.zeros((1 if together else len(ends), *graph.exists.shape), np.float32)
    masks[0 if together else np.arange(len(ends)), ends[:, 0], ends[:, 1]] = 1
    metrics = over_prompts(
        tuple(contrast), _exact, cfg, params, jnp.asarray(masks), axis=1, at_once=rows_at_once(contrast.clean)
    )
    return Effects(metrics[1:-1] - metrics[0], metrics[0], metrics[-1])


@functools.partial(jax.jit, static_argnames=("cfg", "at_once"))
def _exact(
    cfg: ModelConfig, params: Params, masks: Float[Array, "P S R"], metrics: tuple[Metric, ...], *, at_once: int
) -> Float[Array, "N B"]:
    """The metric of the clean run, with the edges of each mask patched, and of the corrupted run."""
    clean, corrupted = metrics
    n_layers = clean.layer + 1
    _, theirs = writes(cfg, params, jnp.asarray(corrupted.tokens.ids), n_layers)

    def score(mask: Array) -> Float[Array, " B"]:
        resid = patched(cfg, params, jnp.asarray(clean.tokens.ids), theirs, mask, n_layers)
        return clean.read(cfg, params, clean.pick(resid))

    # The two runs are masks as well, so that all numbers are rounded alike.
    ends = jnp.zeros((1, *masks.shape[1:])), jnp.ones((1, *masks.shape[1:]))
    return jax.lax.map(score, jnp.concatenate([ends[0], masks, ends[1]]), batch_size=at_once)
