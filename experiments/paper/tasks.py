"""The tasks of a config, one after the other: each with its pair, its folder and its place in the results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.records import write
from wpjax.behaviours import Behaviour, behaviour
from wpjax.cli.console import progress_bars
from wpjax.models.checkpoint import save_checkpoint
from wpjax.pairs import Pair, load_model, load_pair
from wpjax.training import TrainConfig, finetune


def over_tasks(path: Path, out: Path | None, run: Callable[[dict[str, Any], Behaviour], Any]) -> dict[str, Any]:
    """Run something on every task of a config; what an earlier run with the same settings finished is kept.

    Args:
        path: the config.
        out: the results, written after every task.
        run: takes config and task.
    """
    config = json.loads(path.read_text())
    report: dict[str, Any] = {"config": config, "tasks": {}}
    if out is not None and out.exists():
        earlier = json.loads(out.read_text())
        if all(earlier["config"].get(key) == config[key] for key in config if key != "tasks"):
            report["tasks"] = earlier["tasks"]
    for name in config["tasks"]:
        if name not in report["tasks"]:
            report["tasks"][name] = run(config, behaviour(name))
            write(out, report)
    return report


def place_of(work: Path, task: Behaviour) -> Path:
    """Where the steps of a task are kept."""
    return work / task.name.replace(":", "-")


def pair_of(config: dict[str, Any], task: Behaviour) -> Pair:
    """Base and expert of a task; a local expert that is not there is trained first."""
    expert = str(config["expert"]).format(task=task.name)
    if "{task}" in str(config["expert"]) and not Path(expert).exists():
        settings = TrainConfig()
        with progress_bars() as progress:
            trained = finetune(
                load_model(config["base"]), task, settings, on_step=lambda i, _: progress("training", i, settings.steps)
            )
        save_checkpoint(Path(expert), trained)
    return load_pair(config["base"], expert, config["dtype"])
