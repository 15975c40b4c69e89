"""What families say of themselves: published configurations, models of images and text, and what is refused."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.tiny import GEMMA3_ROPE, LLAMA, LLAMA_TIED, NO_HEAD_DIM
from wpjax.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from wpjax.checkpoints.convert import tensor_shapes
from wpjax.checkpoints.hf_config import parse_config
from wpjax.checkpoints.rewrite import rewrite_folder
from wpjax.checkpoints.text_tower import text_config
from wpjax.errors import CheckpointError, ConfigError
from wpjax.models import layers
from wpjax.models.config import ModelConfig, Rope
from wpjax.models.decoder import abstract_params, forward
from wpjax.models.families import FAMILIES, activation

TOKENS = np.random.default_rng(3).integers(3, 50, (2, 9))

PUBLISHED = {  # what the config.json files of published models say, sizes included
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32",
        "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 256000,
    },
    "gemma-3-270m": {
        "architectures": ["Gemma3ForCausalLM"], "_sliding_window_pattern": 6, "attention_bias": False,
        "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1,
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 640, "initializer_range": 0.02, "intermediate_size": 2048,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512, "torch_dtype": "bfloat16",
        "transformers_version": "4.55.0.dev0", "use_bidirectional_attention": False, "use_cache": True,
        "vocab_size": 262144,
    },
    "Phi-3-mini-4k": {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.2", "use_cache": True, "vocab_size": 32064,
    },
    "Phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 199999, "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu",
        "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1,
        "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3",
        "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 200064,
    },
    "pythia-70m": {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
        "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
    },
    "OLMo-2-7B": {
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32",
        "transformers_version": "4.47.0.dev0", "use_cache": False, "vocab_size": 100352,
    },
    "Olmo-3-7B": {
        "architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
        "max_position_embeddings": 65536, "model_type": "olmo3", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06,
        "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
                         "original_max_position_embeddings": 8192, "rope_type": "yarn"},
        "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.57.0", "use_cache": False, "vocab_size": 100278,
    },
    "granite-3.0-8b": {
        "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
        "attention_multiplier": 0.0078125, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12800,
        "logits_scaling": 16.0, "max_position_embeddings": 4096, "mlp_bias": False, "model_type": "granite",
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
        "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.46.0.dev0",
        "use_cache": True, "vocab_size": 49155,
    },
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
        "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": False,
        "use_sliding_window": False, "vocab_size": 128256,
    },
    "starcoder2-3b": {
        "architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1, "bos_token_id": 0,
        "embedding_dropout": 0.1, "eos_token_id": 0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072,
        "initializer_range": 0.018042, "intermediate_size": 12288, "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 16384, "mlp_type": "default", "model_type": "starcoder2", "norm_epsilon": 1e-05,
        "norm_type": "layer_norm", "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2,
        "residual_dropout": 0.1, "rope_theta": 999999.4420358813, "sliding_window": 4096,
        "transformers_version": "4.37.0.dev0", "use_bias": True, "use_cache": True, "vocab_size": 49152,
    },
    "Mixtral-8x7B-v0.1": {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
        "use_cache": True, "vocab_size": 32000,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "OLMoE-1B-7B-0924": {
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
        "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 50304,
    },
}  # fmt: skip
NOT_READ = ("use_mrope", "attention_bias", "full_attn_mod", "interpolate_factor", "lm_head_bias", "mlp_bias")
"""Attributes of these files that transformers' own classes do not have."""


def test_activations_are_those_of_their_names_in_transformers():
    x = np.linspace(-6, 6, 97, dtype=np.float32)
    known = {name: activation(name) for name in transformers.activations.ACT2FN if activation(name)}
    assert set(known.values()) == {"silu", "gelu", "gelu_tanh", "relu"}
    for name, ours in known.items():
        theirs = transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
        mine = layers.activation(ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64, act=ours))(jnp.asarray(x))
        np.testing.assert_allclose(mine, theirs, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name):
    raw = PUBLISHED[name]
    cfg = parse_config(raw, "config.json", ignore=NOT_READ)
    theirs = transformers.AutoConfig.for_model(**raw)
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads) == (
        theirs.num_hidden_layers, theirs.hidden_size, theirs.num_attention_heads
    )  # fmt: skip
    assert cfg.tied == theirs.tie_word_embeddings


