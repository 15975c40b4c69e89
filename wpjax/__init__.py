"""Which weights of a fine-tuned model carry its new behaviour? Weight patching in JAX.

The public API is the list in `__init__.pyi`; each name is imported when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
