"""Safe files: an output has its final name only once it is complete, and nothing of others is overwritten.

An output is staged in a folder beside its place, `.NAME.XXXXXXXX.partial`, which the writing process holds a lock on.
One rename publishes a file, or a folder where none stood before. Several files, or a folder in place of another, are
published by one rename of the staging folder, to `.NAME.XXXXXXXX.ready`, and then moved to their places.

So a process may be killed at any time. What it leaves is mended by the next run of the same output (`recover`): moves
that were begun are finished, and what was never whole is deleted.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wpjax.errors import OutputError, WpjaxError
from wpjax.runtime import interrupts

if TYPE_CHECKING:
    from filelock import BaseFileLock

MAX_NAME = 200
"""Longest name of an output, in bytes: file systems allow 255, and the temporary names beside it are longer."""

PARTIAL, READY = ".partial", ".ready"
"""Ends of the names of staging folders: before and after they are published."""

# What a staging folder holds: the lock of the process that writes, new files, what they replace, and a mark that says
# that files which exist may be replaced.
LOCK, NEW, OLD, MAY_REPLACE = "lock", "new", "old", "overwrite"


def check_output(
    path: Path,
    overwrite: bool = False,
    marker: str | None = None,
    inputs: Sequence[str | Path | None] = (),
    ending: str = "",
) -> None:
    """Refuse a place that cannot be written to, before any work is done.

    What an earlier run of the same output left when it was killed is mended first.

    Args:
        path: the file or folder to write.
        overwrite: whether a file or folder that exists may be replaced.
        marker: None to write a file. To write a folder: the name of a file that every such folder holds. `overwrite`
            replaces a folder only if it holds that file, so that it never deletes what something else made.
        inputs: files and folders that are read, which `overwrite` must not replace. Names that are no paths, say of
            a model on the hub, and None are passed over.
        ending: what the name must end in, say ".json": by it other commands know what the file holds.

    Raises:
        OutputError: the name ends in something else, the path exists and may not be replaced, it is or holds an input,
            or its own folder is missing or not writable.

    >>> import tempfile
    >>> check_output(Path(tempfile.mkdtemp()) / "new.nc")  # no error: it can be written
    """
    if not path.name:
        raise OutputError(f"{str(path)!r} is not a name to write to; give a new one")
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise OutputError(f"{path}: a name longer than {MAX_NAME} bytes cannot be written; choose a shorter one")
    if ending and path.suffix != ending:
        raise OutputError(f"{path}: name a file that ends in {ending}, by which other commands know what it holds")
    recover(path)
    try:
        exists, is_folder = _exists(path), path.is_dir()
    except (OSError, ValueError) as error:  # a path that is too long, or holds NUL
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path}: cannot be written ({reason}); choose another name") from error
    if exists and not overwrite:
        raise OutputError(f"{path} exists; choose another name, or pass --overwrite")
    if is_folder and marker is None:
        raise OutputError(f"{path} is a folder, and a file is to be written; choose another name")
    if exists and not is_folder and marker is not None:
        raise OutputError(f"{path} is a file, and a folder is to be written; choose another name")
    if is_folder and marker is not None and any(path.iterdir()) and not (path / marker).exists():
        raise OutputError(f"{path} holds no {marker}, so something else made it; delete it yourself, or choose another")
    for source in inputs if exists else ():
        if source is not None and _is_or_holds(path, Path(source)):
            raise OutputError(f"{path} is read as an input, so it cannot be replaced; choose another name to write to")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: no permission to write in {folder}; choose another place")


@contextlib.contextmanager
def atomic_output(path: Path, overwrite: bool = False, marker: str | None = None) -> Iterator[Path]:
    """Give a temporary name to write to; it is renamed to `path` if the body succeeds.

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
    with atomic_outputs([path], overwrite, marker) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_outputs(
    paths: Sequence[Path], overwrite: bool = False, marker: str | None = None
) -> Iterator[tuple[Path, ...]]:
    """Give temporary names for several outputs, which appear together if the body succeeds: all of them or none.

    Args:
        paths: files, or folders, to write into one folder. A run that was killed is mended by the next one with the
            same first path.
        overwrite: as for `atomic_output`, for each of them.
        marker: as for `atomic_output`, for each of them.

    Yields:
        a temporary name for each path, with the same last part.

    Raises:
        OutputError: as `atomic_output`.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with atomic_outputs([folder / "page.html", folder / "figure.png"]) as temporaries:
    ...     for temporary in temporaries:
    ...         _ = temporary.write_text(temporary.name)
    >>> sorted(path.name for path in folder.iterdir())
    ['figure.png', 'page.html']
    """
    for path in paths:
        check_output(path, overwrite, marker)
    main = paths[0]
    try:
        with _staging(main) as stage:
            temporaries = tuple(stage / NEW / path.name for path in paths)
            yield temporaries
            for temporary in temporaries:
                _settle(temporary)
            with interrupts.undisturbed():
                _publish(stage, paths, overwrite)
                if not any(parent.name.endswith(PARTIAL) for parent in main.absolute().parents):
                    for path in paths:
                        interrupts.leave(path)
    except OSError as error:
        raise OutputError(f"{main}: cannot be written ({error.strerror or error})") from error