def test_what_published_models_differ_in():
    cfgs = {name: parse_config(raw, "config.json", ignore=NOT_READ) for name, raw in PUBLISHED.items()}
    windows = {name: (cfg.window, sum(cfg.sliding)) for name, cfg in cfgs.items() if cfg.window}
    assert windows == {
        "Mistral-7B-v0.1": (4096, 32),
        "gemma-2-2b": (4096, 13),
        "gemma-3-270m": (512, 15),
        "Phi-3-mini-4k": (2047, 32),
        "Olmo-3-7B": (4096, 24),
        "starcoder2-3b": (4096, 30),
    }
    assert {name for name, cfg in cfgs.items() if cfg.qk_norm} == {"Qwen3-0.6B", "gemma-3-270m", "Qwen3-30B-A3B"}
    routed = {n: (c.n_experts, c.n_active, c.d_expert, c.norm_routing) for n, c in cfgs.items() if c.n_experts}
    assert routed == {
        "Mixtral-8x7B-v0.1": (8, 2, 14336, True),
        "Qwen3-30B-A3B": (128, 8, 768, True),
        "OLMoE-1B-7B-0924": (64, 8, 1024, False),
    }
    assert {name for name, cfg in cfgs.items() if cfg.qkv_bias} == {"Qwen2.5-0.5B", "pythia-70m", "starcoder2-3b"}
    gemma3, phi4 = cfgs["gemma-3-270m"], cfgs["Phi-4-mini"]
    assert (gemma3.rope.theta, gemma3.local_rope.theta) == (1e6, 1e4)
    assert (phi4.n_ctx, phi4.rope.fraction) == (4096, 0.75)  # its short factors hold up to there
    assert (cfgs["gemma-2-2b"].attn_softcap, cfgs["gemma-2-2b"].logit_softcap) == (50.0, 30.0)
    assert cfgs["pythia-70m"].parallel
    assert {name for name, cfg in cfgs.items() if cfg.joint_qk_norm} == {
        "OLMo-2-7B", "Olmo-3-7B", "OLMoE-1B-7B-0924"
    }  # fmt: skip
    olmo3, granite = cfgs["Olmo-3-7B"], cfgs["granite-3.0-8b"]
    assert (olmo3.rope.scaling, olmo3.rope.theta, olmo3.local_rope) == ("yarn", 5e5, Rope(5e5))
    assert (granite.embed_scale, granite.attn_scale, granite.resid_scale) == (12, 1 / 128, 0.22)
    assert granite.logit_scale == 1 / 16
    assert [i for i, stays in enumerate(cfgs["SmolLM3-3B"].unrotated) if stays] == list(range(3, 36, 4))


