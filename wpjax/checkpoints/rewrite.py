"""A model from another one, tensor by tensor: what is written is a Hugging Face folder, and memory holds one tensor.

The tensors are those of the file, in its own dtype. So whatever stays as it is stays bit for bit, also what the decoder
does not read: other heads, towers for images, buffers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from wpjax.checkpoints.adapter import Adapter, Edits
from wpjax.checkpoints.checkpoint import local_path, model_and_adapter
from wpjax.checkpoints.convert import TensorSource, match_names
from wpjax.checkpoints.folder import ADAPTER, MARKER, check_folder, how_to_merge, read_json
from wpjax.checkpoints.fused_experts import SplitExperts
from wpjax.checkpoints.gguf import GgufFile
from wpjax.checkpoints.hf_config import parse_config
from wpjax.checkpoints.text_tower import TextTower, text_config
from wpjax.checkpoints.weights import SHARD_BYTES, WeightsWriter
from wpjax.errors import CheckpointError, OutputError
from wpjax.models.config import ModelConfig
from wpjax.models.families import FAMILIES
from wpjax.runtime.files import atomic_output, check_output

Change = Callable[[str, np.ndarray], np.ndarray]
"""From the full HF name of a tensor, and the tensor as it is stored, to what takes its place."""

# Files of a folder that belong to the model, and are copied as they are: no weights, no code, nothing about training.
_OF_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
)
_COPIED = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model in its files: configuration and names are known, and tensors are read one at a time.

    Attributes:
        source: where it is, as the user wrote it.
        cfg: the architecture; of a model of images and text, that of the text tower.
        hf_config: the content of its config.json.
        path: its folder or `.gguf` file; of an adapter, that of its base.
        names: full HF name of every tensor of the decoder -> its name in the files. The two differ if the files leave
            out the family's prefix, or have a tower for images beside the decoder.
        others: names, in the files, of tensors that are no part of the decoder. A second copy of a tied embedding is
            not among them: it is the same tensor.
        tensors: all tensors, by their names in the files.
        gguf: the `.gguf` file; None for a folder.

    >>> model = open_model("tiny:base")
    >>> model.read("model.layers.0.self_attn.o_proj.weight").shape
    (128, 128)
    """

    source: str
    cfg: ModelConfig
    hf_config: Mapping[str, Any]
    path: Path
    names: Mapping[str, str]
    others: tuple[str, ...]
    tensors: TensorSource
    gguf: GgufFile | None = None

    def read(self, name: str) -> np.ndarray:
        """One tensor by its full HF name, in the dtype in which it is stored.

        Raises:
            CheckpointError: the model has no such tensor, or it cannot be read.
        """
        if name not in self.names:
            raise CheckpointError(f"{self.source}: no tensor {name}; a {self.cfg.family} model has other names")
        return self.tensors.read(self.names[name])

    def fingerprint(self) -> str:
        """A hash of all tensors of the decoder as they are stored: name, dtype, shape and bytes (16 hex digits).

        It reads the whole model, one tensor at a time.
        """
        digest = TensorDigest()
        for name in self.names:
            digest.add(name, self.read(name))
        return digest.hexdigest()


class TensorDigest:
    """A hash of tensors that come one after the other (see `StoredModel.fingerprint`)."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=8)

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Take in a tensor under its full HF name."""
        self._digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        self._digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """The hash (16 hex digits)."""
        return self._digest.hexdigest()


class _AdaptedTensors:
    """The tensors of a base with an adapter over it, in the base's dtype: a `TensorSource`."""

    def __init__(self, base: StoredModel, edits: Edits, where: str):
        self.where, self.configuration = where, base.tensors.configuration
        self._base = base.tensors
        self._edits = {base.names[name]: edit for name, edit in edits.edits.items()}

    def names(self) -> list[str]:
        return self._base.names()

    def read(self, name: str) -> np.ndarray:
        tensor = self._base.read(name)
        return self._edits[name](tensor).astype(tensor.dtype) if name in self._edits else tensor


def open_model(source: str | Path, ignore_config: tuple[str, ...] = (), base: StoredModel | None = None) -> StoredModel:
    """Open a model without reading its weights.

    Args:
        source: folder, `.gguf` file, hub id, or an embedded model such as "tiny:base" (see `local_path`); with `base`,
            also a PEFT folder; or "MODEL+ADAPTER" (see `load_checkpoint`).
        ignore_config: attributes of config.json that you know not to matter.
        base: what an adapter is applied to. Sums are rounded to the base's dtype as they are read. Files beside the
            weights are those of the base.

    Raises:
        CheckpointError: it cannot be read, its tensors do not fit its configuration; or it is an adapter, and there is
            no base, or another one, or one that it ties or grows anew.
    """
    source = str(source)
    parts = model_and_adapter(source)
    if parts is not None:
        over = open_model(parts[1], ignore_config, open_model(parts[0], ignore_config, base))
        return dataclasses.replace(over, source=source)
    path = local_path(source)
    if not path.is_dir():
        file = GgufFile(path, ignore_config)
        raw: dict[str, Any] = file.hf_config()
        cfg = parse_config(raw, source, ignore_config)
        names = match_names(cfg, file)
        raw |= {"model_type": cfg.family, "architectures": [FAMILIES[cfg.family].architecture]}
        return StoredModel(source, cfg, raw, path, names, (), file, file)
    check_folder(path)
    if (path / ADAPTER).exists():
        if base is None:
            raise CheckpointError(
                f"{source}: holds an adapter, not a whole model; name its base, too, or {how_to_merge(path)}"
            )
        found = Adapter(path, source).edits(base.cfg, base.source)
        if found.cfg != base.cfg:
            raise CheckpointError(
                f"{source}: the adapter changes the size or the tying of embeddings, not only weights; "
                f"{how_to_merge(path)}"
            )
        return dataclasses.replace(base, source=source, tensors=_AdaptedTensors(base, found, source))
    where = str(path / MARKER)
    raw = read_json(path / MARKER)
    text = text_config(raw, where)
    cfg = parse_config(raw if text is None else text, where, ignore_config)
    tensors = SplitExperts(path, cfg)
    if text is None:
        names = match_names(cfg, tensors)
        raw.setdefault("model_type", cfg.family)
        if not raw.get("architectures"):
            raw["architectures"] = [FAMILIES[cfg.family].architecture]
    else:
        tower = TextTower(tensors)
        names = {name: tower.stored_name(own) for name, own in match_names(cfg, tower).items()}
    copies = {"lm_head.weight", "language_model.lm_head.weight"} if cfg.tied else set()
    others = tuple(name for name in tensors.names() if name not in {*names.values(), *copies})
    return StoredModel(source, cfg, raw, path, names, others, tensors)


