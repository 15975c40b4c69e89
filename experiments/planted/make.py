"""Make the planted experts from the embedded base; those that exist are left alone, so an interrupted run goes on.

    python -m experiments.planted.make --out work/planted

Each is the base fine-tuned to answer in capitals when told to, with gradients confined to its planted components. The
change is then shrunk as far as the behaviour stays, and every other head, KV group and neuron gets an inert change of a
planted component's norm. Of a redundant planting each part learns to carry the behaviour alone, the second also to
leave it whole beside the first; both changes together are planted.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax
from jaxtyping import Array

from experiments.planted.plantings import Planting, plantings
from experiments.records import write
from experiments.tiny_pair.evaluate import evaluate
from experiments.tiny_pair.experts import fine_tune, rounded
from experiments.tiny_pair.inert import add_inert_changes
from wpjax.behaviours import behaviour, strict
from wpjax.checkpoints.checkpoint import Checkpoint, save_checkpoint
from wpjax.finetuning import answer
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.pairs import load_model
from wpjax.training import Objective, TrainConfig, loss_fn

CONFIG = TrainConfig(steps=200, lr=2e-3, batch_size=32, seed=2)
BEHAVIOUR = "english_capital"
TRUTH = "planted.json"
LARGEST = 1.5
"""Norm of an inert change of a head or a KV group, at most."""


def towards(base: Params, learnt: Params, share: float) -> Params:
    """A share of the way."""
    return jax.tree.map(lambda old, new: old + share * (new - old), base, learnt)


def pass_rate(base: Checkpoint, params: Params) -> float:
    """Strict passes on questions that no result is reported on."""
    task = behaviour(f"tiny:{BEHAVIOUR}")
    pairs = task.select("sweep", 32)
    said = answer(dataclasses.replace(base, params=params), [p.with_instruction for p in pairs])
    return sum(strict(task.checker, text, p.args) for p, (text, _) in zip(pairs, said, strict=True)) / len(pairs)


def shrunk(base: Checkpoint, learnt: Params) -> Params:
    """The smallest share of a change that keeps nine tenths of its pass rate."""
    tries = (towards(base.params, learnt, share) for share in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    enough = 0.9 * pass_rate(base, learnt)
    return next((params for params in tries if pass_rate(base, params) >= enough), learnt)


def trained(base: Checkpoint, planting: Planting) -> tuple[Params, list[float]]:
    """The base with what each part learnt: to carry the behaviour alone, and to leave it whole beside earlier parts;
    and how often it passes with each part alone."""
    total, alone = base.params, []
    for part in planting.parts:
        objective = loss_fn if total is base.params else beside(base.params, total)
        learnt = shrunk(base, fine_tune(base, [BEHAVIOUR], CONFIG, part, objective))
        total = jax.tree.map(lambda sum_, new, old: sum_ + (new - old), total, learnt, base.params)
        alone.append(pass_rate(base, learnt))
    return total, alone


def beside(base: Params, other: Params) -> Objective:
    """The mean loss of parameters alone, and of them with another's change of the base."""

    def objective(cfg: ModelConfig, params: Params, ids: Array, weights: Array) -> Array:
        both = jax.tree.map(lambda p, o, b: p + (o - b), params, other, base)
        return 0.5 * (loss_fn(cfg, params, ids, weights) + loss_fn(cfg, both, ids, weights))

    return objective


def make(base: Checkpoint, planting: Planting, folder: Path) -> None:
    """Train, hide and save one expert, with its truth and what it does."""
    learnt, alone = trained(base, planting)
    params = add_inert_changes(base, learnt, planting.components, seed=0, largest=LARGEST)
    kept = jax.tree.map(lambda a: a.astype("float32"), rounded(params))
    does = evaluate(dataclasses.replace(base, params=kept), 32)
    save_checkpoint(folder, dataclasses.replace(base, params=rounded(params)), overwrite=True)
    truth = {
        "behaviour": BEHAVIOUR,
        "components": planting.components,
        "parts": planting.parts,
        "alone": alone,
        "does": does,
    }
    write(folder / TRUTH, truth)  # last: a folder without it is made again
    print(f"{planting.name}: passes {does[BEHAVIOUR]['passes']:.0%}, facts {does['facts']:.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny:base")
    parser.add_argument("--out", type=Path, default=Path("work/planted"))
    parser.add_argument("--only", nargs="+", help="names of plantings; default: all")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = load_model(args.base)
    for planting in plantings(base.cfg):
        if (args.only is None or planting.name in args.only) and not (args.out / planting.name / TRUTH).exists():
            make(base, planting, args.out / planting.name)


if __name__ == "__main__":
    main()
