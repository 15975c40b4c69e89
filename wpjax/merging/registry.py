"""The registry of ways to merge. An entry says what a method does, which models it takes and which parameters it has.

A new method is one function on arrays and one call of `register`, in a file of `wpjax/merging/methods/`. The recipe's
reader, the command line's help and the model card take it from there.
"""

from __future__ import annotations

import dataclasses
import keyword
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from wpjax.errors import WpjaxError, nearest


class MergeError(WpjaxError):
    """A recipe asks for what does not exist or cannot work, or models cannot be merged with each other."""


class Parameter(NamedTuple):
    """A parameter of a merge method.

    Attributes:
        name: its name in a recipe.
        help: what it is, as a noun phrase.
        kind: what its values are:

            - "number": may be a list, too, of values from the first layer to the last;
            - "switch": true or false;
            - "word": one of `choices`, or any text if there are none;
            - "tensors": the path of a safetensors file, whose tensors have the names of the weights.
        default: value where the recipe gives none; None if one must be given, except with `may_lack`.
        per_expert: whether each expert has a value of its own.
        least: smallest number.
        most: largest number.
        choices: the words.
        by_tensor: whether values may differ between tensors, by filters or from layer to layer.
        may_lack: whether the method does without a value.
        of_preparation: whether it is for `MergeMethod.prepare`, and not passed to `merge`.
        partial: of tensors, whether the file may lack some: the method then gets None for these.
        ignored: whether it has no effect, and is accepted because recipes of mergekit have it.
    """

    name: str
    help: str
    kind: Literal["number", "switch", "word", "tensors"] = "number"
    default: Any = None
    per_expert: bool = False
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    by_tensor: bool = True
    may_lack: bool = False
    of_preparation: bool = False
    partial: bool = False
    ignored: bool = False

    @property
    def argument(self) -> str:
        """Its name as an argument of the method's function: "lambda" is a keyword, so it is `lambda_`."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name


@dataclasses.dataclass(frozen=True)
class MergeMethod:
    """One way to merge.

    Attributes:
        name: name in a recipe; mergekit's where mergekit has the method.
        help: what it makes, as the rest of a sentence that begins with its name.
        merge: function of (base, experts, **parameters) on arrays of one shape, in float32. `experts` is an iterable
            that is read once. The values of a `per_expert` parameter come as a list. See `methods`.
        parameters: its parameters.
        source: where it comes from.
        base: whether it needs the base ("required"), can use one ("optional"), or merges all models alike ("none").
        n_experts: least and most number of experts (without the base); None for no bound.
        random: whether it draws random numbers; `merge` then takes an argument `rng`.
        check: function of the values, by name of argument, that raises a `MergeError` if they do not go together.
        prepare: what has to be done before the first tensor, if anything: a function of a `plan.Plan` that returns a
            function, which gives from a tensor's name further arguments of `merge`. It raises a `MergeError` if it
            cannot be done. Parameters with `of_preparation` are for it alone.
        in_mergekit: whether mergekit has it under this name.
    """

    name: str
    help: str
    merge: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    source: str
    base: Literal["required", "optional", "none"] = "required"
    n_experts: tuple[int, int | None] = (1, None)
    random: bool = False
    check: Callable[[Mapping[str, Any]], None] | None = None
    prepare: Callable[[Any], Callable[[str], dict[str, Any]]] | None = None
    in_mergekit: bool = False

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of a name; None if there is none."""
        return next((p for p in self.parameters if p.name == name), None)


_methods: dict[str, MergeMethod] = {}


def register(method: MergeMethod) -> MergeMethod:
    """Add a method. From now on recipes can name it.

    Raises:
        ValueError: there is another method of this name.
    """
    if _methods.get(method.name, method) != method:
        raise ValueError(f"there is another merge method {method.name!r} already; choose another name")
    return _methods.setdefault(method.name, method)


def merge_methods() -> tuple[MergeMethod, ...]:
    """All methods, in the order in which they were registered."""
    from wpjax.merging import methods  # noqa: F401  registers them

    return tuple(_methods.values())


def find_merge_method(name: str) -> MergeMethod:
    """The method of a name.

    Raises:
        MergeError: there is none; the message names the nearest.

    >>> find_merge_method("ties").source
    'arXiv:2306.01708'
    """
    known = {method.name: method for method in merge_methods()}
    if name not in known:
        raise MergeError(f"unknown merge_method {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return known[name]