def sizes(d_model, n_layers, heads, d_mlp, vocab, **more):
    """The sizes of a config.json; `heads` is the number of query heads, or that and the number of KV heads."""
    heads, kv_heads = heads if isinstance(heads, tuple) else (heads, heads)
    return {"hidden_size": d_model, "num_hidden_layers": n_layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": d_mlp, "vocab_size": vocab, **more}  # fmt: skip


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def text_of_gemma3(n, d_model):
    """Of the n published parameters of a Gemma 3 with a vision tower (SigLIP, and a projector), those of its text."""
    return n - 416_866_032 - 1152 * (d_model + 1)


# Sizes from the config.json of published models, and the number of parameters that Hugging Face shows for their files.
COUNTED = {
    "Llama-2-7b": ("llama", sizes(4096, 32, 32, 11008, 32000), 6_738_415_616),
    "Llama-3.1-70B": ("llama", sizes(8192, 80, (64, 8), 28672, 128256), 70_553_706_496),
    "Mistral-Small-24B": ("mistral", sizes(5120, 40, (32, 8), 32768, 131072, head_dim=128), 23_572_403_200),
    "Ministral-8B": ("ministral", sizes(4096, 36, (32, 8), 12288, 131072), 8_019_808_256),
    "Qwen2.5-72B": ("qwen2", sizes(8192, 80, (64, 8), 29568, 152064), 72_706_203_648),
    "Qwen3-32B": ("qwen3", sizes(5120, 64, (64, 8), 25600, 151936, head_dim=128, **UNTIED), 32_762_123_264),
    "gemma-2-27b": ("gemma2", sizes(4608, 46, (32, 16), 36864, 256000, head_dim=128), 27_227_128_320),
    "OLMo-2-1B": ("olmo2", sizes(2048, 16, 16, 8192, 100352), 1_484_916_736),
    "OLMo-2-13B": ("olmo2", sizes(5120, 40, 40, 13824, 100352), 13_716_198_400),
    "OLMo-2-32B": ("olmo2", sizes(5120, 64, (40, 8), 27648, 100352), 32_234_279_936),
    "granite-3.0-2b": ("granite", sizes(2048, 40, (32, 8), 8192, 49155, **TIED), 2_533_531_648),
    "starcoder2-15b": ("starcoder2", sizes(6144, 40, (48, 4), 24576, 49152, **UNTIED), 15_957_889_024),
    "command-r": ("cohere", sizes(8192, 40, 64, 22528, 256000), 34_980_831_232),
    "aya-23-8B": ("cohere", sizes(4096, 32, (32, 8), 14336, 256000), 8_028_033_024),
    "command-r7b": ("cohere2", sizes(4096, 32, (32, 8), 14336, 256000), 8_028_033_024),
    "pythia-12b": ("gpt_neox", sizes(5120, 36, 40, 20480, 50688), 11_846_072_320),
    "gpt-neox-20b": ("gpt_neox", sizes(6144, 44, 64, 24576, 50432), 20_554_567_680),
    "Mixtral-8x22B": ("mixtral", sizes(6144, 56, (48, 8), 16384, 32000, num_local_experts=8), 140_620_634_112),
    "Qwen3-235B-A22B": (
        "qwen3_moe",
        sizes(4096, 94, (64, 4), 12288, 151936, head_dim=128, num_experts=128, moe_intermediate_size=1536),
        235_093_634_560,
    ),
    "Llama-2-13b": ("llama", sizes(5120, 40, 40, 13824, 32000), 13_015_864_320),
    "Llama-2-70b": ("llama", sizes(8192, 80, (64, 8), 28672, 32000), 68_976_648_192),
    "CodeLlama-34b": ("llama", sizes(8192, 48, (64, 8), 22016, 32000), 33_743_970_304),
    "Llama-3.1-8B": ("llama", sizes(4096, 32, (32, 8), 14336, 128256), 8_030_261_248),
    "Mistral-Nemo-12B": ("mistral", sizes(5120, 40, (32, 8), 14336, 131072, head_dim=128), 12_247_782_400),
    "Qwen2.5-7B": ("qwen2", sizes(3584, 28, (28, 4), 18944, 152064), 7_615_616_512),
    "Qwen2.5-14B": ("qwen2", sizes(5120, 48, (40, 8), 13824, 152064), 14_770_033_664),
    "Qwen2.5-32B": ("qwen2", sizes(5120, 64, (40, 8), 27648, 152064), 32_763_876_352),
    "Qwen3-8B": ("qwen3", sizes(4096, 36, (32, 8), 12288, 151936, head_dim=128, **UNTIED), 8_190_735_360),
    "Qwen3-14B": ("qwen3", sizes(5120, 40, (40, 8), 17408, 151936, head_dim=128, **UNTIED), 14_768_307_200),
    "gemma-2-9b": ("gemma2", sizes(3584, 42, (16, 8), 14336, 256000, head_dim=256), 9_241_705_984),
    "gemma-3-1b": ("gemma3_text", sizes(1152, 26, (4, 1), 6912, 262144, head_dim=256), 999_885_952),
    "gemma-3-4b": (
        "gemma3_text",
        sizes(2560, 34, (8, 4), 10240, 262208, head_dim=256),
        text_of_gemma3(4_300_079_472, 2560),
    ),
    "gemma-3-12b": (
        "gemma3_text",
        sizes(3840, 48, (16, 8), 15360, 262208, head_dim=256),
        text_of_gemma3(12_187_325_040, 3840),
    ),
    "gemma-3-27b": (
        "gemma3_text",
        sizes(5376, 62, (32, 16), 21504, 262208, head_dim=128),
        text_of_gemma3(27_432_406_640, 5376),
    ),
    "Phi-3-medium": ("phi3", sizes(5120, 40, (40, 10), 17920, 32064, pad_token_id=0), 13_960_238_080),
    "phi-4": ("phi3", sizes(5120, 40, (40, 10), 17920, 100352, pad_token_id=0), 14_659_507_200),
    "Olmo-3-32B": ("olmo3", sizes(5120, 64, (40, 8), 27648, 100278), 32_233_522_176),
    "starcoder2-7b": ("starcoder2", sizes(4608, 32, (36, 4), 18432, 49152), 7_173_923_840),
    "pythia-6.9b": ("gpt_neox", sizes(4096, 32, 32, 16384, 50432), 6_857_302_016),
    "command-a": ("cohere2", sizes(12288, 64, (96, 8), 36864, 256000), 111_057_580_032),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
}
COUNTED_ROUGHLY = {  # billions of the language model, by the model card
    "Ministral-3-3B": ("ministral3", sizes(3072, 26, (32, 8), 9216, 131072, head_dim=128, **TIED), 3.4),
    "Ministral-3-8B": ("ministral3", sizes(4096, 34, (32, 8), 14336, 131072, head_dim=128, **UNTIED), 8.4),
    "Ministral-3-14B": ("ministral3", sizes(5120, 40, (32, 8), 16384, 131072, head_dim=128, **UNTIED), 13.5),
}
PUBLISHED_COUNTS = {
    "Mistral-7B-v0.1": 7_241_732_096, "Qwen2.5-0.5B": 494_032_768, "Qwen3-0.6B": 596_049_920,
    "gemma-2-2b": 2_614_341_888, "gemma-3-270m": 268_098_176, "Phi-3-mini-4k": 3_821_079_552,
    "Phi-4-mini": 3_836_021_760, "pythia-70m": 70_426_624,
    "OLMo-2-7B": 7_298_617_344, "Olmo-3-7B": 7_298_011_136, "granite-3.0-8b": 8_170_848_256,
    "SmolLM3-3B": 3_075_098_624, "starcoder2-3b": 3_030_371_328,
    "Mixtral-8x7B-v0.1": 46_702_792_704, "Qwen3-30B-A3B": 30_532_122_624, "OLMoE-1B-7B-0924": 6_919_161_856,
}  # fmt: skip


def test_published_sizes_have_the_published_number_of_parameters():
    """By shapes alone: nothing is allocated, so 72 billion parameters take no longer than 70 million."""
    raws = {name: (PUBLISHED[name], n) for name, n in PUBLISHED_COUNTS.items()}
    raws |= {name: ({"model_type": family, **raw}, n) for name, (family, raw, n) in COUNTED.items()}
    seen = {raw["model_type"] for raw, _ in raws.values()}
    for name, (raw, n) in raws.items():
        cfg = parse_config(raw, "config.json", ignore=NOT_READ)
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(cfg))) == n, name
        assert sum(map(math.prod, tensor_shapes(cfg).values())) == n, name
    for name, (family, raw, billions) in COUNTED_ROUGHLY.items():
        cfg = parse_config({"model_type": family, **raw}, "config.json")
        n = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(cfg)))
        assert math.floor(n / 1e8) == 10 * billions, name
        seen.add(family)
    assert seen == set(FAMILIES) - {"stablelm"}  # which the tests add


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("Qwen3-30B-A3B", {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 5632},
         "'qwen2_moe' is not supported; it has shared experts beside the routed ones, which no family here has; the "
         "nearest family is qwen3_moe, which does not know shared_expert_intermediate_size; supported: llama, gpt2"),
        ("Mixtral-8x7B-v0.1", {"model_type": "deepseek_v3", "n_shared_experts": 1, "kv_lora_rank": 512, "n_group": 8},
         "shared experts beside the routed ones and latent attention, which no family here has"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not implemented, only mlp_only_layers="),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not implemented"),
        ("Mixtral-8x7B-v0.1", {"num_experts_per_tok": 9}, "9 experts cannot act on a token where there are 8"),
        ("Mixtral-8x7B-v0.1", {"num_local_experts": 0}, "num_local_experts=0 is not a size"),
        ("OLMoE-1B-7B-0924", {"clip_qkv": -1.0}, "clip_qkv=-1.0 is not a positive number"),
        ("Qwen3-0.6B", {"model_type": "mine", "auto_map": {"AutoModel": "x.X"}},
         "'mine' is not supported; it is code inside the checkpoint .auto_map., and such code is never run; the near"),
        ("Qwen3-0.6B", {"model_type": "vit", "image_size": 224, "patch_size": 16},
         "it has images or sound, which no family here has; the nearest"),
        ("Qwen3-0.6B", {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {"depth": 2}},
         "images or sound, which no family here has; a text tower is read of gemma3, mistral3, qwen2_vl, qwen2_5_vl o"),
        ("Qwen3-0.6B", {"model_type": "olmo7"}, "'olmo7' is not supported; the nearest family is qwen3; supported"),
        ("pythia-70m", {"model_type": "bloom", "alibi": True}, "ALiBi positions, which .* nearest family is gpt_neox"),
        ("Qwen2.5-0.5B", {"layer_types": ["linear_attention"] * 24}, "layer_types has linear_attention"),
        ("Mistral-7B-v0.1", {"sliding_window": 0}, "sliding_window=0 is not a size"),
        ("gemma-2-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not implemented"),
        ("gemma-2-2b", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping=0.0 is not a positive number"),
        ("gemma-2-2b", {"query_pre_attn_scalar": 0}, "numbers do not fit together"),
        ("gemma-2-2b", {"query_pre_attn_scalar": -4}, "attn_scale=.* is not a positive number"),
        ("gemma-2-2b", {"layer_types": ["full_attention"]}, "transformers rejects it"),
        ("gemma-3-270m", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not implemented"),
        ("granite-3.0-8b", {"logits_scaling": 0}, "numbers do not fit together"),
        ("granite-3.0-8b", {"residual_multiplier": -0.2}, "residual_multiplier=-0.2 is not a positive number"),
        ("granite-3.0-8b", {"embedding_multiplier": 0}, "embedding_multiplier=0 is not a positive number"),
        ("SmolLM3-3B", {"no_rope_layers": [1, 0]}, "2 layers are said .* there are 36; correct .*no_rope_layers"),
        ("Mistral-7B-v0.1", {"model_type": "ministral3", "rope_parameters": {"rope_type": "default"}},
         "numbers do not fit together .*llama_4_scaling_beta"),
        ("gemma-3-270m", {"rope_local_base_freq": 0}, "rope_theta=0 is not a value"),
    ],
)  # fmt: skip
def test_configurations_are_refused_by_what_is_missing(name, changes, says):
    with pytest.raises(ConfigError, match=says):
        parse_config({**PUBLISHED[name], **changes}, "config.json", ignore=NOT_READ)


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
QWEN_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "patch_size": 4}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 1, 0]}
BIASED = {**NO_HEAD_DIM, "rope_parameters": QWEN_ROPE}
MODELS = {
    "gemma3": {
        "text_config": {**LLAMA_TIED, "query_pre_attn_scalar": 8, "sliding_window": 5, "rope_parameters": GEMMA3_ROPE},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 60, "boi_token_index": 59, "eoi_token_index": 58,
    },
    "mistral3": {
        "text_config": {**LLAMA, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
        "tie_word_embeddings": False, "image_token_index": 60,
    },
    "qwen2_vl": {
        "text_config": BIASED, "vision_config": QWEN_VISION, "tie_word_embeddings": False,
        "image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57,
    },
    "qwen2_5_vl": {
        "text_config": BIASED,
        "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
                          "out_hidden_size": 24, "fullatt_block_indexes": [0]},
        "tie_word_embeddings": False,
        "image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57,
    },
}  # fmt: skip


