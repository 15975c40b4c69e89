"""Reading `.gguf` files: tensors (dequantised to float32, under HF names), configuration and tokenizer.

A key of the metadata that may change the model and is not known is refused, as an attribute of config.json is.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from wpjax.checkpoints.folder import check_file
from wpjax.checkpoints.tokenizer import without_dropout
from wpjax.errors import CheckpointError, ConfigError, WpjaxError

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
# Keys that say nothing about the forward pass, or that `_rope` and `_head_width` read.
_OTHERS = frozenset(
    "rope.dimension_count rope.scale_linear rope.scaling.type rope.scaling.factor rope.scaling.finetuned "
    "rope.scaling.original_context_length attention.key_length attention.value_length attention.sliding_window "
    "tensor_data_layout".split()
)
# The names by which llama.cpp writes GPT-2's way to split text, and those that set digits apart first.
_SPLITS_AS_GPT2 = frozenset({"default", "gpt-2", "gpt2"})
_DIGITS_APART = frozenset({"smollm"})


class GgufFile:
    """A GGUF file of the llama architecture, as a `TensorSource` with a configuration and a tokenizer.

    llama.cpp stores queries and keys with the two dimensions of a rotated pair side by side. They are returned in HF's
    layout, with these half a head apart.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is damaged, or holds another architecture.
        WpjaxError: the extra `gguf` is not installed.
    """

    configuration = "metadata"

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as error:
            raise WpjaxError(f"{path}: reading GGUF needs an extra; pip install 'wpjax[gguf]'") from error
        self.where = str(path)
        self._reader = self._open(path)
        self._dequantize = gguf.quants.dequantize
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"{path}: GGUF architecture {architecture!r} is not supported, only 'llama'")
        readers = [self._reader, *(self._open(part) for part in self._other_parts(path))]
        self._by_name = {self._hf_name(t.name): t for reader in readers for t in reader.tensors}
        if "rope_freqs.weight" in self._by_name:
            # Llama 3.1's long-context scaling, which GGUF bakes into a tensor and HF writes as numbers.
            raise CheckpointError(f"{path}: rope_freqs (scaled rotary) cannot be read; use the safetensors model")

    @staticmethod
    def _open(path: Path) -> Any:
        import gguf

        check_file(path)
        try:
            return gguf.GGUFReader(path)
        except Exception as error:  # whatever the reader raises at a damaged file
            raise CheckpointError(f"{path}: not a readable GGUF file ({error}); download it again") from error

    def _other_parts(self, first: Path) -> list[Path]:
        """The other parts of a file that was split; empty if it is whole.

        Raises:
            CheckpointError: the file is not the first part, or a part is missing.
        """
        count, number = (self._field(f"split.{name}") for name in ("count", "no"))
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

    def _field(self, name: str) -> Any:
        """An entry of the file's metadata; None if it has none of that name.

        Raises:
            CheckpointError: it cannot be read.
        """
        field = self._reader.get_field(name)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError, TypeError) as error:  # ValueError: text that is not UTF-8
            raise CheckpointError(f"{self.where}: {name} cannot be read ({error}); download the file again") from error

    def _needed(self, name: str) -> Any:
        """An entry of the metadata that must be there."""
        value = self._field(name)
        if value is None:
            raise CheckpointError(f"{self.where}: the metadata lacks {name}; convert or download the file again")
        return value

    def _number(self, name: str, value: Any) -> Any:
        """A value of the metadata, if it is a finite number."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{self.where}: {name}={str(value)[:60]} is not a number; only one number is implemented")
        return value

    def _hf_name(self, name: str) -> str:
        """The HF name of a tensor: "blk.3.attn_q.weight" is "model.layers.3.self_attn.q_proj.weight"."""
        stem, _, suffix = name.rpartition(".")
        if re.fullmatch(r"blk\.\d+\..+", stem):
            _, layer, part = stem.split(".", 2)
            return f"model.layers.{layer}.{_LAYER_NAMES.get(part, part)}.{suffix}"
        return f"{_NAMES.get(stem, stem)}.{suffix}"

    def names(self) -> list[str]:
        """The HF names of all tensors."""
        return list(self._by_name)

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32, in HF's layout."""
        tensor = self._by_name[name]
        try:
            value = np.asarray(self._dequantize(tensor.data, tensor.tensor_type), np.float32)
            value = value.reshape(tuple(int(n) for n in reversed(tensor.shape)))
        except (NotImplementedError, ValueError, TypeError, IndexError) as error:
            raise CheckpointError(f"{self.where}: tensor {name} cannot be dequantised ({error})") from error
        n_heads, n_kv_heads = self._n_heads
        for part, n in {"self_attn.q_proj": n_heads, "self_attn.k_proj": n_kv_heads}.items():
            if part in name and value.shape[0] % (2 * n) == 0:  # other shapes are refused by whoever asked
                pairs = value.reshape(n, value.shape[0] // n // 2, 2, *value.shape[1:])  # [heads, pairs, 2, D]
                value = pairs.swapaxes(1, 2).reshape(value.shape)
        return value

    @property
    def _n_heads(self) -> tuple[int, int]:
        """Numbers of query heads and of KV heads; a file without the second has one KV head for each query head."""
        n_heads = self._needed("llama.attention.head_count")
        return n_heads, self._field("llama.attention.head_count_kv") or n_heads

    def hf_config(self, ignore: tuple[str, ...] = ()) -> dict[str, Any]:
        """The content of the config.json that HF would write for this model.

        Args:
            ignore: keys of the metadata that the caller knows not to matter.

        Raises:
            CheckpointError: a key is missing, or has a value that cannot be used.
            ConfigError: a key is unknown, or asks for something that is not implemented.
        """
        prefix = "llama."
        known = {prefix + name for name in {*_CONFIG, *_OPTIONAL, *_OTHERS}} | set(ignore)
        names = [name for name in self._reader.fields if name.startswith(prefix) and name not in known]
        unknown = {name: value for name in names if (value := self._field(name)) not in (0, 0.0, False, "", [])}
        if unknown:
            raise ConfigError(
                f"{self.where}: unknown {', '.join(f'{k}={str(v)[:60]}' for k, v in unknown.items())}; if it does not "
                f"change the forward pass, pass {' '.join(f'--ignore-config {name}' for name in unknown)}"
            )
        config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        for ours, theirs in _CONFIG.items():
            config[theirs] = self._number(prefix + ours, self._needed(prefix + ours))
        for ours, theirs in _OPTIONAL.items():
            value = self._field(prefix + ours)
            if value is not None:
                config[theirs] = self._number(prefix + ours, value)
        config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")  # float32 in the file: 1e-05 comes inexact
        config |= self._head_width()
        config |= self._rope()
        name = "llama.attention.sliding_window"
        window = self._number(name, self._field(name) or 0)
        if 0 < window < config["max_position_embeddings"] and name not in ignore:
            raise ConfigError(f"{self.where}: {name}={window} is not implemented for llama")
        config.setdefault("vocab_size", len(self._tokens))
        config["tie_word_embeddings"] = "lm_head.weight" not in self._by_name
        for kind in ("bos", "eos"):
            config[f"{kind}_token_id"] = self._token_id(kind)
        pad = self._token_id("padding")
        return config if pad is None else {**config, "pad_token_id": pad}

    def _head_width(self) -> dict[str, Any]:
        """The width of a head, as config.json says it.

        Raises:
            ConfigError: keys and values are of different width, or only a part of each head is rotated.
        """
        names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
        sizes = {f"llama.{name}": self._field(f"llama.{name}") for name in names}
        sizes = {name: self._number(name, value) for name, value in sizes.items() if value is not None}
        if len(set(sizes.values())) > 1:
            raise ConfigError(
                f"{self.where}: {', '.join(f'{k}={v}' for k, v in sizes.items())} differ; only equal widths of keys, "
                "values and rotated dimensions are implemented"
            )
        return {"head_dim": next(iter(sizes.values()))} if sizes else {}

    def _rope(self) -> dict[str, Any]:
        """How rotary positions are scaled, as config.json says it.

        Raises:
            ConfigError: in a way that is not read from GGUF files.
        """
        kind = self._field("llama.rope.scaling.type")
        factor = next(
            (
                self._number(name, value)
                for name in ("llama.rope.scaling.factor", "llama.rope.scale_linear")
                if (value := self._field(name))
            ),
            1.0,
        )
        if kind not in (None, "none", "linear"):
            raise ConfigError(
                f"{self.where}: rotary scaling {kind!r} in a GGUF cannot be read; use the safetensors model"
            )
        return {} if kind == "none" or factor == 1.0 else {"rope_scaling": {"rope_type": "linear", "factor": factor}}

    def _token_id(self, kind: str) -> int | None:
        """The id of a special token ("bos", "eos", "unknown" or "padding"); None if the file names none.

        Raises:
            CheckpointError: it is not the id of a token.
        """
        key = f"tokenizer.ggml.{kind}_token_id"
        value = self._field(key)
        if value is not None and not (isinstance(value, int) and 0 <= value < len(self._tokens)):
            raise CheckpointError(f"{self.where}: {key}={value} is not the id of one of its {len(self._tokens)} tokens")
        return value

    @functools.cached_property
    def _tokens(self) -> list[str]:
        """The vocabulary, by id."""
        tokens = self._needed("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise CheckpointError(f"{self.where}: tokenizer.ggml.tokens is not a list of text; download the file again")
        return tokens

    def tokenizer(self) -> Any:
        """The file's tokenizer with its chat template, as a transformers tokenizer.

        Raises:
            CheckpointError: something that it needs is missing, or cannot be read.
            ConfigError: the file asks for a way to split text that is not known.
        """
        from tokenizers import Tokenizer, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            GGUF_PRE_TOKENIZER_SPLITS,
            GGUF_TOKENIZER_MAPPING,
            convert_gguf_tokenizer,
        )

        kind, tokens = self._needed("tokenizer.ggml.model"), self._tokens
        if kind == "gpt2":
            self._needed("tokenizer.ggml.merges")
        elif self._field("tokenizer.ggml.merges") is None:
            self._needed("tokenizer.ggml.scores")
        read = {
            theirs: self._field(f"tokenizer.{ours}") for ours, theirs in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        }
        read = {k: v for k, v in read.items() if v is not None}
        split = read.get("pre_tokenizer_type", "default")
        if kind == "gpt2" and split not in [*_SPLITS_AS_GPT2, *_DIGITS_APART, *GGUF_PRE_TOKENIZER_SPLITS]:
            raise ConfigError(
                f"{self.where}: tokenizer.ggml.pre={split!r}, a way to split text that is not known; use the "
                "safetensors model"
            )
        special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {token: self._token_id(name) for token, name in special.items()}
        begins = self._field("tokenizer.ggml.add_bos_token")  # older files do not say: sentencepiece begins texts
        try:
            backend, _ = convert_gguf_tokenizer("llama", read)
            if kind == "gpt2" and split in _DIGITS_APART:
                backend.pre_tokenizer = pre_tokenizers.Sequence(
                    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
                )
            content = json.loads(backend.to_str())
            added = [token for token in content["added_tokens"] if token["id"] < len(tokens)]
            if len(added) < len(content["added_tokens"]):  # the defaults of its class, <|endoftext|> or <s>
                backend = Tokenizer.from_str(json.dumps({**content, "added_tokens": added}))
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=backend,
                chat_template=self._field("tokenizer.chat_template"),
                add_bos_token=bool(kind == "llama" if begins is None else begins) and ids["bos_token"] is not None,
                **{token: tokens[i] for token, i in ids.items() if i is not None},
            )
            without_dropout(tokenizer)
            tokenizer("text")
        except Exception as error:  # whatever the tokenizer's own parser raises
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{self.where}: the tokenizer cannot be read ({reason})") from error
        return tokenizer
