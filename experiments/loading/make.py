"""Write a checkpoint with the shapes of a known model and random weights, in bfloat16.

    python -m experiments.loading.make llama-3.2-3b --out work/llama-3.2-3b
    python -m experiments.loading.make llama-3.2-1b --out work/llama-3.2-1b-mlp --changed mlp

With `--changed`, only the tensors whose names hold that word differ from those of a checkpoint without it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from wpjax.checkpoints.convert import tensor_shapes
from wpjax.checkpoints.hf_config import parse_config
from wpjax.checkpoints.weights import WeightsWriter
from wpjax.runtime.files import atomic_output

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "dtype": "bfloat16",
}
_FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "tie_word_embeddings")
_SHAPES = {
    "llama-3.2-1b": (16, 2048, 32, 8192, True),
    "llama-3.2-3b": (28, 3072, 24, 8192, True),
    "llama-3.1-8b": (32, 4096, 32, 14336, False),
    "llama-3.1-70b": (80, 8192, 64, 28672, False),
}
MODELS: dict[str, dict[str, Any]] = {
    name: {**_LLAMA, **dict(zip(_FIELDS, values, strict=True))} for name, values in _SHAPES.items()
}
MODELS["llama-3.2-1b"]["head_dim"] = 64
"""Name of a model -> its config.json, without scaled positions."""

_POOL = 2**22
"""Random numbers that all tensors are cut from; to draw billions anew would take minutes."""


def make(name: str, out: Path, changed: str = "") -> None:
    """Write the checkpoint."""
    cfg = parse_config(MODELS[name], name)
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(_POOL, np.float32) * 0.02).astype(jnp.bfloat16)
    shapes = tensor_shapes(cfg)
    with atomic_output(out, overwrite=True, marker="config.json") as folder:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(MODELS[name], indent=2) + "\n", encoding="utf-8")
        with WeightsWriter(folder, shapes) as weights:
            for i, (tensor, shape) in enumerate(shapes.items()):
                shift = i + (1000 if changed and changed in tensor else 0)  # no two tensors begin alike
                weights.add(tensor, np.resize(pool[shift:], shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--changed", default="")
    args = parser.parse_args()
    make(args.model, args.out, args.changed)


if __name__ == "__main__":
    main()
