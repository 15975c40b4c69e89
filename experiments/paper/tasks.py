"""The tasks of a config, one after the other: each with its pair, its folder and its place in the results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.records import made, write
from wpjax.behaviours import Behaviour, behaviour
from wpjax.checkpoints.checkpoint import save_checkpoint
from wpjax.cli.console import progress_bars
from wpjax.errors import AnchorRejected, MetricRejected
from wpjax.finetuning import finetune
from wpjax.pairs import Pair, load_model, load_pair
from wpjax.training import TrainConfig


def over_tasks(
    path: Path,
    out: Path | None,
    run: Callable[[dict[str, Any], Behaviour], Any],
    whole: Callable[[dict[str, Any]], bool] = lambda result: True,
) -> dict[str, Any]:
    """Run something on every task of a config; what an earlier run with the same settings finished is kept.

    A task is a name, or an object with a name and settings of its own in place of the config's. One whose models do not
    differ in the behaviour is noted as refused, with the reason.

    Args:
        path: the config.
        out: the results, written after every task.
        run: takes config and task.
        whole: whether an earlier result of a task needs no more.
    """
    config = json.loads(path.read_text())
    report: dict[str, Any] = {"config": config, "tasks": {}}
    earlier = json.loads(out.read_text()) if out is not None and out.exists() else None
    kept = {} if earlier is None else {name: earlier["tasks"].get(name) for name in settings_of(earlier["config"])}
    for name, settings in settings_of(config).items():
        known = kept.get(name)
        if earlier is not None and known is not None and settings_of(earlier["config"])[name] == settings:
            report["tasks"][name] = known
            if "refused" in known or whole(known):
                continue
        try:
            report["tasks"][name] = run(settings, behaviour(name))
        except (AnchorRejected, MetricRejected) as error:
            report["tasks"][name] = {**made(), "refused": str(error)}
        write(out, report)
    return report


def settings_of(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of every task of a config, by name."""
    shared = {key: value for key, value in config.items() if key != "tasks"}
    given = [{"name": task} if isinstance(task, str) else task for task in config["tasks"]]
    return {task["name"]: shared | {key: value for key, value in task.items() if key != "name"} for task in given}


def measured(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tasks of a report that were not refused."""
    return {name: task for name, task in report["tasks"].items() if "refused" not in task}


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
