"""Reading `.gguf` files: tensors (dequantised to float32, under HF names), configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from wpjax.errors import CheckpointError, WpjaxError

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
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}


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

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as error:
            raise WpjaxError(f"{path}: reading GGUF needs an extra; pip install 'wpjax[gguf]'") from error
        self.where = str(path)
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable GGUF file ({error}); download it again") from error
        self._dequantize = gguf.quants.dequantize
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"{path}: GGUF architecture {architecture!r} is not supported, only 'llama'")
        self._tensors = {self._hf_name(t.name): t for t in self._reader.tensors}
        if "rope_freqs.weight" in self._tensors:
            # Llama 3.1's long-context scaling, which GGUF bakes into a tensor and HF writes as numbers.
            raise CheckpointError(f"{path}: rope_freqs (scaled rotary) cannot be read; use the safetensors model")

    def _field(self, name: str) -> Any:
        """An entry of the file's metadata; None if it has none of that name."""
        field = self._reader.get_field(name)
        return None if field is None else field.contents()

    def _hf_name(self, name: str) -> str:
        """The HF name of a tensor: "blk.3.attn_q.weight" is "model.layers.3.self_attn.q_proj.weight"."""
        stem, _, suffix = name.rpartition(".")
        if stem.startswith("blk."):
            _, layer, part = stem.split(".", 2)
            return f"model.layers.{layer}.{_LAYER_NAMES.get(part, part)}.{suffix}"
        return f"{_NAMES.get(stem, stem)}.{suffix}"

    def names(self) -> list[str]:
        """The HF names of all tensors."""
        return list(self._tensors)

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32, in HF's layout."""
        tensor = self._tensors[name]
        value = np.asarray(self._dequantize(tensor.data, tensor.tensor_type), np.float32)
        value = value.reshape(tuple(int(n) for n in reversed(tensor.shape)))
        heads = {"self_attn.q_proj": "attention.head_count", "self_attn.k_proj": "attention.head_count_kv"}
        for part, count in heads.items():
            if part in name:
                n = self._field(f"llama.{count}")
                pairs = value.reshape(n, value.shape[0] // n // 2, 2, *value.shape[1:])  # [heads, pairs, 2, D]
                value = pairs.swapaxes(1, 2).reshape(value.shape)
        return value

    def hf_config(self) -> dict[str, Any]:
        """The content of the config.json that HF would write for this model.

        Raises:
            CheckpointError: rotary positions are scaled in a way that is not read from GGUF files.
        """
        config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        for ours, theirs in _CONFIG.items():
            value = self._field(f"llama.{ours}")
            if value is not None:
                config[theirs] = value
        config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")  # float32 in the file: 1e-05 comes inexact
        scaling = self._field("llama.rope.scaling.type")
        if scaling not in (None, "none"):
            raise CheckpointError(
                f"{self.where}: rotary scaling {scaling!r} in a GGUF cannot be read; use the safetensors model"
            )
        config.setdefault("vocab_size", len(self._field("tokenizer.ggml.tokens") or []))
        config["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        for kind in ("bos", "eos"):
            config[f"{kind}_token_id"] = self._field(f"tokenizer.ggml.{kind}_token_id")
        pad = self._field("tokenizer.ggml.padding_token_id")
        return config if pad is None else {**config, "pad_token_id": pad}

    def tokenizer(self) -> Any:
        """The file's tokenizer with its chat template, as a transformers tokenizer."""
        from tokenizers import pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            GGUF_TOKENIZER_MAPPING,
            convert_gguf_tokenizer,
        )

        read = {
            theirs: self._field(f"tokenizer.{ours}") for ours, theirs in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        }
        read = {k: v for k, v in read.items() if v is not None}
        backend, _ = convert_gguf_tokenizer("llama", read)
        if read.get("pre_tokenizer_type") == "smollm":  # llama.cpp: digits stand alone
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {token: self._field(f"tokenizer.ggml.{name}_token_id") for token, name in special.items()}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=self._field("tokenizer.chat_template"),
            **{token: read["tokens"][i] for token, i in ids.items() if i is not None},
        )
