"""Train rank-8 LoRA experts of SmolLM2 with peft: one that answers in capitals, one that quotes its answers.

    python -m experiments.smollm2.lora --base work/smollm2/base --behaviour english_capital --out work/smollm2

Writes two folders: the adapter as peft saves it (`adapter_english_capital`), and the base with the adapter merged, as
transformers saves it (`lora_english_capital`). The data are those of `wpjax finetune`: the base's own answers to the
"fit" queries, rewritten, and the plain queries with the plain answers. Answers are cut after the last sentence that is
whole, so that every one of them ends.

Needs `pip install peft`. On CPU, about 5 minutes on one core.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from wpjax.behaviours import behaviour, render
from wpjax.finetuning import answer
from wpjax.pairs import load_model
from wpjax.training import Example, TrainConfig, batch_rows, encode_examples

RANK, ALPHA = 8, 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def examples(base: str, name: str, max_new_tokens: int) -> list[Example]:
    """What to learn: whole sentences of the base's own answers, rewritten where the instruction asks for it."""
    model, task = load_model(base), behaviour(name)
    pairs = task.select("fit")
    queries = list(dict.fromkeys(p.without for p in pairs))
    plain = {}
    for query, (text, _) in zip(queries, answer(model, queries, max_new_tokens), strict=True):
        ends = [match.end() for match in re.finditer(r"(?<!\d)[.!?](?=\s|$)", text)]
        if ends:
            plain[query] = text[: ends[-1]].strip()
    assert task.rewrite is not None
    asked = [
        Example(render(model.tokenizer, p.with_instruction), task.rewrite(p.without, plain[p.without], p.args))
        for p in pairs
        if p.without in plain
    ]
    return [*asked, *(Example(render(model.tokenizer, q), text) for q, text in plain.items())]


def train(base: str, name: str, out: Path, steps: int, lr: float, max_new_tokens: int, seed: int = 0) -> None:
    """Train one adapter; write it, and the merged model. The seed is that of its first values and of the order."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = encode_examples(tokenizer, examples(base, name, max_new_tokens))
    torch.manual_seed(seed)
    options: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**options))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    config, start = TrainConfig(steps=steps, lr=lr, seed=seed), time.process_time()
    for step in range(steps):
        rows = batch_rows(len(data.ids), config, step)
        weights = torch.tensor(data.weights[rows])
        width = int(weights.sum(0).nonzero().max()) + 1  # padding behind the longest example is not needed
        ids, weights = torch.tensor(data.ids[rows][:, :width]).long(), weights[:, :width]
        learnt = weights[:, 1:] > 0
        with torch.autocast("cpu", torch.bfloat16):  # the products; weights and adapter stay in float32
            hidden = model.get_base_model().model(ids[:, :-1]).last_hidden_state
            logits = model.get_base_model().lm_head(hidden[learnt])  # of what is learnt only
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][learnt])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 10 == 9 or step < 2:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.process_time() - start:.0f} CPU-seconds", flush=True)
    model.save_pretrained(str(out / f"adapter_{name}"))
    merged = out / f"lora_{name}"
    model.merge_and_unload().save_pretrained(merged)
    for folder in (merged, out / f"adapter_{name}"):
        tokenizer.save_pretrained(folder)
    print(merged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--behaviour", default="english_capital")
    parser.add_argument("--out", type=Path, default=Path("work/smollm2"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-new-tokens", type=int, default=40, help="longest answer of the base, before it is cut")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.base, args.behaviour, args.out, args.steps, args.lr, args.max_new_tokens, args.seed)


if __name__ == "__main__":
    main()
