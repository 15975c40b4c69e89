"""What the page's script reads: every component's numbers and what the figures need, as one compressed text.

Numbers of 40,000 components as JSON would make a page of many megabytes. So the text is base64 of gzip of

    4 bytes        n, length of the JSON, little-endian
    n bytes        JSON, UTF-8
    the columns    in the order of `columns` in the JSON, in planes: the first byte of every number, then the second

Bytes that are alike lie side by side in planes, so gzip makes them small. Floats are float32 without the lowest byte,
which keeps four significant digits; the result file has all of them. `DecompressionStream` undoes gzip in browsers
(since 2023 in all of them). Without it, the page still has its static figures and the first rows of the table.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

WIDTHS = {"float": 3, "int": 4, "bool": 1}
"""Type of a column -> bytes of one number."""


def packed(about: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> str:
    """The text of the page's data.

    Args:
        about: whatever JSON can say; NaN becomes null. The key `columns` is added.
        columns: name -> [C], floats, integers below 2^31 or booleans.

    >>> import numpy as np
    >>> text = packed({"n": 2}, {"effect": np.array([0.5, np.nan])})
    >>> raw = gzip.decompress(base64.b64decode(text))
    >>> raw[4 : 4 + int.from_bytes(raw[:4], "little")].decode()
    '{"n": 2, "columns": [["effect", "float"]]}'
    >>> raw[-6:].hex()  # the highest byte of both numbers comes last
    '000000c03f7f'
    """
    types = {name: _type(values) for name, values in columns.items()}
    text = json.dumps({**_finite(about), "columns": list(map(list, types.items()))}, allow_nan=False).encode()
    parts = [len(text).to_bytes(4, "little"), text]
    parts += [_planes(np.asarray(values), types[name]) for name, values in columns.items()]
    return base64.b64encode(gzip.compress(b"".join(parts), 9, mtime=0)).decode()


def _type(values: np.ndarray) -> str:
    """The type of a column, one of `WIDTHS`."""
    return {"b": "bool", "i": "int", "u": "int"}.get(values.dtype.kind, "float")


def _planes(values: np.ndarray, kind: str) -> bytes:
    """A column as bytes, plane by plane."""
    if kind == "bool":
        return values.astype(np.uint8).tobytes()
    if kind == "int":
        whole = values.astype("<i4").view(np.uint32)
    else:
        with np.errstate(over="ignore"):
            bits = values.astype("<f4").view(np.uint32)
        # To the nearest number whose lowest byte is zero, and of two as near, to the even one; NaN and infinity stay.
        rounded = (bits + np.uint32(0x7F) + ((bits >> np.uint32(8)) & np.uint32(1))) & np.uint32(0xFFFFFF00)
        whole = np.where(np.isfinite(values), rounded, bits)
    return np.ascontiguousarray(whole.view(np.uint8).reshape(-1, 4)[:, 4 - WIDTHS[kind] :].T).tobytes()


def _finite(value: Any) -> Any:
    """A value for JSON: arrays are lists, and numbers that are not finite are null."""
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
