"""Scores of edges: by how much the metric changes if one edge carries what it carries in the corrupted run.

    exact     F(clean run with the edge patched) - F(clean run)
    EAP       <write_s(corrupted) - write_s(clean), dF/dx_r at the clean run>                       (arXiv 2310.10348)
    EAP-IG    the same, with the gradient averaged over runs whose embedding lies between the two   (arXiv 2403.17806)

x_r is the stream that receiver r reads. An edge that helps the clean answer has a negative score. EAP takes one run
forward and backward, and EAP-IG one for each step, whatever the number of edges. The steps stand at the middle of equal
parts of the way (midpoint rule; ours).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from wpjax.circuits.activations import rows_at_once
from wpjax.circuits.contrast import Contrast, Effects
from wpjax.circuits.nodes import Graph
from wpjax.circuits.wiring import embedding, patched, shifted, writes
from wpjax.errors import WpjaxError
from wpjax.metrics.metric import Metric, over_prompts
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params


@dataclasses.dataclass(frozen=True)
class EdgeScores:
    """A score for every edge and prompt.

    Attributes:
        graph: the edges.
        by_prompt: [B, S, R], change of the metric, in its units; 0 where there is no edge.
        method: how they were made.
    """

    graph: Graph
    by_prompt: Float[np.ndarray, "B S R"]
    method: str

    @property
    def mean(self) -> Float[np.ndarray, "S R"]:
        """Mean over prompts."""
        return np.asarray(self.by_prompt.mean(0))

    @property
    def nodes(self) -> Float[np.ndarray, "B S"]:
        """Scores of whole senders, [B, S]: the sum of their edges' scores.

        By the chain rule that is <write(corrupted) - write(clean), dF/dwrite>: attribution patching of nodes (AtP,
        arXiv 2403.00745).
        """
        return np.asarray(self.by_prompt.sum(-1))

    def ranking(self, *, absolute: bool = True, scores: Float[np.ndarray, "S R"] | None = None) -> np.ndarray:
        """Numbers of all edges in the flat [S, R], those that the answer needs most first.

        Args:
            absolute: whether edges are ranked by the size of their score. If not, by how much their patch lowers the
                metric (signed): edges that work against the answer come last.
            scores: scores to rank by; None for the mean.
        """
        mean = self.mean if scores is None else scores
        value = np.abs(mean) if absolute else -mean
        order = np.argsort(-value, axis=None, kind="stable")
        return order[self.graph.exists.ravel()[order]]

    def top(self, n: int, *, absolute: bool = True) -> Bool[np.ndarray, "S R"]:
        """The n best edges, as a mask."""
        kept = np.zeros(self.graph.exists.size, bool)
        kept[self.ranking(absolute=absolute)[:n]] = True
        return kept.reshape(self.graph.exists.shape)

    def listed(self, n: int, *, absolute: bool = True) -> list[tuple[str, str, float]]:
        """Sender, receiver and mean score of the n best edges."""
        mean, g = self.mean, self.graph
        ends = [np.unravel_index(i, mean.shape) for i in self.ranking(absolute=absolute)[:n]]
        return [(g.senders[s].name, g.receivers[r].name, float(mean[s, r])) for s, r in ends]

    def stability(self, n: int, *, absolute: bool = True, resamples: int = 100, seed: int = 0) -> tuple[float, ...]:
        """How far the n best edges depend on which prompts there were: bootstrap Jaccard overlap.

        Prompts are drawn anew with replacement, and the n best edges by them are compared with the n best by all:
        Jaccard = number in both / number in either.

        Returns:
            mean, and the limits between which 95 % of the draws lie.
        """
        rng, own = np.random.default_rng(seed), self.top(n, absolute=absolute).ravel()
        overlaps = []
        for _ in range(resamples):
            # A draw as weights of the prompts: their mean is a product, and no copy of the scores.
            weight = rng.multinomial(len(self.by_prompt), np.full(len(self.by_prompt), 1 / len(self.by_prompt)))
            drawn = np.tensordot(weight / len(self.by_prompt), self.by_prompt, 1)
            both = int(own[self.ranking(absolute=absolute, scores=drawn)[:n]].sum())
            overlaps.append(both / (2 * int(own.sum()) - both))
        return float(np.mean(overlaps)), *(float(x) for x in np.quantile(overlaps, [0.025, 0.975]))


def score_edges(cfg: ModelConfig, params: Params, contrast: Contrast, *, steps: int = 5) -> EdgeScores:
    """EAP-IG scores of all edges; with one step at the clean run, EAP.

    Args:
        cfg: the model.
        params: its parameters.
        contrast: the prompts and the metric.
        steps: number of runs between corrupted and clean. 0 for EAP: one run, the clean one.

    Raises:
        WpjaxError: `steps` is negative.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> two = wp.contrast(model, ["the fox and the"], ["the dog and the"], answers=[" fox"], foils=[" dog"])
    >>> scores = wp.score_edges(model.cfg, model.params, two, steps=2)
    >>> scores.graph.n_edges, len(scores.listed(3))
    (4557, 3)
    """
    if steps < 0:
        raise WpjaxError(f"{steps} steps: give 1 or more for EAP-IG, 0 for EAP")
    graph = Graph.of(cfg, contrast.n_layers)
    scores = over_prompts(tuple(contrast), _attribution, cfg, params, steps=steps)
    by_prompt = np.where(graph.exists, scores, 0)
    return EdgeScores(graph, by_prompt, f"EAP-IG, {steps} steps" if steps else "EAP")


@functools.partial(jax.jit, static_argnames=("cfg", "steps"))
def _attribution(cfg: ModelConfig, params: Params, metrics: tuple[Metric, ...], *, steps: int) -> Float[Array, "B S R"]:
    clean = metrics[0]
    n_layers = clean.layer + 1
    (_, ours), (_, theirs) = (writes(cfg, params, jnp.asarray(m.tokens.ids), n_layers) for m in metrics)
    start, other = (embedding(cfg, params, jnp.asarray(m.tokens.ids)) for m in metrics)
    nothing = jnp.zeros((len(Graph.of(cfg, n_layers).receivers), *start.shape))

    def score(shifts: Array, share: Array) -> Array:
        """The sum over prompts, whose gradient has each prompt's own: prompts do not act on each other."""
        resid = shifted(cfg, params, other + share * (start - other), shifts, n_layers)
        return clean.read(cfg, params, clean.pick(resid)).sum()

    shares = jnp.asarray((np.arange(steps) + 0.5) / steps if steps else np.ones(1), jnp.float32)
    slope, _ = jax.lax.scan(lambda sum_, share: (sum_ + jax.grad(score)(nothing, share), None), nothing, shares)
    product = functools.partial(jnp.einsum, "sbtd,rbtd->bsr", precision=jax.lax.Precision.HIGHEST)
    return product(theirs - ours, slope / len(shares))


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
