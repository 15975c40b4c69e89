"""Result files: netCDF, written whole or not at all, and checked when they are read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from wpjax.errors import OtherResult, WpjaxError
from wpjax.runtime.files import atomic_output


def write_dataset(dataset: xr.Dataset, path: Path, overwrite: bool = False) -> None:
    """Write a netCDF file, whole or not at all.

    Raises:
        OutputError: the place exists or cannot be written.
    """
    encoding = {v: {"zlib": True} for v, a in dataset.data_vars.items() if a.dtype.kind == "f" and a.ndim}
    with atomic_output(path, overwrite) as temporary:
        dataset.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)


def read_dataset(path: str | Path, what: str, schema: int, command: str) -> xr.Dataset:
    """Read a netCDF file of this package.

    Args:
        path: the file.
        what: kind of result that the file must hold, as its attribute `what` says it: "sweep" or "curves".
        schema: version of the layout that the caller can read.
        command: command that makes such files, for the error message.

    Raises:
        WpjaxError: there is no such file, or it holds something else.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about HDF5 that is not netCDF
            dataset = xr.load_dataset(path, engine="h5netcdf")
    except Exception as error:  # HDF5's readers raise what they like on a damaged file
        raise WpjaxError(f"{path}: not a readable result file ({error}); make one with `{command}`") from error
    kind: Any = dataset.attrs.get("what")
    if isinstance(kind, str) and kind != what:
        raise OtherResult(f"{path}: holds {kind}, not {what}; make that with `{command}`")
    written: Any = dataset.attrs.get("schema")
    if not np.array_equal(written, schema):  # the attribute of somebody else's file may be anything, arrays too
        raise WpjaxError(f"{path}: schema {written}, this version reads {schema}; make it anew with `{command}`")
    return dataset


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
    # nothing that is measured is as large as 1e30, so that is damage too
    return not is_finite or variable.dtype.kind != "f" or not (np.abs(variable.values) > 1e30).any()
