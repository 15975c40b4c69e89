"""Components in words: what kinds are called in sentences, and how many of each there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

KIND_NAMES = {
    "head": "heads",
    "kv_group": "KV groups",
    "neuron": "neurons",
    "routed_expert": "routed experts",
    "router": "routers",
    "attn": "attention modules",
    "mlp": "MLPs",
    "layer": "whole layers",
    "norm": "norms",
    "embed": "the embedding",
    "unembed": "the unembedding",
    "final_norm": "the final norm",
    "delta_direction": "directions",
}
"""Kind of component -> what several of them are called in sentences."""


def counted(kinds: Iterable[str]) -> str:
    """How many components of each kind: "1 head and 800 neurons".

    Args:
        kinds: the kind of each component.

    >>> counted(["neuron", "head", "neuron"])
    '1 head and 2 neurons'
    """
    counts = Counter(kinds)
    parts = []
    for kind, names in KIND_NAMES.items():
        if kind in counts:
            of_model = kind in ("embed", "unembed", "final_norm")  # of these a model has one
            word = names.removesuffix("s") if counts[kind] == 1 else names
            parts.append(names if of_model else f"{counts[kind]:,} {word}")
    return enumerated(parts)


def enumerated(parts: Sequence[str]) -> str:
    """Several things as one phrase.

    >>> enumerated(["heads", "KV groups", "neurons"])
    'heads, KV groups and neurons'
    """
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)
