"""GGUF files of the table's Llama models, as llama.cpp's converter would write them."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import HfModel

TOKENS = (*(chr(33 + i) for i in range(60)), '!"')


def write_gguf(
    path: Path, llama: HfModel, *, without: Collection[str] = (), tensors: tuple[int, int] | None = None, **fields: Any
) -> str:
    """The torch model under llama.cpp's own names, with interleaved rotary rows in Q and K.

    Args:
        path: the file to write.
        llama: a Llama model of the table; its 61 tokens are printable characters and one pair of them.
        without: keys of the metadata to leave out.
        tensors: which of the tensors to write, from and to; None for all.
        fields: keys to add or replace, with text, a number, or a list of either.
    """
    import gguf

    config, state = llama.config, {n: t.numpy() for n, t in llama.model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    metadata = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.merges": ['! "'],
        "tokenizer.ggml.token_type": [1] * 61,
        "tokenizer.ggml.eos_token_id": 2,
        **fields,
    }
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in metadata.items():
        if name not in without:
            add[type(value)](name, value)

    def interleave(w: np.ndarray, n: int) -> np.ndarray:
        return w.reshape(n, 2, w.shape[0] // n // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in list(state.items())[slice(*tensors or (None,))]:
        if "q_proj" in name:
            value = interleave(value, config.num_attention_heads)
        if "k_proj" in name:
            value = interleave(value, config.num_key_value_heads)
        stem, suffix = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
