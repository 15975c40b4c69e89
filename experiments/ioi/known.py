"""Path patching where the mechanism is known: a released two-layer attention-only model that repeats sequences.

    python -m experiments.ioi.known MODEL.safetensors --out experiments/ioi/known.json

The model is of the repository of "Progress measures for grokking via mechanistic interpretability" (arXiv 2301.05217);
its tensors are named as there. It is known that head 0.2 attends to the previous token, and that heads 1.1, 1.2 and 1.3
are induction heads: they find what came after the last occurrence of the token by the keys that 0.2 wrote.

Prompts are random tokens, repeated up to the middle. Corrupted, what is repeated comes after other tokens.
The model has no norms. Ours ends with one, which scales all logits of a token alike.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import wpjax as wp
from experiments.records import made, table, write
from wpjax.behaviours import Tokens

N_PROMPTS, HALF = 64, 20


def load(path: Path) -> tuple[wp.ModelConfig, dict[str, Any]]:
    """The model as ours: heads on an axis of their own, and an MLP that writes nothing."""
    w = load_file(path)
    (d, v), (n_ctx, _), (h, dh, _) = (w[n].shape for n in ("embed.W_E", "pos_embed.W_pos", "attn_blocks.0.attn.W_Q"))
    cfg = wp.ModelConfig("gpt2", 2, d, h, h, dh, 1, v, n_ctx, rope=None, pre_norm=False, gated=False)
    stacked = {n: jnp.stack([jnp.asarray(w[f"attn_blocks.{i}.attn.W_{n}"]) for i in range(2)]) for n in "QKVO"}
    attn = {f"W_{n}": jnp.moveaxis(stacked[n], 3, 1) for n in "QKV"}  # [L, D, H, Dh]
    attn["W_O"] = jnp.moveaxis(stacked["O"], 1, 2).reshape(2, h, dh, d)
    mlp = {"W_in": jnp.zeros((2, d, 1)), "W_out": jnp.zeros((2, 1, d))}
    embed = {"W_E": jnp.asarray(w["embed.W_E"].T), "W_pos": jnp.asarray(w["pos_embed.W_pos"])}
    unembed = {"W_U": jnp.asarray(w["unembed.W_U"])}
    blocks = {"attn": attn, "mlp": mlp}
    return cfg, {"embed": embed, "unembed": unembed, "final_norm": {"scale": jnp.ones(d)}, "blocks": blocks}


def measure(path: Path, seed: int = 0) -> dict[str, Any]:
    """Shares of the gap by direct paths to the logits, and by the paths from layer 0 into each head's keys."""
    cfg, params = load(path)
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(np.arange(1, cfg.d_vocab))[: 3 * HALF] for _ in range(N_PROMPTS)])
    half, others, foils = rows[:, :HALF], rows[:, HALF : 2 * HALF], rows[:, -1]
    middle = HALF // 2
    start = np.zeros((N_PROMPTS, 1), int)
    clean, corrupted = (
        np.concatenate([start, first, half[:, :middle]], 1).astype(np.int32) for first in (half, others)
    )
    lengths = np.full(N_PROMPTS, clean.shape[1])
    two = wp.Contrast.of_tokens(cfg, Tokens(clean, lengths), Tokens(corrupted, lengths), half[:, middle], foils)
    first, second = ([f"L{layer}.head.{h}" for h in range(cfg.n_heads)] for layer in range(2))
    direct = wp.path_patch(cfg, params, two, [*first, *second], "logits").share[:, 0]
    into = {part: wp.path_patch(cfg, params, two, first, [f"{name}.{part}" for name in second]).share for part in "qkv"}
    logits = wp.forward(cfg, params, jnp.asarray(clean)).logits
    assert logits is not None
    return {
        "top1": float((np.asarray(logits[:, -1].argmax(-1)) == half[:, middle]).mean()),
        "direct": dict(zip([*first, *second], direct.tolist(), strict=True)),
        "into": {part: dict(zip(first, share.tolist(), strict=True)) for part, share in into.items()},
        **made(),
    }


def markdown(report: dict[str, Any]) -> str:
    """What each head of layer 0 gives to the keys of each head of layer 1, and the direct paths of the latter."""
    keys = report["into"]["k"]
    n = len(keys)
    rows = [(name, *(f"{share:+.3f}" for share in shares)) for name, shares in keys.items()]
    direct = [f"{report['direct'][f'L1.head.{h}']:+.3f}" for h in range(n)]
    return table(("", *(f"keys of L1.head.{h}" for h in range(n))), [*rows, ("its own path to the logits", *direct)])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = measure(arguments.model)
    write(arguments.out, report)
    print(json.dumps(report, indent=1))
    print(markdown(report))


if __name__ == "__main__":
    main()
