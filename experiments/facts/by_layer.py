r"""Where facts appear to live, and where editing them works: edits in many layers, scored, beside a causal trace.

    python -m experiments.facts.by_layer --model work/smollm2/base --text corpus.txt --most 6 --layers 0,2,4 \
        --facts experiments/facts/facts.jsonl --trace experiments/facts/trace --out experiments/facts/by_layer

For each layer it runs `wpjax edit --facts`, in one process, and leaves files of scores that are there; then `wpjax
layers`. Other options are passed on to `wpjax edit`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wpjax import cli


def command(*arguments: object) -> None:
    """Run a command of wpjax in this process; stops the script if it fails."""
    before, sys.argv = sys.argv, ["wpjax", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as left:
        if left.code:
            raise
    finally:
        sys.argv = before


def run(
    model: str,
    text: Path,
    facts: Path,
    most: int,
    layers: Sequence[int],
    trace: Path,
    out: Path,
    options: Sequence[str],
) -> None:
    """Score edits in each layer, and put them beside the trace.

    Args:
        model: the model.
        text: the text for the second moment of keys.
        facts: the file of facts.
        most: facts to edit.
        layers: the layers.
        trace: folder of a trace of the same facts.
        out: folder of the scores; the figure is named after it.
        options: more options of `wpjax edit`.
    """
    out.mkdir(exist_ok=True)
    files = []
    for layer in layers:
        files.append(out / f"scores-{layer}.json")
        if not files[-1].exists():
            given = ["--model", model, "--facts", facts, "--most", most, "--text", text, "--layer", layer]
            command("edit", *given, "--out", files[-1], "--resume", *options)
    command("layers", trace, *files, "--out", out.with_suffix(".json"), "--overwrite")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    for name in ("--text", "--facts", "--trace", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--most", type=int, default=6)
    parser.add_argument("--layers", required=True, help="numbers, comma-separated")
    given, more = parser.parse_known_args()
    numbers = [int(layer) for layer in given.layers.split(",")]
    run(given.model, given.text, given.facts, given.most, numbers, given.trace, given.out, more)
