"""One table of tiny random architectures, shared by the tests; HF torch is the oracle."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers

import tests.scratch_families  # noqa: F401  registers a family that the package does not have
from wpjax.checkpoints.checkpoint import load_checkpoint
from wpjax.pairs import Pair

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


LLAMA_TIED = {name: value for name, value in LLAMA.items() if name != "tie_word_embeddings"}  # as is their default
NO_HEAD_DIM = {name: value for name, value in LLAMA.items() if name != "head_dim"}  # the heads share the width
LAYER_NORM = {name: value for name, value in NO_HEAD_DIM.items() if name != "rms_norm_eps"}
EXPERTS = {"intermediate_size": 8, "num_experts_per_tok": 2}  # as many neurons as Llama has, in five experts
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {
    **LLAMA_TIED,
    "head_dim": 6,
    "query_pre_attn_scalar": 12,
    "final_logit_softcapping": 3.0,
    "sliding_window": 5,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
PHI3_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [2.0, 3.0, 4.0],
}
NEOX = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
}


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
    "llama-yarn": ("llama", _rope(**YARN)),
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
    "gpt-neox": ("gpt_neox", NEOX),
    "mistral": ("mistral", {**LLAMA, "num_key_value_heads": 6, "sliding_window": 5}),
    "mistral-full": ("mistral", {**LLAMA, "sliding_window": None}),
    "qwen2": (
        "qwen2",
        {**NO_HEAD_DIM, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5,
         "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", LLAMA),
    "qwen3-biases": ("qwen3", {**LLAMA, "attention_bias": True}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0}),
    "gemma3": (
        "gemma3_text",
        {**GEMMA, "rope_parameters": GEMMA3_ROPE,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma3-plain": ("gemma3_text", {**LLAMA_TIED, "query_pre_attn_scalar": 8}),
    "phi3": (
        "phi3",
        {**NO_HEAD_DIM, "num_attention_heads": 3, "num_key_value_heads": 1, "sliding_window": 5,
         "original_max_position_embeddings": 32, "rope_parameters": PHI3_ROPE, "pad_token_id": 0},
    ),
    "ministral": (
        "ministral",
        {**LLAMA, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "ministral3": (
        "ministral3",
        {**LLAMA, "rope_parameters": {**YARN, "rope_theta": 500.0, "original_max_position_embeddings": 8,
                                      "llama_4_scaling_beta": 0.3}},
    ),
    "starcoder2": ("starcoder2", {**LAYER_NORM, "sliding_window": 5}),
    "smollm3": (
        "smollm3",
        {**NO_HEAD_DIM, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 5, "pad_token_id": 0,
         "rope_parameters": {**YARN, "rope_theta": 500.0}},
    ),
    "granite": (
        "granite",
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "embedding_multiplier": 1.5, "attention_multiplier": 0.25,
         "residual_multiplier": 0.8, "logits_scaling": 0.7},
    ),
    "olmo2": ("olmo2", NO_HEAD_DIM),
    "olmo3": (
        "olmo3",
        {**NO_HEAD_DIM, "sliding_window": 5,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
         "rope_parameters": {"full_attention": {**YARN, "rope_theta": 500.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}},
    ),
    "cohere": ("cohere", {**LAYER_NORM, "logit_scale": 0.4}),
    "cohere2": (
        "cohere2",
        {**LAYER_NORM, "attention_bias": True, "sliding_window": 5, "logit_scale": 0.6, "tie_word_embeddings": True,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "mixtral": ("mixtral", {**LLAMA, **EXPERTS, "num_local_experts": 5, "sliding_window": 5}),
    "qwen3-moe": (
        "qwen3_moe",
        {**LLAMA, **EXPERTS, "intermediate_size": 7, "moe_intermediate_size": 8, "num_local_experts": 5,
         "norm_topk_prob": True, "attention_bias": True},
    ),
    "olmoe": ("olmoe", {**NO_HEAD_DIM, **EXPERTS, "num_experts": 5, "clip_qkv": 0.8, "eos_token_id": None}),
    "stablelm": (
        "stablelm",
        {**LAYER_NORM, "use_qkv_bias": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HfModel:
    name: str
    model: Any
    folder: Path

    @property
    def config(self) -> Any:
        return self.model.config


def random_model(name: str, seed: int = 0) -> Any:
    """A torch model of the table whose every parameter, biases and norms included, is random and large."""
    return random_of(*SPECS[name], seed=seed)


def random_of(model_type: str, attributes: dict[str, Any], seed: int = 0) -> Any:
    """Likewise, of any configuration."""
    config = transformers.AutoConfig.for_model(model_type, **attributes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
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


ROUTED = ("mixtral", "qwen3_moe", "olmoe")
"""Families with routed experts."""

PAIR_SPECS = tuple(
    "llama-gqa3 granite gpt2-tied gpt2-untied gpt-neox mistral qwen2 qwen3 gemma2 gemma3 phi3 olmo2 cohere2 "
    "mixtral".split()
)


@dataclasses.dataclass(frozen=True)
class HfPair:
    """A base and an expert as torch models, and the folders they were saved to."""

    name: str
    base: HfModel
    expert: HfModel


def build_pair(name: str, folder: Path, strength: float = 0.3) -> HfPair:
    """A random base, and an expert a share of the way towards another random model."""
    base, other = build(name, folder / "base"), random_model(name, seed=1)
    expert = random_model(name)
    with torch.no_grad():
        for p, q in zip(expert.parameters(), other.parameters(), strict=True):
            p.add_(strength * (q - p))
    expert.save_pretrained(folder / "expert")
    return HfPair(name, base, HfModel(name, expert, folder / "expert"))


def as_pair(hf_pair: HfPair) -> Pair:
    """The two models as ours, without a tokenizer: tests of random models bring their own tokens."""
    base, expert = (load_checkpoint(str(m.folder)) for m in (hf_pair.base, hf_pair.expert))
    return Pair(base.cfg, base.params, expert.params, None, base, expert)


def slices(model: Any, component: Any) -> dict[str, Any]:
    """Which part of which HF tensor a component owns, written down here once more, from HF's own layout.

    HF stacks heads along the rows of q_proj, k_proj and v_proj and along the columns of o_proj; GPT-2 stores its
    matrices transposed, with queries, keys and values fused along the columns of c_attn. GPT-NeoX fuses them along the
    rows of query_key_value, head by head; Phi-3 along the rows of qkv_proj, all queries first. Norms of queries and
    keys are no head's own. Routed experts are stacked along a first axis, with all gates before all inputs along the
    second one of gate_up_proj.
    """
    c, config = component, model.config
    names = list(model.state_dict())
    if config.model_type not in ("gpt2", "gpt_neox"):
        norms = ["input_layernorm", "post_attention_layernorm"]
        if config.model_type.startswith("gemma"):
            norms = [norms[0], "pre_feedforward_layernorm", norms[1], "post_feedforward_layernorm"]
        if config.model_type in ("olmo2", "olmo3"):
            norms = [norms[1], "post_feedforward_layernorm"]
        if config.model_type.startswith("cohere"):
            norms = norms[:1]
        dh = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layer = f"model.layers.{c.layer}."
        rows = slice(c.index * dh, (c.index + 1) * dh)
        owned: dict[str, dict[str, Any]] = {
            "head": {"self_attn.q_proj.weight": rows, "self_attn.q_proj.bias": rows,
                     "self_attn.o_proj.weight": (slice(None), rows)},
            "kv_group": {f"self_attn.{p}_proj.{w}": rows for p in "kv" for w in ("weight", "bias")},
            "neuron": {f"mlp.{p}_proj.{w}": c.index for p in ("gate", "up") for w in ("weight", "bias")}
            | {"mlp.down_proj.weight": (slice(None), c.index)},
            "attn": {n.removeprefix(layer): ... for n in names if n.startswith(layer + "self_attn")},
            "mlp": {n.removeprefix(layer): ... for n in names if n.startswith(layer + "mlp")},
            "layer": {n.removeprefix(layer): ... for n in names if n.startswith(layer)},
            "norm": {f"{norms[c.index % len(norms)]}.weight": ...},
        }  # fmt: skip
        if config.model_type == "phi3":
            first = [(config.num_attention_heads + i * config.num_key_value_heads + c.index) * dh for i in range(2)]
            owned["head"]["self_attn.qkv_proj.weight"] = rows
            owned["kv_group"] = {"self_attn.qkv_proj.weight": [slice(start, start + dh) for start in first]}
            owned["neuron"]["mlp.gate_up_proj.weight"] = [c.index, config.intermediate_size + c.index]
        if config.model_type in ROUTED:
            width = config.moe_intermediate_size if config.model_type == "qwen3_moe" else config.intermediate_size
            expert, f = divmod(c.index, width)
            owned["neuron"] = {"mlp.experts.gate_up_proj": [(expert, f), (expert, width + f)],
                               "mlp.experts.down_proj": (expert, slice(None), f)}  # fmt: skip
            owned["routed_expert"] = {f"mlp.experts.{p}_proj": c.index for p in ("gate_up", "down")}
            owned["router"] = {"mlp.gate.weight": ...}
        model_wide = {"embed": ["model.embed_tokens.weight"], "unembed": ["lm_head.weight"],
                      "final_norm": ["model.norm.weight"]}  # fmt: skip
    elif config.model_type == "gpt_neox":
        dh, layer = config.hidden_size // config.num_attention_heads, f"gpt_neox.layers.{c.layer}."
        q, k, v = (slice((3 * c.index + i) * dh, (3 * c.index + i + 1) * dh) for i in range(3))  # head by head
        both = ("weight", "bias")
        owned = {
            "head": {f"attention.query_key_value.{w}": q for w in both}
            | {"attention.dense.weight": (slice(None), slice(c.index * dh, (c.index + 1) * dh))},
            "kv_group": {f"attention.query_key_value.{w}": [k, v] for w in both},
            "neuron": {f"mlp.dense_h_to_4h.{w}": c.index for w in both}
            | {"mlp.dense_4h_to_h.weight": (slice(None), c.index)},
            "attn": {n.removeprefix(layer): ... for n in names if n.startswith(layer + "attention.")},
            "mlp": {n.removeprefix(layer): ... for n in names if n.startswith(layer + "mlp")},
            "layer": {n.removeprefix(layer): ... for n in names if n.startswith(layer)},
            "norm": {f"{('input_layernorm', 'post_attention_layernorm')[c.index % 2]}.{w}": ... for w in both},
        }
        model_wide = {"embed": ["gpt_neox.embed_in.weight"], "unembed": ["lm_head.weight"],
                      "final_norm": [f"gpt_neox.final_layer_norm.{w}" for w in both]}  # fmt: skip
    else:
        d, dh, layer = config.n_embd, config.n_embd // config.n_head, f"transformer.h.{c.layer}."
        q, k, v = (slice(i * d + c.index * dh, i * d + (c.index + 1) * dh) for i in range(3))
        every = slice(None)
        rows = slice(c.index * dh, (c.index + 1) * dh)
        owned = {
            "head": {"attn.c_attn.weight": (every, q), "attn.c_attn.bias": q, "attn.c_proj.weight": rows},
            "kv_group": {"attn.c_attn.weight": [(every, k), (every, v)], "attn.c_attn.bias": [k, v]},
            "neuron": {"mlp.c_fc.weight": (every, c.index), "mlp.c_fc.bias": c.index, "mlp.c_proj.weight": c.index},
            "attn": {n.removeprefix(layer): ... for n in names if n.startswith(layer + "attn")},
            "mlp": {n.removeprefix(layer): ... for n in names if n.startswith(layer + "mlp")},
            "layer": {n.removeprefix(layer): ... for n in names if n.startswith(layer)},
            "norm": {f"ln_{c.index + 1}.{w}": ... for w in ("weight", "bias")},
        }
        model_wide = {"embed": ["transformer.wte.weight", "transformer.wpe.weight"], "unembed": ["lm_head.weight"],
                      "final_norm": ["transformer.ln_f.weight", "transformer.ln_f.bias"]}  # fmt: skip
    if c.kind in model_wide:
        return {name: [...] for name in model_wide[c.kind]}
    wanted = {layer + name: at if isinstance(at, list) else [at] for name, at in owned[c.kind].items()}
    return {name: at for name, at in wanted.items() if name in names}


def patched_torch(pair: HfPair, component: Any) -> Any:
    """The torch base with a component's slices copied from the expert's state dict."""
    model, donor = copy.deepcopy(pair.base.model), pair.expert.model.state_dict()
    state = model.state_dict()
    with torch.no_grad():
        for name, parts in slices(model, component).items():
            for at in parts:
                state[name][at] = donor[name][at]
    return model
