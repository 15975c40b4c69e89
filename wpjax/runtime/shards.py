"""Finished parts of long work, one file each, so that work that was killed goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wpjax.errors import OutputError, WpjaxError
from wpjax.runtime import interrupts
from wpjax.runtime.files import LOCK, discard, flush, recover, release, try_lock
from wpjax.runtime.states import States, open_states, saved_states

if TYPE_CHECKING:
    from filelock import BaseFileLock

DIGEST = 16
"""Bytes of the checksum at the end of each part's file."""

MANIFEST = "manifest.json"
"""The file that says which work the parts of a folder are of."""

STATES = "states"
"""The folder, inside that of the parts, that holds the newest state of iterative work."""

KEPT = "finished parts are kept: go on with --resume"
"""What an interrupted command says of its finished parts."""


def parts_folder(out: Path, command: str = "sweep") -> Path:
    """The folder of the finished parts of an output, beside it; removed once the output is written."""
    return out.with_name(f".{out.name}.{command}")


def check_parts(out: Path, command: str, resume: bool, known: Mapping[str, Any] | None = None) -> None:
    """Refuse finished parts that an earlier run has left, if this one cannot use them; before any work is done.

    A folder that holds no part is in nobody's way, nor is one whose output was written after its parts: they go.

    Args:
        out: the output.
        command: the command that makes it.
        resume: whether parts that exist are to be used.
        known: settings of this run that are known already, by their names in the identity of `Shards`.

    Raises:
        OutputError: parts exist and `resume` is off; or they are of other settings, or another run is at work on them.

    >>> import tempfile
    >>> check_parts(Path(tempfile.mkdtemp()) / "r.nc", "sweep", resume=False)  # no error: there are none
    """
    folder = parts_folder(out, command)
    if not folder.is_dir():
        return
    lock = try_lock(folder / LOCK)
    try:
        if not _parts(folder) or (out.exists() and _newest(folder) <= out.stat().st_mtime_ns):
            discard(folder, out.name)
            return
    finally:
        if lock is not None:
            release(lock)
    if not resume:
        raise OutputError(f"{folder} is left from a run that did not finish; pass --resume, or delete it")
    theirs = read_manifest(folder).get("identity")
    other = what_differs(theirs, known or {}, is_all=False) if isinstance(theirs, dict) else ""
    if other:  # of a manifest that is damaged nothing is known; `Shards` refuses it
        raise OutputError(f"{folder} belongs to a run with {other}; delete it, or go on with the same")


