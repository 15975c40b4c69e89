"""Nodes: what writes to the residual stream, what reads from it, and their names.

    senders      embed, L3.head.5, L3.mlp
    receivers    L3.head.5.q, L3.kv_group.1.k, L3.kv_group.1.v, L3.mlp, logits

Query heads that share keys and values (GQA) share a KV group. So keys and values are received by the group:
`L3.head.5.k` is taken for the keys of the group that head 5 reads. "logits" is the metric's own reading of the stream.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from wpjax.components import parse_component
from wpjax.errors import ComponentError
from wpjax.models.config import ModelConfig

EMBED, LOGITS = "embed", "logits"
"""Names of the first sender and of the last receiver."""

NodeKind = Literal["embed", "head", "mlp"]
"""Kinds of nodes that write to the stream."""

Input = Literal["q", "k", "v", "mlp", "logits"]
"""What a receiver reads the stream for."""


@dataclasses.dataclass(frozen=True)
class Sender:
    """A node that writes to the stream.

    Attributes:
        kind: "embed", "head" or "mlp".
        layer: 0-based layer; -1 for the embedding.
        index: number of the head; 0 for others.
    """

    kind: NodeKind
    layer: int = -1
    index: int = 0

    @property
    def name(self) -> str:
        """Its name, such as L3.head.5."""
        if self.kind == "embed":
            return EMBED
        return f"L{self.layer}.head.{self.index}" if self.kind == "head" else f"L{self.layer}.mlp"


@dataclasses.dataclass(frozen=True)
class Receiver:
    """A node that reads from the stream.

    Attributes:
        kind: what it reads it for.
        layer: 0-based layer; the number of layers for "logits".
        index: number of the query head (q) or of the KV group (k, v); 0 for others.
    """

    kind: Input
    layer: int
    index: int = 0

    @property
    def name(self) -> str:
        """Its name, such as L3.head.5.q."""
        if self.kind == "logits":
            return LOGITS
        if self.kind == "mlp":
            return f"L{self.layer}.mlp"
        return f"L{self.layer}.{'head' if self.kind == 'q' else 'kv_group'}.{self.index}.{self.kind}"


def parse_sender(cfg: ModelConfig, name: str) -> Sender:
    """The sender with a name.

    Raises:
        ComponentError: the model has no such head or MLP, or the name is of something else.

    >>> parse_sender(ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64), "L1.head.3")
    Sender(kind='head', layer=1, index=3)
    """
    if name == EMBED:
        return Sender("embed")
    component = parse_component(cfg, name)
    if component.kind not in ("head", "mlp"):
        raise ComponentError(f"{name} is no sender; senders are embed, heads (L3.head.5) and MLPs (L3.mlp)")
    return Sender(component.kind, component.layer, component.index)  # type: ignore[arg-type]


def parse_receiver(cfg: ModelConfig, name: str) -> Receiver:
    """The receiver with a name.

    Raises:
        ComponentError: the model has no such head, KV group or MLP, or the name is of something else.

    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 4 heads, 2 KV groups
    >>> parse_receiver(cfg, "L1.head.3.k").name
    'L1.kv_group.1.k'
    """
    if name == LOGITS:
        return Receiver("logits", cfg.n_layers)
    owner, _, part = name.rpartition(".")
    if part in ("q", "k", "v"):
        component = parse_component(cfg, owner)
        if component.kind == "head":
            index = component.index if part == "q" else component.index // cfg.n_rep
            return Receiver(part, component.layer, index)  # type: ignore[arg-type]
        if component.kind == "kv_group" and part != "q":
            return Receiver(part, component.layer, component.index)  # type: ignore[arg-type]
    elif name.endswith(".mlp"):
        return Receiver("mlp", parse_component(cfg, name).layer)
    raise ComponentError(
        f"{name!r} is no receiver; receivers are L3.head.5.q, L3.kv_group.1.k, L3.kv_group.1.v, L3.mlp and logits"
    )


def precedes(cfg: ModelConfig, sender: Sender, receiver: Receiver) -> bool:
    """Whether a receiver can read what a sender writes.

    In families with a parallel residual an MLP does not read the attention of its own layer.
    """
    if receiver.kind == "mlp" and sender.kind == "head" and not cfg.parallel:
        return sender.layer <= receiver.layer
    return sender.layer < receiver.layer


class Graph(NamedTuple):
    """All senders and receivers of a model, in the order of a forward pass, and the edges between them.

    Attributes:
        cfg: the model.
        senders: S senders: embed, then the heads and the MLP of each layer.
        receivers: R receivers: q of each head, k and v of each KV group and the MLP of each layer; logits at the end.
        exists: [S, R], whether the receiver can read what the sender writes.

    >>> graph = Graph.of(ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64))
    >>> len(graph.senders), len(graph.receivers), graph.n_edges
    (11, 19, 82)
    """

    cfg: ModelConfig
    senders: tuple[Sender, ...]
    receivers: tuple[Receiver, ...]
    exists: Bool[np.ndarray, "S R"]

    @classmethod
    def of(cls, cfg: ModelConfig, n_layers: int | None = None) -> Graph:
        """The graph of a model, or of its first layers.

        Args:
            cfg: the model.
            n_layers: number of layers; None for all.
        """
        return _graph(cfg, cfg.n_layers if n_layers is None else n_layers)

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.exists.sum())

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.receivers[-1].layer

    def sender(self, name: str) -> int:
        """Number of the sender with a name.

        Raises:
            ComponentError: there is none.
        """
        return _place(self.senders, parse_sender(self.cfg, name))

    def receiver(self, name: str) -> int:
        """Number of the receiver with a name.

        Raises:
            ComponentError: there is none.
        """
        found = parse_receiver(self.cfg, name)
        return _place(
            self.receivers, dataclasses.replace(found, layer=self.n_layers) if found.kind == "logits" else found
        )

    def edge(self, sender: str, receiver: str) -> tuple[int, int]:
        """Numbers of the two ends of an edge.

        Raises:
            ComponentError: the model has no such edge.
        """
        s, r = self.sender(sender), self.receiver(receiver)
        if not self.exists[s, r]:
            raise ComponentError(f"{receiver} comes before {sender} has written, so there is no such edge")
        return s, r


def _place(nodes: tuple[Sender, ...] | tuple[Receiver, ...], node: Sender | Receiver) -> int:
    if node not in nodes:
        raise ComponentError(f"{node.name} comes after the layer that the metric reads")
    return nodes.index(node)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=32)
def _graph(cfg: ModelConfig, n_layers: int) -> Graph:
    def receivers() -> Iterator[Receiver]:
        for layer in range(n_layers):
            yield from (Receiver("q", layer, h) for h in range(cfg.n_heads))
            yield from (Receiver("k", layer, k) for k in range(cfg.n_kv_heads))
            yield from (Receiver("v", layer, k) for k in range(cfg.n_kv_heads))
            yield Receiver("mlp", layer)
        yield Receiver("logits", n_layers)

    layers = [
        [*(Sender("head", layer, h) for h in range(cfg.n_heads)), Sender("mlp", layer)] for layer in range(n_layers)
    ]
    senders = (Sender("embed"), *(s for layer in layers for s in layer))
    reads = tuple(receivers())
    exists = np.array([[precedes(cfg, s, r) for r in reads] for s in senders])
    return Graph(cfg, senders, reads, exists)
