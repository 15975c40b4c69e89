"""Which collectives a compiled program has, and along which axes of the mesh.

In the text of a program, `replica_groups` lists the devices that exchange something with each other, by their place in
the mesh, row by row. It is written in one of three ways:

    {{0,1},{2,3}}            group by group; {} is one group of all
    [2,2]<=[4]               0 1 2 3, cut into two groups of two
    [2,2]<=[2,2]T(1,0)       0 1 2 3 as a square, transposed, then cut
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

OPERATIONS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

_CALL = re.compile(rf" ({'|'.join(OPERATIONS)})(?:-start)?\(.*")
_IOTA = r"\[[\d,]+\](?:T\([\d,]+\))?"
_MESH = rf"mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\((?P<ids>{_IOTA})\))? \{{(?P<along>[^}}]*)\}}"
_GROUPS = re.compile(rf"(?:replica_groups|source_target_pairs)=(\{{\{{.*?\}}\}}|\{{\}}|\[[\d,]+\]<={_IOTA}|{_MESH})")


def collectives(text: str, shape: Mapping[str, int]) -> Counter[tuple[str, str]]:
    """Count the collectives of a program.

    Args:
        text: the program, as `compiled.as_text()` gives it.
        shape: axis of the mesh -> its size, in the order of the mesh.

    Returns:
        (operation, the axes that it goes along, joined by "+") -> how often it stands in the program.

    >>> line = "  %a = f32[4] all-reduce(f32[4] %b), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add"
    >>> dict(collectives(line, {"patch": 2, "model": 2}))
    {('all-reduce', 'model'): 1}
    >>> dict(collectives(line.replace("<=[4]", "<=[2,2]T(1,0)"), {"patch": 2, "model": 2}))
    {('all-reduce', 'patch'): 1}
    """
    found: Counter[tuple[str, str]] = Counter()
    for line in text.splitlines():
        if call := _CALL.search(line):
            groups = _GROUPS.search(call[0])
            if groups is None:
                raise ValueError(f"a collective without groups: {line.strip()[:200]}")
            found[call[1], "+".join(_axes(groups[1], shape))] += 1
    return found


def _axes(groups: str, shape: Mapping[str, int]) -> list[str]:
    """The axes of the mesh along which any group has more than one device."""
    spanned = set()
    for group in _members(groups, math.prod(shape.values())):
        at = np.stack(np.unravel_index(np.asarray(group), tuple(shape.values())))  # [axis, member]
        spanned |= {name for name, along in zip(shape, at, strict=True) if len(set(along.tolist())) > 1}
    return [name for name in shape if name in spanned]


def _members(groups: str, n: int) -> list[list[int]]:
    """The devices of each group."""
    if groups == "{}":
        return [list(range(n))]
    if groups.startswith("{{"):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", groups)]
    if of := re.fullmatch(_MESH, groups):  # the axes of another mesh of the same devices, with names of its own
        sizes = {name: int(size) for name, size in re.findall(r"('[^']*')=(\d+)", of["sizes"])}
        along = [axis for axis, name in enumerate(sizes) if name in of["along"].split(",")]
        ids = _ids(of["ids"] or f"[{n}]").reshape([*sizes.values()])
        return (
            np.moveaxis(ids, along, range(-len(along), 0)).reshape(-1, math.prod(ids.shape[i] for i in along)).tolist()
        )
    counts, order = groups.split("<=")
    return _ids(order).reshape(_numbers(counts)).tolist()


def _ids(order: str) -> Int[np.ndarray, "..."]:
    """The numbers of all devices in an order such as "[4,2]T(1,0)": counted along axes that are then exchanged."""
    sizes, *axes = (_numbers(part) for part in order.split("T"))
    ids: Int[np.ndarray, "..."] = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(axes[0]) if axes else ids


def _numbers(text: str) -> list[int]:
    return [int(i) for i in re.findall(r"\d+", text)]
