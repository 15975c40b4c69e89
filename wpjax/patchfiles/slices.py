"""Which rows or columns of which tensors of a checkpoint a set of components owns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from wpjax.checkpoints.convert import flatten, hf_tensors, unflatten
from wpjax.components import LEAVES, Component, open_units
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import abstract_params
from wpjax.patching import PatchMask, components_of


class Slices(NamedTuple):
    """Rows or columns of one tensor.

    Attributes:
        axis: 0 for rows (and entries of a vector), 1 for columns.
        positions: [n], their numbers in ascending order.
    """

    axis: int
    positions: Int[np.ndarray, " n"]

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """These rows or columns of a tensor.

        >>> Slices(1, np.array([0, 2])).of(np.array([[1, 2, 3], [4, 5, 6]])).tolist()
        [[1, 3], [4, 6]]
        """
        return np.take(tensor, self.positions, self.axis)

    def put(self, tensor: np.ndarray, values: np.ndarray) -> np.ndarray:
        """A copy of a tensor with other values there.

        >>> Slices(0, np.array([1])).put(np.zeros((2, 2), int), np.array([[5, 6]])).tolist()
        [[0, 0], [5, 6]]
        """
        new = tensor.copy()
        new[(slice(None),) * self.axis + (self.positions,)] = values
        return new


def owned_slices(cfg: ModelConfig, components: Iterable[Component | str]) -> dict[str, Slices]:
    """What components own of the tensors of a checkpoint.

    A tree of booleans, true at what is owned, is converted as weights are. So fused and transposed tensors of every
    family come out right, and what two components share is there once.

    Args:
        cfg: the model.
        components: components or their names.

    Returns:
        full HF name -> rows or columns, for tensors of which something is owned.

    Raises:
        ComponentError: a name is not a component of this model.

    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # D = 16, 4 heads of width 4
    >>> for name, (axis, positions) in owned_slices(cfg, ["L1.head.2"]).items():
    ...     print(name, axis, positions.tolist())
    model.layers.1.self_attn.q_proj.weight 0 [8, 9, 10, 11]
    model.layers.1.self_attn.o_proj.weight 1 [8, 9, 10, 11]
    """
    units, owned = open_units(cfg, components), {}
    for path, leaf in flatten(abstract_params(cfg)).items():
        unit, axis = LEAVES[path]
        stacked, shape = path.startswith("blocks/"), [1] * len(leaf.shape)
        if stacked:
            shape[0] = leaf.shape[0]
        if axis is not None:
            shape[axis + stacked] = leaf.shape[axis + stacked]
        owned[path] = np.broadcast_to(units[unit].reshape(shape), leaf.shape)  # a view: it takes no memory
    found = {}
    for name, tensor in hf_tensors(cfg, unflatten(owned)):
        if tensor.any():
            found[name] = _slices(name, tensor)
    return found


def _slices(name: str, owned: np.ndarray) -> Slices:
    """The rows or columns that are true in a tensor."""
    n, per_row = int(owned.sum()), owned[0].size
    rows = np.flatnonzero(owned.reshape(len(owned), -1).all(1))
    if len(rows) * per_row == n:
        return Slices(0, rows)
    columns = np.flatnonzero(owned.all(0))
    assert len(columns) * len(owned) == n, f"{name}: components own neither rows nor columns of it"
    return Slices(1, columns)


def overlap(cfg: ModelConfig, one: Iterable[str], other: Iterable[str]) -> list[Component]:
    """What two sets of components both own, as the fewest components.

    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)
    >>> [c.name for c in overlap(cfg, ["L1.attn"], ["L1.head.2", "L1.mlp"])]
    ['L1.head.2']
    """
    return components_of(cfg, PatchMask.of(cfg, one) & PatchMask.of(cfg, other))
