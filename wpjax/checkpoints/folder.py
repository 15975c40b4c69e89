"""The files of a Hugging Face folder: its JSON, and its tensors, read one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from wpjax.checkpoints.weights import DTYPES
from wpjax.errors import CheckpointError

_NUMPY = {stored: jnp.dtype(name) for name, stored in DTYPES.items()}
_POINTER = b"version https://git-lfs.github.com/spec/"
_READ = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Endings of the files of a folder that are read."""
MARKER = "config.json"
"""The file that makes a folder a model."""
ADAPTER = "adapter_config.json"
"""The file that makes a folder a PEFT adapter."""


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds neither one whole model nor one adapter, before anything is read.

    Raises:
        CheckpointError: the folder holds a model and an adapter, a git-lfs pointer, or something that is no regular
            file; or it has no configuration.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ:
            check_file(path)
    if (folder / ADAPTER).exists():
        # Some trainers write the base's config.json beside an adapter. Weights make it a model.
        tensors = [path.name for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_")]
        weights = sorted([*tensors, *(path.name for path in folder.glob("pytorch_model*.bin"))])
        if weights:
            raise CheckpointError(
                f"{folder}: holds a PEFT adapter ({ADAPTER}) beside a model ({weights[0]}); if it is merged already, "
                f"remove the adapter's files; else put them in a folder of their own, or {how_to_merge(folder)}"
            )
    elif not (folder / MARKER).exists():
        raise CheckpointError(
            f"{folder}: no config.json; a model folder holds config.json and model.safetensors, an adapter {ADAPTER} "
            "and adapter_model.safetensors"
        )


def how_to_merge(folder: Path) -> str:
    """In words and code, how PEFT makes a whole model of an adapter's folder."""
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    return (
        f"merge it: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {folder.name!r})"
        ".merge_and_unload().save_pretrained(NEW_FOLDER)"
    )


def check_file(path: Path) -> None:
    """Refuse a path that is there but no regular file (reading a pipe would hang), and a git-lfs pointer.

    Raises:
        CheckpointError: it is one of these.
    """
    if path.is_dir() or not path.exists():
        return
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file; copy its content to one")
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); check its permissions") from error
    if start == _POINTER:
        raise CheckpointError(
            f"{path}: a git-lfs pointer in place of the file; run `git lfs install` and `git lfs pull` in the folder"
        )


class SafetensorsFolder:
    """The safetensors files of an HF folder, as a `TensorSource`.

    Tensors are views of their files, which are mapped into memory. What is read of one is read when its numbers are
    used, takes no memory of the process's own, and is let go with the view.

    Args:
        folder: the folder, with one model.safetensors or with shards and their index.
        stem: name of the weights' file without its ending; of an adapter "adapter_model".

    Raises:
        CheckpointError: there are no weights or two sets of them, a shard is damaged or missing, or a tensor stands in
            two shards.
    """

    configuration = "config.json"

    def __init__(self, folder: Path, stem: str = "model"):
        self.where = str(folder)
        self._tensors: dict[str, _Stored] = {}
        for path in self._shards(folder, stem):
            for name, tensor in _stored_tensors(path).items():
                if name in self._tensors:
                    raise CheckpointError(f"{folder}: tensor {name} stands in more than one file; remove one")
                self._tensors[name] = tensor

    @staticmethod
    def _shards(folder: Path, stem: str) -> list[Path]:
        """The weight files of a folder."""
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(f"{index}: no weight_map from tensors to files; download it again")
            present = {path.name for path in folder.iterdir() if path.is_file()}
            files = sorted(set(weight_map.values()))
            for name in files:
                if Path(name).name != name or name == "..":
                    raise CheckpointError(f"{index}: weight_map names {name!r}, which is outside the folder")
            absent = [name for name in files if name not in present]
            if single.name in present and single.name not in files:
                if len(absent) == len(files):  # saved anew as one file, and the old index forgotten
                    return [single]
                raise CheckpointError(
                    f"{folder}: two sets of weights, {single.name} and the shards of {index.name}; remove one"
                )
            if absent:
                raise CheckpointError(f"{folder}: the shard {absent[0]} named by {index.name} is missing")
            return [folder / name for name in files]
        if single.is_file():
            return [single]
        pickles = [p.name for p in folder.glob("*.bin")]
        hint = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
        raise CheckpointError(f"{folder}: no {single.name}{hint}")

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as its file names it, such as "BF16", without reading it."""
        return self._tensors[name].dtype

    def read(self, name: str) -> np.ndarray:
        """One tensor, as a view of its file that cannot be written to.

        Raises:
            CheckpointError: it cannot be read as floats, say because it is of 8 bits (fp8).
        """
        path, offset, shape, dtype = self._tensors[name]
        if dtype not in _NUMPY:
            raise CheckpointError(
                f"{self.where}: tensor {name} cannot be read as floats ({dtype}); a quantised checkpoint (fp8, say) "
                "must be dequantised first"
            )
        if 0 in shape:  # of which there is nothing to map
            return np.empty(shape, _NUMPY[dtype])
        try:
            return np.asarray(np.memmap(path, _NUMPY[dtype], "r", offset, shape))
        except (OSError, ValueError) as error:  # gone or cut since its header was read
            raise CheckpointError(f"{path}: cannot be read ({error}); download it again") from error


class _Stored(NamedTuple):
    """Where a tensor stands.

    Attributes:
        path: its file.
        offset: its first byte in the file.
        shape: its shape.
        dtype: its dtype as the file names it.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


def _stored_tensors(path: Path) -> dict[str, _Stored]:
    """The tensors of a safetensors file, by name.

    Raises:
        CheckpointError: the file is damaged, or not whole.
    """
    try:
        with safe_open(path, framework="np"):  # checks the header, and the file's length against it
            pass
        with path.open("rb") as file:
            n = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(n))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error}); download it again") from error
    header.pop("__metadata__", None)
    return {
        name: _Stored(path, 8 + n + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value
