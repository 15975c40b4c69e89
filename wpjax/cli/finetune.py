"""`wpjax finetune`."""

from __future__ import annotations

from typing import Annotated

from wpjax.arguments import (
    Base,
    BehaviourName,
    Checker,
    IgnoreConfig,
    Out,
    Overwrite,
    Resume,
    Seed,
    Setting,
    Split,
)
from wpjax.cli.options import Json

TRAINING = "Training"
"""Title of a panel of `--help`."""

EXAMPLE = "Example: wpjax finetune --base tiny:base --behaviour tiny:title --out title-expert --lr 3e-4"


def run(
    base: Base,
    behaviour: BehaviourName,
    out: Out,
    checker: Checker = None,
    split: Split = "thirds",
    steps: Annotated[int, Setting("Optimiser steps.", least=2, panel=TRAINING)] = 90,
    lr: Annotated[float, Setting("Peak learning rate of AdamW.", least=0, most=1, panel=TRAINING)] = 3e-5,
    batch_size: Annotated[int, Setting("Examples in a step.", least=1, most=2**16, panel=TRAINING)] = 8,
    weight_decay: Annotated[float, Setting("Weight decay of AdamW.", least=0, most=2**20, panel=TRAINING)] = 0.0,
    components: Annotated[
        str | None, Setting("Change these components only, comma-separated: L1.head.2,L3.mlp.", panel=TRAINING)
    ] = None,
    max_new_tokens: Annotated[int, Setting("Longest answer to learn, in tokens.", least=1, panel=TRAINING)] = 64,
    eval_prompts: Annotated[
        int, Setting("Held-out prompts to check the expert on; 0: do not check it.", least=0, panel=TRAINING)
    ] = 16,
    resume: Resume = False,
    seed: Seed = 0,
    ignore_config: IgnoreConfig = (),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make an expert: train a base on its own answers, rewritten so that they follow the instruction."""
    from wpjax.runtime.files import check_output

    check_output(out, overwrite, "config.json", inputs=(base, behaviour))

    from wpjax import behaviours
    from wpjax.checkpoints.checkpoint import save_checkpoint
    from wpjax.cli.console import print_json, print_table, progress_bars
    from wpjax.finetuning import finetune, pass_rate
    from wpjax.pairs import load_model
    from wpjax.training import TrainConfig, check_checkpoints, discard_checkpoints

    checkpoints = out.with_name(f".{out.name}.training")
    check_checkpoints(checkpoints, resume, out)

    task = behaviours.behaviour(behaviour, checker, split)
    if eval_prompts:
        task.check_checker()
    with progress_bars() as progress:
        progress("reading the base", 0, 1)
        model = load_model(base, ignore_config=ignore_config)
    config = TrainConfig(steps=steps, lr=lr, batch_size=batch_size, weight_decay=weight_decay, seed=seed)

    with progress_bars() as progress:
        progress("answers to learn from", 0, 1)
        losses: list[float] = []

        def on_step(step: int, loss: float) -> None:
            progress("answers to learn from", 1, 1)  # the answers came before the first step
            progress("training", step, steps)
            losses.append(loss)

        expert = finetune(
            model,
            task,
            config,
            components=None if components is None else [c.strip() for c in components.split(",")],
            max_new_tokens=max_new_tokens,
            checkpoints=checkpoints,
            on_step=on_step,
        )
        save_checkpoint(out, expert, overwrite=overwrite)
        discard_checkpoints(checkpoints, out)
        rates: dict[str, float] = {}
        for i, (name, which) in enumerate({"base": model, "expert": expert}.items() if eval_prompts else ()):
            progress("checking on held-out prompts", i, 2)
            rates[name] = pass_rate(which, task, eval_prompts, max_new_tokens)
            progress("checking on held-out prompts", i + 1, 2)
    if as_json:
        print_json({"out": str(out), "loss": losses[-1:], "pass_rate": rates})
        return
    if rates:
        rows = [(name, f"{rate:.0%}") for name, rate in rates.items()]
        print_table(f"{task.name} on {eval_prompts} held-out prompts", ("model", "follows"), rows)
    from wpjax.cli.words import print_next, print_written

    print()
    print_written(out)
    print_next(next_command(base, str(out), behaviour, checker, split))


def next_command(base: str, expert: str, behaviour: str, checker: str | None, split: str) -> str:
    """The sweep of an expert that was just made, quoted for a shell.

    >>> print(next_command("org/base", "my caps", "p.jsonl", "regex:^[A-Z ]+$", "thirds"))
    wpjax sweep --base org/base --expert 'my caps' --behaviour p.jsonl --checker 'regex:^[A-Z ]+$' --out 'my caps.nc'
    """
    import shlex

    asked = ["--base", base, "--expert", expert, "--behaviour", behaviour]
    asked += [] if checker is None else ["--checker", checker]
    asked += ["--split", split] if split != "thirds" else []
    return shlex.join(["wpjax", "sweep", *asked, "--out", f"{expert}.nc"])