@pytest.mark.parametrize("model_type", MODELS)
def test_the_text_tower_of_a_model_of_images_and_text(model_type, tmp_path):
    """Its logits are those of the whole model on text; the rest is named; saved, it is a model of text alone."""
    config = transformers.AutoConfig.for_model(model_type, **MODELS[model_type])
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in whole.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
        expected = whole(input_ids=torch.tensor(TOKENS)).logits.numpy()
    whole.save_pretrained(tmp_path / "whole")
    ours = load_checkpoint(tmp_path / "whole")
    logits = forward(ours.cfg, ours.params, jnp.asarray(TOKENS)).logits
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    parts = ["visual"] if model_type.startswith("qwen") else ["multi_modal_projector", "vision_tower"]
    assert sorted(part.split()[0] for part in ours.left_out) == parts
    save_checkpoint(tmp_path / "text", ours)
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager")
    with torch.no_grad():
        np.testing.assert_allclose(text(torch.tensor(TOKENS)).logits.numpy(), expected, atol=1e-4, rtol=1e-4)
    # Rewritten, it is the whole model still, and the tower's tensors are known by the names of its family.
    rewrite_folder(tmp_path / "whole", tmp_path / "out", lambda name, w: 2 * w if name == "model.norm.weight" else w)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "out"))
    changed = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    assert (len(changed), changed[0].endswith(".norm.weight"), before.keys()) == (1, True, after.keys())
    transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


