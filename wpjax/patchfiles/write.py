"""Writes patch files: from a pair, or from a patch with its changes stored in another way (see `patchfiles.patch`)."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import wpjax
from wpjax.checkpoints.checkpoint import Checkpoint
from wpjax.checkpoints.convert import flatten, hf_tensor, hf_tensors
from wpjax.checkpoints.rewrite import StoredModel, open_model
from wpjax.checkpoints.weights import SafetensorsWriter
from wpjax.components import Component, n_parameters, parse_component
from wpjax.errors import PatchError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.pairs import Pair
from wpjax.patchfiles.delta import INT8, Encoding, decode, encode
from wpjax.patchfiles.patch import KEY, Patch, PatchInfo, as_json, plain
from wpjax.patchfiles.slices import Slices, owned_slices
from wpjax.patching import PatchMask, components_of
from wpjax.runtime.cards import public_name
from wpjax.runtime.files import atomic_output


def save_patch(
    path: str | Path,
    pair: Pair,
    components: Iterable[Component | str],
    *,
    behaviour: str = "",
    measured: Mapping[str, Any] | None = None,
    ranked_by: str = "",
    knockout: bool = False,
    encoding: Encoding = Encoding(),  # noqa: B008  (immutable)
    overwrite: bool = False,
    ignore_config: tuple[str, ...] = (),
) -> Patch:
    """Write the slices that components own, before and after, as a patch file.

    The host's slices are read from its files, so that they are bit for bit what is stored. The donor's are those of
    the pair in memory, which were measured: load the pair in float32, the default, to have them as they are stored.

    Args:
        path: the file to write.
        pair: the models.
        components: components of the expert, or their names. What two of them share counts once.
        behaviour: what they are for.
        measured: what was measured of them together, as values of JSON; an interval is a table with mean, low, high.
        ranked_by: name of the ranking that they were chosen by.
        knockout: the reverse: components of the base, for the expert.
        encoding: how changes are stored.
        overwrite: whether to replace a file that is there.
        ignore_config: attributes of the host's config.json that you know not to matter.

    Returns:
        the patch, opened.

    Raises:
        PatchError: there are no components, or base and expert do not differ in them; the host's files are not the
            host in memory; or the encoding cannot be.
        ComponentError: a name is not a component of this model.
        CheckpointError: the host's files cannot be read.
        OutputError: the file exists already, or cannot be written.

    >>> import tempfile
    >>> import wpjax as wp
    >>> pair, path = wp.load_pair("tiny:base", "tiny:expert"), Path(tempfile.mkdtemp()) / "small.safetensors"
    >>> patch = save_patch(path, pair, ["L4.mlp"], encoding=Encoding(rank=4))
    >>> patch.info.encoding, 0 < patch.info.error < 1
    ('changes of rank 4 at most', True)
    """
    encoding.check()
    if pair.division is not None:
        raise PatchError(
            "a patch file holds slices of matrices, and this pair is divided into directions; load it again"
        )
    names = [parse_component(pair.cfg, c if isinstance(c, str) else c.name).name for c in components]
    names = list(dict.fromkeys(names))
    if not names:
        raise PatchError("a patch needs components; name at least one")
    ends = [(pair.base_checkpoint, pair.base), (pair.expert_checkpoint, pair.expert)]
    (into, host), (origin, donor) = reversed(ends) if knockout else ends
    stored = _open_host(pair, into, knockout, ignore_config)
    cfg = dataclasses.replace(pair.cfg, family=stored.cfg.family)  # a pair of two families is in the base's words
    slices = owned_slices(cfg, names)
    absent = [name for name in slices if name not in stored.names]
    if absent:
        raise PatchError(
            f"{into.source} ties embed and unembed, and {origin.source} does not; leave embed and unembed out"
        )
    mask = PatchMask.of(pair.cfg, names)
    n_owned = sum(n_parameters(pair.cfg, component) for component in components_of(pair.cfg, mask))
    about = PatchInfo(
        tuple(names),
        public_name(into.source),
        public_name(origin.source),
        knockout,
        stored.fingerprint(),
        cfg.family,
        n_owned,
        behaviour,
        ranked_by,
        plain(measured or {}),
        encoding.in_words,
        0.0,
        wpjax.__version__,
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return _write(Path(path), about, list(slices), _entries(cfg, stored, (host, donor), slices), encoding, overwrite)


def _open_host(pair: Pair, into: Checkpoint, knockout: bool, ignore_config: tuple[str, ...]) -> StoredModel:
    """The files of the host; those of an adapter lie over the base's."""
    base = open_model(pair.base_checkpoint.source, ignore_config)
    return open_model(into.source, ignore_config, base) if knockout else base


