"""Opens any result file."""

from __future__ import annotations

import contextlib
from pathlib import Path

from wpjax.errors import OtherResult
from wpjax.results.curves import Curves
from wpjax.results.history import History
from wpjax.results.sweep_result import SweepResult


def open_result(path: str | Path) -> SweepResult | Curves | History:
    """The result in a file: of a sweep, of a validation, or of a sweep of several experts.

    Raises:
        WpjaxError: there is no such file, it is no result, or it is damaged.
    """
    for kind in (SweepResult, History):
        with contextlib.suppress(OtherResult):
            return kind.from_netcdf(path)
    return Curves.from_netcdf(path)
