"""Loading a model from a hub id, a local HF folder or a `.gguf` file, and saving it as an HF folder.

Only safetensors and GGUF files are read. Pickles are not read, and code from a checkpoint is not run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from wpjax.checkpoints.adapter import Adapter
from wpjax.checkpoints.convert import (
    OTHER_HEADS,
    TensorSource,
    flatten,
    hf_tensors,
    left_out,
    params_from_hf,
    tensor_shapes,
)
from wpjax.checkpoints.folder import (
    ADAPTER,
    MARKER,
    SafetensorsFolder,
    check_file,
    check_folder,
    how_to_merge,
    read_json,
)
from wpjax.checkpoints.fused_experts import SplitExperts
from wpjax.checkpoints.gguf import GgufFile
from wpjax.checkpoints.hf_config import parse_config, with_changes
from wpjax.checkpoints.hub import download
from wpjax.checkpoints.placing import Place, host_pieces
from wpjax.checkpoints.text_tower import TextTower, text_config
from wpjax.checkpoints.tokenizer import load_tokenizer
from wpjax.checkpoints.weights import SHARD_BYTES, WeightsWriter
from wpjax.errors import CheckpointError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.models.families import FAMILIES
from wpjax.runtime.files import atomic_output

EMBEDDED = ("base", "expert", "planted")
"""Names of the tiny models inside the package, which are loaded as "tiny:base" and so on."""

_HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+(@[\w./-]+)?")  # the oldest ids have no organisation: gpt2


@dataclasses.dataclass(frozen=True, repr=False)
class Checkpoint:
    """A model in memory, with all that is needed to save it again.

    Attributes:
        cfg: the architecture.
        params: parameter tree on the default device.
        tokenizer: its transformers tokenizer; None if the source has none.
        hf_config: the content of its config.json.
        generation_config: the content of its generation_config.json; None if the source has none.
        source: where it was loaded from, as the user wrote it.
        left_out: what was not loaded: heads for other tasks than the next token, by name; the parts of a model of
            images and text beside its text tower.
        notes: what else is to be said of it, in words: of an adapter, what it changes.
        stored: types of numbers of the matrices in its files, such as "BF16" or "Q4_K"; of an adapter, those of its
            base.

    >>> import wpjax as wp
    >>> model = wp.load_model("tiny:base")
    >>> model
    Checkpoint('tiny:base', llama of 8 layers)
    >>> model.params["embed"]["W_E"].shape == (model.cfg.d_vocab, model.cfg.d_model)
    True
    """

    cfg: ModelConfig
    params: Params
    tokenizer: Any
    hf_config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    source: str
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {self.cfg.family} of {self.cfg.n_layers} layers)"

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer, gathered from both configurations and the tokenizer."""
        stops: set[int] = set()
        for config in (self.generation_config or {}, self.hf_config):
            ids = config.get("eos_token_id")
            stops.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            stops.add(self.tokenizer.eos_token_id)
        return tuple(sorted(stops))


PRECISIONS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {"float32": ("float32", 1), "bfloat16": ("bfloat16", 1), "bfloat16x2": ("bfloat16", 2)}
)
"""Name of a precision -> dtype of the weights, and number of such numbers that make up an activation where it meets a
weight (`ModelConfig.activation_splits`).
"""


