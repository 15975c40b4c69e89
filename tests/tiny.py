"""One table of tiny random architectures, shared by the tests; HF torch is the oracle."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
import transformers

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
GPT2 = {"vocab_size": 61, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 64, "n_inner": 40}


def _rope(**options: Any) -> dict[str, Any]:
    return {**LLAMA, "rope_parameters": {"rope_theta": 500.0, **options}}


SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", {**LLAMA, "num_key_value_heads": 6}),
    "llama-gqa3": ("llama", LLAMA),
    "llama-mqa": ("llama", {**LLAMA, "num_key_value_heads": 1}),
    "llama-tied": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("llama", {**LLAMA, "hidden_act": "gelu"}),
    "llama-linear": ("llama", _rope(rope_type="linear", factor=4.0)),
    "llama-dynamic": ("llama", _rope(rope_type="dynamic", factor=4.0)),
    "llama-llama3": (
        "llama",
        _rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama-yarn": ("llama", _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-longrope": (
        "llama",
        _rope(
            rope_type="longrope",
            factor=2.0,
            original_max_position_embeddings=32,
            short_factor=[1.0, 1.1, 1.3, 2.0],
            long_factor=[2.0, 3.0, 4.0, 5.0],
        ),
    ),
    "gpt2-tied": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", {**GPT2, "tie_word_embeddings": False}),
    "gpt2-default-mlp": ("gpt2", {**GPT2, "n_inner": None, "activation_function": "relu"}),
}


@dataclasses.dataclass(frozen=True)
class HfModel:
    name: str
    model: Any
    folder: Path

    @property
    def config(self) -> Any:
        return self.model.config


@functools.cache
def hf_class(model_type: str) -> tuple[type, type]:
    return {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    }[model_type]


def random_model(name: str, seed: int = 0) -> Any:
    """A torch model of the table whose every parameter, biases and norms included, is random and large."""
    model_type, kwargs = SPECS[name]
    config_class, model_class = hf_class(model_type)
    config = config_class(**kwargs, attn_implementation="eager")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            norm = ("norm" in parameter_name or "ln_" in parameter_name) and parameter_name.endswith("weight")
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if norm else 0.0))
    return model


def build(name: str, folder: Path, seed: int = 0) -> HfModel:
    """Make the model and save it as transformers does."""
    model = random_model(name, seed)
    model.save_pretrained(folder)
    return HfModel(name, model, folder)
