"""The command line. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from wpjax.cli import anchor, demo, finetune, inspect, report, sweep
from wpjax.errors import WpjaxError

app = typer.Typer(
    name="wpjax",
    help="Which weights of a fine-tuned model carry its new behaviour?",
    epilog="Start with: wpjax demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (demo, inspect, anchor, sweep, report, finetune):
    app.command(help=command.run.__doc__, epilog=command.EXAMPLE, name=command.__name__.rpartition(".")[2])(command.run)


INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        import wpjax

        print(f"wpjax {wpjax.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line: exit 0 done, 2 bad input, 130 interrupted, 1 a bug."""
    try:
        code = app(standalone_mode=False)
    except WpjaxError as error:
        _fail(str(error))
    except TyperException as error:  # an option that does not exist, a value that does not parse
        _fail(f"{error.format_message()} See --help.")
    if code == INTERRUPTED:
        print("interrupted; nothing was written", file=sys.stderr)
    sys.exit(code or 0)


def _fail(message: str) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
