"""Fine-tune the embedded base to one behaviour at a time, several times: the experts that are merged.

    python -m experiments.merging.experts --out work/merging

Each learns from its own instructions, plain questions and tags; it never sees another behaviour's instructions. Writes
a model folder for each behaviour and seed, work/merging/seed0/title and so on. About two minutes of CPU each.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from experiments.tiny_pair.experts import EXPERT, fine_tune, rounded
from wpjax.checkpoints.checkpoint import save_checkpoint
from wpjax.pairs import load_model

BEHAVIOURS = ("english_capital", "title", "quotation", "multiple_sections")
SEEDS = (0, 1, 2)


def main() -> None:
    """Train those experts that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/merging"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args()
    base = load_model("tiny:base")
    for seed in args.seeds:
        for i, name in enumerate(BEHAVIOURS):
            folder = args.out / f"seed{seed}" / name
            folder.parent.mkdir(parents=True, exist_ok=True)
            if folder.exists():
                continue
            config = dataclasses.replace(EXPERT, steps=100, seed=100 * seed + i)
            params = fine_tune(base, [name], config, others=False)
            # With the tokenizer, so that each is a model that stands alone.
            save_checkpoint(folder, dataclasses.replace(base, params=rounded(params)))
            print(folder, flush=True)


if __name__ == "__main__":
    main()
