"""Finished parts of long work, one file each, so that work that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from wpjax.errors import OutputError, WpjaxError
from wpjax.runtime.files import atomic_output


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


class Shards(MutableMapping[str, np.ndarray]):
    """Finished parts of a sweep as a mapping from keys to arrays; each part is a file in a folder.

    The folder is made with the first part. Beside the parts it holds a manifest with their identity.

    Args:
        folder: where the parts are kept.
        identity: everything that the parts depend on, as values that JSON can hold or `str` can name.
        resume: whether a folder that exists may be used.

    Raises:
        OutputError: the folder exists and `resume` is off, or it holds parts of another identity.

    >>> import tempfile
    >>> shards = Shards(Path(tempfile.mkdtemp()) / "parts", {"seed": 0}, resume=False)
    >>> shards["exact-0"] = np.zeros(3)
    >>> list(shards), shards["exact-0"].shape
    (['exact-0'], (3,))
    >>> shards.discard()
    """

    def __init__(self, folder: Path, identity: dict[str, Any], resume: bool):
        self.folder = folder
        text = json.dumps(identity, sort_keys=True, default=str)
        self._manifest = {"digest": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), "identity": identity}
        self._is_mine = False
        if not folder.exists():
            return  # it is made with the first part
        if not resume:
            raise OutputError(f"{folder} is left from a sweep that did not finish; pass --resume, or delete it")
        self._check_manifest()

    def _check_manifest(self) -> None:
        try:
            theirs = json.loads((self.folder / "manifest.json").read_text())["digest"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            theirs = None
        if theirs != self._manifest["digest"]:
            raise OutputError(
                f"{self.folder} belongs to a sweep with other settings; delete it, or repeat those settings"
            )
        self._is_mine = True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"

    def __getitem__(self, key: str) -> np.ndarray:
        try:
            return np.load(self._path(key), allow_pickle=False)
        except FileNotFoundError:
            raise KeyError(key) from None
        except (OSError, ValueError, EOFError) as error:
            raise OutputError(f"{self._path(key)} is damaged ({error}); delete it, and pass --resume again") from error

    def __setitem__(self, key: str, value: np.ndarray) -> None:
        if not self.folder.exists():
            with atomic_output(self.folder) as temporary:
                temporary.mkdir()
                (temporary / "manifest.json").write_text(json.dumps(self._manifest, default=str))
            self._is_mine = True
        if not self._is_mine:  # another sweep made the folder after this one had looked for it
            self._check_manifest()
        with atomic_output(self._path(key), overwrite=True) as temporary, temporary.open("wb") as file:
            np.save(file, value, allow_pickle=False)

    def __delitem__(self, key: str) -> None:
        self._path(key).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self.folder.glob("[!.]*.npy"))  # a leading dot: a file not yet complete

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def discard(self) -> None:
        """Delete the folder, once the result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
