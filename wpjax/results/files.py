"""Result files: netCDF, written whole or not at all, and checked when they are read; and JSON.

Nothing that a file says is followed outside it, and no number in it is infinite. A checksum of all that it holds stands
in the file, so that damage which leaves it readable is seen, too.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from wpjax.errors import OtherResult, WpjaxError
from wpjax.runtime.files import atomic_output

T = TypeVar("T")

LARGEST = 1e30
"""No number that is measured is as large: a larger one is damage."""

CHECKSUM = "checksum"
"""Attribute of a file that holds the checksum of the rest (`checksum`); no attribute of the dataset in memory."""

MAX_BYTES = 16 * 2**30
"""Largest size of a result in memory; compressed, a small file can hold more."""


def write_dataset(dataset: xr.Dataset, path: Path, overwrite: bool = False) -> None:
    """Write a netCDF file, whole or not at all.

    Raises:
        OutputError: the place exists or cannot be written.
        WpjaxError: a number is infinite.
    """
    with atomic_output(path, overwrite) as temporary:
        temporary.write_bytes(netcdf_bytes(dataset))


def netcdf_bytes(dataset: xr.Dataset) -> bytes:
    """A dataset as the bytes of a netCDF file.

    They are made in memory: on a full disk HDF5 crashes, while writing bytes fails in an orderly way.

    Raises:
        WpjaxError: a number is infinite, or too large to have been measured. (NaN is allowed: it was not measured.)
    """
    wrong = [str(name) for name, values in dataset.variables.items() if _is_infinite(values.values)]
    wrong += [str(name) for name, value in dataset.attrs.items() if _is_infinite(np.asarray(value))]
    if wrong:
        raise WpjaxError(
            f"{', '.join(wrong[:4])}: infinite, so nothing is written; check base and expert for damaged weights"
        )
    encoding = {v: {"zlib": True} for v, a in dataset.data_vars.items() if a.dtype.kind == "f" and a.ndim}
    dataset = dataset.assign_attrs({CHECKSUM: checksum(dataset)})
    return bytes(dataset.to_netcdf(None, engine="h5netcdf", encoding=encoding))


def checksum(dataset: xr.Dataset) -> str:
    """A checksum of a dataset's variables and attributes (32 hex digits): the same before and after it was in a file.

    Attributes under the name `CHECKSUM` do not count. Nor does how a number is stored: text may be bytes or objects,
    and numbers of any width are read as the same numbers.

    >>> one, other = (xr.Dataset({"x": ("n", [1.0, value])}) for value in (2.0, 2.5))
    >>> checksum(one) == checksum(one.copy(deep=True)), checksum(one) == checksum(other)
    (True, False)
    """
    digest = hashlib.blake2b(digest_size=16)
    parts = [(f"variable {name} {variable.dims}", variable.values) for name, variable in dataset.variables.items()]
    parts += [(f"attribute {name}", np.atleast_1d(value)) for name, value in dataset.attrs.items() if name != CHECKSUM]
    for name, values in sorted(parts, key=lambda part: part[0]):
        data = _canonical(values)
        digest.update(f"{name} {values.shape} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def _canonical(values: np.ndarray) -> bytes:
    """An array as bytes that do not depend on how its numbers or texts are stored."""
    if values.dtype.kind == "f":
        wide = np.asarray(values, "<f8")
        return np.where(np.isnan(wide), np.nan, wide).tobytes()  # one NaN is like another
    if values.dtype.kind in "biu":
        return np.asarray(values, "<i8").tobytes()
    texts = [value.decode() if isinstance(value, bytes) else str(value) for value in values.ravel().tolist()]
    return "".join(f"{len(text)} {text}" for text in texts).encode("utf-8", "surrogatepass")


def _is_infinite(values: np.ndarray) -> bool:
    """Whether an array of floats holds a number that cannot have been measured."""
    return values.dtype.kind == "f" and bool((np.abs(values) > LARGEST).any())


def read_dataset(path: str | Path, what: str, schema: int, command: str) -> xr.Dataset:
    """Read a netCDF file of this package.

    Args:
        path: the file.
        what: kind of result that the file must hold, as its attribute `what` says it: "sweep" or "curves".
        schema: version of the layout that the caller can read.
        command: command that makes such files, for the error message.

    Raises:
        WpjaxError: there is no such file, it holds something else, or it is damaged.
    """
    if not Path(path).is_file():
        raise WpjaxError(f"{path}: not a readable result file (no such file); make one with `{command}`")
    try:
        _check_self_contained(path)
        with warnings.catch_warnings(action="ignore"):  # about HDF5 that is not netCDF
            dataset = xr.load_dataset(path, engine="h5netcdf")
    except Exception as error:  # HDF5's readers raise what they like on a damaged file
        if isinstance(error, WpjaxError):
            raise
        damage = "it is damaged, or of another kind" if "signature" in str(error) else str(error)  # HDF5's words
        raise WpjaxError(f"{path}: not a readable result file ({damage}); make one with `{command}`") from error
    kind: Any = dataset.attrs.get("what")
    if isinstance(kind, str) and kind != what:
        raise OtherResult(f"{path}: holds {kind}, not {what}; make that with `{command}`")
    written: Any = dataset.attrs.get("schema")
    if not np.array_equal(written, schema):  # the attribute of somebody else's file may be anything, arrays too
        raise WpjaxError(f"{path}: schema {written}, this version reads {schema}; make it anew with `{command}`")
    claimed: Any = dataset.attrs.pop(CHECKSUM, None)
    if claimed is not None and not np.array_equal(claimed, checksum(dataset)):  # version 0.1.0 wrote none
        raise WpjaxError(
            f"{path}: what it holds is not what was written (its checksum differs); the file is damaged, or was "
            f"changed by another program: take a copy that is whole, or make it anew with `{command}`"
        )
    return dataset


def read_json(path: str | Path, makers: Mapping[str, Callable[[Mapping[str, Any]], T]], wanted: str, command: str) -> T:
    """Read a JSON file of this package.

    Args:
        path: the file.
        makers: what a file may hold, as its entry `what` says it -> makes the result from all its entries; an error of
            Python where they do not hold one.
        wanted: what is looked for, in messages.
        command: the command that makes such files, for messages.

    Raises:
        WpjaxError: there is no such file, it holds something else, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():  # reading a pipe or a device may never end
        raise WpjaxError(f"{path}: no such file; `{command}` makes {wanted}")
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise WpjaxError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise WpjaxError(f"{path}: not JSON ({error}); `{command}` makes {wanted}") from error
    what = content.get("what") if isinstance(content, dict) else None
    if not isinstance(what, str) or what not in makers:
        holds = f" (it holds: {what[:40]})" if isinstance(what, str) else ""
        raise WpjaxError(f"{path}: no {wanted}{holds}; `{command}` makes such a file")
    try:
        return makers[what](content)
    except WpjaxError as error:
        raise WpjaxError(f"{path}: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise WpjaxError(f"{path}: damaged ({type(error).__name__}: {error}); make it anew with `{command}`") from error


def _check_self_contained(path: str | Path) -> None:
    """Refuse an HDF5 file that leads to other files, or to more memory than any result takes.

    HDF5 lets a file name others, whose bytes are then read as if they stood in it: external links, external storage of
    a dataset, and virtual datasets. A result of ours has none of them.
    """
    import h5py

    n_bytes = 0
    with h5py.File(path, "r") as file:
        for name in file:
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise WpjaxError(f"{path}: {name} is a link, perhaps to another file; it is refused: sweep again")
            item = file[name]
            if not isinstance(item, h5py.Dataset):
                raise WpjaxError(f"{path}: {name} is no array; results hold nothing else: sweep again")
            if item.external or item.is_virtual:
                raise WpjaxError(f"{path}: {name} is read from another file; it is refused: sweep again")
            n_bytes += item.size * item.dtype.itemsize if item.shape is not None else 0
    if n_bytes > MAX_BYTES:
        raise WpjaxError(f"{path}: holds {n_bytes:.1e} bytes, more than any result; it is damaged, sweep again")


def has_form(data: xr.Dataset, name: str, dims: tuple[str, ...], kinds: str, is_finite: bool = True) -> bool:
    """Whether a dataset has a variable of a certain form.

    Args:
        data: the dataset.
        name: name of the variable.
        dims: dimensions that the variable must have, in order; none may be empty.
        kinds: kinds of dtype allowed, as NumPy's letters: "f" for floats, "iu" for integers.
        is_finite: whether numbers must be finite. NaN is always allowed: it says that nothing was measured.
    """
    if name not in data:
        return False
    variable = data[name]
    if variable.dims != dims or variable.dtype.kind not in kinds or not variable.size:
        return False
    return not is_finite or not _is_infinite(variable.values)
