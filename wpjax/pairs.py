"""Pairs: a base and an expert, two checkpoints of one architecture and one vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wpjax.checkpoints.checkpoint import Checkpoint, fingerprint, load_checkpoint, load_tokenizer
from wpjax.checkpoints.convert import flatten
from wpjax.components import KINDS, LEAVES, Component
from wpjax.errors import CheckpointError, PairError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.runtime.files import recover
from wpjax.runtime.placement import check_devices

EMBEDDED = ("base", "expert", "planted")
"""Names of the tiny models inside the package, which are loaded as "tiny:base" and so on."""


LARGEST_WEIGHT = 1e9
"""No trained model has a larger weight; sums of their squares would be infinite."""


class DiffNorm(NamedTuple):
    """How much the expert changed the parameters of one unit, over all layers.

    Attributes:
        unit: name of the unit.
        n_params: number of parameters that it owns.
        n_changed: number of these that differ between base and expert.
        delta: Frobenius norm of expert - base.
        base: Frobenius norm of the base.
    """

    unit: str
    n_params: int
    n_changed: int
    delta: float
    base: float


@dataclasses.dataclass(frozen=True)
class Pair:
    """A base and an expert with one configuration and one tokenizer.

    Attributes:
        cfg: the architecture of both.
        base: parameters of the base.
        expert: parameters of the expert.
        tokenizer: the tokenizer of the expert if it has a chat template, otherwise that of the base.
        base_checkpoint: the base as it was loaded.
        expert_checkpoint: the expert as it was loaded.

    >>> import wpjax as wp
    >>> pair = wp.load_pair("tiny:base", "tiny:expert")
    >>> pair.dtype, pair.base["blocks"]["attn"]["W_Q"].shape == pair.expert["blocks"]["attn"]["W_Q"].shape
    ('float32', True)
    """

    cfg: ModelConfig
    base: Params
    expert: Params
    tokenizer: Any
    base_checkpoint: Checkpoint
    expert_checkpoint: Checkpoint

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer, of either model."""
        return tuple(sorted({*self.base_checkpoint.stop_tokens, *self.expert_checkpoint.stop_tokens}))

    @property
    def dtype(self) -> str:
        """The precision of the weights and of products with them, a key of `checkpoint.PRECISIONS`."""
        weights = str(self.base["embed"]["W_E"].dtype)
        return weights if self.cfg.activation_splits == 1 else f"{weights}x{self.cfg.activation_splits}"

    @functools.cached_property
    def fingerprints(self) -> tuple[str, str]:
        """Hashes of base and expert (see `checkpoint.fingerprint`)."""
        return fingerprint(self.cfg, self.base), fingerprint(self.cfg, self.expert)

    def diff_norms(self) -> list[DiffNorm]:
        """What the expert changed, unit by unit, in the order of `components.KINDS`."""
        ours, theirs = flatten(self.base), flatten(self.expert)
        units = dict.fromkeys(unit for kind in KINDS.values() for unit in kind.units)
        rows = []
        for unit in units:
            paths = [path for path in ours if LEAVES[path].unit == unit]
            if not paths:
                continue
            deltas = [np.asarray(theirs[p], np.float32) - np.asarray(ours[p], np.float32) for p in paths]
            rows.append(
                DiffNorm(
                    unit,
                    sum(d.size for d in deltas),
                    sum(int(np.count_nonzero(d)) for d in deltas),
                    float(np.sqrt(sum(np.square(d, dtype=np.float64).sum() for d in deltas))),
                    float(np.sqrt(sum(float(jnp.square(ours[p].astype(jnp.float32)).sum()) for p in paths))),
                )
            )
        return rows

    def delta_norms(self, components: Sequence[Component]) -> Float[np.ndarray, " C"]:
        """Frobenius norm of expert - base over the parameters of each of C components."""
        squares: dict[str, np.ndarray] = {}  # unit -> sums of squares, of the shape of the unit's mask
        ours, theirs = flatten(self.base), flatten(self.expert)
        for path, leaf in ours.items():
            unit, axis = LEAVES[path]
            stacked = path.startswith("blocks/")
            mask_axes = {0} if stacked else set()
            mask_axes |= {axis + stacked} if axis is not None else set()
            rest = tuple(i for i in range(leaf.ndim) if i not in mask_axes)
            square = squared_change(leaf, theirs[path], rest)
            squares[unit] = np.asarray(squares.get(unit, 0.0) + np.asarray(square, np.float64))
        by_kind = {kind: _component_sums(squares, kind) for kind in {c.kind for c in components}}
        return np.sqrt([by_kind[c.kind][max(c.layer, 0)][c.index] for c in components])


