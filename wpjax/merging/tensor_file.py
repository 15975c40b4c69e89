"""Files of tensors that merge methods need beside the models: scores, Fisher information, activations, masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from wpjax.errors import nearest
from wpjax.merging.registry import MergeError


class TensorFile:
    """A safetensors file with tensors under the names of weights: scores, Fisher information, activations or masks.

    Args:
        path: the file.

    Raises:
        MergeError: it cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="np") as file:
                self.names = tuple(file.keys())
                self.metadata: dict[str, str] = file.metadata() or {}
                self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in self.names}
        except (SafetensorError, OSError) as error:
            raise MergeError(f"{path}: not readable as safetensors ({error}); name a .safetensors file") from error

    def check(self, shapes: Mapping[str, tuple[int, ...]], transposed: tuple[str, ...] = ()) -> None:
        """Refuse tensors that belong to no weight, or do not broadcast to it.

        Args:
            shapes: HF name of each weight of the model -> its shape.
            transposed: ends of the names of matrices that lie as [in, out]. A vector for such a matrix has one number
                of each input channel, as for other matrices.

        Raises:
            MergeError: names the tensor.
        """
        if not self.names:
            raise MergeError(f"{self.path}: holds no tensors")
        for name, shape in self._shapes.items():
            if name not in shapes:
                raise MergeError(f"{self.path}: {name} is no tensor of the model{nearest(name, shapes)}")
            if len(shape) == 1 and len(shapes[name]) == 2 and name.endswith(transposed):
                shape = (*shape, 1)
            try:
                fits = np.broadcast_shapes(shape, shapes[name]) == shapes[name]
            except ValueError:
                fits = False
            if not fits:
                raise MergeError(
                    f"{self.path}: {name} has shape {shape}, which does not fit the weight's {shapes[name]}"
                )

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """One tensor in float32.

        Raises:
            MergeError: it cannot be read as numbers.
        """
        try:
            with safe_open(self.path, framework="np") as file:
                return np.asarray(file.get_tensor(name), np.float32)
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise MergeError(f"{self.path}: tensor {name} cannot be read as numbers ({error})") from error
