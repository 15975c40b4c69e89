"""Scores of components as numbers of tensors: published in a safetensors file, and read from there.

One tool measures what matters, another merges by it; between them stands a file. It holds a tensor for each tensor of
the model that has scores, under the same name. Its shape is that of the weight, with length 1 along axes on which the
score does not vary: of neurons, [1, F] for a matrix [D, F]. So the file is small, and `weight * score` broadcasts. NaN
means that there is no score. A JSON file beside it says what the scores are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

import wpjax
from wpjax.checkpoints.convert import flatten, hf_tensor, tensor_shapes
from wpjax.components import KINDS, LEAVES, Component, enumerate_components, parse_component, unit_shapes
from wpjax.components import unit_positions as positions_of
from wpjax.errors import ComponentError
from wpjax.merging.registry import MergeError
from wpjax.merging.tensor_file import TensorFile
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import abstract_params
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.files import atomic_outputs, write_tensors

FORMAT = "wpjax scores"
"""What the metadata of a file of scores calls itself, under "format"."""

DEFAULT_KINDS = ("head", "kv_group", "neuron")
"""The kinds of components that a file of scores is read for, unless others are named."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of components.

    Attributes:
        components: the components, which own different weights.
        values: [C], their scores, finite.
        about: what they are, in words, by name: the behaviour, the ranking, base and expert.
        changes: [C], norm of what the expert changed of each component, as the sweep measured it; None if that is not
            known.
    """

    components: tuple[Component, ...]
    values: Float[np.ndarray, " C"]
    about: Mapping[str, str]
    changes: Float[np.ndarray, " C"] | None = None


def scores_of(
    cfg: ModelConfig, result: SweepResult, by: str | None = None, kinds: Sequence[str] | None = None
) -> Scores:
    """The scores that a sweep gives.

    Args:
        cfg: the architecture of the models.
        result: the sweep.
        by: name of the ranking; None for the result's `set_ranking`.
        kinds: kinds of components; None for the finest that were swept.

    Raises:
        WpjaxError: the result has no such ranking or kind, it is of another model, or kinds own the same weights.
    """
    by, data = by or result.set_ranking, result.dataset
    values = result.values(by)
    has = data["kind"].values.astype(str)
    chosen = list(kinds) if kinds is not None else result.finest_kinds
    for kind in chosen:
        if kind not in has:
            raise MergeError(f"kind {kind!r} was not swept, only {', '.join(dict.fromkeys(has.tolist()))}")
    check_disjoint(chosen)
    usable = np.isfinite(values) & np.isin(has, chosen)
    attrs = data.attrs
    if int(attrs["n_layers"]) != cfg.n_layers:
        raise MergeError(f"the sweep is of a model with {attrs['n_layers']} layers, and this one has {cfg.n_layers}")
    try:
        components = tuple(parse_component(cfg, str(name)) for name in data["name"].values[usable])
    except ComponentError as error:
        raise MergeError(f"the sweep is of another architecture: {error}") from error
    about = {name: str(attrs[name]) for name in ("behaviour", "base", "expert", "metric") if name in attrs}
    is_exact = attrs.get("dtype", "float32") == "float32"  # rounding to bfloat16 changes what is small
    changes = data["delta_norm"].values.astype(float)[usable] if is_exact and "delta_norm" in data else None
    return Scores(components, values[usable], {**about, "ranking": by}, changes)


def check_disjoint(kinds: Iterable[str]) -> None:
    """Refuse kinds of which two own the same weights, as a head and its attention module do.

    Raises:
        MergeError: names the two.
    """
    owners: dict[str, str] = {}
    for kind in kinds:
        for unit in KINDS[kind].units:
            if unit in owners:
                raise MergeError(f"kinds {owners[unit]} and {kind} own the same weights; name one of them")
            owners[unit] = kind


def spread(cfg: ModelConfig, units: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A number of each unit as one of each parameter: leaves of a parameter tree, which take no memory.

    Args:
        cfg: the architecture.
        units: unit -> array of its shape (`components.unit_shapes`).

    Returns:
        path of a leaf -> array of its shape, a view of its unit's. `checkpoints.convert.hf_tensor` makes from these the
        tensors of a checkpoint.

    >>> cfg = ModelConfig("llama", 1, 16, 4, 2, 4, 32, 50, 64)
    >>> heads = {**{u: np.zeros(s) for u, s in unit_shapes(cfg).items()}, "head": np.arange(4.0)[None]}
    >>> hf_tensor(cfg, spread(cfg, heads), "model.layers.0.self_attn.q_proj.weight")[::4, 0].tolist()  # 4 rows a head
    [0.0, 1.0, 2.0, 3.0]
    """
    leaves = {}
    for path, leaf in flatten(abstract_params(cfg)).items():
        unit, axis = LEAVES[path]
        stacked = path.startswith("blocks/")
        shape = [1] * len(leaf.shape)
        if stacked:
            shape[0] = leaf.shape[0]
        if axis is not None:
            shape[axis + stacked] = leaf.shape[axis + stacked]
        leaves[path] = np.broadcast_to(units[unit].reshape(shape), leaf.shape)
    return leaves