@functools.partial(jax.jit, static_argnames="over")
def squared_change(base: Array, expert: Array, over: tuple[int, ...]) -> Array:
    """Sum of the squared changes of a leaf, over some of its axes.

    It is one compiled program, so that no copy of a leaf in float32 stays in memory.

    Args:
        base: a leaf of the base.
        expert: the same leaf of the expert.
        over: axes to sum over (static).

    Returns:
        float32, with the axes that are left.
    """
    return jnp.square(expert.astype(jnp.float32) - base.astype(jnp.float32)).sum(over)


def _component_sums(squares: dict[str, np.ndarray], kind: str) -> Float[np.ndarray, "L n"]:
    """Sums of each component of a kind, by layer and index, from the sums of each unit."""
    entry = KINDS[kind]
    if entry.opens == "part":  # a norm that the model lacks gets zeros, so that the others keep their indices
        any_part = next(squares[unit] for unit in entry.units if unit in squares)
        return np.stack([squares.get(unit, np.zeros_like(any_part)) for unit in entry.units], axis=1)
    units = [squares[unit] for unit in entry.units if unit in squares]
    if entry.opens == "channel":
        return units[0]
    if not entry.in_layer:
        return np.array([[sum(units)]])
    return np.sum([g.reshape(len(g), -1).sum(1) for g in units], axis=0)[:, None]


def load_model(source: str | Path, dtype: str = "float32", ignore_config: tuple[str, ...] = ()) -> Checkpoint:
    """Load one model: any source of `load_checkpoint`, or a tiny model inside the package.

    Args:
        source: folder, `.gguf` file or hub id; or "tiny:base", "tiny:expert" or "tiny:planted".
        dtype: "float32", "bfloat16" or "bfloat16x2" (see `load_checkpoint`).
        ignore_config: attributes of config.json that you know not to matter.

    Raises:
        CheckpointError: the source cannot be read.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> model.cfg.family, model.source
    ('llama', 'tiny:base')
    """
    source = str(source)
    check_devices()
    if not source.startswith("tiny:"):
        recover(Path(source).expanduser())  # a folder that a killed `finetune --overwrite` was about to replace
        return load_checkpoint(source, dtype, ignore_config)
    name = source.removeprefix("tiny:")
    if name not in EMBEDDED:
        raise CheckpointError(
            f"unknown embedded model {source!r}; there are {', '.join(f'tiny:{n}' for n in EMBEDDED)}"
        )
    with resources.as_file(resources.files("wpjax") / "assets" / "tiny") as folder:
        model = load_checkpoint(str(folder / name), dtype)
        # The base's folder alone holds the tokenizer, which all of them share.
        tokenizer = model.tokenizer or load_tokenizer(folder / "base")
    return dataclasses.replace(model, tokenizer=tokenizer, source=source)


