"""Writing the weights of an HF folder one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO

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


class WeightsWriter:
    """Writes the safetensors files of an HF folder, tensor by tensor, so that only one need be in memory.

    A safetensors file begins with a header that says where each tensor lies. Here the tensors are written first, and
    the header afterwards, into a gap that was left for it; blanks fill what remains of the gap.

    Use it as a context: the files get their names, and an index if there are several, at its end.

    Args:
        folder: the folder, which exists.
        names: the names of all tensors that will come.
        limit: size of a file, at most; a single tensor may exceed it.

    >>> import tempfile
    >>> from safetensors.numpy import load_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> with WeightsWriter(folder, ["a", "b"]) as weights:
    ...     weights.add("a", np.arange(3))
    ...     weights.add("b", np.ones((2, 2), np.float32))
    >>> load_file(folder / "model.safetensors")["a"].tolist()
    [0, 1, 2]
    """

    def __init__(self, folder: Path, names: Collection[str], limit: int = SHARD_BYTES):
        self._folder, self._limit = folder, limit
        # JSON may write a character as \uXXXX, or two of these.
        self._gap = 8 * math.ceil((100 + sum(_ENTRY + 12 * len(name) for name in names)) / 8)
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._shards: list[list[str]] = []  # the names of the tensors of each file
        self._size = self._total = 0

    def __enter__(self) -> WeightsWriter:
        return self

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Write a tensor.

        Args:
            name: its name, one of `names`.
            tensor: its value, of a dtype in `DTYPES`.

        Raises:
            OSError: the disk refuses the bytes.
        """
        if self._file is not None and self._size + tensor.nbytes > self._limit:
            self._end_file()
        if self._file is None:
            self._file = (self._folder / f"shard-{len(self._shards)}").open("wb")
            self._file.seek(8 + self._gap)
            self._header, self._size = {"__metadata__": {"format": "pt"}}, 0
            self._shards.append([])
        self._header[name] = {
            "dtype": DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [self._size, self._size + tensor.nbytes],
        }
        self._file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        self._shards[-1].append(name)
        self._size += tensor.nbytes
        self._total += tensor.nbytes

    def _end_file(self) -> None:
        """Fill the gap that was left for the header, and close the file."""
        assert self._file is not None
        header = json.dumps(self._header).encode()
        assert len(header) <= self._gap, "a tensor was added whose name was not announced"
        self._file.seek(0)
        self._file.write(self._gap.to_bytes(8, "little") + header.ljust(self._gap))
        self._file.close()
        self._file = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._file is not None:
                self._file.close()
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
