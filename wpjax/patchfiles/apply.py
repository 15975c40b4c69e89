"""Patches put into a model, and taken out again, tensor by tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from wpjax.checkpoints.convert import tensor_name
from wpjax.checkpoints.rewrite import StoredModel, TensorDigest, check_rewrite, rewrite_folder
from wpjax.errors import PatchError
from wpjax.models.config import ModelConfig
from wpjax.patchfiles.card import model_card
from wpjax.patchfiles.delta import widened
from wpjax.patchfiles.patch import Patch
from wpjax.patchfiles.stack import OnConflict, Stack, check_fits, stack

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much is done."""


@dataclasses.dataclass(frozen=True)
class Written:
    """What a command wrote.

    Attributes:
        n_tensors: number of tensors that were changed.
        n_weights: number of weights in the slices that were written.
        is_host: whether the model, but for these slices, was the host of the patches to the last bit, in its dtype;
            None if they say different things.
    """

    n_tensors: int
    n_weights: int
    is_host: bool | None


def apply_patches(
    model: StoredModel,
    patches: Sequence[Patch],
    out: str | Path,
    *,
    scales: Sequence[float] | float = 1.0,
    undo: bool = False,
    on_conflict: OnConflict = "error",
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    card: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Written:
    """Write a model with patches in it, or without them, as an HF folder that transformers loads.

    Slices are checked before anything is written. One tensor is in memory at a time.

    Args:
        model: what the patches go into, as `open_model` gives it; to undo, the patched model.
        patches: the patches.
        out: the folder to write.
        scales: the share of its change that a patch makes: one number for all of them, or one for each.
        undo: the reverse. `scales` and `on_conflict` must be those with which the patches went in. The slices become
            those of the host, bit for bit.
        on_conflict: what becomes of components that two patches bring.
        dtype: dtype of the weights that are written; None for that of the model.
        card: the text of the model card; None for one that says what the patches say.
        overwrite: whether to replace a model folder that is there.
        progress: called for each tensor.

    Raises:
        PatchError: a patch does not fit the model: it is for another base, or in it already (to undo: not in it); or
            patches conflict.
        OutputError: the folder exists already, lies in the model, or cannot be written.

    A patch is put in, and taken out again:

    >>> import tempfile
    >>> import wpjax as wp
    >>> from wpjax.checkpoints.rewrite import open_model
    >>> from wpjax.patchfiles import apply_patches, save_patch
    >>> pair, folder = wp.load_pair("tiny:base", "tiny:expert"), Path(tempfile.mkdtemp())
    >>> patch = save_patch(folder / "title.safetensors", pair, ["L2.head.0", "L4.mlp"])
    >>> base = open_model("tiny:base")
    >>> apply_patches(base, [patch], folder / "patched").n_tensors
    5
    >>> patched = open_model(folder / "patched")
    >>> _ = apply_patches(patched, [patch], folder / "restored", undo=True)
    >>> open_model(folder / "restored").fingerprint() == base.fingerprint() != patched.fingerprint()
    True
    """
    put = stack(model.cfg, patches, scales, on_conflict)
    check_rewrite(Path(out), overwrite, model)
    check_model(model, put, undo, progress)
    host = TensorDigest()
    n_weights = n_done = 0

    def change(name: str, tensor: np.ndarray) -> np.ndarray:
        nonlocal n_weights, n_done
        n_done += 1
        progress("writing", n_done, len(model.names))
        if name not in changed:
            host.add(name, tensor)
            return tensor
        values = put.values(name)
        n_weights += values.before.size
        as_host = values.slices.put(tensor, values.before.astype(tensor.dtype))
        host.add(name, as_host)
        if undo:
            return as_host
        if dtype is not None:  # rounded once, from the values, not from those in the model's own dtype
            tensor = widened(tensor)
            return values.slices.put(tensor, widened(values.after))
        with np.errstate(over="ignore"):  # what is not finite is refused
            return values.slices.put(tensor, values.after.astype(tensor.dtype))

    changed = set(put.names)
    hosts = {patch.info.fingerprint for patch in patches}
    if card is None:
        card = model_card(model.source, put, undo)
    rewrite_folder(model, out, change, files={"README.md": card}, overwrite=overwrite, dtype=dtype)
    return Written(len(changed), n_weights, hosts == {host.hexdigest()} if len(hosts) == 1 else None)


def remove_patch(
    expert: StoredModel,
    patch: Patch,
    out: str | Path,
    *,
    base: StoredModel | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Written:
    """Take a behaviour out of an expert: the base's slices at the components of a patch (a knock-out).

    The expert may be another one than the patch was made of: whatever it has there, it gets the base's weights.

    Args:
        expert: the model to change, as `open_model` gives it.
        patch: a patch for the base.
        out: the folder to write.
        base: the base, if it is to be checked that the patch is one of its; None to leave that out.
        dtype: dtype of the weights that are written; None for that of the expert.
        overwrite: whether to replace a model folder that is there.
        progress: called for each tensor.

    Raises:
        PatchError: the patch is for another architecture, for another base, or is a knock-out itself; or the expert
            has the base's weights there already.
        OutputError: the folder exists already, lies in a model, or cannot be written.
    """
    if patch.info.knockout:
        raise PatchError(f"{patch.where} is a knock-out already, a patch for the expert; use wpjax apply")
    check_fits(patch, expert.cfg)
    check_rewrite(Path(out), overwrite, *([expert] if base is None else [expert, base]))
    if base is not None:
        check_model(base, stack(base.cfg, [patch]), False, progress)
    differs = False
    for i, (name, slices) in enumerate(patch.slices.items()):
        progress("comparing", i, len(patch.slices))
        tensor = _fitting(expert, patch, name)
        differs |= not same_bits(slices.of(tensor), patch.before(name).astype(tensor.dtype))
    if not differs:
        raise PatchError(f"{expert.source} has the weights of {patch.info.into} there already: nothing to remove")
    n_weights = n_done = 0

    def change(name: str, tensor: np.ndarray) -> np.ndarray:
        nonlocal n_weights, n_done
        n_done += 1
        progress("writing", n_done, len(expert.names))
        if name not in patch.slices:
            return tensor
        before = patch.before(name)
        n_weights += before.size
        return patch.slices[name].put(tensor, before.astype(tensor.dtype))

    card = model_card(expert.source, stack(expert.cfg, [patch]), removed=True)
    rewrite_folder(expert, out, change, files={"README.md": card}, overwrite=overwrite, dtype=dtype)
    return Written(len(patch.slices), n_weights, None)


def check_model(model: StoredModel, put: Stack, undo: bool = False, progress: Progress = lambda *_: None) -> None:
    """Refuse a model that patches do not fit, before anything is written. Only patched tensors are read.

    Args:
        model: the model.
        put: the patches.
        undo: whether they are to be taken out.
        progress: called for each tensor.

    Raises:
        PatchError: the slices are not the host's (to undo: not the patched ones). The message says what they are.
    """
    n_host = n_patched = 0
    other: list[str] = []
    for i, name in enumerate(put.names):
        progress("comparing", i, len(put.names))
        fitting = [_fitting(model, patch, name) for patch in put.patches if name in patch.slices]
        tensor = fitting.pop()
        values = put.values(name)
        found = values.slices.of(tensor)
        with np.errstate(over="ignore"):
            host, patched = (same_bits(found, v.astype(tensor.dtype)) for v in (values.before, values.after))
        n_host, n_patched = n_host + host, n_patched + patched
        if not host and not patched:
            other.append(name)
    n, where = len(put.names), " and ".join(patch.where for patch in put.patches)
    is_are = "is" if len(put.patches) == 1 else "are"
    if (n_patched if undo else n_host) == n:
        return
    if other:
        into = put.patches[0].info.into
        how = ", or a patch went in with another --scale or --on-conflict" if undo else ""
        raise PatchError(
            f"{model.source}: {len(other)} of the {n} tensors that {where} would change are neither those of {into} "
            f"nor patched, the first {other[0]}; the patch is for another base, or another patch changed it{how}"
        )
    if undo and n_host == n:
        raise PatchError(f"{where} {is_are} not in {model.source}: nothing to undo")
    if not undo and n_patched == n:
        raise PatchError(f"{where} {is_are} in {model.source} already; to take it out, pass --undo")
    raise PatchError(
        f"{model.source}: {n_patched} of the {n} tensors that {where} would change are patched already, and "
        f"{n_host} are not; take out what is in it first, patch by patch, with --undo"
    )


def _fitting(model: StoredModel, patch: Patch, name: str) -> np.ndarray:
    """A tensor of a model, of the shape that a patch says it has. Vocabularies may have more rows, or fewer.

    Raises:
        PatchError: it is missing, or of another shape.
    """
    shape, last = patch.shapes[name], int(patch.slices[name].positions[-1])
    if name not in model.names:
        raise PatchError(f"{model.source} has no tensor {name}; {patch.where} is for {patch.info.into}")
    tensor = model.read(name)
    grown = tensor.shape[1:] == shape[1:] and last < len(tensor) and name in vocabulary_tensors(model.cfg)
    if tensor.shape != shape and not grown:
        raise PatchError(
            f"{model.source}: {name} has shape {tensor.shape}, and {patch.where} is for a model where it has {shape}"
        )
    return tensor


def vocabulary_tensors(cfg: ModelConfig) -> set[str]:
    """Full HF names of the tensors that have a row for each token.

    >>> sorted(vocabulary_tensors(ModelConfig("llama", 1, 16, 4, 2, 4, 32, 50, 64)))
    ['lm_head.weight', 'model.embed_tokens.weight']
    """
    return {tensor_name(cfg, leaf) for leaf in (["embed/W_E"] if cfg.tied else ["embed/W_E", "unembed/W_U"])}


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays of one dtype are equal to the last bit, the sign of a zero included.

    >>> same_bits(np.array([0.0]), np.array([-0.0]))
    False
    """
    return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()