def planted_components() -> tuple[str, ...]:
    """Names of the components that "tiny:planted" was trained in: the truth that its sweep should find."""
    text = (resources.files("wpjax") / "assets" / "tiny" / "planted" / "planted.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["components"])


def load_pair(
    base: str | Path, expert: str | Path, dtype: str = "float32", ignore_config: tuple[str, ...] = ()
) -> Pair:
    """Load two checkpoints and check that they fit each other.

    Args:
        base: source of the base, as `load_model` takes it.
        expert: source of the expert, likewise.
        dtype: "float32", "bfloat16" or "bfloat16x2" (see `load_checkpoint`).
        ignore_config: attributes of config.json that you know not to matter.

    Raises:
        PairError: the two differ in architecture or vocabulary, or have equal weights. The message says how.
        CheckpointError: a source cannot be read.

    >>> import wpjax as wp
    >>> pair = wp.load_pair("tiny:base", "tiny:expert")
    >>> [norm.unit for norm in pair.diff_norms() if norm.n_changed][:3]
    ['head', 'kv_group', 'neuron']
    """
    return make_pair(load_model(base, dtype, ignore_config), load_model(expert, dtype, ignore_config))


def make_pair(base: Checkpoint, expert: Checkpoint) -> Pair:
    """A pair of two models in memory.

    Args:
        base: the base.
        expert: the expert.

    Raises:
        PairError: as `load_pair`.
    """
    names = f"{base.source} and {expert.source}"
    differences = base.cfg.differences(expert.cfg)
    if differences:
        raise PairError(f"{names} are not one architecture: {'; '.join(differences)}")
    tokenizer = _common_tokenizer(base, expert, names)
    ours, theirs = flatten(base.params), flatten(expert.params)
    for checkpoint, leaves in ((base, ours), (expert, theirs)):
        for path, leaf in leaves.items():
            _check_size(checkpoint.source, path, leaf)
    if all(bool(jnp.array_equal(ours[path], theirs[path])) for path in ours):
        raise PairError(f"{names} have equal weights; name a base and an expert that was trained from it")
    return Pair(base.cfg, base.params, expert.params, tokenizer, base, expert)


@jax.jit
def _too_large(leaf: Array) -> Array:
    return (~(jnp.abs(leaf) <= LARGEST_WEIGHT)).any()  # so written, NaN is too large


def _check_size(source: str, path: str, leaf: Array) -> None:
    """Refuse weights that are not finite, or so large that what is computed from them would not be.

    Raises:
        CheckpointError: names the parameter, and the layer.
    """
    if not _too_large(leaf):
        return
    at = np.unravel_index(int(np.argmax(np.nan_to_num(np.abs(np.asarray(leaf, np.float32)), nan=np.inf))), leaf.shape)
    layer, rest = (f" of layer {at[0]}", at[1:]) if path.startswith("blocks/") else ("", at)
    value = float(np.asarray(leaf[tuple(int(i) for i in at)], np.float32))
    raise CheckpointError(
        f"{source}: {path.removeprefix('blocks/')}{layer} is {value:g} at [{', '.join(map(str, rest))}]; no trained "
        "weight is so large, so the checkpoint is damaged: download or train it again"
    )


def _common_tokenizer(base: Checkpoint, expert: Checkpoint, names: str) -> Any:
    """The tokenizer of a pair; see `Pair.tokenizer`.

    Raises:
        PairError: there is none, one belongs to another model, or the two give tokens different ids.
    """
    first, second = base.tokenizer, expert.tokenizer
    if first is None and second is None:
        raise PairError(f"{names}: neither has a tokenizer; put tokenizer.json beside the weights of one")
    for checkpoint in (base, expert):
        if checkpoint.tokenizer is not None and len(checkpoint.tokenizer) > checkpoint.cfg.d_vocab:
            raise PairError(
                f"{checkpoint.source}: the tokenizer has {len(checkpoint.tokenizer)} tokens, the model "
                f"{checkpoint.cfg.d_vocab}; it belongs to another model"
            )
    if first is None or second is None:
        return first or second
    ours, theirs = first.get_vocab(), second.get_vocab()
    if ours != theirs:
        moved = [t for t in ours if t in theirs and ours[t] != theirs[t]]
        only = [t for t in ours if t not in theirs] + [t for t in theirs if t not in ours]
        parts = [
            f"{len(tokens)} tokens {what} (e.g. {', '.join(map(repr, tokens[:3]))})"
            for what, tokens in (("with different ids", moved), ("in only one of them", only))
            if tokens
        ]
        raise PairError(f"{names} do not share a vocabulary: {'; '.join(parts)}")
    return second if getattr(second, "chat_template", None) else first
