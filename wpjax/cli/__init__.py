"""The command line. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

# Nothing slow is imported here, so that Ctrl-C is heard from the first moment on (`main`).
from wpjax.runtime import early, interrupts

if TYPE_CHECKING:
    import typer

HELP = {"help_option_names": ["-h", "--help"]}
"""Options that show the help, of the program and of every command."""

COMMANDS = (
    "demo", "inspect", "anchor", "sweep", "collect", "show", "report", "validate", "relax", "extract", "interference",
    "circuit", "trace", "edit", "layers", "compare", "export", "apply", "remove", "encode", "scores", "merge",
    "finetune",
)  # fmt: skip
"""Names of the commands, each a module of this package, in the order of the help."""

PIPE_CLOSED = 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
"""Exit code when nobody reads the output any more, as in `wpjax inspect MODEL | head -1`; other tools have it too."""


def make_app() -> typer.Typer:
    """The command line: one command a module of this package. Its help lists the methods registered so far."""
    import typer

    from wpjax.cli.options import with_options

    app = typer.Typer(
        name="wpjax",
        help="Which weights of a fine-tuned model carry its new behaviour?",
        epilog="Start with: wpjax demo",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings=HELP,
    )

    def root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
        if version:
            import wpjax

            print(f"wpjax {wpjax.__version__}")
            raise typer.Exit

    app.callback(invoke_without_command=True)(root)
    for name in COMMANDS:
        command = importlib.import_module(f"wpjax.cli.{name}")
        options = {"epilog": command.EXAMPLE, "name": name, "context_settings": HELP}
        app.command(help=command.run.__doc__, **options)(with_options(command.run))
    return app


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 2 bad input, 130 interrupted (143 terminated), 141 nobody reads the output, 1 a bug.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch: nothing here needs it
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that the terminal's encoding lacks are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    early.stop_listening()  # what is restored when the command is over
    with interrupts.listening(_say_what_is_left), _tolerant("stdout") as printed, _tolerant("stderr"):
        try:
            code = _run()
        except KeyboardInterrupt:  # where Typer does not catch it
            code = interrupts.exit_code()
        if code == 128 + signal.SIGINT or interrupts.came():
            _say_what_is_left()
            _leave_at_once(interrupts.exit_code())
        failure = printed.failure()
        if isinstance(failure, BrokenPipeError):
            code = code or PIPE_CLOSED
        elif failure is not None:
            written = ", ".join(interrupts.written())
            also = f"; written and whole: {written}" if written else ""
            code = _print_error(f"the output cannot be printed ({failure.strerror or failure}){also}")
    if interrupts.ends_abruptly():
        _leave_at_once(code)
    sys.exit(code)


def _run() -> int:
    """Run the command that the arguments name; its exit code."""
    from typer.exceptions import TyperException

    from wpjax.cli.compiled import keep_programs
    from wpjax.errors import WpjaxError

    keep_programs()
    app = make_app()
    interrupts.check()
    try:
        return app(prog_name="wpjax", standalone_mode=False) or 0
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except WpjaxError as error:
        return _print_error(str(error))
    except TyperException as error:  # an option that does not exist, a value that does not parse
        if not error.format_message():  # no command was given, and the help has been shown
            return 2
        return _print_error(f"{error.format_message().replace('Value error, ', '').rstrip('.')}. See --help.")
    except (MemoryError, RuntimeError) as error:  # JAX's errors are RuntimeErrors
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            less = "ask for less at once: fewer prompts, a smaller batch, a lower --memory-mb"
            return _print_error(f"out of memory ({error}); {less}")
        raise


def _print_error(message: str) -> int:
    """Print an error as one line; returns the exit code of bad input."""
    line = " ".join(message.split())
    # A message may quote a file, say the name of a tensor: control characters in it must not reach the terminal.
    print("error: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
    return 2


def _say_what_is_left() -> None:
    """Print what an interrupted command has left, and how to go on."""
    with contextlib.suppress(Exception):  # said from another thread while the main one is busy: it may not fail
        print(interrupts.account(), file=sys.stderr, flush=True)


def _leave_at_once(code: int) -> NoReturn:
    """Exit without tearing the interpreter down, which crashes if XLA was cut off in the middle of a program."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
            stream.flush()
    os._exit(code)


class _Tolerant:
    """A text stream that drops what it is given once it cannot be written to, so that work goes on without it."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def failure(self) -> OSError | None:
        """What went wrong, after all that was printed has been passed on; None if nothing did."""
        self.flush()
        return self._failure

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._failure is None:
            try:
                action()
            except OSError as error:
                self._failure = error


@contextlib.contextmanager
def _tolerant(name: str) -> Iterator[_Tolerant]:
    """Put a `_Tolerant` in the place of `sys.stdout` or `sys.stderr`."""
    stream = getattr(sys, name)
    if stream is None:  # closed from the start: print drops everything anyway
        yield _Tolerant(io.StringIO())
        return
    tolerant = _Tolerant(stream)
    setattr(sys, name, tolerant)
    try:
        yield tolerant
    finally:
        setattr(sys, name, stream)
        if tolerant.failure() is not None:
            # Python passes on what is left in its buffer as it exits, and that would fail too: give it a place to go.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
