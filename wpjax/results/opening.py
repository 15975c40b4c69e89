"""Opens any result file."""

from __future__ import annotations

from pathlib import Path

from wpjax.errors import OtherResult
from wpjax.results.curves import Curves
from wpjax.results.sweep_result import SweepResult


def open_result(path: str | Path) -> SweepResult | Curves:
    """The result in a file, whether a sweep or a validation wrote it.

    Raises:
        WpjaxError: there is no such file, it is no result, or it is damaged.
    """
    try:
        return SweepResult.from_netcdf(path)
    except OtherResult:
        return Curves.from_netcdf(path)