def rewrite_folder(
    source: StoredModel | str | Path,
    out: str | Path,
    change: Change,
    *,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model as an HF folder, with its tensors changed one by one.

    config.json, generation config, tokenizer and licence are those of the source. Tensors that are no part of the
    decoder are copied. A tied embedding is one tensor, even if the source holds it twice, and is written once.

    Args:
        source: the model, or where it is (see `open_model`).
        out: the folder to write. It appears whole or not at all.
        change: called for each tensor of the decoder, in the order of its configuration, with the full HF name (that
            with the family's prefix) and the value as stored; of a `.gguf` file, float32. It returns what is written;
            its dtype is cast to the one that is stored.
        files: more text files by name, say README.md. They are looked up after the last tensor, so that they may tell
            what `change` found.
        overwrite: whether to replace a model folder that is there.
        dtype: dtype of the decoder's tensors, "float32", "float16" or "bfloat16"; None for that of the source.
        tokenizer: the folder whose tokenizer is copied; None for that of the source.
        max_shard_bytes: size of a weight file, at most; a single tensor may exceed it.

    Raises:
        CheckpointError: the source cannot be read; or what it became is of another shape, or not finite in the dtype.
        OutputError: the folder exists already, lies inside the source, or cannot be written.

    The embedded base with another final norm:

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "doubled"
    >>> rewrite_folder("tiny:base", out, lambda name, w: 2 * w if name == "model.norm.weight" else w)
    >>> sorted(path.name for path in out.iterdir())[1:3]
    ['config.json', 'model.safetensors']
    """
    model = source if isinstance(source, StoredModel) else open_model(source)
    out = Path(out)
    check_rewrite(out, overwrite, model)
    config = dict(model.hf_config)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    elif not model.path.is_dir():
        config["dtype"] = "float32"
    with atomic_output(out, overwrite, MARKER) as folder:
        folder.mkdir()
        with WeightsWriter(folder, [*model.names.values(), *model.others], max_shard_bytes) as weights:
            for name, stored in model.names.items():
                weights.add(stored, _changed(model, name, change, dtype))
            for stored in model.others:
                weights.add(stored, model.tensors.read(stored))
        (folder / MARKER).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _copy_files(model, folder, tokenizer)
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def check_rewrite(out: Path, overwrite: bool, *inputs: StoredModel) -> None:
    """Refuse a folder that cannot be written to, or that lies inside a model that is read, before any work is done.

    Raises:
        OutputError: it is one of these.
    """
    check_output(out, overwrite, MARKER, inputs=[model.path for model in inputs])
    for model in inputs:
        if model.path.is_dir() and model.path.resolve() in out.resolve().parents:
            raise OutputError(f"{out} lies inside the model {model.source}, which is read; choose a place outside it")


def _changed(model: StoredModel, name: str, change: Change, dtype: str | None) -> np.ndarray:
    """One tensor as it is to be written.

    Raises:
        CheckpointError: it is of another shape, or not finite.
    """
    old = model.read(name)
    new = change(name, old)
    if new.shape != old.shape:
        raise CheckpointError(f"{model.source}: tensor {name} of shape {old.shape} would become one of {new.shape}")
    to = old.dtype if dtype is None else jnp.dtype(dtype)
    with np.errstate(over="ignore"):
        cast = new.astype(to, copy=False)
    if cast is not old and not np.isfinite(cast).all():
        raise CheckpointError(
            f"{model.source}: tensor {name} would hold NaN or infinity as {to.name}; change the weights by less, or "
            "store them as float32 or bfloat16"
        )
    return cast


def _copy_files(model: StoredModel, folder: Path, tokenizer: Path | None) -> None:
    """Copy what belongs to the model beside its weights; of a `.gguf` file, write its tokenizer."""
    places: list[tuple[Path, tuple[str, ...]]] = [(model.path, _COPIED)] if model.path.is_dir() else []
    if tokenizer is not None:
        places.append((tokenizer, _OF_TOKENIZER))
    elif model.path.parent == (tiny := local_path("tiny:base")).parent:  # which share the tokenizer of the base
        places += [(tiny, _OF_TOKENIZER), (model.path, _OF_TOKENIZER)]
    elif model.path.is_dir():
        places.append((model.path, _OF_TOKENIZER))
    else:
        assert model.gguf is not None
        model.gguf.tokenizer().save_pretrained(str(folder))
    found = {path.name: path for place, patterns in places for pattern in patterns for path in place.glob(pattern)}
    for name, path in sorted(found.items()):
        if path.is_file() and not name.endswith((".safetensors", ".bin", ".py")):
            shutil.copyfile(path, folder / name)
