"""The methods of a sweep: one entry each, which says what it does, what it needs and what columns it makes.

`sweep` runs what the entry says. The result file, the report and the command line read the same entries, so a new
method is one file with one call of `register`. Nothing here imports JAX, so that the command line's help is quick; a
run step that lives beside heavy code is named, not imported (`lazily`).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from wpjax.columns import Column, add_columns
from wpjax.errors import WpjaxError


def lazily(module: str, name: str) -> Callable[..., Any]:
    """A function that is imported when it is first called.

    Args:
        module: where it is.
        name: of the function.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    call.__qualname__ = call.__name__ = name
    call.__module__ = module
    return call


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one or two passes over the prompts say of all components; it makes one column.

    Attributes:
        column: what it makes.
        compute: a function of (cfg, base, expert, components, metric) that returns the change of the metric that it
            expects of each component on each prompt, [C, B].
    """

    column: Column
    compute: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to measure what components do.

    Attributes:
        name: what `sweep(method=...)` and `--method` take.
        help: what it does, in words that go on after its name: "replaces every component".
        run: the step that does it: takes a `estimators.job.Job`, returns what it found, a `estimators.job.Found`.
        estimates: that it makes first. If it replaces components, these choose which.
        cells: of the 2x2 that it replaces components in, by name of `engines.engine.CELLS`, the main one first.
        columns: that it makes, besides those of its estimates.
        needs_fixed_words: it reads every model along the same words, so it cannot be used where each says its own.
        marks: attributes of its own in the result, which the command line prints beside the ranking: numbers, or
            mappings, which are stored as JSON.
        note: a function of the result that returns what the command line adds below the ranking; None for nothing.
    """

    name: str
    help: str
    run: Callable[[Any], Any]
    estimates: tuple[Estimate, ...] = ()
    cells: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()
    needs_fixed_words: bool = True
    marks: tuple[str, ...] = ()
    note: Callable[[Any], str] | None = None


_methods: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method: `sweep` takes its name from now on, and its columns can be ranked by.

    Returns:
        the method.

    Raises:
        ValueError: there is another method or column of a name.
    """
    if _methods.get(method.name, method) != method:
        raise ValueError(f"there is another method {method.name!r} already; choose another name")
    add_columns((*(estimate.column for estimate in method.estimates), *method.columns))
    return _methods.setdefault(method.name, method)


def methods() -> tuple[Method, ...]:
    """All methods, in the order in which they were registered."""
    return tuple(_methods.values())


def find_method(name: str) -> Method | None:
    """A method by its name; None for one that is not registered, say of a file that someone else's made."""
    return _methods.get(name)


def check_method(name: str, has_fixed_words: bool = True) -> Method:
    """A method by its name.

    Args:
        name: of it.
        has_fixed_words: whether what is measured reads every model along the same words.

    Raises:
        WpjaxError: there is no such method, or it needs fixed words; with those that there are.
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


def described() -> str:
    """All methods and what they do, in one sentence each."""
    return "; ".join(f"{method.name} {method.help}" for method in methods()) + "."
