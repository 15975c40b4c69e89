"""Circuits: which nodes or edges of a model do the work, as data that can be kept in a file.

Everything outside a circuit is ablated: what it writes is replaced by zero, by its mean over the corrupted prompts, or
by what it writes on the corrupted prompt ("resample"). Which of the three it is changes the numbers, and every result
says it (arXiv 2407.08734).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wpjax.checkpoints.checkpoint import Checkpoint, fingerprint
from wpjax.circuits.contrast import Contrast
from wpjax.circuits.nodes import Graph, NodeKind
from wpjax.circuits.scores import ARROW, Level, NodeScores, Scores
from wpjax.circuits.wiring import patched, writes
from wpjax.errors import ComponentError, WpjaxError
from wpjax.metrics.metric import Metric, over_prompts
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.runtime.files import atomic_output

AblationKind = Literal["zero", "mean", "resample"]
"""What stands in the place of what an ablated node writes."""

SCHEMA = 1
"""Number of the form of circuit files."""


@dataclasses.dataclass(frozen=True)
class Circuit:
    """A set of nodes, or of edges, of one model.

    Attributes:
        level: "nodes" or "edges".
        members: names: "L3.head.5", "L3.mlp"; or of edges, "L0.mlp->L3.head.5.q".
        model: fingerprint of the model (`checkpoint.fingerprint`).
        ablates: of a circuit of nodes: the kinds of nodes that are ablated if they are not in it. The IOI paper ablates
            heads alone, and all MLPs stay.
        found_by: in words, where it comes from.

    >>> circuit = Circuit("nodes", ("L0.head.3", "L1.mlp"), model="0")
    >>> graph = Graph.of(ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64))
    >>> circuit.kept(graph).any(1).tolist()  # embed, then 4 heads and the MLP of each layer
    [True, False, False, False, True, False, False, False, False, False, True]
    """

    level: Level
    members: tuple[str, ...]
    model: str
    ablates: tuple[NodeKind, ...] = ("head", "mlp")
    found_by: str = ""

    def kept(self, graph: Graph) -> Bool[np.ndarray, "S R"]:
        """Which edges are live: those of the circuit.

        Raises:
            ComponentError: the model has no such node or edge.
        """
        if self.level == "edges":
            mask = np.zeros(graph.exists.shape, bool)
            for name in self.members:
                sender, arrow, receiver = name.partition(ARROW)
                if not arrow:
                    raise ComponentError(
                        f"{name!r} is not the name of an edge; one looks like L0.mlp{ARROW}L3.head.5.q"
                    )
                mask[graph.edge(sender, receiver)] = True
            return mask
        rows = np.array([s.kind not in self.ablates for s in graph.senders])
        rows[[graph.sender(name) for name in self.members]] = True
        return graph.exists & rows[:, None]

    def without(self, members: Sequence[str]) -> Circuit:
        """The circuit without some members."""
        gone = set(members)
        return dataclasses.replace(self, members=tuple(m for m in self.members if m not in gone))

    def whole(self, graph: Graph) -> Circuit:
        """The circuit that has every node that this one could have, or every edge: the model."""
        if self.level == "edges":
            ends = np.argwhere(graph.exists)
            members = tuple(f"{graph.senders[s].name}{ARROW}{graph.receivers[r].name}" for s, r in ends)
        else:
            members = tuple(s.name for s in graph.senders if s.kind in self.ablates)
        return dataclasses.replace(self, members=members)

    @classmethod
    def of(cls, scores: Scores, n: int, model: str, *, absolute: bool = True) -> Circuit:
        """The n best nodes, or edges, by their scores.

        Args:
            scores: scores of nodes or of edges.
            n: number of members.
            model: fingerprint of the model.
            absolute: see `Scores.ranking`.
        """
        members = tuple(name for name, _ in scores.listed(n, absolute=absolute))
        ablates = {"ablates": scores.ablates} if isinstance(scores, NodeScores) else {}
        how = "absolute" if absolute else "signed"
        return cls(scores.level, members, model, found_by=f"top {n} of {scores.method}, {how}", **ablates)

    def save(self, path: Path | str, overwrite: bool = False) -> None:
        """Write the circuit as JSON.

        Raises:
            OutputError: the file exists or cannot be written.
        """
        content = {"what": "circuit", "schema": SCHEMA, **dataclasses.asdict(self)}
        with atomic_output(Path(path), overwrite) as file:
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str, model: Checkpoint) -> Circuit:
        """Read a circuit of a model.

        Args:
            path: the file.
            model: the model; every node and edge must be one of its own.

        Raises:
            WpjaxError: the file is not a circuit, or is one of another model.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise WpjaxError(
                f"{path}: cannot be read as JSON ({error}); name a file that `Circuit.save` wrote"
            ) from error
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or content.get("what") != "circuit" or content.get("schema") != SCHEMA:
            raise WpjaxError(f"{path} is not a circuit file of this version")
        values = {name: value for name, value in content.items() if name in fields}
        lists = [values.get(name) for name in ("members", "ablates")]
        if (
            set(values) != fields
            or values["level"] not in ("nodes", "edges")
            or not all(isinstance(part, list) and all(isinstance(x, str) for x in part) for part in lists)
            or not {*values["ablates"]} <= {*get_args(NodeKind)}
        ):
            raise WpjaxError(f"{path}: its fields are damaged; make it again with `Circuit.save`")
        circuit = cls(**{**values, "members": tuple(values["members"]), "ablates": tuple(values["ablates"])})
        own = fingerprint(model.cfg, model.params)
        if circuit.model != own:
            raise WpjaxError(
                f"{path} is a circuit of another model (fingerprint {circuit.model}), and {model.source} has {own}; "
                "load the model that it was found in"
            )
        circuit.kept(Graph.of(model.cfg))
        return circuit


