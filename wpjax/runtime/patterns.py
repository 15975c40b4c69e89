"""Patterns for several paths, such as `run/checkpoint-*`, where no shell has expanded them."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from wpjax.errors import WpjaxError


def expanded(names: Sequence[str]) -> tuple[str, ...]:
    """The names of models, with each pattern replaced by the paths that it matches, as a shell would.

    Args:
        names: names of models. One with `*`, `?` or `[` that is no path itself is a pattern.

    Raises:
        WpjaxError: a pattern matches nothing.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for n in (20, 100):
    ...     (folder / f"checkpoint-{n}").mkdir()
    >>> [Path(name).name for name in expanded([f"{folder}/checkpoint-*", "org/model@step3"])]
    ['checkpoint-100', 'checkpoint-20', 'model@step3']
    """
    found: list[str] = []
    for name in names:
        if not is_pattern(name):
            found.append(name)
            continue
        paths = sorted(glob.glob(str(Path(name).expanduser())))  # noqa: PTH207 - the pattern may begin at any folder
        if not paths:
            raise WpjaxError(f"{name}: matches nothing here; look at the path, from the working directory")
        found += paths
    return tuple(found)


def is_pattern(name: str) -> bool:
    """Whether a name is a pattern for several paths, and no path itself.

    >>> is_pattern("run/checkpoint-*"), is_pattern("run/checkpoint-100")
    (True, False)
    """
    try:
        return glob.has_magic(name) and not Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # no name of a path at all
        return False
