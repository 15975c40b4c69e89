"""What a command takes from the file of a sweep, unless its options name something else: models, behaviour, checker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from wpjax.arguments import INPUT, Setting

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


def swept_or_given(
    result: SweepResult,
    *,
    base: str | None = None,
    expert: str | None = None,
    behaviour: str | None = None,
    checker: str | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    ignore_config: tuple[str, ...] = (),
) -> Origin:
    """What a result was made from, with the options that were given in place of what its file names."""
    from wpjax.results.origin import Origin

    origin = Origin.of(result.dataset.attrs)
    options = {"base": base, "expert": expert, "behaviour": behaviour, "checker": checker, "dtype": dtype}
    options["tokenizer"] = tokenizer
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if behaviour is not None and not behaviour.endswith(".jsonl"):
        given["checker"] = checker  # a built-in behaviour has its own
    return origin._replace(**given, ignore_config=ignore_config or origin.ignore_config)


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
        if note := pair.mesh_note(mesh):
            progress.note(note)
        return pair
