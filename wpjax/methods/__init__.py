"""The methods of a sweep, one entry each (see `registry`); every module of this package registers its own.

Modules in here are imported with the command line, so they hold entries only: what is heavy is imported when it runs.
"""

import importlib
import pkgutil

from wpjax.methods import builtin
from wpjax.methods.registry import (
    Estimate,
    Method,
    check_method,
    described,
    find_method,
    lazily,
    methods,
    register,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Estimate",
    "Method",
    "builtin",
    "check_method",
    "described",
    "find_method",
    "lazily",
    "methods",
    "register",
]
