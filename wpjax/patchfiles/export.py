"""Patches for others: as a PEFT LoRA folder, and as a mask that training can be restricted to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wpjax.checkpoints.convert import tensor_name, tensor_shapes
from wpjax.checkpoints.folder import ADAPTER
from wpjax.checkpoints.rewrite import StoredModel
from wpjax.checkpoints.text_tower import text_config
from wpjax.checkpoints.weights import SafetensorsWriter
from wpjax.errors import PatchError
from wpjax.models.families import FAMILIES
from wpjax.patchfiles.apply import Progress, check_model, vocabulary_tensors
from wpjax.patchfiles.card import model_card
from wpjax.patchfiles.delta import truncated, widened
from wpjax.patchfiles.patch import Patch
from wpjax.patchfiles.slices import owned_slices
from wpjax.patchfiles.stack import OnConflict, Values, check_fits, stack
from wpjax.runtime.cards import public_name
from wpjax.runtime.files import atomic_output, check_output, write_tensors

TOLERANCE = 1e-4
"""Relative error of the change of one matrix. The change of a LoRA expert in float32 is of its rank but for rounding,
which is below this.
"""


class LoraExport(NamedTuple):
    """What a LoRA folder holds.

    Attributes:
        ranks: module -> rank of its change.
        error: |LoRA's change - change| / |change| over all matrices, in the Frobenius norm. All else is exact.
        whole: modules, and biases, that are stored whole.
    """

    ranks: dict[str, int]
    error: float
    whole: tuple[str, ...]


def export_lora(
    model: StoredModel,
    patches: Sequence[Patch],
    out: str | Path,
    *,
    scales: Sequence[float] | float = 1.0,
    on_conflict: OnConflict = "error",
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> LoraExport:
    """Write patches as a LoRA adapter in a PEFT folder, which `peft` loads over the base.

    For rows or columns S of a matrix W, the change is the truncated singular value decomposition of S_after - S_before,
    with zeros elsewhere:

        W' = W + B A        rows: B is 0 but there; columns: A is 0 but there

    A LoRA changes matrices. Norms and embeddings are stored whole (`modules_to_save`), and so are biases.

    Args:
        model: the base, as `open_model` gives it.
        patches: the patches.
        out: the folder to write.
        scales: as for `apply_patches`.
        on_conflict: as for `apply_patches`.
        rank: highest rank of a module; None for the rank that is needed.
        tolerance: relative error of the change of each matrix, in the Frobenius norm; the smallest rank within it is
            taken, but at most `rank`.
        overwrite: whether to replace an adapter that is there.
        progress: called for each tensor.

    Returns:
        ranks and error.

    Raises:
        PatchError: as `apply_patches`; or PEFT cannot hold the patch.
        OutputError: the folder exists already, or cannot be written.
    """
    if (rank is not None and rank < 1) or not 0 <= tolerance < 1:
        raise PatchError(f"rank={rank}, tolerance={tolerance}: give a rank from 1 on, an error from 0 to below 1")
    put = stack(model.cfg, patches, scales, on_conflict)
    if text_config(model.hf_config, model.source) is not None:
        raise PatchError(
            f"{model.source}: PEFT names the modules of a model of images and text otherwise; write a model"
        )
    check_output(Path(out), overwrite, ADAPTER, inputs=[model.path])
    check_model(model, put, progress=progress)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    saved: list[str] = []
    biases: dict[str, np.ndarray] = {}
    wrong = whole = 0.0
    for i, name in enumerate(put.names):
        progress("factorising", i, len(put.names))
        values, (module, parameter) = put.values(name), _module(model, name)
        if _is_matrix(model, name):
            factors, off, size = _factors(model, name, values, rank, tolerance)
            wrong, whole = wrong + off, whole + size
            ranks[module] = len(factors["A"])
            tensors |= {f"base_model.model.{module}.lora_{part}.weight": of for part, of in factors.items()}
        elif parameter == "bias" and _is_matrix(model, f"{name.removesuffix('bias')}weight"):
            biases[module] = _whole(model, name, values)
        elif module not in saved:
            saved.append(module)
            for own in (f"{module}.weight", f"{module}.bias"):
                if own in model.names:
                    of = _whole(model, own, put.values(own)) if own in put.names else model.read(own)
                    tensors[f"base_model.model.{own}"] = of
    for module, bias in biases.items():
        tensors[f"base_model.model.{module}{'.base_layer' if module in ranks else ''}.bias"] = bias
    if not ranks:
        raise PatchError(
            f"{' and '.join(p.where for p in patches)}: no matrix changes, so there is no LoRA; write a model"
        )
    error = math.sqrt(wrong / whole) if whole else 0.0
    about = f"LoRA of rank {min(ranks.values())} to {max(ranks.values())}; relative error of the change {error:.2g}"
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": public_name(model.source),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),  # a scale of 1
        "rank_pattern": {_pattern(module): r for module, r in ranks.items()},
        "alpha_pattern": {_pattern(module): r for module, r in ranks.items()},
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(saved) or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": bool(FAMILIES[model.cfg.family].transposed),
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    with atomic_output(Path(out), overwrite, ADAPTER) as folder:
        folder.mkdir()
        (folder / ADAPTER).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
        card = model_card(model.source, put, about=[about], library="peft")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return LoraExport(ranks, error, (*saved, *(f"{module}.bias" for module in biases)))


def _module(model: StoredModel, name: str) -> tuple[str, str]:
    """The module that a tensor belongs to, as transformers calls it, and which parameter of it the tensor is.

    Raises:
        PatchError: it is an embedding that the model ties.
    """
    module, _, parameter = name.rpartition(".")
    if model.cfg.tied and name in vocabulary_tensors(model.cfg):
        raise PatchError(
            f"{model.source} ties embed and unembed, and PEFT would change one of them alone; leave the component "
            "embed out, or write a model"
        )
    return "lm_head" if module == "embed_out" else module, parameter


def _is_matrix(model: StoredModel, name: str) -> bool:
    """Whether a tensor is the matrix of a linear map, not a table of vectors, a norm or a bias."""
    tables = (tensor_name(model.cfg, "embed/W_E"), "transformer.wpe.weight")
    return name not in tables and len(tensor_shapes(model.cfg).get(name, ())) == 2


def _factors(
    model: StoredModel, name: str, values: Values, rank: int | None, tolerance: float
) -> tuple[dict[str, np.ndarray], float, float]:
    """A and B of one matrix; the squared error of the change, and its squared norm."""
    change = widened(values.after).astype(np.float64) - widened(values.before)
    left, right = truncated(change, rank, tolerance)
    error = float(((left.astype(np.float64) @ right - change) ** 2).sum())
    (n_rows, n_columns), at = tensor_shapes(model.cfg)[name], values.slices
    if at.axis == 0:
        left = at.put(np.zeros((n_rows, left.shape[1]), np.float32), left)
    else:
        right = at.put(np.zeros((len(right), n_columns), np.float32), right)
    a, b = (left.T, right.T) if name.endswith(FAMILIES[model.cfg.family].transposed) else (right, left)
    return {"A": np.ascontiguousarray(a), "B": np.ascontiguousarray(b)}, error, float((change**2).sum())


def _whole(model: StoredModel, name: str, values: Values) -> np.ndarray:
    """A tensor with its slices patched."""
    tensor = model.read(name)
    return values.slices.put(tensor, values.after.astype(tensor.dtype))


def _pattern(module: str) -> str:
    """A module as a key of `rank_pattern`, which is a regular expression."""
    return module.replace(".", r"\.")


def export_mask(model: StoredModel, patches: Sequence[Patch], out: str | Path, *, overwrite: bool = False) -> int:
    """Write which weights the components of patches own, for training that is to change nothing else.

    The file is in safetensors, keyed by HF names. An entry is boolean and broadcasts over its tensor: [rows, 1],
    [1, columns], or [n] for a vector. What is not in the file belongs to no component (docs/patches.md shows how torch
    uses it).

    Args:
        model: the base, as `open_model` gives it.
        patches: the patches.
        out: the file to write.
        overwrite: whether to replace a file that is there.

    Returns:
        the number of tensors in the file.

    Raises:
        PatchError: a patch does not fit the model.
        OutputError: the file exists already, or cannot be written.
    """
    for patch in patches:
        check_fits(patch, model.cfg)
    components = list(dict.fromkeys(name for patch in patches for name in patch.info.components))
    masks: dict[str, Any] = {}
    for name, at in owned_slices(model.cfg, components).items():
        whole = tensor_shapes(model.cfg)[name]
        shape = [1] * len(whole)
        shape[at.axis] = whole[at.axis]
        mask = np.zeros(shape[at.axis], bool)
        mask[at.positions] = True
        masks[name] = mask.reshape(shape)
    about = json.dumps(components)
    with atomic_output(Path(out), overwrite) as path:
        file = SafetensorsWriter(path, list(masks), len(json.dumps(about)) + 100)
        for name, mask in masks.items():
            file.add(name, mask)
        file.end({"format": "pt", "wpjax_mask": about})
    return len(masks)