def unit_numbers(
    cfg: ModelConfig, components: Sequence[Component], values: Float[np.ndarray, " C"], rest: float
) -> dict[str, Float[np.ndarray, "..."]]:
    """A number of each component as one of each unit.

    Args:
        cfg: the architecture.
        components: C components that own different weights.
        values: [C].
        rest: the number of units that none of them owns.
    """
    units = {unit: np.full(shape, rest, np.float32) for unit, shape in unit_shapes(cfg).items()}
    by_kind: dict[str, list[int]] = {}
    for i, component in enumerate(components):
        by_kind.setdefault(component.kind, []).append(i)
    for kind, chosen in by_kind.items():
        if KINDS[kind].opens == "channel":  # at once: there may be hundreds of thousands
            places = [components[i].layer for i in chosen], [components[i].index for i in chosen]
            units[KINDS[kind].units[0]][places] = values[chosen]
            continue
        for i in chosen:
            for unit, at in positions_of(cfg, components[i]).items():
                units[unit].reshape(-1)[at] = values[i]
    return units


class Owners:
    """Which component owns each weight of each tensor.

    Args:
        cfg: the architecture.
        components: C components that own different weights.
    """

    def __init__(self, cfg: ModelConfig, components: Sequence[Component]):
        self._cfg, self._n = cfg, len(components)
        numbers = {unit: np.full(shape, self._n, np.int64) for unit, shape in unit_shapes(cfg).items()}
        for i, component in enumerate(components):
            for unit, at in positions_of(cfg, component).items():
                numbers[unit].reshape(-1)[at] = i
        self._leaves = spread(cfg, numbers)

    def sums(self, name: str, values: Float[np.ndarray, "..."]) -> Float[np.ndarray, " C"]:
        """The sum over a tensor of a number of each weight, for each component.

        Args:
            name: HF name of the tensor.
            values: a number of each of its weights.
        """
        owner = hf_tensor(self._cfg, self._leaves, name)
        return np.bincount(owner.ravel(), values.ravel(), self._n + 1)[: self._n]


def tensor_scores(cfg: ModelConfig, scores: Scores) -> dict[str, Float[np.ndarray, "..."]]:
    """Scores as a file of scores holds them: by HF name, with length 1 along axes on which they do not vary.

    >>> cfg = ModelConfig("llama", 1, 16, 4, 2, 4, 32, 50, 64)
    >>> one = Scores((Component("neuron", 0, 3),), np.array([2.0]), {})
    >>> {name.split(".")[-2]: tensor.shape for name, tensor in tensor_scores(cfg, one).items()}
    {'gate_proj': (32, 1), 'up_proj': (32, 1), 'down_proj': (1, 32)}
    """
    leaves = spread(cfg, unit_numbers(cfg, scores.components, scores.values, np.nan))
    tensors = {}
    for name in tensor_shapes(cfg):
        whole = hf_tensor(cfg, leaves, name)
        for axis in range(whole.ndim):
            first = whole.take([0], axis)
            if np.array_equal(whole, np.broadcast_to(first, whole.shape), equal_nan=True):
                whole = first
        if not np.isnan(whole).all():
            tensors[name] = np.ascontiguousarray(whole)
    return tensors


