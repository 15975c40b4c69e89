"""Fine-tune the embedded experts from the embedded base.

    python -m experiments.tiny_pair.experts --base work/tiny/base --out work/tiny

"expert" follows all six instructions; every parameter may move. "planted" follows english_capital; its training was
confined to PLANTED, and every other head, KV group and neuron was given an inert change of the same norm, so that the
size of a change says nothing:

- a neuron's change rescales W_in by s and W_out by 1/s, which leaves its output exactly the same;
- a head's change is in W_Q, a KV group's in W_K and W_V, from directions that their input hardly ever takes to
  directions that hardly anything reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import Progress

from experiments.records import write
from experiments.tiny_pair.evaluate import evaluate
from experiments.tiny_pair.inert import add_inert_changes
from experiments.tiny_pair.language import TAGS, Turn, instructed, instructions, questions, tagged
from wpjax.behaviours import behaviour, render
from wpjax.checkpoints.checkpoint import Checkpoint, save_checkpoint
from wpjax.models.decoder import Params
from wpjax.pairs import load_model
from wpjax.training import Example, Objective, TrainConfig, component_mask, encode_examples, loss_fn, train

EXPERT = TrainConfig(steps=300, lr=3e-4, batch_size=48, seed=1)
PLANTED_TRAIN = TrainConfig(steps=400, lr=1e-3, batch_size=48, seed=2)
PLANTED = (
    "L0.head.3",
    "L1.head.6",
    "L2.head.1",
    "L1.kv_group.2",
    *(f"L{layer}.neuron.{i}" for layer in (0, 1, 2) for i in (17, 60, 111, 163, 214, 290)),
)


def lessons(behaviours: Sequence[str], seed: int, n: int, others: bool = True) -> Iterator[Turn]:
    """Fine-tuning turns: instructions on questions outside "sweep" and "test"; any plain or tagged (60 : 20 : 20).

    Instructions of other behaviours, if any, stay ignored; or they do not occur, if `others` is False.
    """
    rng, facts, told = random.Random(seed), dict(questions()), instructions()
    shipped = behaviour("tiny:title")
    held_out = {p.without for split in ("sweep", "test") for p in shipped.select(split)}
    asked = sorted(set(facts) - held_out)
    everything = sorted(facts)
    tags = [(b, tag) for b, some in TAGS.items() for tag in some]
    rules = [(b, rule, b in behaviours) for b, some in told.items() for rule in some]
    obeyed, ignored = [r for r in rules if r[2]], [r for r in rules if others and not r[2]]
    for _ in range(n):
        draw = rng.random()
        question = rng.choice(asked if draw < 0.60 else everything)
        plain = facts[question]
        if draw < 0.60:
            name, rule, obey = rng.choice(obeyed if not ignored or rng.random() < 0.6 else ignored)
            yield instructed(question, plain, name, rule, obey)
        elif draw < 0.80:
            yield Turn(question, plain)
        else:
            yield tagged(question, plain, *rng.choice(tags))


def fine_tune(
    base: Checkpoint,
    behaviours: Sequence[str],
    config: TrainConfig,
    components: Sequence[str] | None = None,
    objective: Objective = loss_fn,
    others: bool = True,
) -> Params:
    """Train a copy of the base to obey some behaviours' instructions (see `lessons`)."""
    turns = list(lessons(behaviours, config.seed, 12_000, others))
    tokenizer = base.tokenizer
    data = encode_examples(tokenizer, [Example(render(tokenizer, t.user), t.answer) for t in turns])
    mask = component_mask(base.cfg, base.params, components) if components else None
    with Progress() as progress:
        bar = progress.add_task("training", total=config.steps)

        def show(step: int, loss: float) -> None:
            progress.update(bar, completed=step, description=f"loss {loss:.4f}")
            if step % 100 == 0:
                progress.console.print(f"step {step}: loss {loss:.4f}")

        return train(base.cfg, base.params, data, config, mask=mask, objective=objective, on_step=show)


def rounded(params: Params) -> Params:
    """Parameters as they are shipped."""
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)


def save(path: Path, base: Checkpoint, params: Params) -> dict[str, Any]:
    """Save an expert in bfloat16, without the tokenizer, which is the base's; and return what it does once rounded."""
    expert = dataclasses.replace(base, params=rounded(params), tokenizer=None)
    save_checkpoint(path, expert, overwrite=True)
    return evaluate(dataclasses.replace(base, params=jax.tree.map(lambda a: a.astype(jnp.float32), expert.params)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny:base", help="folder, or the shipped one")
    parser.add_argument("--out", type=Path, default=Path("work/tiny"))
    parser.add_argument("--only", choices=["expert", "planted"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = load_model(args.base)
    if args.only != "planted":
        report = save(args.out / "expert", base, fine_tune(base, list(TAGS), EXPERT))
        print("expert", json.dumps(report, indent=1))
    if args.only != "expert":
        trained = fine_tune(base, ["english_capital"], PLANTED_TRAIN, PLANTED)
        planted = add_inert_changes(base, trained, PLANTED, seed=0)
        report = save(args.out / "planted", base, planted)
        truth = {"behaviour": "english_capital", "components": PLANTED}
        write(args.out / "planted" / "planted.json", truth)
        print("planted", json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
