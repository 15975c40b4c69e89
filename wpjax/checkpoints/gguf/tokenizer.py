"""The tokenizer in a GGUF file.

transformers makes it of the vocabulary and the merges. It leaves out a few things that llama.cpp knows by the name of
the way to split text ("tokenizer.ggml.pre"), or that the file says. They are added here.
"""

from __future__ import annotations

import json
from typing import Any

from wpjax.checkpoints.gguf.metadata import Metadata
from wpjax.checkpoints.tokenizer import without_dropout
from wpjax.errors import CheckpointError, ConfigError

# Ways to split text, by llama.cpp's names (`llama_vocab::impl::load` in its llama-vocab.cpp). The first split as GPT-2
# does; the second as well, but set digits apart first.
_AS_GPT2 = frozenset({"default", "gpt-2", "gpt2", "olmo", "granite-docling"})
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "minerva-7b"})
# A word that is a token is that token, whatever the merges would make of it; and texts begin with the BOS token.
_LLAMA3 = frozenset("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano".split())
_WHOLE_WORDS = _LLAMA3 | {"tekken"}
# Letters with separate accents are composed, by the tokenizer.json of these models; llama.cpp does not do it.
_COMPOSED = frozenset({"qwen2", "olmo", "command-r"})
_COMPOSED_ARCHITECTURES = frozenset({"gptneox"})


def gguf_tokenizer(metadata: Metadata, architecture: str) -> Any:
    """The file's tokenizer with its chat template, as a transformers tokenizer.

    Args:
        metadata: of the file.
        architecture: "llama", "gemma3", ...: some decide how blanks are written.

    Raises:
        CheckpointError: something that it needs is missing, or cannot be read.
        ConfigError: the file asks for a way to split text that is not known.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_PRE_TOKENIZER_SPLITS,
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    kind, tokens = metadata.needed("tokenizer.ggml.model"), metadata.tokens
    if kind == "gpt2":
        metadata.needed("tokenizer.ggml.merges")
    elif metadata.get("tokenizer.ggml.merges") is None:
        metadata.needed("tokenizer.ggml.scores")
    read = {theirs: metadata.get(f"tokenizer.{ours}") for ours, theirs in GGUF_TOKENIZER_MAPPING["tokenizer"].items()}
    read = {k: v for k, v in read.items() if v is not None}
    split = read.get("pre_tokenizer_type", "default")
    if kind == "gpt2" and split not in [*_AS_GPT2, *_DIGITS_APART, *GGUF_PRE_TOKENIZER_SPLITS]:
        raise ConfigError(
            f"{metadata.where}: tokenizer.ggml.pre={split!r}, a way to split text that is not known; use the "
            "safetensors model"
        )
    special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {token: metadata.token_id(name) for token, name in special.items()}
    begins = metadata.get("tokenizer.ggml.add_bos_token")
    if begins is None:  # older files do not say
        begins = kind == "llama" or (kind == "gpt2" and split in _LLAMA3)
    try:
        backend, _ = convert_gguf_tokenizer(architecture, read)
        _adjust(backend, architecture, read)
        # The converter fills a vocabulary up to the rows of the embedding; the model's own tokenizer does not.
        padding = {token for i, token in enumerate(tokens) if token == f"[PAD{i}]"}
        if padding or any(i >= len(tokens) for i in backend.get_added_tokens_decoder()):
            # The defaults of its class, <|endoftext|> or <s>.
            content = json.loads(backend.to_str())
            content["added_tokens"] = [
                token
                for token in content["added_tokens"]
                if token["id"] < len(tokens) and token["content"] not in padding
            ]
            vocabulary = content["model"]["vocab"]
            if isinstance(vocabulary, dict):
                content["model"]["vocab"] = {token: i for token, i in vocabulary.items() if token not in padding}
            backend = Tokenizer.from_str(json.dumps(content))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=metadata.get("tokenizer.chat_template"),
            add_bos_token=bool(begins) and ids["bos_token"] is not None,
            **{token: tokens[i] for token, i in ids.items() if i is not None},
        )
        without_dropout(tokenizer)
        tokenizer("text")
    except Exception as error:  # whatever the tokenizer's own parser raises
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{metadata.where}: the tokenizer cannot be read ({reason})") from error
    return tokenizer


def _adjust(backend: Any, architecture: str, read: dict[str, Any]) -> None:
    """Add to transformers' tokenizer what it leaves out.

    Args:
        backend: the tokenizer of the library tokenizers, which is changed.
        architecture: the file's architecture.
        read: the metadata of the tokenizer, under transformers' names.
    """
    from tokenizers import decoders, normalizers, pre_tokenizers

    kind, split = read["tokenizer_type"], read.get("pre_tokenizer_type", "default")
    if kind == "gpt2":
        if split in _DIGITS_APART:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        if split in _WHOLE_WORDS:
            backend.model.ignore_merges = True
        if split in _COMPOSED or architecture in _COMPOSED_ARCHITECTURES:
            backend.normalizer = normalizers.NFC()
    elif kind == "llama" and not architecture.startswith("gemma"):
        # sentencepiece sets a blank before a text, also before one that begins with a blank; transformers does not.
        before = [] if read.get("add_prefix_space") is False else [normalizers.Prepend("▁")]
        backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
        after = [decoders.Strip(content=" ", left=1)] if before else []
        blanks = decoders.Replace("▁", " ")
        backend.decoder = decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse(), *after])