def write_scores(path: str | Path, cfg: ModelConfig, scores: Scores, *, overwrite: bool = False) -> tuple[Path, Path]:
    """Publish scores: a safetensors file, and beside it a JSON file that says what they are.

    Args:
        path: the safetensors file; the other has the same name with the ending .json.
        cfg: the architecture of the models.
        scores: the scores.
        overwrite: whether files that exist may be replaced.

    Returns:
        the two files.

    Raises:
        OutputError: a file exists or cannot be written.
        MergeError: the name does not end in .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise MergeError(f"{path}: scores are written to a file that ends in .safetensors; choose such a name")
    tensors = tensor_scores(cfg, scores)
    about = {"format": FORMAT, "wpjax_version": wpjax.__version__, **scores.about}
    kinds = sorted({c.kind for c in scores.components}, key=list(KINDS).index)
    shapes = tensor_shapes(cfg)
    summary: dict[str, Any] = {
        **about,
        "kinds": kinds,
        "n_components": len(scores.components),
        "tensors": {
            name: {
                "shape": list(shapes[name]),
                "scores": list(tensor.shape),
                "mean": float(np.nanmean(tensor, dtype=np.float64)),
                "largest": float(np.nanmax(tensor)),
            }
            for name, tensor in tensors.items()
        },
    }
    outputs = path, path.with_suffix(".json")
    with atomic_outputs(outputs, overwrite) as (file, beside):
        write_tensors(file, tensors, {**about, "kinds": ",".join(kinds)})
        beside.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return outputs


def read_scores(path: str | Path, cfg: ModelConfig, kinds: Sequence[str] | None = None) -> Scores:
    """Read published scores, those of `write_scores` or any in the same form, as scores of components.

    A component's score is the mean over its weights that have one. So scores of single weights can be read, too.

    Args:
        path: a safetensors file with a tensor for each tensor of the model that has scores, under its HF name, of its
            shape or with length 1 along axes on which the score does not vary.
        cfg: the architecture of the models.
        kinds: kinds of components; None for those that the file names, or else `DEFAULT_KINDS`.

    Raises:
        MergeError: the file cannot be read, is of another model, or has no score for any component of these kinds.
    """
    tensors = TensorFile(path)
    if kinds is None:
        named = tensors.metadata.get("kinds", "")
        kinds = [kind for kind in named.split(",") if kind in KINDS] or DEFAULT_KINDS
    check_disjoint(kinds)
    components = tuple(enumerate_components(cfg, kinds))
    owners = Owners(cfg, components)
    total, count = (np.zeros(len(components)) for _ in range(2))
    shapes = tensor_shapes(cfg)
    tensors.check(shapes)
    for name in tensors.names:
        whole = np.broadcast_to(tensors.read(name), shapes[name])
        known = np.isfinite(whole)
        total += owners.sums(name, np.where(known, whole, 0))
        count += owners.sums(name, known.astype(np.float64))
    has = count > 0
    if not has.any():
        raise MergeError(f"{path}: no score for any {' or '.join(kinds)}; name other kinds")
    chosen = tuple(c for c, usable in zip(components, has, strict=True) if usable)
    said = ("behaviour", "base", "expert", "ranking")
    about = {name: text for name, text in tensors.metadata.items() if name in said}
    return Scores(chosen, total[has] / count[has], about)
