"""The newest state of long iterative work, saved by orbax, so that work that was killed goes on where it stopped.

A state is any pytree of arrays. It is written in the background, under a name of its own until it is whole: after
`kill -9` or on a full disk the one before it is still there. Who may use the folder, and for which work, is for the
caller to check.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wpjax.errors import OutputError
from wpjax.runtime import interrupts


class States:
    """The states of one piece of work in a folder; the newest that is whole is kept.

    Use `open_states`.

    Args:
        folder: the folder; it is made if there is none.
        kept: what an interrupted command says of it.

    Attributes:
        newest: number of the step of the newest state; None if there is none.
    """

    def __init__(self, folder: Path, kept: str):
        import orbax.checkpoint as ocp  # slow to import, and who only asks what was saved does not need it

        self.folder, self._kept = folder, kept
        self._manager = ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1))
        self.newest: int | None = self._manager.latest_step()
        if self.newest:
            interrupts.leave(folder, kept)

    def restore(self, like: Any) -> Any:
        """The newest state, a tree like another one.

        Raises:
            OutputError: it is damaged.
        """
        import jax
        import orbax.checkpoint as ocp

        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            return self._manager.restore(self.newest, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # whatever orbax raises on a folder that is not whole
            raise OutputError(f"{self.folder}: damaged ({_brief(error)}); delete it, and start again") from error

    def save(self, step: int, tree: Any) -> None:
        """Begin to write a state. A disk that refuses it shows at the next one, or at the end.

        Raises:
            OutputError: a state cannot be written.
        """
        import jax
        import numpy as np
        import orbax.checkpoint as ocp

        with self._in_words():
            # As NumPy's, which orbax copies: JAX's may be donated to the next step while they are being written.
            self._manager.save(step, args=ocp.args.StandardSave(jax.tree.map(np.asarray, tree)))
        interrupts.leave(self.folder, self._kept)

    def close(self) -> None:
        """Wait for a state that is being written."""
        with self._in_words(), interrupts.undisturbed():
            self._manager.close()

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        """Say in one line why a state cannot be written."""
        try:
            yield
        except Exception as error:  # orbax raises what its background threads raised
            earlier = max((int(path.name) for path in saved_states(self.folder)), default=0)
            kept = f"that of step {earlier} is kept: make room, and go on with --resume" if earlier else "make room"
            raise OutputError(f"{self.folder}: a checkpoint cannot be written ({_brief(error)}); {kept}") from error


@contextlib.contextmanager
def open_states(folder: Path, kept: str) -> Iterator[States]:
    """The states in a folder, for the time of the work; arguments as of `States`.

    Raises:
        OutputError: a state cannot be written.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> folder = Path(tempfile.mkdtemp()) / "states"
    >>> for _ in range(3):  # as if the work were killed twice
    ...     with open_states(folder, "kept") as states:
    ...         at = states.newest or 0
    ...         tree = states.restore({"n": jnp.zeros(())}) if at else {"n": jnp.zeros(())}
    ...         states.save(at + 1, {"n": tree["n"] + 1})
    >>> at + 1, float(tree["n"] + 1)
    (3, 3.0)
    """
    # Errors come as exceptions. What orbax and its threads print of them beside that is hundreds of lines.
    shown = sys.unraisablehook
    sys.unraisablehook = lambda seen: None if str(seen.exc_value) == "Event loop is closed" else shown(seen)
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    states = States(folder, kept)
    try:
        yield states
    except BaseException:
        with contextlib.suppress(OutputError):  # the first error says more
            states.close()
        raise
    else:
        states.close()
    finally:
        sys.unraisablehook = shown
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def saved_states(folder: Path) -> list[Path]:
    """The states in a folder that are whole, one folder each."""
    return [path for path in folder.glob("*") if path.name.isdigit()]


def _brief(error: Exception) -> str:
    """An error in some words, on one line."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    for known in ("No space left on device", "File too large", "Disk quota exceeded"):
        if known in reason:
            return known
    return reason if len(reason) <= 200 else reason[:200] + "..."
