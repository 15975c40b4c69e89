r"""A causal trace of one fact, ours against the released loop in PyTorch: same machine, same noise, same numbers.

    python -m experiments.facts.speed --model work/smollm2/base --out experiments/facts/speed.json

The released code (kmeng01/rome, `trace_with_patch`) runs the model once for each token and layer, on a batch of the
clean prompt and all corrupted ones, with forward hooks. Each of its runs takes as long as any other, so a random sample
of cells is run, and their median is multiplied by the number of cells. Ours is the whole map, compilation left out. The
two alternate. The sampled cells must be the same numbers.

What counts is the time that a processor spends on it, of all threads together, so that other work on the machine does
not. PyTorch gets one thread: those of several would wait for each other by spinning, and that would count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Float, Int
from transformers import AutoModelForCausalLM

import wpjax as wp
from experiments.records import machine, made, table, write
from wpjax.facts.facts import padded
from wpjax.facts.flow import flow, packing
from wpjax.facts.tracing import known_facts, subject_sigma


class TorchTrace:
    """The released loop, for the Llama family."""

    def __init__(self, folder: str, ids: Int[np.ndarray, " T"], noise: Float[np.ndarray, "R T D"], answer: int):
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.inputs = torch.tensor(np.tile(ids, (len(noise) + 1, 1)).astype(np.int64))
        self.noise, self.answer = torch.tensor(noise), answer
        self.model.get_input_embeddings().register_forward_hook(self._corrupt)

    def _corrupt(self, module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        out[1:] += self.noise
        return out

    @torch.no_grad()
    def cell(self, layer: int, token: int) -> float:
        """Mean probability of the answer with one state restored."""

        def restore(module: Any, args: Any, out: Any) -> Any:
            h = out[0] if isinstance(out, tuple) else out
            h[1:, token] = h[0, token]
            return out

        handle = self.model.model.layers[layer].register_forward_hook(restore)
        logits = self.model(self.inputs).logits
        handle.remove()
        return float(torch.softmax(logits[1:, -1], dim=1)[:, self.answer].mean())


def compare(folder: str, fact: wp.Fact, samples: int, n_cells: int, repeats: int, seed: int = 0) -> dict[str, Any]:
    """Run both, and compare their numbers.

    Args:
        folder: the model.
        fact: the fact.
        samples: corrupted runs.
        n_cells: cells that the loop runs in each repeat.
        repeats: how often both run.
        seed: seed of the noise and of the cells.
    """
    model = wp.load_model(folder)
    (known,) = known_facts(model, [fact])
    at, n, n_layers = known.at, len(known.at.ids), model.cfg.n_layers
    rows, rng = padded([at.ids]), np.random.default_rng(seed)
    noise = np.zeros((samples, rows.shape[1], model.cfg.d_model), np.float32)
    shape = samples, at.stop - at.start, model.cfg.d_model
    noise[:, at.start : at.stop] = 3 * subject_sigma(model, [known]) * rng.standard_normal(shape)
    cells = np.eye(n, rows.shape[1], dtype=bool)[at.start :]

    def ours() -> Float[np.ndarray, "L C"]:
        arrays = jnp.asarray(rows[0]), jnp.asarray(np.tile(rows, (samples, 1))), jnp.asarray(noise), jnp.asarray(cells)
        numbers = jnp.asarray(n - 1), jnp.asarray(known.answer)
        found = flow(model.cfg, model.params, *arrays, packing(cells, n), *numbers)
        return np.asarray(jax.block_until_ready(found.restored)).mean(-1)

    whole = ours()  # compiles
    theirs = TorchTrace(folder, at.ids, noise[:, :n], known.answer)
    theirs.cell(0, at.start)
    seconds: dict[str, list[float]] = {"ours": [], "loop": []}
    worst = 0.0
    for _ in range(repeats):
        begun = time.process_time()
        whole = ours()
        seconds["ours"].append(time.process_time() - begun)
        for _ in range(n_cells):
            layer, token = int(rng.integers(n_layers)), int(rng.integers(at.start, n))
            begun = time.process_time()
            p = theirs.cell(layer, token)
            seconds["loop"].append(time.process_time() - begun)
            worst = max(worst, abs(p - float(whole[layer, token - at.start])))
    if worst > 1e-4:
        raise SystemExit(f"the two differ by {worst:.1e}")
    one, map_of = statistics.median(seconds["loop"]), statistics.median(seconds["ours"])
    return {
        **made(),
        "machine": machine(),
        "model": Path(folder).name,
        "fact": fact.text,
        "n_tokens": n,
        "samples": samples,
        "n_cells": n_layers * n,
        "largest_difference": worst,
        "seconds": seconds,
        "loop_seconds": one * n_layers * n,
        "our_seconds": map_of,
        "times_faster": one * n_layers * n / map_of,
    }


def markdown(report: dict[str, Any]) -> str:
    """The comparison as a table."""
    rows = [
        ("PyTorch, one run a cell, with hooks", f"{report['loop_seconds']:.0f} s", "1"),
        ("`wpjax trace`", f"{report['our_seconds']:.0f} s", f"{report['times_faster']:.1f}"),
    ]
    return table(
        (f"{report['n_cells']} cells, {report['samples']} corrupted runs", "processor time", "times as fast"), rows
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--cells", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    tower = wp.Fact("{} is in the city of", "The Eiffel Tower", "Paris")
    report = compare(given.model, tower, given.samples, given.cells, given.repeats)
    print(markdown(report), report["largest_difference"])
    write(given.out, report)
