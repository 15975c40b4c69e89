"""Learned circuits: which nodes or edges do together what the model does? Found by gradient, with masks.

Every member has a gate between 0 (ablated) and 1 (live). The gates are learned by `wpjax.relax`, with any of its
parametrisations, so that the circuit does what the model does:

    loss = mean over prompts (F(C) - F(M))^2 / mean over prompts (F(nothing) - F(M))^2

So 1 is the empty circuit and 0 the model. That is the goal of CMD, not of CPR: what works against the answer is part of
what the model does. Gates are learned together, so of two members that stand in for each other one may be left out.

Nested gates give one ranking for all sizes, so they suit CPR and CMD. They begin half closed. Where half of an edge
does more harm than none, because what is computed is all or nothing, they can learn the opposite of the truth; gates at
a price that begin open, `HardConcrete(0.3, initial=3.0)`, found it in every case (experiments/circuits).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from wpjax.circuits.circuit import Ablation, masked_scores
from wpjax.circuits.contrast import Contrast
from wpjax.circuits.nodes import Graph, NodeKind
from wpjax.circuits.scores import EdgeScores, Level, NodeScores, Scores
from wpjax.circuits.wiring import patched
from wpjax.errors import WpjaxError
from wpjax.metrics.metric import Metric
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.relax.learn import RelaxConfig, learn
from wpjax.relax.objectives import choose
from wpjax.relax.parametrisations import Nested, Parametrisation
from wpjax.runtime.progress import Progress, silent

AT_ONCE = 4
"""Prompts of a step: the backward pass keeps what all senders write, for each layer."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CircuitGates:
    """Which edges each of C gates opens; a pytree.

    Attributes:
        owner: [S, R], number of the gate that each edge follows; C for edges that are always live, C + 1 for none.
        share: [C], 1 / C each: every member counts alike.
    """

    owner: Int[Array, "S R"]
    share: Float[Array, " C"]

    @classmethod
    def of(cls, scores: Scores) -> CircuitGates:
        """One gate for each member that the scores are of, in the order of the members."""
        numbers = np.flatnonzero(scores.members)
        n = len(numbers)
        owner = np.where(scores.live(np.zeros(scores.members.shape, bool)), n, n + 1)
        of_member = np.full(scores.members.size, n + 1)
        of_member[numbers] = np.arange(n)
        by_edge = of_member.reshape(scores.members.shape)
        by_edge = by_edge[:, None] if scores.level == "nodes" else by_edge
        follows = (by_edge < n) & scores.graph.exists
        return cls(jnp.asarray(np.where(follows, by_edge, owner), jnp.int32), jnp.full(n, 1 / max(n, 1), jnp.float32))

    def __len__(self) -> int:
        return len(self.share)

    def mask(self, values: Float[Array, " C"]) -> Float[Array, "S R"]:
        """How live every edge is."""
        return jnp.concatenate([values, jnp.array([1.0, 0.0], values.dtype)])[self.owner]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "metric", "ablated", "reached", "scale"],
    meta_fields=["cfg", "n_prompts"],
)
@dataclasses.dataclass(frozen=True)
class Match:
    """The circuit should do what the model does; see this module for the loss.

    Attributes:
        cfg: the model (static).
        params: its parameters.
        metric: F on the clean prompts.
        ablated: what ablated nodes write.
        reached: [B], F(M).
        scale: mean of (F(nothing) - F(M))^2.
        n_prompts: prompts of a step (static).
    """

    cfg: ModelConfig
    params: Params
    metric: Metric
    ablated: Ablation
    reached: Float[Array, " B"]
    scale: Float[Array, ""]
    n_prompts: int = AT_ONCE

    def __call__(self, mask: Float[Array, "S R"], key: PRNGKeyArray) -> Float[Array, ""]:
        """The loss of a circuit: mask is 1 where an edge is live."""
        rows = choose(len(self.metric), self.n_prompts, key)
        metric, ablated = self.metric.take(rows), self.ablated.take(rows)
        replacement = ablated.writes[:, ablated.group]
        tokens = jnp.asarray(metric.tokens.ids)
        resid = patched(self.cfg, self.params, tokens, replacement, 1 - mask, metric.layer + 1)
        score = metric.read(self.cfg, self.params, metric.pick(resid))
        return jnp.square(score - self.reached[rows]).mean() / self.scale


def learn_circuit(
    cfg: ModelConfig,
    params: Params,
    contrast: Contrast,
    ablated: Ablation,
    level: Level = "edges",
    parametrisation: Parametrisation | None = None,
    config: RelaxConfig | None = None,
    *,
    ablates: tuple[NodeKind, ...] = ("head", "mlp"),
    start: Scores | None = None,
    progress: Progress = silent,
) -> EdgeScores | NodeScores:
    """Learn which nodes, or edges, do together what the model does.

    Args:
        cfg: the model.
        params: its parameters.
        contrast: the prompts and the metric.
        ablated: what ablated members write.
        level: "nodes" or "edges".
        parametrisation: how numbers become gates (`wpjax.relax`); None for `Nested()`.
        config: number of steps, learning rate and so on; None for the defaults.
        ablates: of nodes: the kinds that have gates; the others stay live.
        start: scores of the same members to begin with; None to begin with all gates alike.
        progress: called as work gets done.

    Returns:
        scores with one row for all prompts. As everywhere, the lower, the more the answer needs the member: they are
        the learned numbers, turned round and moved so that the least needed member has 0. They have no unit, and they
        are ranked signed or absolute alike.

    Raises:
        WpjaxError: the model and the empty circuit have the same metric, there is no such level, or `start` is of other
            members.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> two = wp.contrast(model, ["the fox and the"], ["the dog and the"], answers=[" fox"], foils=[" dog"])
    >>> resample, config = wp.ablation(model.cfg, model.params, two), RelaxConfig(steps=5)
    >>> scores = wp.learn_circuit(model.cfg, model.params, two, resample, "nodes", config=config)
    >>> scores.n_members, len(scores.listed(3))
    (72, 3)
    """
    if level not in ("nodes", "edges"):
        raise WpjaxError(f"unknown level {level!r}; there are nodes and edges")
    graph = Graph.of(cfg, contrast.n_layers)
    n_senders, n_receivers = graph.exists.shape
    title = f"learned masks, {ablated.kind} ablation"
    empty: EdgeScores | NodeScores = EdgeScores(graph, np.zeros((1, n_senders, n_receivers)), title)
    if level == "nodes":
        empty = NodeScores(graph, np.zeros((1, n_senders)), title, ablates)
    members = empty.members
    if start is not None and (start.level != level or not np.array_equal(start.members, members)):
        raise WpjaxError(f"start: scores of other members than the {len(members.ravel())} {level} of this circuit")
    gates = CircuitGates.of(empty)
    ends = np.stack([empty.live(members & kept) for kept in (True, False)])
    reached, nothing = masked_scores(cfg, params, contrast, ablated, ends)
    scale = float(np.square(nothing - reached).mean())
    if scale == 0:
        raise WpjaxError(
            "the model and the empty circuit have the same metric, so there is nothing to learn; take prompts that the "
            "ablation spoils, or ablate more"
        )
    objective = Match(cfg, params, contrast.clean, ablated, jnp.asarray(reached), jnp.float32(scale))
    begin = None if start is None else -start.mean[members]
    learned = learn(objective, gates, parametrisation or Nested(), config, start=begin, progress=progress)
    values = np.zeros(members.shape)
    values[members] = learned.scores.min() - learned.scores
    return dataclasses.replace(empty, by_prompt=values[None])
