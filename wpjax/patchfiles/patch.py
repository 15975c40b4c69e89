"""Patch files: the slices that a set of components owns, as they are in the host and as they are to become.

A patch is one safetensors file. For the HF tensor NAME it holds

    positions/NAME   [n] int64      which rows (axis 0) or columns (axis 1), in ascending order
    before/NAME      the host's, in the dtype in which the host is stored
    after/NAME       the donor's    (or a smaller change, see `patchfiles.delta`)

and in its header, under "wpjax_patch", what it is, as JSON. Slices of tensors in which the donor does not differ from
the host are left out.

**Which model it fits.** It fits where `before` stands, bit for bit, cast to the dtype in which that model is stored.
This decides, not a hash of the whole model: it costs only the slices to read, it does not depend on dtypes, it tells a
patch that is in already from one for another base, and a second patch of other components fits a model that has the
first. Models that were trained apart agree in no weight that anyone would patch. The header also holds a hash of the
whole host as stored, which tells whether the rest of a model is the host's, too; it is said, and decides nothing.

So `before` is stored whatever the encoding, and what was patched can be undone bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

import wpjax
from wpjax.checkpoints.folder import check_file
from wpjax.checkpoints.placing import finite_floats
from wpjax.errors import PatchError
from wpjax.patchfiles.delta import EXACT, INT8, LOW_RANK, decode, widened
from wpjax.patchfiles.slices import Slices

FORMAT = 1
"""Version of the format that is written, and the highest that is read."""

KEY = "wpjax_patch"
"""Where the header holds the JSON."""

_ENCODINGS = (EXACT, LOW_RANK, INT8)
_DEEPEST = 16
_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class PatchInfo:
    """What a patch says of itself.

    Attributes:
        components: names of the components.
        into: name of the host, the model that it is for.
        origin: name of the donor, the model whose weights it brings ("from" in the file).
        knockout: whether the host is the expert and the donor the base.
        fingerprint: hash of the host as stored (`StoredModel.fingerprint`).
        family: HF's `model_type` of both.
        n_parameters: number of weights that the components own.
        behaviour: what the patch is for; empty if nobody said.
        ranked_by: name of the ranking that the components were chosen by; empty likewise.
        measured: what was measured of it, as values of JSON. An interval is a table with mean, low and high.
        encoding: how changes are stored, in words.
        error: |stored change - change| / |change| over all weights, in the Frobenius norm; 0 if it is exact.
        wpjax_version: what wrote the file.
        date: when, in UTC.
    """

    components: tuple[str, ...]
    into: str
    origin: str
    knockout: bool
    fingerprint: str
    family: str
    n_parameters: int
    behaviour: str = ""
    ranked_by: str = ""
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    encoding: str = "exact"
    error: float = 0.0
    wpjax_version: str = wpjax.__version__
    date: str = ""


class Patch:
    """A patch file that was opened. Its tensors are read when they are asked for.

    Args:
        path: the file.

    Attributes:
        where: the file, for messages.
        info: what it says of itself.
        slices: full HF name of a tensor -> the rows or columns that are patched.
        shapes: full HF name of a tensor -> its shape in the host.

    Raises:
        PatchError: there is no such file, it is no patch, or it is damaged.
    """

    def __init__(self, path: str | Path):
        self.where = str(path)
        check_file(Path(path))
        try:
            self._file = safe_open(path, framework="np")
            text = (self._file.metadata() or {}).get(KEY)
        except (SafetensorError, OSError, UnicodeError) as error:
            raise PatchError(f"{path}: no patch file that can be read ({error}); name one, or make it again") from error
        if text is None:
            raise PatchError(f"{path}: a safetensors file, but not a patch; `wpjax extract` makes patches")
        try:
            about = json.loads(text)
            self.info = _info(about)
            tensors = {str(name): (entry["axis"], tuple(entry["shape"])) for name, entry in about["tensors"].items()}
        except PatchError as error:
            raise PatchError(f"{path}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise self._damaged(f"its header does not say what it must ({type(error).__name__}: {error})") from error
        if not tensors:
            raise self._damaged("it holds no tensors")
        names = set(self._file.keys())
        self.slices: dict[str, Slices] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, tuple[str, ...]] = {}
        for name, (axis, shape) in tensors.items():
            self._check_entry(name, axis, shape, names)
        if names:
            raise self._damaged(f"it holds {sorted(names)[0]!r}, which its header does not name")

    def _damaged(self, what: str) -> PatchError:
        return PatchError(f"{self.where}: a damaged patch: {what}; get the file again")

    def _check_entry(self, name: str, axis: Any, shape: tuple[Any, ...], names: set[str]) -> None:
        """Check what the file holds of one tensor, without reading values; what is known is removed from `names`."""
        is_shape = 0 < len(shape) < 3 and all(type(n) is int and n > 0 for n in shape)
        if not is_shape or type(axis) is not int or not 0 <= axis < len(shape):
            raise self._damaged(f"axis {axis!r} of a tensor of shape {shape!r}, {name!r}, cannot be")
        at = self._read(f"positions/{name}", names)
        inside = at.ndim == 1 and at.dtype == np.int64 and at.size > 0 and (np.diff(at) > 0).all()
        if not inside or at[0] < 0 or at[-1] >= shape[axis]:
            raise self._damaged(f"the positions in {name} are not among its {shape[axis]}, each once and in order")
        expected = tuple(len(at) if i == axis else n for i, n in enumerate(shape))
        parts = next((e for e in _ENCODINGS if all(f"{part}/{name}" in names for part in e)), None)
        if parts is None:
            raise self._damaged(f"it does not hold what {name} becomes")
        found = {part: self._layout(f"{part}/{name}", names) for part in ("before", *parts)}
        rank = found["delta_A"][1][-1:] if "delta_A" in found else ()
        fits = {
            "before": (_FLOATS, expected),
            "after": (_FLOATS, expected),
            "delta_A": (_FLOATS, (*expected[:1], *rank)),
            "delta_B": (_FLOATS, (*rank, *expected[1:])),
            "delta_q": (("int8",), expected),
            "delta_scale": (_FLOATS, (len(at),)),
        }
        for part, (dtype, has) in found.items():
            dtypes, needed = fits[part]
            if dtype not in dtypes or has != needed or (part != "after" and parts != EXACT and len(shape) != 2):
                raise self._damaged(f"{part}/{name} is {dtype} of shape {has}, which does not fit")
        self.slices[name], self.shapes[name], self._parts[name] = Slices(axis, at), shape, parts

    def _layout(self, key: str, names: set[str]) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a tensor of the file, without reading it."""
        if key not in names:
            raise self._damaged(f"it lacks {key!r}")
        names.remove(key)
        layout = self._file.get_slice(key)
        return _DTYPES.get(layout.get_dtype(), layout.get_dtype()), tuple(layout.get_shape())

    def _read(self, key: str, names: set[str] | None = None) -> np.ndarray:
        if names is not None and key not in names:
            raise self._damaged(f"it lacks {key!r}")
        try:
            tensor = self._file.get_tensor(key)
        except (SafetensorError, TypeError, AttributeError) as error:
            raise self._damaged(f"{key!r} cannot be read ({error})") from error
        if names is not None:
            names.remove(key)
        return tensor

    def before(self, name: str) -> np.ndarray:
        """What stood in the slices of a tensor: those rows or columns of the host.

        Raises:
            PatchError: it cannot be read.
            CheckpointError: it is not finite.
        """
        return finite_floats(self.where, f"before/{name}", self._read(f"before/{name}"))

    def after(self, name: str) -> np.ndarray:
        """What takes their place, in the donor's dtype; in float32 if the change is stored, not the value.

        Raises:
            PatchError: it cannot be read.
            CheckpointError: it is not finite.
        """
        parts = {part: self._read(f"{part}/{name}") for part in self._parts[name]}
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
            after = decode(self.before(name), self.slices[name].axis, parts)
        return finite_floats(self.where, f"after/{name}", after)

    def delta(self, name: str) -> np.ndarray:
        """after - before, in float32."""
        return widened(self.after(name)) - widened(self.before(name))


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}


