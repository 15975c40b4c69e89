"""Activation and path patching beside TransformerLens: the same numbers, and how long a map takes.

    python -m experiments.ioi.peer --out experiments/ioi/peer.json
    python -m experiments.ioi.peer --model SMOLLM2 --out experiments/ioi/peer.json

Without a model it compares values on small random models, and writes the largest difference of each sweep. With one it
adds how long a map of all heads and positions takes here, and how long TransformerLens's loop would take: some of its
cells, drawn at random, are run and timed, in turns with ours.

TransformerLens is no dependency of the project: `pip install transformer-lens` in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
import transformers
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

import wpjax as wp
from wpjax.behaviours import Tokens
from wpjax.metrics.readouts import LogOdds
from wpjax.models.edits import Add, Edit
from wpjax.models.sites import Site

SIZE = {"vocab_size": 61, "max_position_embeddings": 64}
LLAMA = {
    **SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "head_dim": 8,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("gpt2", {"vocab_size": 61, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 64}),
    "Llama": ("llama", {**LLAMA, "num_key_value_heads": 6}),
    "Llama with 3 heads a KV group": ("llama", {**LLAMA, "num_key_value_heads": 2}),
}
N_CELLS = 20
"""Cells of TransformerLens's loop that are timed."""


def words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer; nothing is tokenised."""
    ids = {"<s>": 0, **{f"w{i}": i for i in range(1, 61)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<s>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<s>")


def random_model(model_type: str, attributes: dict[str, Any], folder: Path) -> Any:
    """A torch model with random weights large enough to matter, saved to a folder."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **attributes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def compare(name: str) -> dict[str, float]:
    """Largest difference of every sweep, in the units of the logit difference."""
    with tempfile.TemporaryDirectory() as folder:
        hf = random_model(*MODELS[name], Path(folder))
        words().save_pretrained(folder)  # TransformerLens loads one from the folder
        ours = wp.load_checkpoint(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=hf, device="cpu")
    rng = np.random.default_rng(0)
    clean, corrupted = rng.integers(0, 61, (2, 1, 8)).astype(np.int32)
    lengths, answer, foil = np.array([8]), np.array([3]), np.array([40])
    two = wp.Contrast.of_tokens(ours.cfg, Tokens(clean, lengths), Tokens(corrupted, lengths), answer, foil)
    theirs = [torch.tensor(ids, dtype=torch.long) for ids in (clean, corrupted)]

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, answer[0]] - logits[0, -1, foil[0]]

    caches = [bridge.run_with_cache(ids)[1] for ids in theirs]
    # TransformerLens puts clean values into the corrupted run.
    sweeps = {
        "head output": (patching.get_act_patch_attn_head_out_all_pos, "z", False),
        "head output by position": (patching.get_act_patch_attn_head_out_by_pos, "z", True),
        "queries": (patching.get_act_patch_attn_head_q_all_pos, "q", False),
        "keys": (patching.get_act_patch_attn_head_k_all_pos, "k", False),
        "values": (patching.get_act_patch_attn_head_v_all_pos, "v", False),
        "patterns": (patching.get_act_patch_attn_head_pattern_all_pos, "pattern", False),
        "MLP by position": (patching.get_act_patch_mlp_out, "mlp_out", True),
        "stream by position": (patching.get_act_patch_resid_pre, "resid_pre", True),
        # Its hook "resid_mid" stands at the norm before the MLP, so that a patch there reaches the MLP alone.
        "what MLPs read by position": (patching.get_act_patch_resid_mid, "mlp_input", True),
    }
    found = {}
    for sweep, (run, site, by_position) in sweeps.items():
        expected = run(bridge, theirs[1], caches[0], metric).numpy()
        got = wp.activation_patch(ours.cfg, ours.params, two.swapped, site, by_position=by_position)
        values = (got.clean + got.change)[..., 0]
        # Theirs counts positions before heads; keys and values of GQA have fewer heads than the table.
        values = np.moveaxis(values, 1, 2) if site == "z" and by_position else values
        expected = expected[tuple(slice(n) for n in values.shape)]
        found[sweep] = float(np.abs(values - expected).max())
    names = [f"L{layer}.head.{h}.q" for layer in range(1, 3) for h in range(ours.cfg.n_heads)]
    direct = patching.get_act_patch_direct_path(bridge, theirs[1], *caches, metric, 0, 1, verbose=False)[1:].numpy()
    paths = wp.path_patch(ours.cfg, ours.params, two.swapped, "L0.head.1", names, mlps="frozen")
    found["direct path to queries"] = float(np.abs((paths.clean + paths.change)[0, :, 0] - direct.ravel()).max())
    return found