class Entry(NamedTuple):
    """One tensor of a patch.

    Attributes:
        name: its full HF name.
        slices: the rows or columns that are patched.
        shape: the shape of the tensor in the host.
        before: those rows or columns of the host.
        after: what takes their place.
        parts: how that is stored, if it is known already (see `patchfiles.delta`); None: as the encoding says.
    """

    name: str
    slices: Slices
    shape: tuple[int, ...]
    before: np.ndarray
    after: np.ndarray
    parts: Mapping[str, np.ndarray] | None = None


def _write(
    path: Path, about: PatchInfo, names: Sequence[str], entries: Iterable[Entry], encoding: Encoding, overwrite: bool
) -> Patch:
    """Write a patch, one tensor after the other; `names` are those that it may hold."""
    longest = ("positions", "before", *INT8)
    text = json.dumps(json.dumps(as_json(about, {name: (0, (10**12, 10**12)) for name in names})))
    tensors: dict[str, tuple[int, tuple[int, ...]]] = {}
    wrong = whole = 0.0  # squared norms of the error, and of the change
    with atomic_output(path, overwrite) as file:
        out = SafetensorsWriter(file, [f"{part}/{name}" for part in longest for name in names], len(text) + 200)
        try:
            for name, at, shape, before, after, known in entries:
                parts = encode(before, after, at.axis, encoding) if known is None else known
                change = after.astype(np.float64) - before
                kept = decode(before, at.axis, parts).astype(np.float64) - before
                wrong, whole = wrong + float(((kept - change) ** 2).sum()), whole + float((change**2).sum())
                out.add(f"positions/{name}", at.positions.astype(np.int64))
                for part, values in {"before": before, **parts}.items():
                    out.add(f"{part}/{name}", values)
                tensors[name] = at.axis, shape
            if not tensors:
                raise PatchError(
                    f"{about.origin} does not differ from {about.into} in these components: nothing to patch"
                )
            about = dataclasses.replace(about, error=math.sqrt(wrong / whole))
            out.end({"format": "pt", KEY: json.dumps(as_json(about, tensors))})
        except BaseException:
            out.abandon()
            raise
    return Patch(path)


def _entries(
    cfg: ModelConfig, stored: StoredModel, models: tuple[Params, Params], slices: Mapping[str, Slices]
) -> Iterator[Entry]:
    """The slices in which host and donor differ, tensor by tensor."""
    ours, theirs = (hf_tensors(cfg, params) for params in models)
    for (name, host), (_, donor) in zip(ours, theirs, strict=True):
        if name not in slices:
            continue
        at, tensor = slices[name], stored.read(name)
        before, after = at.of(tensor), at.of(donor)
        _check_is_host(stored, name, before, at.of(host))
        after = _narrowed(after, before.dtype)
        if not np.array_equal(before, after):
            yield Entry(name, at, tensor.shape, before, after)


