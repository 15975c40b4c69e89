"""Writing safetensors files, and the weights of an HF folder, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

DTYPES = MappingProxyType(
    {
        "float64": "F64",
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "int64": "I64",
        "uint64": "U64",
        "int32": "I32",
        "uint32": "U32",
        "int16": "I16",
        "uint16": "U16",
        "int8": "I8",
        "uint8": "U8",
        "bool": "BOOL",
    }
)
"""NumPy's name of a dtype -> the name in a safetensors file."""

SHARD_BYTES = 5 * 10**9
"""Size of a weight file, at most."""

_ENTRY = 200
"""Bytes that a tensor takes in a file's header, at most, besides its name: dtype, shape and two offsets."""


class SafetensorsWriter:
    """Writes one safetensors file, tensor by tensor, so that only one need be in memory.

    Such a file begins with a header that says where each tensor lies. Here the tensors are written first, and the
    header afterwards, into a gap that was left for it; blanks fill what remains of the gap.

    Args:
        path: the file.
        names: the names of all tensors that may come.
        n_metadata: bytes that the metadata may take, written as JSON.

    >>> import tempfile
    >>> from safetensors.numpy import load_file
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> file = SafetensorsWriter(path, ["a", "b"])
    >>> file.add("a", np.arange(3))
    >>> file.add("b", np.ones((2, 2), np.float32))
    >>> file.end({"format": "pt"})
    >>> load_file(path)["a"].tolist()
    [0, 1, 2]
    """

    def __init__(self, path: Path, names: Collection[str], n_metadata: int = 100):
        self._gap = 8 * math.ceil((100 + n_metadata + sum(_ENTRY + len(json.dumps(name)) for name in names)) / 8)
        self._header: dict[str, Any] = {}
        self._file = path.open("wb")
        self._file.seek(8 + self._gap)
        self.size = 0
        """Bytes of tensors written so far."""

    @property
    def names(self) -> list[str]:
        """The names of the tensors written so far."""
        return list(self._header)

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Write a tensor.

        Args:
            name: its name, one of `names`.
            tensor: its value, of a dtype in `DTYPES`.

        Raises:
            OSError: the disk refuses the bytes.
        """
        self._header[name] = {
            "dtype": DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, self.size + tensor.nbytes],
        }
        self._file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        self.size += tensor.nbytes

    def end(self, metadata: Mapping[str, str]) -> None:
        """Fill the gap that was left for the header, and close the file.

        Args:
            metadata: texts by name, for the header.
        """
        header = json.dumps({"__metadata__": dict(metadata), **self._header}).encode()
        assert len(header) <= self._gap, "a tensor was added whose name was not announced, or too long a text"
        self._file.seek(0)
        self._file.write(self._gap.to_bytes(8, "little") + header.ljust(self._gap))
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()


class WeightsWriter:
    """Writes the weights of an HF folder, tensor by tensor, in one file or in several with an index.

    Use it as a context: the files get their names at its end.

    Args:
        folder: the folder, which exists.
        names: the names of all tensors that will come.
        limit: size of a file, at most; a single tensor may exceed it.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with WeightsWriter(folder, ["a", "b"], limit=10) as weights:
    ...     weights.add("a", np.arange(3))
    ...     weights.add("b", np.ones((2, 2), np.float32))
    >>> sorted(path.name for path in folder.glob("*.safetensors"))
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """

    def __init__(self, folder: Path, names: Collection[str], limit: int = SHARD_BYTES):
        self._folder, self._names, self._limit = folder, names, limit
        self._file: SafetensorsWriter | None = None
        self._shards: list[list[str]] = []  # the names of the tensors of each file
        self._total = 0

    def __enter__(self) -> WeightsWriter:
        return self

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Write a tensor; as `SafetensorsWriter.add`."""
        if self._file is not None and self._file.size + tensor.nbytes > self._limit:
            self._end_file()
        if self._file is None:
            self._file = SafetensorsWriter(self._folder / f"shard-{len(self._shards)}", self._names)
        self._file.add(name, tensor)
        self._total += tensor.nbytes

    def _end_file(self) -> None:
        assert self._file is not None
        self._shards.append(self._file.names)
        self._file.end({"format": "pt"})
        self._file = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._file is not None:
                self._file.abandon()
            return
        if self._file is not None:
            self._end_file()
        if len(self._shards) == 1:
            (self._folder / "shard-0").rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, tensors in enumerate(self._shards):
            final = f"model-{i + 1:05}-of-{len(self._shards):05}.safetensors"
            (self._folder / f"shard-{i}").rename(self._folder / final)
            weight_map |= dict.fromkeys(tensors, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
