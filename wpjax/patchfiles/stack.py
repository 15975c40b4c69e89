"""Several patches that go into one model together: where they conflict, and which values they make of its tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from wpjax.checkpoints.convert import tensor_shapes
from wpjax.components import parse_component
from wpjax.errors import PatchError
from wpjax.models.config import ModelConfig
from wpjax.patchfiles.delta import widened
from wpjax.patchfiles.patch import Patch
from wpjax.patchfiles.slices import Slices, overlap, owned_slices

OnConflict: TypeAlias = Literal["error", "sum", "first"]
"""What becomes of a component that two patches bring: it is refused, changes are added up, or the first patch wins."""

MOST_NAMED = 8
"""Components that a message names, at most."""


class Conflict(NamedTuple):
    """A component that two patches bring.

    Attributes:
        component: its name.
        one: the file of the patch that is named first.
        other: the file of the other one.
    """

    component: str
    one: str
    other: str


class Values(NamedTuple):
    """What patches make of one tensor.

    Attributes:
        slices: the rows or columns that are patched.
        before: the host's.
        after: what takes their place, before it is rounded to the dtype of a model.
    """

    slices: Slices
    before: np.ndarray
    after: np.ndarray


@dataclasses.dataclass(frozen=True)
class Stack:
    """Patches for one model.

    Where a patch has scale 1 and stands alone, its values are the donor's. Otherwise they are

        before + sum over patches of scale (after - before)

    in float32, which is rounded to the dtype of the model.

    Attributes:
        cfg: the architecture of the model.
        patches: the patches.
        scales: the scale of each.
        on_conflict: what becomes of components that two patches bring.

    Raises:
        PatchError: a patch does not fit the architecture, or is there twice; there are conflicts, and nothing was said
            of them; or there are not as many scales as patches.
    """

    cfg: ModelConfig
    patches: tuple[Patch, ...]
    scales: tuple[float, ...]
    on_conflict: OnConflict = "error"

    def __post_init__(self) -> None:
        if not self.patches:
            raise PatchError("name at least one patch")
        if len(self.scales) != len(self.patches):
            raise PatchError(f"{len(self.scales)} scales for {len(self.patches)} patches; give one, or one for each")
        for scale in self.scales:
            if not np.isfinite(scale):
                raise PatchError(f"scale {scale} is not a number; 1 puts a patch in as it is")
        for patch in self.patches:
            check_fits(patch, self.cfg)
        found = self.conflicts
        if found and self.on_conflict == "error":
            files: dict[tuple[str, str], list[str]] = {}
            for conflict in found:
                files.setdefault((conflict.one, conflict.other), []).append(conflict.component)
            said = "; ".join(f"{one} and {other} both bring {_first(names)}" for (one, other), names in files.items())
            raise PatchError(
                f"{said}; pass --on-conflict sum to add their changes up, or --on-conflict first to let the first "
                "patch win"
            )

    @property
    def conflicts(self) -> list[Conflict]:
        """Every component that two patches bring."""
        return [
            Conflict(component.name, one.where, other.where)
            for i, one in enumerate(self.patches)
            for other in self.patches[i + 1 :]
            for component in overlap(self.cfg, one.info.components, other.info.components)
        ]

    @property
    def names(self) -> list[str]:
        """Full HF names of the tensors that are patched."""
        return list(dict.fromkeys(name for patch in self.patches for name in patch.slices))

    def values(self, name: str) -> Values:
        """What the patches make of one tensor.

        Args:
            name: its full HF name, one of `names`.

        Raises:
            PatchError: two patches are of different hosts, or one cannot be read.
            CheckpointError: a value is not finite.
        """
        parts = list(self._parts(name))
        if len(parts) == 1:
            return parts[0][0]
        axis = max(values.slices.axis for values, _, _ in parts)  # a whole tensor is rows as well as columns
        at = np.unique(np.concatenate([_along(v.slices, axis, p.shapes[name]).positions for v, _, p in parts]))
        shape = list(parts[0][2].shapes[name])
        shape[axis] = len(at)
        before, after = (np.zeros(shape, widened(parts[0][0].before).dtype) for _ in range(2))
        host, patched = (np.moveaxis(values, axis, 0) for values in (before, after))  # views, slices first
        seen = np.zeros(len(at), bool)
        for values, scale, patch in parts:
            where = np.searchsorted(at, _along(values.slices, axis, patch.shapes[name]).positions)
            ours, theirs = (np.moveaxis(widened(of), axis, 0) for of in (values.before, values.after))
            twice = seen[where]
            if not np.array_equal(host[where[twice]], ours[twice]):
                raise PatchError(f"{parts[0][2].where} and {patch.where} are of different bases: {name} differs")
            if self.on_conflict == "sum":
                patched[where[twice]] += np.moveaxis(np.float32(scale) * patch.delta(name), axis, 0)[twice]
            host[where[~twice]] = ours[~twice]
            patched[where[~twice]] = theirs[~twice]
            seen[where] = True
        return Values(Slices(axis, at), before, after)

    def _parts(self, name: str) -> Iterator[tuple[Values, float, Patch]]:
        """What each patch alone makes of a tensor, with its scale."""
        for patch, scale in zip(self.patches, self.scales, strict=True):
            if name not in patch.slices:
                continue
            before = patch.before(name)
            after = patch.after(name) if scale == 1 else widened(before) + np.float32(scale) * patch.delta(name)
            yield Values(patch.slices[name], before, after), scale, patch


def _first(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _along(slices: Slices, axis: int, shape: tuple[int, ...]) -> Slices:
    """The same slices along another axis, if they are the whole tensor.

    Raises:
        PatchError: they are not.
    """
    if slices.axis == axis:
        return slices
    if len(slices.positions) != shape[slices.axis]:
        raise PatchError("a patch holds rows of a tensor, and another one columns; apply them one after the other")
    return Slices(axis, np.arange(shape[axis]))


def stack(
    cfg: ModelConfig,
    patches: Sequence[Patch],
    scales: Sequence[float] | float = 1.0,
    on_conflict: OnConflict = "error",
) -> Stack:
    """Patches for one model.

    Args:
        cfg: the architecture of the model.
        patches: the patches.
        scales: one number for all of them, or one for each.
        on_conflict: what becomes of components that two patches bring.

    Raises:
        PatchError: as `Stack`.
    """
    many = tuple(scales) if isinstance(scales, Sequence) else (scales,)
    many = many * len(patches) if len(many) == 1 else many
    return Stack(cfg, tuple(patches), tuple(float(scale) for scale in many), on_conflict)


def check_fits(patch: Patch, cfg: ModelConfig) -> None:
    """Refuse a patch whose components or slices are not those of an architecture.

    Raises:
        PatchError: they are not; the message says what differs.
    """
    if patch.info.family != cfg.family:
        raise PatchError(f"{patch.where} is a patch for a {patch.info.family!r} model, and this is a {cfg.family!r}")
    try:
        for name in patch.info.components:
            parse_component(cfg, name)
    except ValueError as error:
        raise PatchError(f"{patch.where} does not fit this model: {error}; it is for {patch.info.into}") from error
    owned, shapes = owned_slices(cfg, patch.info.components), tensor_shapes(cfg)
    most = sum(math.prod(shapes[name]) // shapes[name][at.axis] * len(at.positions) for name, at in owned.items())
    if not 0 < patch.info.n_parameters <= most:
        raise PatchError(
            f"{patch.where} says that its components own another number of weights than the {most:,} that they own in "
            f"this model; it is for {patch.info.into}, or it is damaged"
        )
    for name, slices in patch.slices.items():
        if name not in owned:
            raise PatchError(f"{patch.where}: its components own nothing of {name}, which it changes; get it again")
        if slices.axis != owned[name].axis or not np.isin(slices.positions, owned[name].positions).all():
            raise PatchError(
                f"{patch.where}: its components own other rows or columns of {name} in this model; it is for "
                f"{patch.info.into}, or it is damaged"
            )
