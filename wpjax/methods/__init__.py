"""The methods of a sweep and the metrics, one entry each (see `registry` and `metrics`).

Every module of this package is imported here, and registers its entries. The command line imports the package to show
its help, so modules hold entries only: heavy code is imported when it runs.
"""

import importlib
import pkgutil

from wpjax.methods import builtin
from wpjax.methods.registry import (
    DEFAULT_METHOD,
    Estimate,
    Method,
    check_method,
    find_method,
    lazily,
    methods,
    methods_help,
    register,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "DEFAULT_METHOD",
    "Estimate",
    "Method",
    "builtin",
    "check_method",
    "find_method",
    "lazily",
    "methods",
    "methods_help",
    "register",
]
