"""A GGUF file as a source of tensors, a configuration and a tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import einops
import numpy as np

from wpjax.checkpoints.gguf.architectures import (
    ARCHITECTURES,
    LLAMA3_FACTORS,
    LONG_FACTORS,
    SHORT_FACTORS,
    family_of,
    hf_config,
)
from wpjax.checkpoints.gguf.metadata import Metadata, open_gguf
from wpjax.checkpoints.gguf.tokenizer import gguf_tokenizer
from wpjax.errors import CheckpointError
from wpjax.models.families import Family

_IN_CONFIG = frozenset({LLAMA3_FACTORS, SHORT_FACTORS, LONG_FACTORS})


class GgufFile:
    """A GGUF file, as a `TensorSource` with a configuration and a tokenizer.

    llama.cpp stores some tensors in another layout, and the norms of Gemma with the 1 that HF adds to them. They are
    returned as HF has them.

    Args:
        path: the file; of a split one, the first part.
        ignore: entries of the metadata that the caller knows not to matter.

    Attributes:
        where: the file, for messages.
        configuration: what says how large its tensors are, for messages.
        metadata: its entries, without those to ignore.
        architecture: llama.cpp's name of its family, a key of `ARCHITECTURES`.
        tensors: the names of all tensors, as llama.cpp writes them.

    Raises:
        CheckpointError: the file is damaged, is no whole model, or holds an architecture or a type of numbers that is
            not supported.
        WpjaxError: the extra `gguf` is not installed.
    """

    configuration = "metadata"

    def __init__(self, path: Path, ignore: tuple[str, ...] = ()):
        self.where = str(path)
        reader = open_gguf(path)
        self.metadata = Metadata(reader, self.where, frozenset(ignore))
        kind = self.metadata.get("general.type")
        if kind not in (None, "model"):
            raise CheckpointError(f"{path}: a GGUF file of type {kind!r}, not a model; name the model's own file")
        self.architecture = str(self.metadata.needed("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: GGUF architecture {self.architecture!r} is not supported; supported: "
                f"{', '.join(ARCHITECTURES)}"
            )
        readers = [reader, *(open_gguf(part) for part in self._other_parts(path))]
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        self.tensors = frozenset(self._tensors)
        if not all(name.isprintable() for name in (*self._tensors, *self.metadata.names())):
            raise CheckpointError(f"{path}: a name in its header is no text; download the file again")
        self._refuse_types()
        templates = _hf_names(self.architecture, family_of(self))
        self._names: dict[str, tuple[str, int | None]] = {}  # HF's name -> name in the file, and number of the expert
        for name, tensor in self._tensors.items():
            if name in _IN_CONFIG:
                continue
            theirs = _hf_name(name, templates)
            n_experts = len(tensor.data) if "{x}" in theirs and tensor.data.size else 0
            self._names |= {theirs.replace("{x}", str(x)): (name, x) for x in range(n_experts)}
            if not n_experts:
                self._names[theirs] = name, None

    def _other_parts(self, first: Path) -> list[Path]:
        """The other parts of a file that was split; empty if it is whole.

        Raises:
            CheckpointError: the file is not the first part, or a part is missing.
        """
        count, number = (self.metadata.get(f"split.{name}") for name in ("count", "no"))
        if not isinstance(count, int) or count < 2:
            return []
        merge = "or merge the parts: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        name = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", first.name, re.IGNORECASE)
        if number != 0 or name is None or int(name[2]) != count:
            raise CheckpointError(
                f"{first}: a part of a model split in {count}; name the first, ...-00001-of-{count:05}.gguf, {merge}"
            )
        parts = [first.with_name(f"{name[1]}-{i:05}-of-{name[2]}{first.suffix}") for i in range(2, count + 1)]
        for i, part in enumerate(parts, start=2):
            if not part.exists():
                raise CheckpointError(
                    f"{first}: part {i} of {count}, {part.name}, is missing; put it beside it, {merge}"
                )
        return parts

    def _refuse_types(self) -> None:
        """Refuse types of numbers that cannot be dequantised, before the tensors are read.

        Raises:
            CheckpointError: there are some.
        """
        import gguf

        examples = {tensor.tensor_type: tensor.name for tensor in self._tensors.values()}
        for kind, name in examples.items():
            try:
                gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{self.where}: tensor {name} is of type {kind.name}, which cannot be dequantised; use a file of "
                    "another quantisation, such as Q8_0, or the safetensors model"
                ) from error

    def names(self) -> list[str]:
        """The HF names of all tensors."""
        return list(self._names)

    def types(self) -> tuple[str, ...]:
        """The types of numbers of its matrices, such as "Q4_K"."""
        return tuple(sorted({tensor.tensor_type.name for tensor in self._tensors.values() if len(tensor.shape) > 1}))

    def read(self, name: str) -> np.ndarray:
        """One tensor by its HF name, dequantised to float32, in HF's layout.

        Raises:
            CheckpointError: it cannot be dequantised, or does not fit the configuration.
        """
        name, expert = self._names[name]
        value = self._dequantised(name, expert)
        entry = ARCHITECTURES[self.architecture]
        pattern = next((p for ending, p in entry.layouts.items() if name.endswith(f".{ending}")), None)
        if pattern is not None:
            named = re.findall(r"\w+", pattern)
            sizes = {axis: size for axis, size in self._axes().items() if axis in named}
            try:
                value = einops.rearrange(value, pattern, **sizes)
            except einops.EinopsError as error:
                raise CheckpointError(
                    f"{self.where}: tensor {name} has shape {value.shape}, which does not fit its numbers of heads; "
                    "the weights do not belong to this metadata"
                ) from error
        offset = family_of(self).fixed.get("norm_offset", 0.0)
        return value - np.float32(offset) if offset and name.endswith("norm.weight") else value

    def vector(self, name: str) -> np.ndarray:
        """A tensor by llama.cpp's name, dequantised to float32."""
        return self._dequantised(name)

    def _dequantised(self, name: str, expert: int | None = None) -> np.ndarray:
        """A tensor; of one that holds all routed experts of a layer, one of them, and no other is dequantised."""
        import gguf

        tensor = self._tensors[name]
        data, shape = tensor.data, tuple(int(n) for n in reversed(tensor.shape))
        try:
            if expert is not None:
                data, shape = data[expert], shape[1:]
            return np.asarray(gguf.dequantize(data, tensor.tensor_type), np.float32).reshape(shape)
        except (NotImplementedError, ValueError, TypeError, IndexError) as error:
            raise CheckpointError(f"{self.where}: tensor {name} cannot be dequantised ({error})") from error

    def _axes(self) -> dict[str, int]:
        """The sizes of the axes that `Architecture.layouts` name and that a tensor does not say."""
        heads = self.metadata.size(f"{self.architecture}.attention.head_count")
        kv_heads = self.metadata.size(f"{self.architecture}.attention.head_count_kv", heads)
        return {"h": heads, "k": kv_heads, "n": 3, "t": 2}

    def hf_config(self) -> dict[str, Any]:
        """The content of the config.json that HF would write for this model.

        Raises:
            CheckpointError: an entry is missing, or has a value that cannot be used.
            ConfigError: an entry is unknown, or asks for something that is not implemented.
        """
        return hf_config(self)

    def tokenizer(self) -> Any:
        """The file's tokenizer with its chat template, as a transformers tokenizer.

        Raises:
            CheckpointError: something that it needs is missing, or cannot be read.
            ConfigError: the file asks for a way to split text that is not known.
        """
        return gguf_tokenizer(self.metadata, self.architecture)


def _hf_names(architecture: str, family: Family) -> dict[str, str]:
    """llama.cpp's name of a tensor, of layer 0 if it belongs to a layer -> HF's name, with "{l}" for the layer.

    One that holds all routed experts of a layer has "{x}" for the number of the expert.
    """
    import gguf

    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    theirs = gguf.get_tensor_name_map(number, 1)
    names = {}
    for rule in family.tensors:
        stem, _, suffix = rule.hf.rpartition(".")
        name = theirs.get_name(stem.replace("{l}", "0").replace(".{x}", ""))
        if name is not None:
            names[f"{name}.{suffix}"] = rule.hf
    return names


def _hf_name(name: str, templates: dict[str, str]) -> str:
    """HF's name of a tensor: "blk.3.attn_q.weight" is "model.layers.3.self_attn.q_proj.weight" in Llama.

    One that HF does not have keeps its name.
    """
    layer = re.match(r"blk\.(\d+)\.", name)
    if layer is None:
        return templates.get(name, name)
    template = templates.get(name.replace(layer[0], "blk.0.", 1))
    return name if template is None else template.replace("{l}", layer[1])