@functools.partial(jax.tree_util.register_dataclass, data_fields=["writes", "group"], meta_fields=["kind"])
@dataclasses.dataclass(frozen=True)
class Ablation:
    """What stands in the place of what ablated nodes write; `ablation` makes it.

    Attributes:
        writes: [S, G, T, D], for each sender and each of G groups of prompts.
        group: [B], the group of each prompt.
        kind: "zero", "mean" or "resample" (static).
    """

    writes: Float[Array, "S G T D"]
    group: Int[Array, " B"]
    kind: AblationKind

    def take(self, rows: Int[Array, " N"]) -> Ablation:
        """The same for some of the prompts."""
        return dataclasses.replace(self, group=jnp.asarray(self.group)[rows])


def ablation(
    cfg: ModelConfig,
    params: Params,
    contrast: Contrast,
    kind: AblationKind = "resample",
    groups: Sequence[int] | Int[np.ndarray, " B"] | None = None,
    reference: tuple[Contrast, Sequence[int] | Int[np.ndarray, " R"]] | None = None,
) -> Ablation:
    """What nodes write when they are ablated.

    Args:
        cfg: the model.
        params: its parameters.
        contrast: the prompts. "mean" and "resample" are of the corrupted ones.
        kind: "zero": nothing is written. "mean": the mean, position by position, over the corrupted prompts of the same
            group. "resample": what is written on the corrupted version of the prompt.
        groups: of "mean": the group of each prompt, say its template, so that positions mean the same in a group.
            None: prompts of one length are a group.
        reference: of "mean": other prompts, and their groups, whose corrupted versions the mean is over. None: these
            prompts themselves. Of a group with one prompt, the mean is that prompt: give a reference with many.

    Raises:
        WpjaxError: there is no such kind, prompts of one group have different lengths, or the reference lacks a group.
    """
    lengths = np.asarray(contrast.corrupted.tokens.lengths)
    n_prompts, n_layers = len(lengths), contrast.n_layers
    if kind == "zero":
        n_senders = len(Graph.of(cfg, n_layers).senders)
        return Ablation(jnp.zeros((n_senders, 1, 1, cfg.d_model)), jnp.zeros(n_prompts, jnp.int32), kind)
    if kind not in ("mean", "resample"):
        raise WpjaxError(f"unknown ablation {kind!r}; there are zero, mean and resample")
    if kind == "resample":
        made = jnp.asarray(over_prompts(contrast.corrupted, _writes, cfg, params, axis=1))
        return Ablation(made, jnp.arange(n_prompts), kind)
    of_prompt = lengths if groups is None else np.asarray(groups)
    names, group = np.unique(of_prompt, return_inverse=True)
    source, theirs = (contrast, of_prompt) if reference is None else (reference[0], np.asarray(reference[1]))
    width, means = contrast.clean.tokens.ids.shape[1], []
    for g, name in enumerate(names):  # one group after the other: what all nodes write is large
        rows = np.flatnonzero(theirs == name)
        if not len(rows):
            raise WpjaxError(f"the reference has no prompt of group {name}, so there is no mean of it")
        n_tokens = {*lengths[group == g].tolist(), *np.asarray(source.corrupted.tokens.lengths)[rows].tolist()}
        if len(n_tokens) > 1:
            raise WpjaxError(f"group {name} has prompts of several lengths, so their positions have no mean")
        some = source.corrupted.take(jnp.asarray(rows))
        written = over_prompts(some, _writes, cfg, params, axis=1).mean(1)[:, :width]
        means.append(np.pad(written, ((0, 0), (0, width - written.shape[1]), (0, 0))))
    return Ablation(jnp.asarray(np.stack(means, 1)), jnp.asarray(group), kind)


