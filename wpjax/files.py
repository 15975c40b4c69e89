"""Writing files so that nothing half-written is ever left under its final name."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from wpjax.errors import OutputError


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuse a place that cannot be written to, before any work is done.

    Raises:
        OutputError: it exists (and `overwrite` is off), or its folder is missing or not writable.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; choose another name, or pass --overwrite")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: no permission to write in {folder}; choose another place")


@contextlib.contextmanager
def atomic_output(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary name beside `path` (for a file or a folder), renamed to it if the body succeeds.

    Raises:
        OutputError: as `check_output`, or if the disk refuses the bytes.
    """
    check_output(path, overwrite)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        _open_to_readers(temporary)
        _flush(temporary)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        temporary.replace(path)
        _flush(path.absolute().parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


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
