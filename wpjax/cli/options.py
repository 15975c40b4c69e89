"""Makes the options of a command from the types of a function's arguments (see `wpjax.arguments`)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wpjax.arguments import OUTPUT, TOGETHER, Argument, Setting, argument, arguments_of, choices_of
from wpjax.errors import WpjaxError

if TYPE_CHECKING:
    from wpjax.runtime.processes import Member

Json = Annotated[bool, Setting("Print JSON instead of tables.", option="--json", panel=OUTPUT)]


@dataclasses.dataclass(frozen=True)
class Processes:
    """The options of a command that several processes may run together; it has this as one argument."""

    coordinator: Annotated[
        str | None,
        Setting(
            "HOST:PORT of process 0, where several processes do the work together. Without it: as JAX finds out, on "
            "TPU pod slices, under Slurm (srun) and Open MPI, and in Kubernetes. none: this process is alone.",
            panel=TOGETHER,
        ),
    ] = None
    num_processes: Annotated[int | None, Setting("Number of processes.", least=1, panel=TOGETHER)] = None
    process_id: Annotated[int | None, Setting("Number of this process, from 0.", least=0, panel=TOGETHER)] = None

    @property
    def are_named(self) -> bool:
        """Whether a coordinator is named."""
        return self.coordinator not in (None, "none")

    def joined(self) -> contextlib.AbstractContextManager[Member]:
        """Join the others while the body runs (`runtime.processes.joined`)."""
        from wpjax.runtime.processes import joined

        return joined(self.coordinator, self.num_processes, self.process_id)


PLACEHOLDERS = {int: "N", float: "X", Path: "PATH"}
"""What stands for the value of an option in `--help`: short, so that the names of the options have room."""


def with_options(run: Callable[..., None]) -> Callable[..., None]:
    """A function as a command that Typer understands, with an option for every argument.

    - An argument whose type holds a `Setting` becomes an option.
    - An argument that is a dataclass of such fields, say `SweepConfig`, becomes one option for each field. The function
      gets the dataclass, made from the options.
    - Other arguments are left to Typer.

    Args:
        run: the function.
    """
    hints = typing.get_type_hints(run, include_extras=True)
    single: dict[str, Argument] = {}
    configs: dict[str, tuple[type, tuple[Argument, ...]]] = {}  # the dataclass and its fields
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(run).parameters.items():
        hint, default = hints[name], parameter.default
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            configs[name] = hint, arguments_of(hint)
            parameters += [_option(arg) for arg in configs[name][1]]
        elif any(isinstance(extra, Setting) for extra in typing.get_args(hint)[1:]):
            single[name] = argument(name, hint, dataclasses.MISSING if default is inspect.Parameter.empty else default)
            parameters.append(_option(single[name]))
        else:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(run)
    def command(**options: Any) -> None:
        dataclass_values: dict[str, Any] = {}
        for name, (config, args) in configs.items():
            found = {arg.name: _value(arg, options.pop(arg.name)) for arg in args}
            dataclass_values[name] = config(**_with_more(args, found))
        values: Mapping[str, Any] = {n: _value(single[n], v) if n in single else v for n, v in options.items()}
        run(**dataclass_values, **values)

    # Typer reads a command's options from its signature and its annotations.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _with_more(args: tuple[Argument, ...], values: dict[str, Any]) -> dict[str, Any]:
    """The values of arguments, where a repeated option gives its first value to one argument, the others to another.

    Raises:
        WpjaxError: the option is repeated, and values stand without it too: their order is not known.
    """
    for arg in args:
        if not arg.setting.more:
            continue
        (first, *rest), without = values[arg.name], values[arg.setting.more]
        if rest and without:
            raise WpjaxError(
                f"--{arg.name} is repeated, and {without[0]!r} stands without it: write --{arg.name} once, with all "
                f"names behind it (--{arg.name} A B C), or before each of them"
            )
        values[arg.name], values[arg.setting.more] = first, (*rest, *without)
    return values


def _option(arg: Argument) -> inspect.Parameter:
    """An argument as a parameter that Typer makes an option from."""
    setting, default = arg.setting, arg.default
    if setting.is_positional:
        more = Annotated[list[str] | None, typer.Argument(help=setting.text, show_default=False)]
        return inspect.Parameter(arg.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=more)
    name = setting.option or "--" + arg.name.replace("_", "-")
    if arg.type is bool and default is True:
        name += "/--no-" + name.removeprefix("--")
    kind, text = arg.type, setting.text
    if choices := choices_of(arg):
        kind = Literal[choices]
        if not all(str(choice) in text for choice in choices):
            text = f"{text} One of {', '.join(map(str, choices))}."
    elif _is_tuple(arg):
        kind = str if setting.separator else list[str]
        if setting.separator and default:
            default = setting.separator.join(default)
    if setting.more:
        kind = list[str]
    elif kind == list[str]:
        kind, default = list[str] | None, default or None  # None: the option was not given
    elif type(None) in typing.get_args(arg.type):
        kind = kind | None
    plain = next((t for t in (arg.type, *typing.get_args(arg.type)) if t in PLACEHOLDERS), str)
    option = typer.Option(
        name,
        help=text,
        min=setting.least,
        max=setting.most,
        metavar="" if arg.type is bool else PLACEHOLDERS.get(plain, "TEXT"),
        rich_help_panel=setting.panel or None,
    )
    return inspect.Parameter(
        arg.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
        annotation=Annotated[kind, option],
    )


def _value(arg: Argument, option: Any) -> Any:
    """The value of an argument from that of its option: text with separators, or a list, becomes a tuple."""
    if not _is_tuple(arg):
        return option
    if option is None:
        return None if arg.default is None else ()
    return (
        tuple(part.strip() for part in option.split(arg.setting.separator) if part.strip())
        if arg.setting.separator
        else tuple(option)
    )


def _is_tuple(arg: Argument) -> bool:
    """Whether an argument is a tuple, perhaps an optional one."""
    return any(typing.get_origin(kind) is tuple for kind in (arg.type, *typing.get_args(arg.type)))
