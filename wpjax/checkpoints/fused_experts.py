"""Files that hold a layer's routed experts together, as transformers does in memory, read as one tensor for each.

    ...mlp.experts.gate_up_proj  [E, 2 F, D]   each expert's W_gate, then its W_in, both [out, in]
    ...mlp.experts.down_proj     [E, D, F]     each expert's W_out

transformers writes such files with `save_pretrained(..., save_original_format=False)`; published ones have a tensor for
each expert. What is written here has that form too.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from wpjax.checkpoints.folder import SafetensorsFolder
from wpjax.errors import CheckpointError
from wpjax.models.config import ModelConfig
from wpjax.models.families import FAMILIES

_FUSED = re.compile(r"(.*?)layers\.(\d+)\.mlp\.(experts\.gate_up_proj|experts\.down_proj|gate\.weight)")


class SplitExperts(SafetensorsFolder):
    """The safetensors files of a folder, with one tensor for each routed expert, whichever way they are stored.

    Args:
        folder: the folder.
        cfg: the model.

    Raises:
        CheckpointError: as `SafetensorsFolder`; or a tensor of all experts has not the shape that it should have.
    """

    def __init__(self, folder: Path, cfg: ModelConfig):
        super().__init__(folder)
        family = FAMILIES[cfg.family]
        names = {rule.leaves[0]: rule.hf.removeprefix(family.prefix) for rule in family.tensors}
        self._parts: dict[str, tuple[str, int, slice]] = {}  # name here -> name in the file, expert, rows
        self._renamed: dict[str, str] = {}
        for stored in super().names():
            found = _FUSED.fullmatch(stored)
            if not cfg.n_experts or found is None:
                continue
            prefix, layer, what = found.groups()
            if what == "gate.weight":
                self._renamed[prefix + names["blocks/mlp/W_router"].replace("{l}", layer)] = stored
                continue
            n, d, f = cfg.n_experts, cfg.d_model, cfg.d_expert
            is_down = what.endswith("down_proj")
            shape = (n, d, f) if is_down else (n, 2 * f, d)
            has = super().shape(stored)
            if has != shape:
                raise CheckpointError(
                    f"{self.where}: tensor {stored} has shape {has}, {self.configuration} says {shape}"
                )
            leaves = {"W_out": slice(None)} if is_down else {"W_gate": slice(0, f), "W_in": slice(f, 2 * f)}
            for leaf, rows in leaves.items():
                name = prefix + names[f"blocks/mlp/{leaf}"].replace("{l}", layer)
                self._parts |= {name.replace("{x}", str(x)): (stored, x, rows) for x in range(n)}

    def names(self) -> list[str]:
        """The names of all tensors, those of experts one by one."""
        taken = {*self._renamed.values(), *(stored for stored, _, _ in self._parts.values())}
        return [*(name for name in super().names() if name not in taken), *self._renamed, *self._parts]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        if name not in self._parts:
            return super().shape(self._renamed.get(name, name))
        stored, _, rows = self._parts[name]
        _, n_rows, n_columns = super().shape(stored)
        return len(range(n_rows)[rows]), n_columns

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as its file names it, such as "BF16", without reading it."""
        return super().dtype(self._parts[name][0] if name in self._parts else self._renamed.get(name, name))

    def read(self, name: str) -> np.ndarray:
        """One tensor, as a view of its file; raises as `SafetensorsFolder.read`."""
        if name not in self._parts:
            return super().read(self._renamed.get(name, name))
        stored, expert, rows = self._parts[name]
        return super().read(stored)[expert, rows]
