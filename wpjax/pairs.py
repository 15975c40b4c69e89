"""A base and an expert: two checkpoints of one architecture that read the same tokens."""

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

EMBEDDED = ("base", "expert", "planted")


class DiffNorm(NamedTuple):
    """How much of one unit's parameters the expert changed.

    Attributes:
        unit: the unit.
        n_params: parameters it owns in the whole model.
        n_changed: how many of them differ.
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
        tokenizer: the expert's if it has a chat template, otherwise the base's.
        base_checkpoint: where the base came from.
        expert_checkpoint: where the expert came from.
    """

    cfg: ModelConfig
    base: Params
    expert: Params
    tokenizer: Any
    base_checkpoint: Checkpoint
    expert_checkpoint: Checkpoint

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end a generation of either model."""
        return tuple(sorted({*self.base_checkpoint.stop_tokens, *self.expert_checkpoint.stop_tokens}))

    @property
    def dtype(self) -> str:
        """Of the weights, and of products with them: one of `checkpoint.PRECISIONS`."""
        weights = str(self.base["embed"]["W_E"].dtype)
        return weights if self.cfg.activation_splits == 1 else f"{weights}x{self.cfg.activation_splits}"

    @functools.cached_property
    def fingerprints(self) -> tuple[str, str]:
        """Hashes of base and expert."""
        return fingerprint(self.cfg, self.base), fingerprint(self.cfg, self.expert)

    def diff_norms(self) -> list[DiffNorm]:
        """What the expert changed, unit by unit, in the order of the component tables."""
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
        """Frobenius norm of expert - base over each component's parameters."""
        squares: dict[str, np.ndarray] = {}
        ours, theirs = flatten(self.base), flatten(self.expert)
        for path, leaf in ours.items():
            unit, axis = LEAVES[path]
            stacked = path.startswith("blocks/")
            keep = {0} if stacked else set()
            keep |= {axis + stacked} if axis is not None else set()
            rest = tuple(i for i in range(leaf.ndim) if i not in keep)
            square = squared_change(leaf, theirs[path], rest)
            squares[unit] = np.asarray(squares.get(unit, 0.0) + np.asarray(square, np.float64))
        by_kind = {kind: _component_sums(squares, kind) for kind in {c.kind for c in components}}
        return np.sqrt([by_kind[c.kind][max(c.layer, 0)][c.index] for c in components])


@functools.partial(jax.jit, static_argnames="over")
def squared_change(base: Array, expert: Array, over: tuple[int, ...]) -> Array:
    """Sum of squares of a leaf's change over some of its axes, in one program: no copy of it is kept in float32.

    Args:
        base: a leaf of the base.
        expert: the same leaf of the expert.
        over: axes that are summed over.

    Returns:
        float32, of the axes that are left.
    """
    return jnp.square(expert.astype(jnp.float32) - base.astype(jnp.float32)).sum(over)


def _component_sums(squares: dict[str, np.ndarray], kind: str) -> Float[np.ndarray, "L n"]:
    """Per-unit sums -> sums of each component of a kind, by layer and index."""
    entry = KINDS[kind]
    if entry.opens == "part":  # a norm that the model does not have takes its place, so that indices stay
        some = next(squares[unit] for unit in entry.units if unit in squares)
        return np.stack([squares.get(unit, np.zeros_like(some)) for unit in entry.units], axis=1)
    units = [squares[unit] for unit in entry.units if unit in squares]
    if entry.opens == "channel":
        return units[0]
    if not entry.in_layer:
        return np.array([[sum(units)]])
    return np.sum([g.reshape(len(g), -1).sum(1) for g in units], axis=0)[:, None]


def load_model(source: str | Path, dtype: str = "float32", ignore_config: tuple[str, ...] = ()) -> Checkpoint:
    """Load one model: as `load_checkpoint`, and "tiny:base", "tiny:expert", "tiny:planted" from the package.

    Raises:
        CheckpointError: the source cannot be read.
    """
    source = str(source)
    if not source.startswith("tiny:"):
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
    """The components that "tiny:planted" was trained in: the truth its sweep should find."""
    text = (resources.files("wpjax") / "assets" / "tiny" / "planted" / "planted.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["components"])


def load_pair(
    base: str | Path, expert: str | Path, dtype: str = "float32", ignore_config: tuple[str, ...] = ()
) -> Pair:
    """Load two checkpoints and check that they are a pair.

    Args:
        base: folder, `.gguf` file, hub id or embedded model.
        expert: likewise.
        dtype: "float32", "bfloat16" or "bfloat16x2" (see `load_checkpoint`).
        ignore_config: attributes of config.json known not to matter.

    Raises:
        PairError: different architectures or vocabularies, or equal weights; the message lists the differences.
        CheckpointError: a source cannot be read.
    """
    return make_pair(load_model(base, dtype, ignore_config), load_model(expert, dtype, ignore_config))


def make_pair(base: Checkpoint, expert: Checkpoint) -> Pair:
    """A pair from two models in memory.

    Raises:
        PairError: as `load_pair`.
    """
    names = f"{base.source} and {expert.source}"
    differences = base.cfg.differences(expert.cfg)
    if differences:
        raise PairError(f"{names} are not one architecture: {'; '.join(differences)}")
    tokenizer = _common_tokenizer(base, expert, names)
    ours, theirs = flatten(base.params), flatten(expert.params)
    if all(bool(jnp.array_equal(ours[path], theirs[path])) for path in ours):
        raise PairError(f"{names} have equal weights; name a base and an expert that was trained from it")
    return Pair(base.cfg, base.params, expert.params, tokenizer, base, expert)


def _common_tokenizer(base: Checkpoint, expert: Checkpoint, names: str) -> Any:
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
            f"{len(some)} tokens {what} (e.g. {', '.join(map(repr, some[:3]))})"
            for what, some in (("with different ids", moved), ("in only one of them", only))
            if some
        ]
        raise PairError(f"{names} do not share a vocabulary: {'; '.join(parts)}")
    return second if getattr(second, "chat_template", None) else first
