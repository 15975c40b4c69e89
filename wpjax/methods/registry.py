"""The registry of methods. An entry says what a method does, what it needs and which columns it makes.

`sweep` runs the entry. The result file, the report and the command line read the same entries, so a new method is one
file with one call of `register`. Nothing here imports JAX, so that the command line's help is quick. A step that stands
in a heavy module is named here, and imported when it runs (`lazily`).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from wpjax.columns import Column, add_columns
from wpjax.errors import WpjaxError

DEFAULT_METHOD = "screen+exact"
"""The method of a sweep that names none, in Python and on the command line."""


def lazily(module: str, name: str) -> Callable[..., Any]:
    """A stand-in for a function whose module is imported when the function is called.

    Args:
        module: full name of the module.
        name: name of the function.

    >>> from wpjax.methods import lazily
    >>> lazily("math", "sqrt")(9)
    3.0
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    call.__qualname__ = call.__name__ = name
    call.__module__ = module
    return call


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate of the effects of all components at once, from a few passes over the prompts. It makes one column.

    Attributes:
        column: column of the result that it makes.
        compute: function of (cfg, base, expert, components, metric) that returns [C, B], the expected change of the
            metric by each component on each prompt.
    """

    column: Column
    compute: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to measure what components do.

    Attributes:
        name: name that users give to `sweep(method=...)` and `--method`.
        help: what the method does, as the rest of a sentence that begins with its name: "replaces every component".
        run: step that does it: a function from an `estimators.job.SweepJob` to an `estimators.job.MethodOutput`.
        estimates: estimates that the step makes first. They choose which components are replaced, if any are.
        cells: names of the cells of the 2x2 in which components are replaced (`engines.engine.CELLS`), the main one
            first.
        columns: columns that the method makes, without those of its estimates.
        can_follow: whether it can replace the components that another sweep chose (`sweep(like=...)`).
        needs_fixed_words: whether every model must be read along the same words. Then the method cannot measure the
            on-policy score.
        marks: names of attributes that the method adds to the result, and that the command line prints beside the
            ranking. Values are numbers, or mappings, which are stored as JSON.
        note: function from the result to a line that the command line prints below the ranking; None for no line.
    """

    name: str
    help: str
    run: Callable[[Any], Any]
    estimates: tuple[Estimate, ...] = ()
    cells: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()
    needs_fixed_words: bool = True
    can_follow: bool = True
    marks: tuple[str, ...] = ()
    note: Callable[[Any], str] | None = None


_methods: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method. From now on `sweep` takes its name, and components can be ranked by its columns.

    Returns:
        the method.

    Raises:
        ValueError: there is a different method, or a different column, of the same name.
    """
    if _methods.get(method.name, method) != method:
        raise ValueError(f"there is another method {method.name!r} already; choose another name")
    add_columns((*(estimate.column for estimate in method.estimates), *method.columns))
    return _methods.setdefault(method.name, method)


def methods() -> tuple[Method, ...]:
    """All methods, in the order in which they were registered."""
    return tuple(_methods.values())


def find_method(name: str) -> Method | None:
    """The method of a name; None if it is not registered. A result file may come from a method that is unknown here."""
    return _methods.get(name)


def check_method(name: str, has_fixed_words: bool = True) -> Method:
    """The method of a name, if it can measure what is to be measured.

    Args:
        name: name of the method.
        has_fixed_words: whether the measure reads every model along the same words.

    Raises:
        WpjaxError: there is no such method, or it needs fixed words and there are none. The message lists the methods
            that can be used.

    >>> from wpjax.methods import check_method
    >>> check_method("exact").cells
    ('exact',)
    """
    if name not in _methods:
        raise WpjaxError(f"unknown method {name!r}; methods: {', '.join(_methods)}")
    method = _methods[name]
    if method.needs_fixed_words and not has_fixed_words:
        usable = ", ".join(other.name for other in methods() if not other.needs_fixed_words)
        raise WpjaxError(
            f"method {name} needs fixed words, and on-policy they change with every patch; take one of {usable}"
        )
    return method


def methods_help() -> str:
    """The help of `--method`: every method with its help."""
    return "; ".join(f"{method.name} {method.help}" for method in methods()) + "."