def recover(path: Path) -> None:
    """Mend what earlier runs of the same output left when they were killed.

    Outputs that were whole already get their places; what was not whole is deleted. What a process that still runs is
    writing stays as it is.

    Args:
        path: the output; of several, the first.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}({PARTIAL}|{READY})")
    with contextlib.suppress(OSError, ValueError):  # no such folder, or none that can be written: `check_output` says
        for stage in path.absolute().parent.iterdir():
            if not pattern.fullmatch(stage.name) or stage.is_symlink() or not stage.is_dir():
                continue
            if not (stage / LOCK).exists() and any(stage.iterdir()):
                continue  # not one of ours
            try:
                lock = try_lock(stage / LOCK)
            except Locked:
                continue
            if lock is None:
                continue  # who knows whether it is in use
            try:
                if stage.name.endswith(READY):
                    _finish(stage, path.name)
                else:
                    _delete(stage)
            finally:
                release(lock)


class Locked(OutputError):
    """Another process is writing there."""


def try_lock(path: Path) -> BaseFileLock | None:
    """A lock on a file, which is released when the process ends, however it ends.

    Args:
        path: the file; it is made if it does not exist.

    Returns:
        the lock; None if the file system has no locks.

    Raises:
        Locked: another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Locked(f"{path.parent} is in use: another run is at work on it; wait for it, or stop it") from error
    except (OSError, NotImplementedError):
        return None
    return lock


def release(lock: BaseFileLock) -> None:
    """Release a lock, whose file may be gone already."""
    with contextlib.suppress(OSError):
        lock.release(force=True)


def discard(folder: Path, name: str) -> None:
    """Delete a folder in one step: if the process is killed, `recover` of the output `name` beside it does the rest."""
    dead = folder.with_name(f".{name}.{secrets.token_hex(4)}{PARTIAL}")
    with contextlib.suppress(OSError):
        (folder / LOCK).touch()  # the mark of our folders
        folder.rename(dead)
        _delete(dead)


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


@contextlib.contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A new staging folder beside an output, locked; it is deleted afterwards, with what is still in it."""
    lock = None
    while lock is None:
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.absolute().parent))
        with contextlib.suppress(Locked):  # another run took it for a dead one, and deletes it
            lock = try_lock(stage / LOCK)
            if lock is None and stage.is_dir():
                break  # a file system without locks
    try:
        (stage / NEW).mkdir()
        yield stage
    finally:
        _delete(stage)  # not what was published: `recover` finishes that
        if lock is not None:
            release(lock)


def _publish(stage: Path, paths: Sequence[Path], overwrite: bool) -> None:
    """Move what is staged to its places."""
    for path in paths:
        if _exists(path) and not overwrite:
            raise OutputError(f"{path} was made by another run meanwhile; choose another name, or pass --overwrite")
    main = paths[0]
    if len(paths) == 1 and (not main.is_dir() or main.is_symlink()):
        (stage / NEW / main.name).replace(main)
        flush(main.absolute().parent)
        return
    if overwrite:
        (stage / MAY_REPLACE).touch()
    flush(stage)
    ready = stage.with_suffix(READY)
    stage.rename(ready)  # from here on the outputs are there, if only by way of `recover`
    flush(ready.parent)
    _finish(ready, main.name)


def _finish(ready: Path, main: str) -> None:
    """Move outputs that are whole to their places, the main one last, and delete what they replace."""
    new, old, may_replace = ready / NEW, ready / OLD, (ready / MAY_REPLACE).exists()
    for item in sorted(new.iterdir() if new.is_dir() else (), key=lambda item: item.name == main):
        target = ready.parent / item.name
        if _exists(target) and (not may_replace or _exists(old / item.name)):
            continue  # made by something else after the run was killed
        if target.is_dir() and not target.is_symlink():  # a folder cannot be replaced in one step
            old.mkdir(exist_ok=True)
            target.rename(old / item.name)
        item.replace(target)
    flush(ready.parent)
    _delete(ready)


def _delete(stage: Path) -> None:
    """Delete a staging folder. Its lock, by which `recover` knows it, goes last."""
    with contextlib.suppress(OSError):
        for item in stage.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            elif item.name != LOCK:
                item.unlink()
        (stage / LOCK).unlink(missing_ok=True)
        stage.rmdir()


def _exists(path: Path) -> bool:
    """Whether something stands at a path, be it a link to nothing."""
    return path.exists() or path.is_symlink()


def _is_or_holds(output: Path, source: Path) -> bool:
    """Whether an output is an input, or a folder that an input is in."""
    try:
        where, read = output.resolve(), source.expanduser().resolve()
        return read.exists() and (where == read or where in read.parents or output.samefile(read))
    except (OSError, ValueError, RuntimeError):  # no path, but say a hub id
        return False


def _settle(path: Path) -> None:
    """Give a file, or all files of a folder, the usual permissions, and bring the bytes to the disk.

    Some libraries let only the owner read what they write. The bytes reach the disk before the final name does.
    """
    mask = os.umask(0)  # the mask can only be read by setting it
    os.umask(mask)
    inside = [*path.rglob("*"), path] if path.is_dir() else [path]
    for file in inside:
        if file.is_file():
            file.chmod(0o666 & ~mask)
        flush(file)


def flush(path: Path) -> None:
    """Make sure that a file's bytes, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


MOST_CHARACTERS = 2**20
"""Characters of a text file that are read, at most: what is measured on a text needs its first tokens."""


def beginning_of_text(path: Path) -> str:
    """The beginning of a text file in UTF-8.

    Raises:
        WpjaxError: it cannot be read, or is no such text.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
    >>> _ = path.write_text("Owls hunt at night.", encoding="utf-8")
    >>> beginning_of_text(path)
    'Owls hunt at night.'
    """
    if path.exists() and not path.is_file():  # reading a pipe or a device may never end
        raise WpjaxError(f"{path}: not a regular file; name a text file")
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(MOST_CHARACTERS)
    except OSError as error:
        raise WpjaxError(f"{path}: cannot be read ({error.strerror or error}); name a text file") from error
    except ValueError as error:
        raise WpjaxError(f"{path}: not text in UTF-8 ({error}); convert it") from error
