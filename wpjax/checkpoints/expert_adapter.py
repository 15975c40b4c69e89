"""LoRA over routed experts: PEFT adapts the tensors that hold all experts of a layer together (`target_parameters`).

With E experts and rank r, `lora_A` is [E r, in], `lora_B` [out, r E] (peft 0.21, `ParamWrapper.get_delta_weight`):

    W[e]' = W[e] + s B[e] A[e],    A[e] = lora_A as [E, r, in], at e;   B[e] = lora_B as [out, r, E], at the last e

A module with two such tensors has its factors in two modules, one inside the other. Which is which, their shapes tell:
[2 F, D] for the gates and inputs of F neurons, [D, F] for their outputs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from wpjax.checkpoints.convert import tensor_names
from wpjax.errors import CheckpointError
from wpjax.models.config import ModelConfig

Add: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
"""W + s B A, from W, A, B and s."""

_FACTOR = re.compile(r"(.*\.(\d+)\.mlp\.experts)((?:\.base_layer)?)\.lora_([AB])\.weight")


class ExpertFactors(NamedTuple):
    """Where the factors of one tensor of all experts stand in a file.

    Attributes:
        path: the module, as the file names it.
        layer: its layer.
        names: "A" and "B" -> names in the file.
    """

    path: str
    layer: int
    names: dict[str, str]


def collect(cfg: ModelConfig, name: str, stem: str, found: dict[str, ExpertFactors]) -> bool:
    """Note a tensor of an adapter, if it is a factor of routed experts.

    Args:
        cfg: the base's architecture.
        name: its name in the file.
        stem: its name without PEFT's prefix.
        found: what was noted before, by module; it is added to.

    Returns:
        whether it is one.

    >>> cfg = ModelConfig("mixtral", 2, 16, 4, 2, 4, 32, 50, 64, n_experts=2, n_active=1)
    >>> found = {}
    >>> collect(cfg, "a", "model.layers.1.mlp.experts.base_layer.lora_A.weight", found), found
    (True, {'model.layers.1.mlp.experts.base_layer': ExpertFactors(path='model.layers.1.mlp.experts', layer=1, \
names={'A': 'a'})})
    """
    match = _FACTOR.fullmatch(stem)
    if match is None or not cfg.n_experts or int(match[2]) >= cfg.n_layers:
        return False
    found.setdefault(match[1] + match[3], ExpertFactors(match[1], int(match[2]), {})).names[match[4]] = name
    return True


def expert_edits(
    cfg: ModelConfig,
    found: Mapping[str, ExpertFactors],
    read: Callable[[str], np.ndarray],
    scale: Callable[[str, int], float],
    add: Add,
    where: str,
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What factors of routed experts make of the base's tensors, expert by expert.

    Args:
        cfg: the base's architecture.
        found: the factors, from `collect`.
        read: a tensor of the file, by its name there.
        scale: the factor s, from the name of the tensor of all experts and the rank.
        add: W + s B A, from W, A, B and s.
        where: the file, for messages.

    Returns:
        HF name of a tensor that changes -> function from the base's tensor to the expert's.

    Raises:
        CheckpointError: a factor has no partner, or does not fit the base.
    """
    edits: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    if not found:
        return edits
    n, d, f = cfg.n_experts, cfg.d_model, cfg.d_expert
    for module, (path, layer, names) in found.items():
        if len(names) < 2:
            raise CheckpointError(
                f"{where}: of {module} only one of lora_A and lora_B is there; save the adapter again"
            )
        a, b = read(names["A"]), read(names["B"])
        what = {(d, 2 * f): "gate_up_proj", (f, d): "down_proj"}.get((a.shape[1], b.shape[0]))
        rank = len(a) // n
        if what is None or (len(a), b.shape[1]) != (rank * n, rank * n):
            raise CheckpointError(
                f"{where}: {module} has factors of shapes {a.shape} and {b.shape}, which fit no tensor of {n} experts "
                "of the base; the adapter was trained over another base"
            )
        s = scale(f"{path}.{what}", rank)
        leaves = {"W_out": slice(None)} if what == "down_proj" else {"W_gate": slice(0, f), "W_in": slice(f, 2 * f)}
        by_expert = a.reshape(n, rank, -1), np.moveaxis(b.reshape(len(b), rank, n), -1, 0)
        for leaf, rows in leaves.items():
            for name, one, other in zip(tensor_names(cfg, f"blocks/mlp/{leaf}", layer), *by_expert, strict=True):
                edits[name] = functools.partial(_added, add, one, other[rows], s)
    return edits


def _added(add: Add, a: np.ndarray, b: np.ndarray, scale: float, weight: np.ndarray) -> np.ndarray:
    return add(weight, a, b, scale)
