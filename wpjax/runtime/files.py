"""Writing files so that nothing half-written is ever left under its final name."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from wpjax.errors import OutputError

MAX_NAME = 200
"""Longest name of an output in bytes: file systems take 255, and temporary names beside it are longer."""


def check_output(path: Path, overwrite: bool = False, marker: str | None = None) -> None:
    """Refuse a place that cannot be written to, before any work is done.

    Args:
        path: the file, or the folder, to write.
        overwrite: whether one that exists may be replaced.
        marker: None for a file; for a folder, the name of a file that every such folder holds, so that `overwrite`
            never deletes a folder that something else made.

    Raises:
        OutputError: it exists (and `overwrite` is off, or it is not what would be written), or its folder is missing
            or not writable.
    """
    if not path.name:
        raise OutputError(f"{str(path)!r} is not a name to write to; give a new one")
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise OutputError(f"{path}: a name longer than {MAX_NAME} bytes cannot be written; choose a shorter one")
    try:
        exists, is_folder = path.exists() or path.is_symlink(), path.is_dir()
    except OSError as error:  # a path that is too long
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another name") from error
    if exists and not overwrite:
        raise OutputError(f"{path} exists; choose another name, or pass --overwrite")
    if is_folder and marker is None:
        raise OutputError(f"{path} is a folder, and a file is to be written; choose another name")
    if exists and not is_folder and marker is not None:
        raise OutputError(f"{path} is a file, and a folder is to be written; choose another name")
    if is_folder and marker is not None and any(path.iterdir()) and not (path / marker).exists():
        raise OutputError(f"{path} holds no {marker}, so something else made it; delete it yourself, or choose another")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: no permission to write in {folder}; choose another place")


@contextlib.contextmanager
def atomic_output(path: Path, overwrite: bool = False, marker: str | None = None) -> Iterator[Path]:
    """A temporary name beside `path` (for a file or a folder), renamed to it if the body succeeds.

    Args:
        path: as in `check_output`, with the next two.
        overwrite: as there.
        marker: as there.

    Raises:
        OutputError: as `check_output`, or if the disk refuses the bytes.
    """
    check_output(path, overwrite, marker)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        _open_to_readers(temporary)
        _flush(temporary)
        if path.is_dir() and not path.is_symlink():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            temporary.replace(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
        _flush(path.absolute().parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk refuses the bytes (the library itself raises an error of its own).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, path, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _open_to_readers(path: Path) -> None:
    """The permissions that a newly made file has anyway; some writers leave files for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        file.chmod(0o666 & ~mask)


def _flush(path: Path) -> None:
    """Bring a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