def load_checkpoint(
    source: str | Path,
    dtype: str = "float32",
    ignore_config: tuple[str, ...] = (),
    base: Checkpoint | None = None,
    place: Place | None = None,
) -> Checkpoint:
    """Load a model.

    Args:
        source: a folder with config.json and safetensors, a `.gguf` file (of a split one, the first part), or a hub id
            ("gpt2", "org/name" or "org/name@revision"); with `base`, also a PEFT folder. See `local_path`. Or
            "MODEL+ADAPTER": one of these with a PEFT adapter over it.
        dtype: precision, a key of `PRECISIONS`:

            - "float32";
            - "bfloat16": weights and the operands of their products are bfloat16;
            - "bfloat16x2": weights are bfloat16, and each activation that meets them is the sum of two bfloat16
              numbers. This takes twice the operations of "bfloat16".
        ignore_config: attributes of config.json, or entries of a GGUF file's metadata, that you know not to matter.
        base: the model that this one was trained from. The result shares with it each array whose bytes are equal. A
            whole model does without; an adapter (`checkpoints.adapter`) is applied to it, and has its precision.
        place: where each leaf is to stand: a function from its path, such as "blocks/attn/W_Q", and its shape to a
            `jax.sharding.Sharding`. None for the default device.

    Raises:
        CheckpointError: the model cannot be read, or it is an adapter of another base. The message names the file, the
            tensor or the attribute.

    Save a model to a folder, and load it from there:

    >>> import tempfile
    >>> import wpjax as wp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     wp.save_checkpoint(f"{folder}/model", wp.load_model("tiny:base"))
    ...     model = wp.load_checkpoint(f"{folder}/model")
    >>> model.cfg == wp.load_model("tiny:base").cfg
    True
    """
    source = str(source)
    if dtype not in PRECISIONS:
        raise CheckpointError(f"unknown dtype {dtype!r}; there are {', '.join(PRECISIONS)}")
    parts = model_and_adapter(source)
    if parts is not None:
        under = load_checkpoint(parts[0], dtype, ignore_config, base, place)
        over = load_checkpoint(parts[1], dtype, ignore_config, under, place)
        return dataclasses.replace(over, source=source, tokenizer=over.tokenizer or under.tokenizer)
    path = local_path(source)
    if path.is_dir():
        return _load_folder(path, source, dtype, ignore_config, base, place)
    file = GgufFile(path, ignore_config)
    raw = file.hf_config()
    weights, splits = PRECISIONS[dtype]
    cfg = dataclasses.replace(parse_config(raw, source, ignore_config), activation_splits=splits)
    tokenizer = file.tokenizer()  # before the weights, which take longer
    params = params_from_hf(cfg, file, weights, place, None if base is None else base.params)
    return Checkpoint(cfg, params, tokenizer, raw, None, source, stored=file.types())


def model_and_adapter(source: str) -> tuple[str, str] | None:
    """The two sources in "MODEL+ADAPTER"; None if a source is not written so, or is the name of something there.

    Raises:
        CheckpointError: what stands after the plus is no adapter.

    >>> model_and_adapter("org/name") is None
    True
    """
    if "+" not in source or Path(source).expanduser().exists():
        return None
    model, _, adapter = source.rpartition("+")
    if not model or not (local_path(adapter) / ADAPTER).is_file():
        raise CheckpointError(
            f"{source}: {adapter or 'what stands after the plus'} is no PEFT adapter; name a model alone"
        )
    return model, adapter


def local_path(source: str | Path) -> Path:
    """Where a model lies: its folder or `.gguf` file. A hub id is fetched, or found in the cache.

    Args:
        source: folder, `.gguf` file or hub id; or "tiny:base", "tiny:expert" or "tiny:planted", inside the package.

    Raises:
        CheckpointError: there is no such model.

    >>> local_path("tiny:base").name
    'base'
    """
    source = str(source)
    if source.startswith("tiny:"):
        name = source.removeprefix("tiny:")
        if name not in EMBEDDED:
            raise CheckpointError(
                f"unknown embedded model {source!r}; there are {', '.join(f'tiny:{n}' for n in EMBEDDED)}"
            )
        return Path(str(resources.files("wpjax") / "assets" / "tiny" / name))
    try:
        path = Path(source).expanduser()
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a user that does not exist
        raise CheckpointError(f"{source}: cannot be a folder or a file ({error}); correct the name") from error
    if is_folder:
        return path
    if is_there:
        check_file(path)
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{source}: a model is a folder, a .gguf file or a hub id; name the folder")
        return path
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"{source}: no such folder or .gguf file, and not a hub id like gpt2 or org/name")
    return download(source)


def _load_folder(
    folder: Path,
    source: str,
    dtype: str,
    ignore_config: tuple[str, ...],
    base: Checkpoint | None,
    place: Place | None,
) -> Checkpoint:
    check_folder(folder)
    if (folder / ADAPTER).exists():
        return _load_adapter(folder, source, base, place)
    config = folder / MARKER
    whole = read_json(config)
    text = text_config(whole, str(config))
    raw = whole if text is None else text
    weights, splits = PRECISIONS[dtype]
    cfg = dataclasses.replace(parse_config(raw, str(config), ignore_config), activation_splits=splits)
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else None
    for file, content in ((config, raw), (path, generation or {})):
        _check_stop_tokens(file, content.get("eos_token_id"))
    files = SplitExperts(folder, cfg)
    tensors: TensorSource = files
    towers: tuple[str, ...] = ()
    if text is not None:
        tensors = tower = TextTower(tensors)
        towers = tower.left_out
    tokenizer = load_tokenizer(folder)  # before the weights are read, which takes longer
    params = params_from_hf(cfg, tensors, weights, place, None if base is None else base.params)
    omitted = (*towers, *left_out(tensors))
    return Checkpoint(cfg, params, tokenizer, raw, generation, source, omitted, stored=_types(files, cfg))