def save_low_rank(
    path: str | Path,
    model: Checkpoint,
    components: Sequence[str],
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    origin: str,
    behaviour: str = "",
    measured: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    ignore_config: tuple[str, ...] = (),
) -> Patch:
    """Write changes of low rank to a model as a patch file: before + A B in each tensor, exactly.

    Args:
        path: the file to write.
        model: the host, in float32, as it was loaded.
        components: names of components that own the tensors.
        factors: full HF name of a tensor -> A [rows, r] and B [r, columns], float32.
        origin: name of what the changes make of the host.
        behaviour: what they are for.
        measured: what was measured of them, as values of JSON.
        overwrite: whether to replace a file that is there.
        ignore_config: attributes of the host's config.json that you know not to matter.

    Returns:
        the patch, opened.

    Raises:
        PatchError: the host's files are not the host in memory, or nothing changes.
        CheckpointError: the host's files cannot be read.
        OutputError: the file exists already, or cannot be written.

    >>> import tempfile
    >>> import wpjax as wp
    >>> model, path = wp.load_model("tiny:base"), Path(tempfile.mkdtemp()) / "one.safetensors"
    >>> a, b = np.ones((model.cfg.d_model, 1), np.float32), np.ones((1, model.cfg.d_mlp), np.float32)
    >>> patch = save_low_rank(path, model, ["L1.mlp"], {"model.layers.1.mlp.down_proj.weight": (a, b)}, origin="mine")
    >>> patch.info.encoding, patch.info.error
    ('changes of rank 1 at most', 0.0)
    """
    stored, leaves = open_model(model.source, ignore_config), flatten(model.params)
    slices = owned_slices(model.cfg, components)
    n_owned = sum(n_parameters(model.cfg, parse_component(model.cfg, name)) for name in components)
    encoding = Encoding(rank=max(a.shape[1] for a, _ in factors.values()))

    def entries() -> Iterator[Entry]:
        for name, (a, b) in factors.items():
            tensor, at = stored.read(name), slices[name]
            _check_is_host(stored, name, tensor, hf_tensor(model.cfg, leaves, name))
            parts = {"delta_A": a.astype(np.float32), "delta_B": b.astype(np.float32)}
            before = at.of(tensor)
            yield Entry(name, at, tensor.shape, before, decode(before, at.axis, parts), parts)

    about = PatchInfo(
        tuple(components),
        public_name(model.source),
        origin,
        False,
        stored.fingerprint(),
        model.cfg.family,
        n_owned,
        behaviour,
        "",
        plain(measured or {}),
        encoding.in_words,
        0.0,
        wpjax.__version__,
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return _write(Path(path), about, list(factors), entries(), encoding, overwrite)


def encode_patch(path: str | Path, patch: Patch, encoding: Encoding, overwrite: bool = False) -> Patch:
    """Write a patch again, with its changes stored in another way, to an error that the new file states.

    Args:
        path: the file to write.
        patch: the patch, stored exactly.
        encoding: how changes are stored.
        overwrite: whether to replace a file that is there.

    Returns:
        the new patch, opened.

    Raises:
        PatchError: the patch is not stored exactly: the error of the new one would not be known. Or it is damaged, or
            the encoding cannot be.
        OutputError: the file exists already, or cannot be written.

    >>> import tempfile
    >>> import wpjax as wp
    >>> pair, folder = wp.load_pair("tiny:base", "tiny:expert"), Path(tempfile.mkdtemp())
    >>> patch = save_patch(folder / "whole.safetensors", pair, ["L4.mlp"])
    >>> small = encode_patch(folder / "small.safetensors", patch, Encoding(int8=True))
    >>> small.info.encoding, 0 < small.info.error < 0.01
    ('changes in 8 bits', True)
    """
    encoding.check()
    if patch.info.encoding != "exact":
        raise PatchError(
            f"{patch.where} holds {patch.info.encoding} already, with a relative error of {patch.info.error:.2g}; "
            "encode the patch that is stored exactly"
        )
    about = dataclasses.replace(patch.info, encoding=encoding.in_words, error=0.0, wpjax_version=wpjax.__version__)
    entries = (
        Entry(name, at, patch.shapes[name], patch.before(name), patch.after(name)) for name, at in patch.slices.items()
    )
    return _write(Path(path), about, list(patch.slices), entries, encoding, overwrite)


def _check_is_host(stored: StoredModel, name: str, before: np.ndarray, host: np.ndarray) -> None:
    """Refuse a host in memory that is not the one in its files, but for rounding to the coarser dtype of the two.

    Raises:
        PatchError: it is another one.
    """
    eps = max(_eps(before.dtype), _eps(host.dtype))
    if not np.allclose(before.astype(np.float64), host.astype(np.float64), rtol=2 * eps, atol=1e-30):
        raise PatchError(
            f"tensor {name} in memory is not that of {stored.source}, where the pair says that it comes from; save the "
            "model to a folder, and load the pair from there"
        )


def _eps(dtype: np.dtype[Any]) -> float:
    """The relative step of a dtype."""
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).eps)


def _narrowed(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """The values in another dtype if that holds them exactly; else as they are."""
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype)
    return narrow if np.array_equal(narrow.astype(values.dtype), values) else values
