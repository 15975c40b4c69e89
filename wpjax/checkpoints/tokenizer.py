"""Tokenizers of Hugging Face folders, as transformers reads them."""

from __future__ import annotations

import importlib.util
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
        CheckpointError: a library is missing, transformers cannot read the files, or it reads tokenizer.json otherwise
            than that says.
    """
    if not any((folder / name).exists() for name in _FILES):
        return None
    missing = _missing_library(folder)
    if missing:
        raise CheckpointError(missing)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        tokenizer("text")  # some damaged files fail only when the tokenizer is used
        without_dropout(tokenizer)
        differs = _reads_otherwise(tokenizer, folder / "tokenizer.json")
    except Exception as error:  # whatever the tokenizer's own parser raises
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({' '.join(str(error).split())})") from error
    if differs:
        import transformers

        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} reads tokenizer.json as a {type(tokenizer).__name__}, "
            "which splits text otherwise than the file says; set tokenizer_class to PreTrainedTokenizerFast in its "
            "tokenizer_config.json"
        )
    return tokenizer


def without_dropout(tokenizer: Any) -> None:
    """Switch off the dropout of byte-pair merges, which makes tokens random.

    Args:
        tokenizer: a tokenizer of transformers, which is changed.
    """
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):
        model.dropout = None


def _reads_otherwise(tokenizer: Any, file: Path) -> bool:
    """Whether a tokenizer splits ordinary text otherwise than its tokenizer.json does by itself."""
    if not file.exists():
        return False
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(file))
    plain.no_truncation()
    plain.no_padding()
    if getattr(plain.model, "dropout", None):
        plain.model.dropout = None
    return bool(
        tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"] != plain.encode(_SAMPLE, add_special_tokens=False).ids
    )


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