def _types(files: SafetensorsFolder, cfg: ModelConfig) -> tuple[str, ...]:
    """The dtypes of a model's matrices as its files name them, such as "BF16"."""
    skipped = FAMILIES[cfg.family].skipped
    names = [name for name in files.names() if not name.endswith(skipped) and not name.startswith(OTHER_HEADS)]
    return tuple(sorted({files.dtype(name) for name in names if len(files.shape(name)) > 1}))


def check_adapter(source: str | Path) -> bool:
    """Refuse an adapter that fits no base, before a base is read, which takes longer. Every other source passes.

    Args:
        source: what may be a folder with an adapter.

    Returns:
        whether it is one.

    Raises:
        CheckpointError: as `Adapter`.

    >>> check_adapter("tiny:expert")
    False
    """
    try:
        folder = Path(source).expanduser()
        is_adapter = (folder / ADAPTER).is_file()
    except (OSError, RuntimeError, ValueError):  # no name of a folder: said when it is loaded
        return False
    if is_adapter:
        check_folder(folder)
        Adapter(folder, str(source))
    return is_adapter


def _load_adapter(folder: Path, source: str, base: Checkpoint | None, place: Place | None) -> Checkpoint:
    """The expert that an adapter makes of a base; its tokenizer is the one in the folder, if there is one."""
    if base is None:
        about = read_json(folder / ADAPTER)
        raise CheckpointError(
            f"{folder}: holds a PEFT adapter ({about.get('peft_type')} of {about.get('base_model_name_or_path')}), not "
            f"a whole model; name it as the expert, and what it was trained over as the base; or {how_to_merge(folder)}"
        )
    adapter, tokenizer = Adapter(folder, source), load_tokenizer(folder)
    cfg, params, omitted, notes = adapter.apply(base.cfg, base.params, base.source, place)
    raw = with_changes(base.hf_config, base.cfg, cfg, source)
    return Checkpoint(cfg, params, tokenizer, raw, base.generation_config, source, omitted, notes, base.stored)


def _check_stop_tokens(path: Path, ids: Any) -> None:
    """Refuse stop tokens that are not token ids."""
    for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if not (isinstance(token, int) and abs(token) < 2**31):
            raise CheckpointError(f"{path}: eos_token_id={ids!r} is not a token id or a list of them; correct it")


def save_checkpoint(
    path: str | Path, checkpoint: Checkpoint, *, overwrite: bool = False, max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a model as an HF folder, which transformers can load: config.json, safetensors, tokenizer.

    Args:
        path: the folder to write.
        checkpoint: the model.
        overwrite: whether to replace a model folder that is there.
        max_shard_bytes: size of a weight file, at most; larger models are written in several. A single tensor may
            exceed it.

    Raises:
        OutputError: the folder exists already, or cannot be written.

    >>> import tempfile
    >>> import wpjax as wp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     wp.save_checkpoint(f"{folder}/model", wp.load_model("tiny:base"))
    ...     Path(folder, "model", "model.safetensors").exists()
    True
    """
    cfg = checkpoint.cfg
    dtype = str(checkpoint.params["embed"]["W_E"].dtype)
    config = {k: v for k, v in checkpoint.hf_config.items() if k not in ("torch_dtype", "dtype")}
    config |= {"model_type": cfg.family, "architectures": [FAMILIES[cfg.family].architecture], "dtype": dtype}
    with atomic_output(Path(path), overwrite, MARKER) as folder:
        folder.mkdir()
        (folder / MARKER).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if checkpoint.generation_config is not None:
            text = json.dumps(dict(checkpoint.generation_config), indent=2) + "\n"
            (folder / "generation_config.json").write_text(text, encoding="utf-8")
        with WeightsWriter(folder, tensor_shapes(cfg), max_shard_bytes) as weights:
            for name, tensor in hf_tensors(cfg, checkpoint.params):
                weights.add(name, tensor)
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save_pretrained(str(folder))


def fingerprint(cfg: ModelConfig, params: Params) -> str:
    """A hash of a model: of its configuration and of every parameter's name, dtype, shape and bytes (16 hex digits)."""
    digest = hashlib.blake2b(repr(cfg).encode(), digest_size=8)
    for path, leaf in sorted(flatten(params).items()):
        digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        for rows in host_pieces(leaf):
            digest.update(np.ascontiguousarray(rows).view(np.uint8).data)
    return digest.hexdigest()