def load_patch(path: str | Path) -> Patch:
    """Open a patch file.

    Args:
        path: the file.

    Raises:
        PatchError: there is no such file, it is no patch, or it is damaged.

    >>> import tempfile
    >>> import wpjax as wp
    >>> from wpjax.patchfiles import save_patch
    >>> pair, path = wp.load_pair("tiny:base", "tiny:expert"), Path(tempfile.mkdtemp()) / "two.safetensors"
    >>> _ = save_patch(path, pair, ["L2.head.0", "L4.mlp"], behaviour="english_capital")
    >>> patch = load_patch(path)
    >>> patch.info.components, patch.info.behaviour, len(patch.slices)
    (('L2.head.0', 'L4.mlp'), 'english_capital', 5)
    """
    return Patch(path)


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is in the format of patches: by its name, or by how it begins.

    >>> is_safetensors("caps.safetensors"), is_safetensors("caps.nc")
    (True, False)
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return True
    if not path.is_file():  # reading a pipe may never end
        return False
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"  # after eight bytes, the length of the header, comes JSON
    except OSError:
        return False


def plain(value: Any) -> Any:
    """A value as JSON can hold it: tables with text as keys, lists, numbers; what is not finite becomes null.

    >>> from wpjax.stats import Interval
    >>> plain({"recovery": Interval(0.5, 0.25, float("nan"))})
    {'recovery': {'mean': 0.5, 'low': 0.25, 'high': None}}
    """
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(info: PatchInfo, tensors: Mapping[str, tuple[int, tuple[int, ...]]]) -> dict[str, Any]:
    """The JSON of the header: the inverse of `_info`."""
    fields = dataclasses.asdict(info)
    return {
        "format": FORMAT,
        **{"from" if name == "origin" else name: value for name, value in fields.items()},
        "tensors": {name: {"axis": axis, "shape": list(shape)} for name, (axis, shape) in tensors.items()},
    }


