"""A line of checkpoints of one fine-tuning: in which order they were saved, and that each is named once."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from wpjax.errors import CheckpointError

STATE = "trainer_state.json"
"""The file in which transformers' `Trainer` keeps the step of a checkpoint, as `global_step`."""

MAX_STEP = 2**53
"""No training has as many steps."""

_NUMBER = re.compile(
    r"(?:checkpoint|ckpt|step|iter|epoch)[-_]?(\d{1,16})(?!\d)|(?<!\d)(\d{1,16})(?:\.gguf)?$", re.IGNORECASE
)
"""The number of a step in a name: behind a word for it, or at the end."""


def step_of(source: str) -> int:
    """The step of the training at which a checkpoint was saved.

    It is `global_step` of the checkpoint's trainer_state.json. Without that file it is the number at the end of the
    folder's name, or of the revision of a hub id; or the number behind "checkpoint", "step" or the like.

    Raises:
        CheckpointError: neither says a step; or the file is damaged.

    >>> step_of("run/checkpoint-1000"), step_of("org/model@step512")
    (1000, 512)
    """
    own = source.rpartition("+")[2]  # of MODEL+ADAPTER the adapter's
    path = Path(own).expanduser() / STATE
    if path.is_file():
        try:
            step = json.loads(path.read_bytes())["global_step"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as the state of a training ({type(error).__name__}: {error}); delete it if "
                "the step stands in the name of the folder"
            ) from error
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise CheckpointError(f"{path}: global_step is {str(step)[:40]!r}, no number of steps; correct it")
        return step
    name = own.rpartition("@")[2] if "@" in own else Path(own).name
    found = _NUMBER.search(name)
    if found is None:
        raise CheckpointError(
            f"{source}: no checkpoint of a line: it has no {STATE}, and its name says no step; name folders like "
            "checkpoint-100, or pass --stages if these are stages of training, one after the other"
        )
    return int(found[1] or found[2])


def in_order(sources: Sequence[str]) -> list[tuple[int, str]]:
    """Checkpoints of one training with their steps, the earliest first.

    Args:
        sources: names of the checkpoints.

    Raises:
        CheckpointError: two are of one step, or one says no step.

    >>> in_order(["run/checkpoint-1000", "run/checkpoint-200"])
    [(200, 'run/checkpoint-200'), (1000, 'run/checkpoint-1000')]
    """
    line = sorted((step_of(source), source) for source in sources)
    for (step, one), (other_step, other) in itertools.pairwise(line):
        if step == other_step:
            raise CheckpointError(
                f"{one} and {other} are both of step {step}: name the checkpoints of one training, each once"
            )
    return line


def check_different(base: str, experts: Sequence[str]) -> None:
    """Refuse a model that is named twice, by whatever path.

    Args:
        base: name of the base.
        experts: names of the experts.

    Raises:
        CheckpointError: the base is among the experts, or an expert is there twice.
    """
    seen: dict[str, str] = {}
    for source in experts:
        key = _resolved(source)
        if key in seen:
            twice = source if source == seen[key] else f"{seen[key]} and {source}, which are one folder,"
            raise CheckpointError(f"{twice} stands twice among the experts; name each checkpoint once")
        seen[key] = source
    if _resolved(base) in seen:
        raise CheckpointError(
            f"{seen[_resolved(base)]} is the base, and stands among the experts too; leave it out there"
        )


def _resolved(source: str) -> str:
    """One text for all paths of one file or folder; other names as they are."""
    try:
        path = Path(source).expanduser()
        return str(path.resolve()) if path.exists() else source
    except (OSError, RuntimeError, ValueError):
        return source