@functools.partial(jax.jit, static_argnames="cfg")
def _writes(cfg: ModelConfig, params: Params, metric: Metric) -> Float[Array, "S B T D"]:
    return writes(cfg, params, jnp.asarray(metric.tokens.ids), metric.layer + 1)[1]


def circuit_scores(
    cfg: ModelConfig, params: Params, contrast: Contrast, ablated: Ablation, circuits: Sequence[Circuit]
) -> Float[np.ndarray, "N B"]:
    """The metric of each prompt, with everything outside a circuit ablated; one row for each circuit.

    Args:
        cfg: the model.
        params: its parameters.
        contrast: the prompts and the metric.
        ablated: what ablated nodes write.
        circuits: N circuits.

    Raises:
        ComponentError: the model has no such node or edge.

    >>> import wpjax as wp
    >>> from wpjax.circuits.circuit import ablation, circuit_scores
    >>> model = wp.load_model("tiny:base")
    >>> two = wp.contrast(model, ["the fox and the"], ["the dog and the"], answers=[" fox"], foils=[" dog"])
    >>> resample = ablation(model.cfg, model.params, two)
    >>> nothing = wp.Circuit("nodes", (), model="0", ablates=("embed", "head", "mlp"))
    >>> score = circuit_scores(model.cfg, model.params, two, resample, [nothing])
    >>> bool(abs(score - two.corrupted(model.cfg, model.params)).max() < 1e-3)  # everything is corrupted
    True
    """
    graph = Graph.of(cfg, contrast.n_layers)
    return masked_scores(cfg, params, contrast, ablated, np.stack([c.kept(graph) for c in circuits]))


def masked_scores(
    cfg: ModelConfig, params: Params, contrast: Contrast, ablated: Ablation, kept: Bool[np.ndarray, "N S R"]
) -> Float[np.ndarray, "N B"]:
    """`circuit_scores` of sets of edges that are given as masks: True where an edge is live."""
    arrays: tuple[Any, ...] = (contrast.clean, ablated)
    return over_prompts(arrays, _scores, cfg, params, jnp.asarray(kept), axis=1)


@functools.partial(jax.jit, static_argnames="cfg")
def _scores(
    cfg: ModelConfig, params: Params, kept: Bool[Array, "N S R"], prompts: tuple[Metric, Ablation]
) -> Float[Array, "N B"]:
    metric, ablated = prompts
    replacement = ablated.writes[:, ablated.group]

    def score(kept: Array) -> Float[Array, " B"]:
        mask = 1 - kept.astype(jnp.float32)
        resid = patched(cfg, params, jnp.asarray(metric.tokens.ids), replacement, mask, metric.layer + 1)
        return metric.read(cfg, params, metric.pick(resid))

    return jax.lax.map(score, kept)
