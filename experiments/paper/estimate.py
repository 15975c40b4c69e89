"""What the pipeline costs a task: floating-point operations of each step, memory, and time at a given rate.

    python -m experiments.paper.estimate --out experiments/paper/estimate.json

Counted from the shapes alone, by the count of docs/method.md, "Counting operations": a patch of layer l costs the
layers from there to what is read, for every prompt and token. The count leaves out compilation, the host, and that
decoding waits for memory and not for the matrix unit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from experiments.records import table, write

HERE = Path(__file__).parent
PROMPT_TOKENS = 64
RANKINGS = 5
"""Of the validation: the one under test and its controls."""


class Shape(NamedTuple):
    """What a decoder's cost depends on."""

    layers: int
    d_model: int
    heads: int
    kv_heads: int
    d_head: int
    d_mlp: int
    vocab: int
    tied: bool
    anchor: int

    @property
    def layer(self) -> int:
        """Parameters of one layer's matrices."""
        attention = 2 * self.d_model * self.d_head * (self.heads + self.kv_heads)
        return attention + 3 * self.d_model * self.d_mlp

    @property
    def parameters(self) -> int:
        """Parameters of all matrices."""
        return self.layers * self.layer + (1 if self.tied else 2) * self.vocab * self.d_model


MODELS = {"Llama-3.1-8B": ("llama-3.1-8b", Shape(32, 4096, 32, 8, 128, 14336, 128256, False, 24))}
"""Configs and shapes; anchors at three quarters of the depth."""


def operations(shape: Shape, config: dict[str, Any]) -> dict[str, float]:
    """Floating-point operations of each step of one task."""
    new, swept, judged = int(config["max_new_tokens"]), int(config["n_prompts"]), int(config["n_validated"])
    logits = 2 * shape.vocab * shape.d_model
    through = 2 * shape.layer  # a token through a layer

    def run(prompts: int, tokens: int, layers: int = shape.layers) -> float:
        return float(prompts * tokens * layers * through)

    answers = run(int(config["n_steered"]), PROMPT_TOKENS + new) + int(config["n_steered"]) * new * logits
    sets = 2 + 4 * (3 + 1 + 2 * 2)  # own answers; of four layers: strengths, removal, random directions of both
    fitting = 2 * 2 * run(64, PROMPT_TOKENS)
    per_kind = int(config["top"]) + 64
    channels = (shape.heads, shape.kv_heads, shape.d_mlp)

    def patches(layers: int) -> int:
        return sum(min(per_kind, layers * n) for n in channels)

    def suffix(layers: int, tokens: int, read: float) -> float:
        """Screen (a forward and a backward pass), then each patch through half of the layers on average."""
        return run(swept, tokens, 4 * layers) + patches(layers) * (run(swept, tokens, layers) / 2 + swept * read)

    after = shape.layers - shape.anchor - 1
    patched = run(judged, PROMPT_TOKENS + new) * 3 + judged * new * 4 * logits  # an answer, scored twice
    return {
        "anchor": fitting + sets * answers,
        "sweep": suffix(shape.anchor + 1, PROMPT_TOKENS, 0.0),
        "execution": suffix(after, PROMPT_TOKENS + new, new * logits),
        "validation": 2 * RANKINGS * int(config["points"]) * patched,
    }


def memory(shape: Shape, config: dict[str, Any]) -> float:
    """Bytes at the peak: base, expert and one patched model, and a third of as much to work in."""
    width = 4 if config["dtype"] == "float32" else 2
    return 3 * width * shape.parameters * 4 / 3


def report(rate: float) -> dict[str, Any]:
    """What one task of each model would take at the rate."""
    found: dict[str, Any] = {"rate": rate, "prompt_tokens": PROMPT_TOKENS, "models": {}}
    for name, (file, shape) in MODELS.items():
        config = json.loads((HERE / f"{file}.json").read_text())
        steps = operations(shape, config)
        found["models"][name] = {
            "operations": steps,
            "seconds": {step: n / rate for step, n in steps.items()},
            "bytes": memory(shape, config),
            "dtype": config["dtype"],
        }
    return found


def markdown(found: dict[str, Any]) -> str:
    """One line a model and step."""
    rows = []
    for name, model in found["models"].items():
        for step, operations in model["operations"].items():
            rows.append([f"{name}: {step}", f"{operations / 1e12:,.0f}", f"{model['seconds'][step] / 60:.1f}"])
        rows.append([f"{name}: memory", f"{model['bytes'] / 2**30:.0f} GiB, {model['dtype']}", ""])
    return table(["one task", "10¹² operations", f"minutes at {found['rate'] / 1e12:,.0f} · 10¹² a second"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=1e14, help="operations a second; a tenth of an H100's peak")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = report(args.rate)
    print(markdown(found))
    write(args.out, found)


if __name__ == "__main__":
    main()
