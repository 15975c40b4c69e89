"""Ctrl-C in the first moments of the command `wpjax`, while Python still imports it: one line, not a traceback.

Nothing is on the disk yet, so the process may end at once. Later `runtime.interrupts` listens. Only modules that Python
has loaded anyway, or loads quickly, are imported here.
"""

import os
import signal
import sys


def is_command() -> bool:
    """Whether this process is the command `wpjax`, and not another program that imports the package."""
    name = sys.argv[0].replace("\\", "/").rpartition("/")[2] if getattr(sys, "argv", None) else ""
    return name in ("wpjax", "wpjax.exe") or sys.orig_argv[1:3] == ["-m", "wpjax"]


def listen() -> None:
    """From now on, Ctrl-C ends the process with a line. A process that was told to ignore it goes on to do so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def stop_listening() -> None:
    """Ctrl-C raises `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: object) -> None:
    os.write(2, b"interrupted; nothing was written\n")
    os._exit(128 + number)
