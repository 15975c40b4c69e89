"""The merge methods: plain functions on NumPy arrays in float32, one tensor of all models at a time.

Every module here is imported, and registers its methods. With tau_i = theta_i - theta_base, the change that expert i
makes, they all have the form

    merged = f(theta_base, theta_1, ..., theta_N)

The base is an array, or None for a method that needs none. The experts are an iterable, which is read once, so that a
caller who reads them from a disk need not hold all of them. Nothing that is passed in is changed.

Where elements of a change are chosen by size and some are equal, the first count, in the order of the flat array. In
bfloat16 checkpoints many are equal.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
