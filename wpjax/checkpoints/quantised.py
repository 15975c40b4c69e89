"""Quantised checkpoints of transformers: what they are called, and how transformers makes plain ones of them.

They are refused. Which of the methods transformers can undo, and how, is data here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

LOADED_PLAIN: Mapping[str, str] = MappingProxyType(
    {
        "compressed-tensors": "CompressedTensorsConfig",
        "fp8": "FineGrainedFP8Config",
        "mxfp8": "FineGrainedFP8Config",
        "mxfp4": "Mxfp4Config",
        "metal": "MetalConfig",
    }
)
"""`quant_method` -> the configuration class of transformers that dequantises the weights as they are loaded."""

UNDONE_AFTERWARDS = frozenset({"bitsandbytes", "higgs"})
"""`quant_method` of models that have a method `dequantize` in transformers."""

_PACKAGES = {name: name for name in ("bitsandbytes", "compressed-tensors")}
_TENSORS = {
    ".qweight": "gptq or awq",
    ".weight_packed": "compressed-tensors",
    ".absmax": "bitsandbytes (4 bits)",
    ".SCB": "bitsandbytes (8 bits)",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "compressed-tensors or fbgemm_fp8",
    "_blocks": "mxfp4",
}  # what only such files hold, by the ending of its name


def how_to_dequantise(config: Any) -> str:
    """In words and code, by what a model is quantised, and what makes a plain one of it.

    Args:
        config: `quantization_config` of its config.json.

    >>> how_to_dequantise({"quant_method": "gptq"})[:44]
    'the weights are quantised by gptq, which tra'
    >>> how_to_dequantise({"load_in_4bit": True}).split("; ")[0]
    'the weights are quantised by bitsandbytes (4 bits)'
    """
    entries = config if isinstance(config, Mapping) else {}
    method, bits = entries.get("quant_method"), ""
    for n in (4, 8):
        if entries.get(f"load_in_{n}bit"):
            method, bits = "bitsandbytes", f" ({n} bits)"
    return _undone(method if isinstance(method, str) else "", bits)


def quantised_tensors(names: Iterable[str]) -> str:
    """As `how_to_dequantise`, by the names of tensors, of a model whose config.json does not say it; empty if none is.

    Args:
        names: of tensors that no plain model has.

    >>> quantised_tensors(["model.layers.0.self_attn.q_proj.bias"])
    ''
    """
    found = next(((name, what) for name in names for ending, what in _TENSORS.items() if name.endswith(ending)), None)
    if found is None:
        return ""
    method, _, bits = found[1].partition(" (")
    return f"tensor {found[0]}: {_undone(method, f' ({bits}' if bits else '')}"


def _undone(method: str, bits: str) -> str:
    says = f"the weights are quantised{f' by {method}{bits}' if method else ''}"
    load = "AutoModelForCausalLM.from_pretrained(FOLDER"
    if method in UNDONE_AFTERWARDS:
        code = f"{load}).dequantize().save_pretrained(NEW_FOLDER)"
    elif method in LOADED_PLAIN:
        code = f"{load}, quantization_config={LOADED_PLAIN[method]}(dequantize=True)).save_pretrained(NEW_FOLDER)"
    else:
        return f"{says}, which transformers cannot undo; name the model that it was made from"
    needs = f" and {_PACKAGES[method]}" if method in _PACKAGES else ""
    return f"{says}; dequantise them first, with transformers{needs}: {code}"