def test_names_and_configurations_of_both_ways_of_saving_are_read(tmp_path):
    """Older files of Qwen2-VL have a flat configuration; newer ones name the text tower in every tensor."""
    config = transformers.AutoConfig.for_model("qwen2_vl", **MODELS["qwen2_vl"])
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    expected = load_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    path.write_text(
        json.dumps({**text, **raw, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}), encoding="utf-8"
    )
    tensors = load_file(tmp_path / "model.safetensors")
    other = {}
    for name, value in tensors.items():
        stem = name.removeprefix("model.").removeprefix("language_model.")
        is_tower = not stem.startswith(("visual", "lm_head"))
        other[f"model.language_model.{stem}" if is_tower and "language_model" not in name else
              f"model.{stem}" if is_tower else name] = value  # fmt: skip
    assert other.keys() != tensors.keys()
    save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = load_checkpoint(tmp_path)
    assert ours.cfg == expected.cfg
    np.testing.assert_array_equal(ours.params["blocks"]["attn"]["W_Q"], expected.params["blocks"]["attn"]["W_Q"])


def test_a_model_of_images_without_a_text_tower_is_refused(tmp_path):
    config = transformers.AutoConfig.for_model("qwen2_vl", **MODELS["qwen2_vl"])
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    images = {name: value for name, value in tensors.items() if "visual" in name}
    save_file(images, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"no text tower, only visual \({len(images)} tensors\); a model of im"):
        load_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="no text_config, so there is no text tower to read"):
        text_config({"model_type": "gemma3", "vision_config": VISION}, "config.json")


def test_a_text_tower_of_another_family_is_refused():
    raw = {"model_type": "gemma3", "text_config": {"model_type": "mistral"}}
    with pytest.raises(ConfigError, match="text tower is of model_type 'mistral'"):
        text_config(raw, "config.json")
