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

_STEP = re.compile(r"(?:step|checkpoint|ckpt|(?<![a-z])iter)[-_]?(\d{1,16})(?![0-9a-z]|\.\d)", re.IGNORECASE)
"""The number of a step in a name: behind a word for it. No part of a number, as in 1e5 or 1.5."""

_LAST = re.compile(r"(?<!\d)(?<!\d\.)(?<!\de)(?<!\de[-+])(\d{1,16})(?:\.gguf)?$", re.IGNORECASE)
"""The number at the end of a name. It may be a step, or the version of a model."""


def step_of(source: str, line: Sequence[str] = ()) -> int:
    """The step of the training at which a checkpoint was saved.

    It is `global_step` of the checkpoint's trainer_state.json. Without that file it is the number behind "step",
    "checkpoint" or the like in the folder's name, or in the revision of a hub id. Another number at the end counts only
    if it is the whole name, or if all names of the line are equal but for it.

    Args:
        source: name of the checkpoint.
        line: names of all checkpoints of its line.

    Raises:
        CheckpointError: neither says a step; the file is damaged, or the name is none that a file could have.

    >>> step_of("run/checkpoint-1000"), step_of("org/model@step512"), step_of("epoch-1-step-500"), step_of("run/7")
    (1000, 512, 500, 7)
    >>> step_of("run/epoch-2", ["run/epoch-2", "run/epoch-3"])
    2
    """
    own = _own(source)
    try:
        path = Path(own).expanduser() / STATE
        has_state = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source[:60]!r}: cannot be the name of a checkpoint ({str(error)[:100]})") from error
    if has_state:
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
    name = _name(own)
    behind = {found[0].lower().startswith("step"): found[1] for found in _STEP.finditer(name)}
    if behind:  # of checkpoint-2-step-500 the 500
        return int(behind.get(True) or behind[False])
    last = _LAST.search(name)
    if last is not None and (last.start() == 0 or (len(line) > 1 and len({_but_last(other) for other in line}) == 1)):
        return int(last[1])
    raise CheckpointError(
        f"{source}: no checkpoint of a line: it has no {STATE}, and its name says no step; name folders like "
        "checkpoint-100, or pass --stages if these are stages of training, one after the other"
    )


def _own(source: str) -> str:
    """Of MODEL+ADAPTER the adapter's name."""
    return source.rpartition("+")[2]


def _name(own: str) -> str:
    """The last part of a path, or of a revision."""
    return Path(own.rpartition("@")[2]).name


def _but_last(source: str) -> str:
    """A name without the number at its end."""
    return _LAST.sub("", str(Path(_own(source))))


def in_order(sources: Sequence[str]) -> list[tuple[int, str]]:
    """Checkpoints of one training with their steps, the earliest first.

    Args:
        sources: names of the checkpoints.

    Raises:
        CheckpointError: two are of one step, or one says no step.

    >>> in_order(["run/checkpoint-1000", "run/checkpoint-200"])
    [(200, 'run/checkpoint-200'), (1000, 'run/checkpoint-1000')]
    """
    line = sorted((step_of(source, sources), source) for source in sources)
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
