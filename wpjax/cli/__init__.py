"""The command line. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from wpjax.cli import anchor, compare, demo, export, finetune, inspect, report, show, sweep, validate
from wpjax.cli.compiled import keep_programs
from wpjax.cli.options import with_options
from wpjax.errors import WpjaxError

HELP = {"help_option_names": ["-h", "--help"]}
"""Options that show the help, of the program and of every command."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


def make_app() -> typer.Typer:
    """The command line: one command a module of this package. Its help lists the methods registered so far."""
    app = typer.Typer(
        name="wpjax",
        help="Which weights of a fine-tuned model carry its new behaviour?",
        epilog="Start with: wpjax demo",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings=HELP,
    )
    app.callback(invoke_without_command=True)(_root)
    for command in (demo, inspect, anchor, sweep, show, report, validate, compare, export, finetune):
        name, run = command.__name__.rpartition(".")[2], with_options(command.run)
        app.command(help=command.run.__doc__, epilog=command.EXAMPLE, name=name, context_settings=HELP)(run)
    return app


def _root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        import wpjax

        print(f"wpjax {wpjax.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 bad input, 130 interrupted, 1 a bug."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that the terminal's encoding lacks are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    keep_programs()
    try:
        code = make_app()(prog_name="wpjax", standalone_mode=False)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:  # the command has already said what was kept
            _leave_at_once()
        raise
    except WpjaxError as error:
        _fail(str(error))
    except TyperException as error:  # an option that does not exist, a value that does not parse
        if not error.format_message():  # no command was given, and the help has been shown
            sys.exit(2)
        _fail(f"{error.format_message().replace('Value error, ', '').rstrip('.')}. See --help.")
    except (MemoryError, RuntimeError) as error:  # JAX's errors are RuntimeErrors
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            _fail(f"out of memory ({error}); ask for less at once: fewer prompts, a smaller batch, a lower --memory-mb")
        if "Unable to initialize backend" in str(error):  # JAX_PLATFORMS names a device that is not there
            _fail(str(error))
        raise
    if code == INTERRUPTED:  # Typer's own answer to Ctrl-C, in commands that do not handle it
        print("interrupted; nothing was written", file=sys.stderr)
        _leave_at_once()
    sys.exit(code or 0)


def _fail(message: str) -> NoReturn:
    """Print an error as one line, and exit with code 2."""
    line = " ".join(message.split())
    # A message may quote a file, say the name of a tensor: control characters in it must not reach the terminal.
    print("error: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
    sys.exit(2)


def _leave_at_once() -> NoReturn:
    """Exit without tearing the interpreter down, which crashes if XLA was cut off in the middle of a program."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
            stream.flush()
    os._exit(INTERRUPTED)
