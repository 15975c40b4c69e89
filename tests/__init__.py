"""Tests; and the run-time type checker they run under, to which an int is a float, as to a static one."""

from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checked: dict[tuple[Any, ...], Any] = {}


def typechecked(fn):
    """`fn`, which checks its arguments.

    jaxtyping hands in functions that it writes from a signature and that do nothing else. One that is defined within
    another comes anew with every call of that other: the checks of its signature are made once.
    """
    if "<locals>" not in fn.__qualname__ or fn.__name__ == "__init__":
        return _check(fn)
    key = fn.__module__, fn.__qualname__, fn.__code__, tuple(fn.__annotations__.items())
    try:
        if key not in _checked:
            _checked[key] = _check(fn)
    except TypeError:  # an annotation that cannot be looked up
        return _check(fn)
    return _checked[key]
