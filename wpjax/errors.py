"""Errors of bad input. The message is one line: what is wrong, where, and how to mend it.

Everything that the package raises on purpose is a `WpjaxError`. The command line prints the message and exits with
code 2. Any other exception is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class WpjaxError(ValueError):
    """Bad input; the message is one line that also says how to mend it.

    >>> import wpjax as wp
    >>> try:
    ...     wp.load_model("tiny:nothing")
    ... except wp.WpjaxError as error:
    ...     print(error)
    unknown embedded model 'tiny:nothing'; there are tiny:base, tiny:expert, tiny:planted
    """


class CheckpointError(WpjaxError):
    """A model folder or file is missing or damaged, or does not hold what its configuration says."""


class ConfigError(CheckpointError):
    """The decoder does not implement, or does not know, something that a model's configuration asks for."""


class PairError(WpjaxError):
    """Two models are no pair: base and expert need one architecture, one vocabulary and different weights."""


class ComponentError(WpjaxError):
    """A name or a kind of component does not exist in the model, or cannot be swept here."""


class BehaviourError(WpjaxError):
    """Prompts, an instruction or a checker cannot be used."""


class MetricRejected(WpjaxError):
    """The metric does not tell the expert from the base on these prompts; the message gives the figure."""


class AnchorRejected(MetricRejected):
    """The anchor, or the behaviour, fails a test; the message names the test and gives its figure.

    Attributes:
        diagnostics: what the tests of an anchor found at each layer, as far as they came (`LayerDiagnostics`).
    """

    def __init__(self, message: str, diagnostics: Sequence[Any] = ()):
        super().__init__(message)
        self.diagnostics = tuple(diagnostics)


class PatchError(WpjaxError):
    """A patch file is damaged, or does not fit the model or another patch."""


class FactError(WpjaxError):
    """A fact, a file of facts or a text cannot be used, or the model does not know the fact."""


class OutputError(WpjaxError):
    """A file or folder cannot be written, exists already, or belongs to another run."""


class OtherResult(WpjaxError):
    """A result file holds another kind of result than was asked for."""


def nearest(name: str, names: Iterable[str]) -> str:
    """In words, the most similar of some names; empty if none is. For messages about a name that does not exist.

    >>> nearest("wieght", ["weight", "density"])
    ' (did you mean weight?)'
    """
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
