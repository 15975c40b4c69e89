"""Which weights of a fine-tuned model carry its new behaviour? Weight patching in JAX.

`__init__.pyi` lists the public names. The module of a name is imported when the name is first used, so `import wpjax`
alone is quick: it imports neither JAX nor NumPy.
"""

from wpjax.runtime import early

if early.is_command():
    early.listen()

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
