"""A farm: independent processes that share one folder of finished pieces of work, and nothing else.

Every process runs the same program on the same inputs, as part i of n. The pieces of work are dealt out in turn, so
part i knows which are its own. It makes those that are not in the folder yet. So a part that died is done by running it
again, and a piece that two processes make is no harm: the first one that is in the folder counts, for all of them.

What all parts need, say the anchor, works in the same way (`made`): who finds it missing makes it, the first one
counts, and everybody goes on with that one. At the end a process that is no part (`part=None`) collects the pieces.

There is no server, and there are no locks: file systems of clusters often have none that hold between machines.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from wpjax.errors import OutputError, WpjaxError
from wpjax.runtime import interrupts
from wpjax.runtime.files import flush
from wpjax.runtime.processes import Together
from wpjax.runtime.shards import MANIFEST, PartFiles, digest_of, finished_part, read_manifest, what_differs

T = TypeVar("T")

KEPT = "finished pieces are kept: run the part again"
"""What an interrupted part says of its finished pieces."""


class Unfinished(WpjaxError):
    """Pieces of other parts are missing, without which the work cannot go on here."""


class Part(NamedTuple):
    """Part i of n of some work.

    Attributes:
        number: i, from 1 to n.
        of: n.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read "i/n".

        Raises:
            WpjaxError: it is nothing of the kind, or i is not from 1 to n.

        >>> Part.parse("2/8")
        Part(number=2, of=8)
        """
        number, slash, of = text.partition("/")
        if not (slash and number.strip().isdecimal() and of.strip().isdecimal()):
            raise WpjaxError(f"--part {text!r} is not a part; write i/n, say 2/8 for the second of eight")
        part = cls(int(number), int(of))
        if not 1 <= part.number <= part.of:
            raise WpjaxError(f"--part {text}: the parts of {part.of} are 1/{part.of} to {part.of}/{part.of}")
        return part

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


class Piece(NamedTuple):
    """A piece of work.

    Attributes:
        owner: number of the part that makes it.
        is_done: a function that says whether it is in the folder.
    """

    owner: int
    is_done: Callable[[], bool]


class Farm(PartFiles):
    """The finished pieces of a farm, as a mapping from keys to arrays.

    Args:
        folder: the folder that all parts share; it is made if there is none.
        part: which part this process is; None for the process that collects.
        identity: everything that the pieces depend on, as values that JSON can hold or `str` can name.
        arguments: what to write beside it, so that the process that collects need not be told again.

    Raises:
        OutputError: the folder holds pieces of other work, or something else, or it cannot be written to; or there is
            nothing to collect.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "farm"
    >>> for part in (Part(1, 2), Part(2, 2), None):
    ...     farm = Farm(folder, part, {"seed": 0}, {})
    ...     for i in farm.share(range(5), lambda i: f"square-{i}" in farm):
    ...         if part is not None:
    ...             farm[f"square-{i}"] = np.array([float(i**2)])
    >>> farm.conclude()  # nothing is missing
    >>> sorted(float(farm[key][0]) for key in farm)
    [0.0, 1.0, 4.0, 9.0, 16.0]
    """

    again = "run its part again"

    def __init__(self, folder: Path, part: Part | None, identity: Mapping[str, Any], arguments: Mapping[str, Any]):
        self.folder, self.part, self.digest = folder, part, digest_of(identity)
        self._pieces: list[Piece] = []
        self.manifest = read_manifest(folder)
        if part is not None and not self.manifest:
            self._begin(identity, {"parts": part.of, "arguments": dict(arguments)})
        check_farm(folder, identity)
        self._n_parts = part.of if part is not None else int(self.manifest["parts"])

    def _begin(self, identity: Mapping[str, Any], more: dict[str, Any]) -> None:
        """Write the manifest, unless another part was faster."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            in_the_way = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be made ({error.strerror}); name another folder") from error
        if in_the_way and MANIFEST not in in_the_way:
            raise OutputError(f"{self.folder} holds other files ({in_the_way[0]}); name a new folder for --shards")
        manifest = {"digest": self.digest, "identity": dict(identity), **more}
        self._write(MANIFEST, json.dumps(manifest, default=str).encode())
        self.manifest = read_manifest(self.folder)

    def _write(self, name: str, data: bytes) -> None:
        """Write a file of the folder, whole or not at all; one that is there already stays as it is."""
        # A name of its own: another process may be writing the same piece.
        temporary = self.folder / f".{name}.{secrets.token_hex(6)}.partial"
        try:
            temporary.write_bytes(data)
            flush(temporary)
            _publish(temporary, self.folder / name)
            flush(self.folder)
        except OSError as error:
            raise OutputError(
                f"{self.folder / name}: cannot be written ({error.strerror or error}); what is finished stays: make "
                "room, and run the part again"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def __setitem__(self, key: str, value: np.ndarray) -> None:
        super().__setitem__(key, value)
        interrupts.leave(self.folder, KEPT)

    def share(self, pieces: Sequence[T], is_done: Callable[[T], bool]) -> list[T]:
        """The pieces that are done, and those that are this process's own.

        All processes must ask for the same pieces in the same order.

        Args:
            pieces: pieces of work.
            is_done: whether a piece is in the folder.
        """
        first = len(self._pieces)
        owners = [(first + i) % self._n_parts + 1 for i in range(len(pieces))]
        self._pieces += [
            Piece(owner, functools.partial(is_done, piece)) for owner, piece in zip(owners, pieces, strict=True)
        ]
        own = 0 if self.part is None else self.part.number
        return [piece for owner, piece in zip(owners, pieces, strict=True) if owner == own or is_done(piece)]

    def missing(self) -> list[int]:
        """The part of every piece that was shared out and is not in the folder."""
        return [piece.owner for piece in self._pieces if not piece.is_done()]

    def account(self) -> str:
        """How far the work is, in words, for the end of a part."""
        assert self.part is not None
        missing = self.missing()
        own = sum(piece.owner == self.part.number for piece in self._pieces)
        said = f"part {self.part}: all of its {own} pieces of work are in {self.folder}"
        if missing:
            return f"{said}; of all {len(self._pieces)} pieces {len(missing)} are missing, of {self._named(missing)}"
        return f"{said}, and so are those of all other parts"

    def conclude(self) -> None:
        """Refuse to go on if pieces are missing, or if this process is one part only: the rest is to be collected.

        Raises:
            Unfinished: says which parts are to be run.
        """
        if self.part is not None:
            raise Unfinished(self.account())
        missing = self.missing()
        if missing:
            raise self.unfinished(missing, f"{len(missing)} of {len(self._pieces)} pieces of work")
        # What parts that died were writing. One that still writes makes a piece that is there already (`_publish`).
        for dead in self.folder.glob(".*.partial"):
            with contextlib.suppress(OSError):
                dead.unlink()

    def unfinished(self, owners: Sequence[int], what: str) -> Unfinished:
        """The error that some pieces are missing.

        Args:
            owners: the part of each.
            what: what is missing, in words.
        """
        command, first = self.manifest["arguments"].get("command", ""), min(owners, default=1)
        how = f"{command} --part {first}/{self._n_parts} --shards {self.folder}".strip()
        run = "run it" if len({*owners}) == 1 else "run each of them"
        return Unfinished(f"{self.folder} lacks {what}, of {self._named(owners)}; {run}: {how}")

    def _named(self, owners: Sequence[int]) -> str:
        """Some parts in words; most of many parts are not listed."""
        numbers = sorted({*owners})
        listed = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        return f"part{'s' if len(numbers) > 1 else ''} {listed} of {self._n_parts}"

    def __enter__(self) -> Farm:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to give up: there is no lock."""


def check_farm(folder: Path, known: Mapping[str, Any], is_begun: bool = True) -> None:
    """Refuse a folder whose pieces are of other work.

    Args:
        folder: the folder of a farm.
        known: settings of this run that are known already, by their names in the identity of the farm.
        is_begun: whether there must be a farm.

    Raises:
        OutputError: there is no farm, its manifest is damaged, or its pieces are of other settings.
    """
    if not is_begun and not (folder / MANIFEST).exists():
        return
    manifest = read_manifest(folder)
    theirs = manifest.get("identity")
    if not (
        isinstance(theirs, dict)
        and isinstance(manifest.get("arguments"), dict)
        and isinstance(manifest.get("parts"), int)
        and manifest["parts"] > 0
        and digest_of(theirs) == manifest.get("digest")
    ):
        why = "is damaged" if (folder / MANIFEST).exists() else "is not there"
        raise OutputError(
            f"{folder} holds no parts of a sweep ({MANIFEST} {why}); make them with `wpjax sweep ... --part 1/2 "
            f"--shards {folder}`"
        )
    other = what_differs(theirs, known, is_all=False)
    if other:
        raise OutputError(f"{folder} belongs to a sweep with {other}; go on with the same, or name another folder")


def made(
    done: MutableMapping[str, np.ndarray],
    key: str,
    make: Callable[[], np.ndarray],
    shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """A part of the work that all of its processes need: made here, unless it is there already.

    In a farm all processes go on with the first one that was made, even if theirs was rounded in another way. Processes
    that work together (`runtime.processes`) go on with that of process 0.

    Args:
        done: finished parts.
        key: name of the part.
        make: a function that makes it.
        shape: shape that it must have, if it is of floats; None not to check it.

    Raises:
        Unfinished: it is to be collected, and no part has made it.
        WpjaxError: it has another shape.

    >>> done = {}
    >>> [float(made(done, "x", lambda value=value: np.array(value))) for value in (1.0, 2.0)]
    [1.0, 1.0]
    """
    if key not in done:
        if isinstance(done, Farm) and done.part is None:
            raise done.unfinished([1], f"the beginning of the work ({key})")
        done[key] = done.agreed(make()) if isinstance(done, Together) else make()
    return np.asarray(done[key]) if shape is None else finished_part(done, key, shape)


def shared_out(done: Mapping[str, np.ndarray], pieces: Sequence[T], is_done: Callable[[T], bool]) -> list[T]:
    """The pieces of work that this process makes or reads: all of them, outside a farm (`Farm.share`).

    >>> shared_out({}, ["a", "b"], lambda piece: False)
    ['a', 'b']
    """
    return done.share(pieces, is_done) if isinstance(done, Farm) else list(pieces)


def is_shared(done: Mapping[str, np.ndarray]) -> bool:
    """Whether other processes do parts of the same work, so that they must agree on what it is (`made`).

    >>> is_shared({})
    False
    """
    return isinstance(done, Farm | Together)


def conclude(done: Mapping[str, np.ndarray]) -> None:
    """The place in the work from which on all pieces are needed (`Farm.conclude`); nothing happens outside a farm.

    Raises:
        Unfinished: this process is a part of a farm, or pieces are missing.
    """
    if isinstance(done, Farm):
        done.conclude()


def _publish(temporary: Path, final: Path) -> None:
    """Give a file its final name, unless there is one of this name already."""
    try:
        os.link(temporary, final)  # in one step, and it fails if the name is taken
    except FileExistsError:
        return
    except OSError:  # a file system without links, say of an object store
        if not final.exists():
            temporary.replace(final)