def timed(model_folder: str, n_prompts: int, seed: int = 0) -> dict[str, Any]:
    """Seconds of a head x position map here, and of TransformerLens's loop, from some of its cells."""
    model = wp.load_model(model_folder)
    prompts = wp.ioi_prompts(model, n_prompts, seed=seed)
    two = prompts.contrast.swapped
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, attn_implementation="eager", torch_dtype=torch.float32
    )
    bridge = TransformerBridge.boot_transformers(model_folder, hf_model=hf.eval(), device="cpu")
    ids = [torch.tensor(np.asarray(m.tokens.ids), dtype=torch.long) for m in (prompts.contrast.clean, two.clean)]
    last, rows = torch.tensor(np.asarray(two.clean.tokens.last)), torch.arange(n_prompts)
    odds = two.clean.readout
    assert isinstance(odds, LogOdds)
    tokens = [torch.tensor(np.asarray(t)[:, 0]) for t in (odds.tokens, odds.foils)]

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[rows, last, tokens[0]] - logits[rows, last, tokens[1]]).mean()

    n_positions = ids[0].shape[1]
    every = [(layer, t, h) for layer in range(model.cfg.n_layers) for t in range(n_positions)
             for h in range(model.cfg.n_heads)]  # fmt: skip
    cells = random.Random(seed).sample(every, N_CELLS)
    with torch.no_grad():
        cache = bridge.run_with_cache(ids[0])[1]

        def one(cell: tuple[int, int, int]) -> float:
            layer, t, h = cell

            def put(z: torch.Tensor, hook: Any) -> torch.Tensor:
                z[:, t, h] = cache[hook.name][:, t, h]
                return z

            return float(metric(bridge.run_with_hooks(ids[1], fwd_hooks=[(f"blocks.{layer}.attn.hook_z", put)])))

        one(cells[0])  # the first run is slower
        half = N_CELLS // 2
        start = time.perf_counter()
        before = [one(cell) for cell in cells[:half]]
        a_cell = (time.perf_counter() - start) / half
        start = time.perf_counter()
        ours = wp.activation_patch(model.cfg, model.params, two, "z", by_position=True)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        after = [one(cell) for cell in cells[half:]]
        a_cell = (a_cell + (time.perf_counter() - start) / half) / 2
    values = (ours.clean + ours.change).mean(-1)
    difference = max(
        abs(float(values[layer, h, t]) - x) for (layer, t, h), x in zip(cells, before + after, strict=True)
    )
    return {
        "prompts": n_prompts,
        "positions": n_positions,
        "cells": len(every),
        "seconds_here_with_compilation": seconds,
        "seconds_of_a_cell_there": a_cell,
        "timed_cells": N_CELLS,
        "times_faster": a_cell * len(every) / seconds,
        "largest_difference": difference,
    }


def edges_timed(model_folder: str, n_prompts: int, steps: int = 5, repeats: int = 3) -> dict[str, Any]:
    """Seconds of all edges' EAP-IG scores, and how many plain passes forward and backward that is; compiled before."""
    model = wp.load_model(model_folder)
    cfg, params, two = model.cfg, model.params, wp.ioi_prompts(model, n_prompts).contrast

    @jax.jit
    def plain(params: Any) -> jax.Array:
        """The slope of the metric by the embedded prompts: a pass forward and one backward, without weights."""

        def score(shift: jax.Array) -> jax.Array:
            out = two.clean.run(cfg, params, edits=(Edit(Site.RESID_PRE, Add(shift), layer=0),))
            return two.clean.read(cfg, params, two.clean.pick(out.resid)).sum()

        return jax.grad(score)(jnp.zeros((*two.clean.tokens.ids.shape, cfg.d_model)))

    seconds: dict[str, list[float]] = {"plain": [], "edges": []}
    for turn in range(repeats + 1):
        for name, run in (
            ("plain", lambda: plain(params).block_until_ready()),
            ("edges", lambda: wp.score_edges(cfg, params, two, steps=steps)),
        ):
            start = time.perf_counter()
            run()
            if turn:  # the first turn compiles
                seconds[name].append(time.perf_counter() - start)
    best = {name: min(took) for name, took in seconds.items()}
    n_edges = wp.score_edges(cfg, params, two, steps=steps).n_members
    return {
        "prompts": n_prompts,
        "edges": n_edges,
        "steps": steps,
        "seconds": best["edges"],
        "plain_passes": best["edges"] / best["plain"],
    }


def main() -> None:
    """Compare, and write what was found; what the file holds already and is not measured anew stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="folder of a model on which both are timed; without it values are compared")
    parser.add_argument("--n-prompts", type=int, default=2)
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    found["transformer_lens"] = metadata.version("transformer-lens")
    if arguments.model:
        found["edges"] = edges_timed(arguments.model, 4)
        found["map"] = timed(arguments.model, arguments.n_prompts)
    else:
        found["largest_difference"] = {name: compare(name) for name in MODELS}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
