"""Patch files: what carries a behaviour, as a file that can be put into a model, taken out, mixed and passed on.

    save_patch, load_patch      a file of slices, before and after
    encode_patch                the same, smaller, to a stated error
    apply_patches               a model with patches in it, or (undo) without them
    remove_patch                an expert without the behaviour
    export_lora, export_mask    the same slices for PEFT, and for training that changes nothing else

(docs/patches.md)
"""

from wpjax.patchfiles.apply import apply_patches, remove_patch
from wpjax.patchfiles.delta import Encoding
from wpjax.patchfiles.export import export_lora, export_mask
from wpjax.patchfiles.patch import Patch, PatchInfo, load_patch
from wpjax.patchfiles.write import encode_patch, save_patch

__all__ = [
    "Encoding",
    "Patch",
    "PatchInfo",
    "apply_patches",
    "encode_patch",
    "export_lora",
    "export_mask",
    "load_patch",
    "remove_patch",
    "save_patch",
]
