"""What a command takes from the file of a sweep, unless its options name something else: models, behaviour, checker."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wpjax.arguments import INPUT, MEASURED, IgnoreConfig, Setting, TokenizerOf

if TYPE_CHECKING:
    from wpjax.behaviours import Behaviour
    from wpjax.pairs import Pair
    from wpjax.results.origin import Origin
    from wpjax.results.sweep_result import SweepResult

SweptBase = Annotated[str | None, Setting("The base model, if it is no longer where the sweep found it.", panel=INPUT)]
SweptExpert = Annotated[str | None, Setting("The expert model, likewise.", panel=INPUT)]
SweptBehaviour = Annotated[str | None, Setting("The behaviour, if its file is no longer there.", panel=INPUT)]
SweptChecker = Annotated[
    str | None, Setting("Another checker than the sweep's. One of the form module:function must be named.", panel=INPUT)
]
SweptDtype = Annotated[
    Literal["float32", "bfloat16", "bfloat16x2"] | None,
    Setting("Precision of the weights; that of the sweep if absent.", panel=INPUT),
]


SweepFile = Annotated[Path, typer.Argument(help="A result file from `wpjax sweep`.")]
SweptNewTokens = Annotated[
    int | None, Setting("Longest answer, in tokens; that of the sweep if absent.", least=1, panel=MEASURED)
]


@dataclasses.dataclass(frozen=True)
class Given:
    """The options that stand in place of what the file of a sweep names; a command that takes all of them has this as
    one argument.
    """

    base: SweptBase = None
    expert: SweptExpert = None
    behaviour: SweptBehaviour = None
    checker: SweptChecker = None
    dtype: SweptDtype = None
    tokenizer: TokenizerOf = None
    ignore_config: IgnoreConfig = ()

    @property
    def inputs(self) -> tuple[str | None, ...]:
        """What may be files or folders that are read."""
        return self.base, self.expert, self.behaviour

    @property
    def has_checker(self) -> bool:
        """Whether the checker comes from an option, not from the file."""
        return self.checker is not None


def swept_or_given(result: SweepResult, given: Given | None = None) -> Origin:
    """What a result was made from, with the options that were given in place of what its file names."""
    from wpjax.results.origin import Origin

    origin, given = Origin.of(result.dataset.attrs), given or Given()
    values: dict[str, Any] = {name: value for name, value in vars(given).items() if value is not None}
    if given.behaviour is not None and not given.behaviour.endswith(".jsonl"):
        values["checker"] = given.checker  # a built-in behaviour has its own
    return origin._replace(**values | {"ignore_config": given.ignore_config or origin.ignore_config})


def behaviour_of(path: Path, origin: Origin, is_checker_given: bool) -> Behaviour:
    """The behaviour that a result was swept on, or that the options name.

    Args:
        path: the file of the result, for messages.
        origin: what `swept_or_given` found.
        is_checker_given: whether the checker comes from an option, not from the file.

    Raises:
        BehaviourError: it cannot be loaded. Or the file names a checker that is code: a file that somebody else made
            must not choose what runs here. Or the file was not written by `wpjax sweep`, and has only the name.
    """
    from wpjax import behaviours
    from wpjax.errors import BehaviourError

    name = origin.behaviour
    if origin.checker_is_code and not is_checker_given:
        raise BehaviourError(
            f"{path} names the checker {origin.checker!r}, which is code, and a result file is not trusted to choose "
            f"code: pass --checker {origin.checker} if it is yours"
        )
    if not name.endswith(".jsonl") and name.removeprefix("tiny:") not in behaviours.BUILT_IN:
        raise BehaviourError(
            f"{path} does not say which file its behaviour {name!r} came from; pass --behaviour FILE.jsonl, and "
            "--checker if the answers are to be judged"
        )
    return behaviours.behaviour(name, origin.checker, "none" if origin.split == "none" else "thirds")


def pair_of(origin: Origin, mesh: str | None = None) -> Pair:
    """The pair of models that a result was swept on, or that the options name, on a mesh of devices."""
    from wpjax.cli.console import progress_bars

    with progress_bars() as progress:
        progress("reading the pair", 0, 1)
        from wpjax.pairs import load_pair

        pair = load_pair(origin.base, origin.expert, origin.dtype, origin.ignore_config, origin.tokenizer, mesh)
        if origin.is_divided:
            from wpjax.directions import by_directions

            progress("dividing the change", 0, 1)
            pair = by_directions(pair, origin.rank)
            progress("dividing the change", 1, 1)
        if note := pair.mesh_note(mesh):
            progress.note(note)
        return pair
