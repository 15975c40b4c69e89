"""Which components each planted expert is confined to: kinds, depths, sizes and redundant pairs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from wpjax.components import count, enumerate_components
from wpjax.models.config import ModelConfig

DEPTHS = {"shallow": (0, 1), "middle": (2, 3), "deep": (4, 5), "spread": (0, 1, 2, 3, 4, 5)}
"""Layers a planting is drawn from; the embedded base has eight."""


class Planting(NamedTuple):
    """One planted expert.

    Attributes:
        name: such as `neurons-shallow-8`; seeds the draw of its components.
        parts: the components of each part. A part alone is trained to carry the behaviour; with two parts, both are
            planted together, and either would do.
    """

    name: str
    parts: tuple[tuple[str, ...], ...]

    @property
    def components(self) -> tuple[str, ...]:
        """All planted components."""
        return tuple(name for part in self.parts for name in part)


SIZES: dict[tuple[str, str], tuple[int, ...]] = {
    ("heads", "shallow"): (1, 2, 4, 8),
    ("heads", "middle"): (4, 8),
    ("heads", "deep"): (8,),
    ("kv", "shallow"): (2, 4),
    ("kv", "spread"): (6, 12),
    ("neurons", "shallow"): (4, 8, 16, 32),
    ("neurons", "middle"): (4, 8, 32),
    ("neurons", "deep"): (8, 32),
    ("mixed", "shallow"): (8, 16, 32),
    ("mixed", "middle"): (8, 16, 32),
    ("mixed", "deep"): (8,),
    ("mixed", "spread"): (4, 16, 32),
}
REDUNDANT = {("heads", "shallow"): 2, ("neurons", "shallow"): 8, ("neurons", "middle"): 8, ("mixed", "middle"): 8}
"""Size of each of the two parts of a redundant planting."""

KINDS = {"heads": ("head",), "kv": ("kv_group",), "neurons": ("neuron",), "mixed": ("head", "kv_group", "neuron")}


def plantings(cfg: ModelConfig) -> Iterator[Planting]:
    """All of them, drawn the same way every time."""
    for (kinds, depth), sizes in SIZES.items():
        for size in sizes:
            name = f"{kinds}-{depth}-{size}"
            yield Planting(name, (tuple(_draw(cfg, kinds, depth, size, random.Random(name))),))
    for (kinds, depth), size in REDUNDANT.items():
        name = f"{kinds}-{depth}-redundant-{size}+{size}"
        drawn = _draw(cfg, kinds, depth, 2 * size, random.Random(name))
        yield Planting(name, (tuple(drawn[::2]), tuple(drawn[1::2])))


def _draw(cfg: ModelConfig, kinds: str, depth: str, size: int, rng: random.Random) -> list[str]:
    """Components of the kinds in turn, without repeats; a kind of few stops at half of what a depth has of it."""
    layers = DEPTHS[depth]
    pools = {kind: enumerate_components(cfg, [kind], layers) for kind in KINDS[kinds]}
    room = {kind: max(1, count(cfg, kind) * len(layers) // 2) for kind in pools}
    for pool in pools.values():
        rng.shuffle(pool)
    drawn: list[str] = []
    if size > sum(room.values()):
        raise ValueError(f"{kinds}-{depth} has no room for {size} components")
    while len(drawn) < size:
        for kind, pool in pools.items():
            if len(drawn) < size and room[kind] > 0:
                drawn.append(pool.pop().name)
                room[kind] -= 1
    return drawn
