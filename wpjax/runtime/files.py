"""Safe files: a file or folder has its final name only once it is complete, and nothing of others is overwritten."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from wpjax.errors import OutputError

MAX_NAME = 200
"""Longest name of an output, in bytes: file systems allow 255, and the temporary names beside it are longer."""


def check_output(path: Path, overwrite: bool = False, marker: str | None = None) -> None:
    """Refuse a place that cannot be written to, before any work is done.

    Args:
        path: the file or folder to write.
        overwrite: whether a file or folder that exists may be replaced.
        marker: None to write a file. To write a folder: the name of a file that every such folder holds. `overwrite`
            replaces a folder only if it holds that file, so that it never deletes what something else made.

    Raises:
        OutputError: the path exists and may not be replaced, or its own folder is missing or not writable.

    >>> import tempfile
    >>> check_output(Path(tempfile.mkdtemp()) / "new.nc")  # no error: it can be written
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
    """Give a temporary name beside `path` to write to; it is renamed to `path` if the body succeeds.

    If the body fails, what it wrote is deleted, and what stood at `path` stays as it was.

    Args:
        path: the file or folder to write (see `check_output`).
        overwrite: whether a file or folder that exists may be replaced.
        marker: None to write a file; to write a folder, a file that it holds (see `check_output`).

    Raises:
        OutputError: as `check_output`, or the disk refuses the bytes.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "words.txt"
    >>> with atomic_output(path) as temporary:
    ...     _ = temporary.write_text("all of it")
    ...     path.exists()
    False
    >>> path.read_text()
    'all of it'
    """
    check_output(path, overwrite, marker)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        _open_to_readers(temporary)
        _flush(temporary)  # the bytes reach the disk before the name does
        if path.is_dir() and not path.is_symlink():
            # a folder cannot be replaced in one step: it is moved aside, and deleted last
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

    Args:
        path: the file.
        tensors: arrays by name.
        metadata: texts by name, for the file's header.

    Raises:
        OSError: the disk refuses the bytes. (The library raises an error of its own, which `atomic_output` does not
            know.)
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, path, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _open_to_readers(path: Path) -> None:
    """Give a file, or all files of a folder, the usual permissions; some libraries let only the owner read them."""
    mask = os.umask(0)  # the mask can only be read by setting it
    os.umask(mask)
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        file.chmod(0o666 & ~mask)


def _flush(path: Path) -> None:
    """Make sure that a file's bytes, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
