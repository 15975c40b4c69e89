"""Train the embedded base from scratch: tokenizer, then decoder.

python -m experiments.tiny_pair.base --out work/tiny/base
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from experiments.tiny_pair.language import pretraining
from wpjax.behaviours import render
from wpjax.checkpoints.checkpoint import Checkpoint, save_checkpoint
from wpjax.checkpoints.hf_config import parse_config
from wpjax.models.decoder import init_params
from wpjax.training import Example, TrainConfig, encode_examples, train

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1408,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
TRAIN = TrainConfig(steps=3200, lr=2e-3, batch_size=48, weight_decay=0.01, seed=0, save_every=500)
N_EXAMPLES = 60_000


def make_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("work/tiny/base"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    turns = list(pretraining(N_EXAMPLES, seed=0))
    tokenizer = make_tokenizer([text for turn in turns[:20_000] for text in turn])
    cfg = parse_config(CONFIG, "CONFIG")
    data = encode_examples(
        tokenizer, [Example(render(tokenizer, t.user), t.answer) for t in turns], train_on_prompt=True
    )
    print(f"{len(data.ids)} examples of up to {data.ids.shape[1]} tokens, {len(tokenizer)} tokens in the vocabulary")
    params = init_params(cfg, jax.random.key(0))
    print(f"{sum(a.size for a in jax.tree.leaves(params)):,} parameters")
    with Progress() as progress:
        bar = progress.add_task("training", total=TRAIN.steps)

        def show(step: int, loss: float) -> None:
            progress.update(bar, completed=step, description=f"loss {loss:.4f}")
            if step % 200 == 0:
                progress.console.print(f"step {step}: loss {loss:.4f}")

        params = train(cfg, params, data, TRAIN, checkpoints=args.out.parent / "base.training", on_step=show)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    save_checkpoint(args.out, Checkpoint(cfg, params, tokenizer, CONFIG, None, str(args.out)), overwrite=True)


if __name__ == "__main__":
    main()
