"""The files of a Hugging Face folder: its JSON, and its tensors, read one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from wpjax.errors import CheckpointError


class SafetensorsFolder:
    """The safetensors files of an HF folder, as a `TensorSource`.

    Args:
        folder: the folder, with one model.safetensors or with shards and their index.

    Raises:
        CheckpointError: there are no weights, a shard is damaged or missing, or a tensor stands in two shards.
    """

    def __init__(self, folder: Path):
        self.where = str(folder)
        self._files: dict[str, Any] = {}
        for path in self._shards(folder):
            try:
                shard = safe_open(path, framework="np")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: damaged or truncated ({error}); download it again") from error
            for name in shard.keys():  # noqa: SIM118  (not a mapping)
                if name in self._files:
                    raise CheckpointError(f"{folder}: tensor {name} stands in more than one file; remove one")
                self._files[name] = shard

    @staticmethod
    def _shards(folder: Path) -> list[Path]:
        """The weight files of a folder."""
        index = folder / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(f"{index}: no weight_map from tensors to files; download it again")
            present = {path.name for path in folder.iterdir() if path.is_file()}
            files = sorted(set(weight_map.values()))
            for name in files:
                if Path(name).name != name or name == "..":
                    raise CheckpointError(f"{index}: weight_map names {name!r}, which is outside the folder")
                if name not in present:
                    raise CheckpointError(f"{folder}: the shard {name} named by {index.name} is missing")
            return [folder / name for name in files]
        single = folder / "model.safetensors"
        if single.is_file():
            return [single]
        pickles = [p.name for p in folder.glob("*.bin")]
        hint = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
        raise CheckpointError(f"{folder}: no model.safetensors{hint}")

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    def read(self, name: str) -> np.ndarray:
        """One tensor.

        Raises:
            CheckpointError: it cannot be read as floats.
        """
        try:
            return self._files[name].get_tensor(name)
        except (SafetensorError, TypeError, AttributeError) as error:  # a dtype NumPy lacks (fp8)
            raise CheckpointError(f"{self.where}: tensor {name} cannot be read as floats ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value
