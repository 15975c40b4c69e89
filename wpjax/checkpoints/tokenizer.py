"""Tokenizers of Hugging Face folders, as transformers reads them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from wpjax.errors import CheckpointError

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
# Ordinary text: two readings of one tokenizer.json that split it alike split prompts alike.
_SAMPLE = "Why is the sky blue? It's 12:30, isn't it?\nNaïve café, 你好 (x += 1);\tEND"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of an HF folder; None if it holds none.

    A tokenizer that is random (byte pairs with dropout) is made deterministic.

    Args:
        folder: the folder. Its files may be those of any class of transformers: tokenizer.json, or a vocabulary.

    Raises:
        CheckpointError: a library is missing, or transformers cannot read the files.
    """
    if not any((folder / name).exists() for name in _FILES):
        return None
    missing = _missing_library(folder)
    if missing:
        raise CheckpointError(missing)
    try:
        return _read(folder)
    except Exception as error:  # whatever the tokenizer's own parser raises
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({' '.join(str(error).split())})") from error


def _read(folder: Path) -> Any:
    """The tokenizer as transformers reads it, unless its class forgets what tokenizer.json says.

    Some classes of transformers take only the vocabulary and the merges from tokenizer.json, and make the rest
    themselves. For a byte-level vocabulary that is labelled Llama, say, that would lose the spaces (before 5.22), and
    for SmolLM2's, labelled GPT-2, that digits stand alone. The model was trained with what the file says.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    without_dropout(tokenizer)
    ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]  # some damaged files fail only here
    file = _by_file(folder)
    if file is None or ids == file.encode(_SAMPLE, add_special_tokens=False).ids:
        return tokenizer
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn that the class is not the one in tokenizer_config.json
    try:
        plain = PreTrainedTokenizerFast.from_pretrained(**where)
    finally:
        logging.set_verbosity(verbosity)
    plain.backend_tokenizer.pre_tokenizer = file.pre_tokenizer
    without_dropout(plain)
    return plain


def _by_file(folder: Path) -> Any:
    """The tokenizer of the library tokenizers that a tokenizer.json describes, without dropout and truncation.

    tokenizer_config.json may say otherwise whether a blank is set before a text. That is done here if the vocabulary is
    byte-level. If it is not, or there is no tokenizer.json, there is nothing to compare with: None.
    """
    from tokenizers import Tokenizer

    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    prefix = json.loads(settings.read_text(encoding="utf-8")).get("add_prefix_space") if settings.exists() else None
    if prefix is not None:
        splitter = content.get("pre_tokenizer") or {}
        parts = [part for part in splitter.get("pretokenizers", [splitter]) if part.get("type") == "ByteLevel"]
        if not parts:
            return None
        parts[0]["add_prefix_space"] = bool(prefix)
    content |= {"truncation": None, "padding": None}
    if content["model"].get("dropout"):
        content["model"]["dropout"] = None
    return Tokenizer.from_str(json.dumps(content))


def without_dropout(tokenizer: Any) -> None:
    """Switch off the dropout of byte-pair merges, which makes tokens random.

    Args:
        tokenizer: a tokenizer of transformers, which is changed.
    """
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):
        model.dropout = None


def _missing_library(folder: Path) -> str:
    """What is missing to read a folder that has tokenizer.model alone; empty if nothing is.

    transformers would try one library after the other, and print what each says.
    """
    path = next((folder / name for name in _FILES if name.endswith(".model") and (folder / name).is_file()), None)
    if path is None or (folder / "tokenizer.json").exists():
        return ""
    # A sentencepiece model is a protocol buffer that begins with its pieces, field 1.
    with path.open("rb") as file:
        name = "sentencepiece" if file.read(1) == b"\n" else "tiktoken"
    if importlib.util.find_spec(name) is not None:
        return ""
    how = "'wpjax[sentencepiece]'" if name == "sentencepiece" else name
    return f"{path}: {name} is needed to read it; pip install {how}, or put tokenizer.json beside it"