def finished_part(done: Mapping[str, np.ndarray], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A finished part of an earlier attempt, after a check that it can be one.

    Args:
        done: finished parts by key, say `Shards`.
        key: name of the part.
        shape: shape that it must have.

    Raises:
        WpjaxError: the part has another shape, or holds no floats.
    """
    part = np.asarray(done[key])
    if part.shape != shape or part.dtype.kind != "f":
        raise WpjaxError(
            f"the finished part {key} has shape {part.shape} and dtype {part.dtype}, not floats of shape {shape}: it "
            "is damaged; delete its file, and go on with --resume"
        )
    return part


class PartFiles(MutableMapping[str, np.ndarray]):
    """Finished parts as a mapping from keys to arrays, each a file of one folder. `Shards` and `runtime.farm` write it.

    Each file ends with a checksum of the part, its key and the identity of the work. So a part that is damaged, or that
    belongs to another key or other work, is refused.

    Attributes:
        folder: the folder.
        digest: hash of the identity of the work (`digest_of`).
        again: what to do once a damaged file was deleted, for messages.
    """

    folder: Path
    digest: str
    again: str

    def _write(self, name: str, data: bytes) -> None:
        """Write a file of the folder, whole or not at all."""
        raise NotImplementedError

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"

    def _checksum(self, key: str, data: bytes) -> bytes:
        return hashlib.blake2b(key.encode() + b"\0" + data, digest_size=DIGEST, key=bytes.fromhex(self.digest)).digest()

    def __getitem__(self, key: str) -> np.ndarray:
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise KeyError(key) from None
        except OSError as error:
            raise OutputError(f"{path} cannot be read ({error.strerror}); delete it, and {self.again}") from error
        data, checksum = data[:-DIGEST], data[-DIGEST:]
        if checksum != self._checksum(key, data):
            raise OutputError(
                f"{path} is damaged, or of another run (its checksum is wrong); delete it, and {self.again}"
            )
        try:
            return np.load(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # NumPy raises what it likes on a header that somebody made up
            raise OutputError(f"{path} is no array ({error}); delete it, and {self.again}") from error

    def __setitem__(self, key: str, value: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        data = buffer.getvalue()
        self._write(self._path(key).name, data + self._checksum(key, data))

    def __delitem__(self, key: str) -> None:
        self._path(key).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self.folder.glob("[!.]*.npy"))  # a leading dot: a file not yet complete

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Shards(PartFiles):
    """Finished parts of an output as a mapping from keys to arrays; each part is a file in a folder beside it.

    The folder is made with the first part. Beside the parts it holds a manifest with their identity, and a lock, so
    that no two runs write into it.

    Args:
        out: the output that the parts are for (see `parts_folder`).
        command: the command that makes it, say "sweep".
        identity: everything that the parts depend on, as values that JSON can hold or `str` can name.
        resume: whether a folder that exists may be used.

    Raises:
        OutputError: as `check_parts`; or the folder holds parts of another identity.

    >>> import tempfile
    >>> shards = Shards(Path(tempfile.mkdtemp()) / "r.nc", "sweep", {"seed": 0}, resume=False)
    >>> shards["exact-0"] = np.zeros(3)
    >>> list(shards), shards["exact-0"].shape
    (['exact-0'], (3,))
    >>> shards.discard()

    As a context manager it gives up its lock at the end, so that another run may go on.
    """

    def __init__(self, out: Path, command: str, identity: dict[str, Any], resume: bool):
        self.out, self.folder, self.again = out, parts_folder(out, command), "pass --resume again"
        self.digest = digest_of(identity)
        self._manifest: dict[str, Any] = {"digest": self.digest, "identity": identity}
        self._is_open = False
        self._lock: BaseFileLock | None = None
        recover(out)
        check_parts(out, command, resume)
        if self.folder.exists():
            self._open()

    def _open(self) -> None:
        """Make the folder if there is none; be sure that it is of this identity, and that no other run uses it."""
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be made ({error.strerror})") from error
        self._lock = try_lock(self.folder / LOCK)
        if not (self.folder / MANIFEST).exists() and not _parts(self.folder):
            self._write(MANIFEST, json.dumps(self._manifest, default=str).encode())
        elif (theirs := read_manifest(self.folder)).get("digest") != self.digest:
            differs = what_differs(theirs.get("identity") or {}, self._manifest["identity"]) or "other settings"
            raise OutputError(f"{self.folder} belongs to a run with {differs}; delete it, or go on with the same")
        for dead in self.folder.glob(".*.partial"):
            dead.unlink(missing_ok=True)
        self._is_open = True
        if len(self):
            interrupts.leave(self.folder, KEPT)

    def _write(self, name: str, data: bytes) -> None:
        """Write a file of the folder, whole or not at all; the lock keeps others from the temporary name."""
        temporary = self.folder / f".{name}.partial"
        try:
            temporary.write_bytes(data)
            flush(temporary)
            temporary.replace(self.folder / name)
            flush(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise OutputError(
                f"{self.folder / name}: cannot be written ({error.strerror or error}); what is finished stays: make "
                "room, and go on with --resume"
            ) from error

    def __setitem__(self, key: str, value: np.ndarray) -> None:
        if not self._is_open:
            self._open()
        super().__setitem__(key, value)
        interrupts.leave(self.folder, KEPT)

    @contextlib.contextmanager
    def states(self) -> Iterator[States]:
        """The states of iterative work, for the time of the work: parts that replace each other (`runtime.states`).

        They stand in the folder beside the parts, under the same identity and the same lock.

        Raises:
            OutputError: a state cannot be written.
        """
        if not self._is_open:
            self._open()
        with open_states(self.folder / STATES, KEPT) as states:
            yield states

    def discard(self) -> None:
        """Delete the folder, once the output is written."""
        if self._is_open:
            discard(self.folder, self.out.name)
            interrupts.forget(self.folder)
        self._unlock()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_open and not _parts(self.folder):  # nothing was finished, so there is nothing to go on with
            discard(self.folder, self.out.name)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            release(self._lock)
        self._lock, self._is_open = None, False


def digest_of(identity: Mapping[str, Any]) -> str:
    """A hash of everything that some work depends on (32 hex digits).

    >>> digest_of({"seed": 0}) == digest_of({"seed": 1})
    False
    """
    text = json.dumps(dict(identity), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def what_differs(theirs: Mapping[str, Any], identity: Mapping[str, Any], is_all: bool = True) -> str:
    """What finished parts were made with that is another here, in words; empty if nothing is.

    Args:
        theirs: identity of the parts, as their manifest has it.
        identity: identity of this run.
        is_all: whether it is all of it, and not only what is known so far.

    >>> what_differs({"seed": 0}, {"seed": 1})
    'other settings (seed: 0 there, 1 here)'
    """
    for name, value in identity.items():
        ours = json.loads(json.dumps(value, default=str))
        if theirs.get(name) != ours:
            there, here = _brief(theirs.get(name)), _brief(ours)
            return f"other settings ({name}: {there} there, {here} here)" if there != here else f"other {name}"
    return "other settings" if is_all and len(theirs) > len(identity) else ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; empty if it has none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _parts(folder: Path) -> list[Path]:
    """What is finished in a folder: parts, and the state of iterative work."""
    return [*folder.glob("[!.]*.npy"), *saved_states(folder / STATES)]  # a leading dot: a file not yet complete


def _newest(folder: Path) -> int:
    """When the last part of a folder was written, in nanoseconds."""
    return max(path.stat().st_mtime_ns for path in _parts(folder))


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:60] + "..."
