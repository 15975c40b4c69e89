"""`.gguf` files: tensors (dequantised to float32, under HF names), configuration and tokenizer.

A key of the metadata that may change the model and is not known is refused, as an attribute of config.json is.
"""

from wpjax.checkpoints.gguf.file import GgufFile

__all__ = ["GgufFile"]
