"""GGUF files of tiny torch models, as llama.cpp's converter would write them.

Names and layouts stand here once more, from the converter (`conversion/` in llama.cpp), not from the package. The
converter in llama-cpp-python 0.3.36 writes the same tensors, bit for bit, and the same entries (checked 2026-11-28).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import ROUTED, HfModel

TOKENS = (*(chr(33 + i) for i in range(60)), '!"')

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "ministral3": "mistral3",
    "smollm3": "smollm3",
    "granite": "granite",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "starcoder2": "starcoder2",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "gpt_neox": "gptneox",
    "gpt2": "gpt2",
}
_LLAMA = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_OLMO = {
    **_LLAMA,
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GEMMA = {
    **_LLAMA,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GPT_NEOX = {
    "embed_in": "token_embd",
    "lm_head": "output",  # "embed_out" in files
    "final_layer_norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_GPT2 = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "lm_head": "output",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_SIDE_BY_SIDE = ("llama", "mistral3", "smollm3", "granite")
_NAMES = {"olmo2": _OLMO, "olmo3": _OLMO, "gemma2": _GEMMA, "gemma3_text": _GEMMA, "gpt_neox": _GPT_NEOX, "gpt2": _GPT2}


def write_gguf(
    path: Path,
    hf: HfModel,
    *,
    without: Collection[str] = (),
    tensors: tuple[int, int] | None = None,
    kind: Any = None,
    extra: tuple[np.ndarray, Any] | None = None,
    **fields: Any,
) -> str:
    """The torch model under llama.cpp's own names and in its layouts.

    Args:
        path: the file to write.
        hf: a torch model; its 61 tokens are printable characters and one pair of them.
        without: keys of the metadata to leave out.
        tensors: which of the tensors to write, from and to; None for all.
        kind: type of the matrices, a `gguf.GGMLQuantizationType`; None for float32, which all vectors are.
        extra: bytes and type of a tensor "odd.weight" to add.
        fields: keys to add or replace, with text, a number, or a list of either.
    """
    import gguf

    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", ARCHITECTURES[hf.config.model_type]))
    metadata = {
        **_metadata(hf.config),
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
    for name, value in list(_tensors(hf).items())[slice(*tensors or (None,))]:
        array = np.ascontiguousarray(value, np.float32)
        if kind is not None and array.ndim > 1:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    if extra is not None:
        writer.add_tensor("odd.weight", extra[0], raw_dtype=extra[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _metadata(config: Any) -> dict[str, Any]:
    """What the converter writes of a configuration."""
    arch = ARCHITECTURES[config.model_type]
    gpt2 = config.model_type == "gpt2"
    of_all = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.n_inner if gpt2 else config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
    }
    if arch not in ("gpt2", "gptneox"):
        of_all["attention.head_count_kv"] = config.num_key_value_heads
    epsilons = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    epsilon = next(name for name in epsilons if hasattr(config, name))
    of_all[f"attention.layer_norm_{'rms_' if 'rms' in epsilon else ''}epsilon"] = getattr(config, epsilon)
    more: dict[str, Any] = {}
    ropes = {} if gpt2 else config.rope_parameters
    rope = ropes.get("full_attention", ropes)
    if arch not in ("gpt2", "gptneox", "gemma2"):
        more["rope.freq_base"] = float(rope["rope_theta"])
    if arch in ("llama", "granite", "smollm3", "mistral3"):
        more |= {"rope.dimension_count": _width(config), "vocab_size": config.vocab_size}
    if arch in ("qwen3", "qwen3moe", "gemma2", "gemma3"):
        more |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if arch in ("phi3", "gptneox"):
        width = config.hidden_size // config.num_attention_heads
        more["rope.dimension_count"] = int(rope["partial_rotary_factor"] * width)
    if arch == "phi3":
        more |= {
            "attention.sliding_window": config.sliding_window or 0,
            "rope.scaling.original_context_length": config.original_max_position_embeddings,
        }
    if arch == "granite":
        names = {"attention.scale": "attention", "embedding_scale": "embedding", "residual_scale": "residual"}
        more |= {key: getattr(config, f"{name}_multiplier") for key, name in names.items()}
        more["logit_scale"] = config.logits_scaling
    if arch == "mistral3":
        more["rope.scaling.yarn_log_multiplier"] = rope["mscale_all_dim"]
        more["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
    if arch in ("command-r", "cohere2"):
        more |= {"logit_scale": config.logit_scale, "rope.scaling.type": "none"}
    if config.model_type in ("olmo3", "cohere2"):
        more["attention.sliding_window"] = config.sliding_window
    if config.model_type == "olmo3":
        more["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
        more["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    if arch == "cohere2":
        more |= {"rope.dimension_count": _width(config), "vocab_size": config.vocab_size}
    if config.model_type in ROUTED:
        more |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    if arch == "qwen3moe":
        more["expert_feed_forward_length"] = config.moe_intermediate_size
    if arch == "gptneox":
        more["use_parallel_residual"] = config.use_parallel_residual
    if arch in ("gemma2", "gemma3"):
        more["attention.sliding_window"] = config.sliding_window
        if config.final_logit_softcapping:
            more["final_logit_softcapping"] = config.final_logit_softcapping
    if arch == "gemma2":
        more["attn_logit_softcapping"] = config.attn_logit_softcapping
    if arch == "gemma3":
        more["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        more |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope.get("rope_type") == "yarn":
        more["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{arch}.{name}": value for name, value in (of_all | more).items()}


def _width(config: Any) -> int:
    """The width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _tensors(hf: HfModel) -> dict[str, np.ndarray]:
    """The tensors as the converter writes them."""
    config = hf.config
    names = _NAMES.get(config.model_type, _LLAMA)
    out: dict[str, np.ndarray] = {}
    state = {name: tensor.numpy() for name, tensor in hf.model.state_dict().items()}
    if config.tie_word_embeddings:
        state = {name: value for name, value in state.items() if name != "lm_head.weight"}
    for name, value in state.items():
        stem, suffix = name.rsplit(".", 1)
        stem = stem.removeprefix("model.").removeprefix("transformer.").removeprefix("gpt_neox.")
        layer = ""
        if stem.startswith(("layers.", "h.")):
            _, number, stem = stem.split(".", 2)
            layer = f"blk.{number}."
        if stem == "mlp.experts":  # of a layer, all stacked: gates before inputs in one tensor
            halves = zip(("gate", "up"), np.split(value, 2, axis=1), strict=False)
            parts = dict(halves) if suffix == "gate_up_proj" else {"down": value}
            out |= {f"{layer}ffn_{part}_exps.weight": tensor for part, tensor in parts.items()}
            continue
        ours = names[stem]
        if ARCHITECTURES[config.model_type] in _SIDE_BY_SIDE and ours in ("attn_q", "attn_k"):
            # Rotated pairs stand side by side, not half a head apart.
            n = config.num_attention_heads if ours == "attn_q" else config.num_key_value_heads
            value = value.reshape(n, 2, len(value) // n // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if config.model_type == "gpt2" and value.ndim == 2 and layer:
            value = value.T
        if ours == "attn_qkv" and config.model_type == "gpt_neox":
            # All queries first, then all keys and all values; in HF they stand head by head.
            n = config.num_attention_heads
            value = value.reshape(n, 3, len(value) // n // 3, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
        out[f"{layer}{ours}.{suffix}"] = value
    ropes = {} if config.model_type == "gpt2" else config.rope_parameters
    rope = ropes.get("full_attention", ropes)
    if rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            out[f"rope_factors_{kind}.weight"] = np.array(rope[f"{kind}_factor"])
    if rope.get("rope_type") == "llama3":
        out["rope_freqs.weight"] = _llama3(rope, config.head_dim)
    return out


def _llama3(rope: dict[str, Any], width: int) -> np.ndarray:
    """By what Llama 3.1 divides the frequency of each rotated pair."""
    factors = []
    for wavelength in 2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width):
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0), 1)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors)