_TYPES: Mapping[str, tuple[type, ...]] = {
    "tuple[str, ...]": (list,),
    "str": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "Mapping[str, Any]": (dict,),
}


def _depth(value: Any) -> int:
    """How deep tables and lists are nested, but no more than `_DEEPEST` and one."""
    level, depth = [value], 0
    while level and depth <= _DEEPEST:
        level = [
            entry
            for part in level
            if isinstance(part, dict | list)
            for entry in (part.values() if isinstance(part, dict) else part)
        ]
        depth += 1
    return depth


def _info(about: Any) -> PatchInfo:
    """What a header says, checked.

    Raises:
        PatchError: it is of a later format.
        KeyError, TypeError, ValueError: it is not what it must be.
    """
    if not isinstance(about, dict):
        raise TypeError("no JSON object")
    if type(about["format"]) is not int or about["format"] < 1:
        raise ValueError(f"format {about['format']!r}")
    if about["format"] > FORMAT:
        raise PatchError(f"a patch of format {about['format']}, and this wpjax reads up to {FORMAT}; get a newer wpjax")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(PatchInfo):
        name = "from" if field.name == "origin" else field.name
        value = about[name]
        if not isinstance(value, _TYPES[str(field.type)]):
            raise TypeError(f"{name} is {type(value).__name__}")
        values[field.name] = value
    values["error"] = float(values["error"])
    if _depth(values["measured"]) > _DEEPEST:
        raise ValueError("measured is nested too deep")
    components = values["components"]
    if not components or not all(isinstance(name, str) for name in components):
        raise TypeError("components are no names")
    return PatchInfo(**{**values, "components": tuple(components)})
