"""From what arguments say of themselves to the options of a command."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import typer

from wpjax.arguments import Argument, Setting, argument, arguments_of, choices_of

Json = Annotated[bool, Setting("Print JSON instead of tables.", option="--json")]


def with_options(run: Callable[..., None]) -> Callable[..., None]:
    """A command as Typer takes it: with one option for every argument of a function.

    An argument whose type holds a `Setting` becomes an option; one that is a dataclass of such fields becomes an option
    a field, and the function gets the dataclass made of them; others are left as they are.

    Args:
        run: the function.
    """
    hints = typing.get_type_hints(run, include_extras=True)
    own: dict[str, Argument] = {}
    configs: dict[str, tuple[type, tuple[Argument, ...]]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(run).parameters.items():
        hint, default = hints[name], parameter.default
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            configs[name] = hint, arguments_of(hint)
            parameters += [_option(arg) for arg in configs[name][1]]
        elif any(isinstance(extra, Setting) for extra in typing.get_args(hint)[1:]):
            own[name] = argument(name, hint, dataclasses.MISSING if default is inspect.Parameter.empty else default)
            parameters.append(_option(own[name]))
        else:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(run)
    def command(**given: Any) -> None:
        made: dict[str, Any] = {
            name: config(**{arg.name: _value(arg, given.pop(arg.name)) for arg in args})
            for name, (config, args) in configs.items()
        }
        values: Mapping[str, Any] = {n: _value(own[n], value) if n in own else value for n, value in given.items()}
        run(**made, **values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _option(arg: Argument) -> inspect.Parameter:
    setting, default = arg.setting, arg.default
    name = setting.option or "--" + arg.name.replace("_", "-")
    if arg.type is bool and default is True:
        name += "/--no-" + name.removeprefix("--")
    kind = arg.type
    if choices := choices_of(arg):
        kind = Literal[choices]
    elif _is_tuple(arg):
        kind = str if setting.separator else list[str]
        if setting.separator and default:
            default = setting.separator.join(default)
    if kind == list[str]:
        kind, default = list[str] | None, default or None
    elif type(None) in typing.get_args(arg.type):
        kind = kind | None
    option = typer.Option(name, help=setting.text, min=setting.least, max=setting.most)
    return inspect.Parameter(
        arg.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
        annotation=Annotated[kind, option],
    )


def _value(arg: Argument, given: Any) -> Any:
    """What an option was given, as the argument wants it."""
    if not _is_tuple(arg):
        return given
    if given is None:
        return None if arg.default is None else ()
    return (
        tuple(part.strip() for part in given.split(arg.setting.separator) if part.strip())
        if arg.setting.separator
        else tuple(given)
    )


def _is_tuple(arg: Argument) -> bool:
    return any(typing.get_origin(kind) is tuple for kind in (arg.type, *typing.get_args(arg.type)))
