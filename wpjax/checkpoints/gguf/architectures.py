"""The architectures of llama.cpp whose files are read, as data: how its converter writes each family.

Names of tensors come from the package gguf, by which the converter translates HF's. Names of HF's attributes come from
the family. What is left to say of an architecture stands in one entry of `ARCHITECTURES`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from wpjax.checkpoints.gguf.metadata import Metadata, shortest
from wpjax.errors import CheckpointError, ConfigError
from wpjax.models.config import Rope
from wpjax.models.families import FAMILIES, Family
from wpjax.models.rotary import frequencies


@runtime_checkable
class Source(Protocol):
    """What a configuration is made from.

    Attributes:
        metadata: the file's entries.
        architecture: the file's architecture, which is a key of `ARCHITECTURES`.
        tensors: the names of all tensors, as llama.cpp writes them.
    """

    metadata: Metadata
    architecture: str
    tensors: frozenset[str]

    def vector(self, name: str) -> np.ndarray:
        """A tensor by llama.cpp's name, as float32."""
        ...


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How llama.cpp writes one family, apart from what it writes alike for all of them.

    Attributes:
        family: `model_type` of the family that these files are read as.
        keys: entry of the metadata, without the architecture's name and the dot -> the `ModelConfig` field it gives.
            These entries must be there.
        optional: likewise, for entries that may be missing. The family's default holds then.
        layouts: ending of a tensor's name -> einops pattern from llama.cpp's layout to HF's. Axes: h heads, k KV heads,
            n queries, keys and values, t the two dimensions of a rotated pair.
        more: gives further HF attributes, or others; it has the source and the attributes so far.
        others: entries that `more` reads.
        instead: gives the `model_type` of another family, which llama.cpp writes under the same name, if the file is of
            it; None if it is not.
    """

    family: str
    keys: Mapping[str, str]
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    more: Callable[[Source, Mapping[str, Any]], Mapping[str, Any]] = lambda source, config: {}
    others: frozenset[str] = frozenset()
    instead: Callable[[Source], str | None] = lambda source: None


_SIZES = {
    "block_count": "n_layers",
    "context_length": "n_ctx",
    "embedding_length": "d_model",
    "feed_forward_length": "d_mlp",
    "attention.head_count": "n_heads",
}
_RMS = {"attention.layer_norm_rms_epsilon": "norm_eps"}
_LOGITS = {"logit_scale": "logit_scale"}
_LAYER_NORM = {"attention.layer_norm_epsilon": "norm_eps"}
_WIDTHS = ("attention.key_length", "attention.value_length")
_ROTARY = frozenset(
    "rope.dimension_count rope.freq_base rope.scale_linear rope.scaling.type rope.scaling.factor "
    "rope.scaling.finetuned rope.scaling.original_context_length rope.scaling.attn_factor "
    "rope.scaling.yarn_attn_factor rope.scaling.yarn_ext_factor rope.scaling.yarn_beta_fast "
    "rope.scaling.yarn_beta_slow".split()
)
# Entry -> its only value that changes nothing, besides 0, false and nothing.
_HARMLESS = {"attention.causal": True, "tensor_data_layout": "Meta AI original pth", "expert_gating_func": 1}
# Tensors that say how positions are rotated. HF says it with numbers in config.json.
LLAMA3_FACTORS, SHORT_FACTORS, LONG_FACTORS = (
    f"{name}.weight" for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")
)


def _no_window(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse a window of some layers, of which these files do not say which they are."""
    name = f"{source.architecture}.attention.sliding_window"
    window = source.metadata.number(name, 0)
    if 0 < window < config["max_position_embeddings"]:
        raise ConfigError(f"{source.metadata.where}: {name}={window} is not implemented for {source.architecture}")
    return {}


def _window(source: Source) -> int | None:
    """The sliding window; None if there is none, or it is as long as the context."""
    prefix = source.architecture
    window = source.metadata.number(f"{prefix}.attention.sliding_window", 0)
    return window if 0 < window < source.metadata.size(f"{prefix}.context_length") else None


def _slides(source: Source, config: Mapping[str, Any], every: int) -> list[bool]:
    """Which layers have the sliding window.

    Args:
        source: the file.
        config: the attributes so far.
        every: of a file that does not say it, one layer in so many has none.
    """
    metadata, n_layers = source.metadata, config["num_hidden_layers"]
    name = f"{source.architecture}.attention.sliding_window_pattern"
    pattern = metadata.get(name)
    if not isinstance(pattern, list):
        every = metadata.size(name, every)
        return [(layer + 1) % every > 0 for layer in range(n_layers)]
    if len(pattern) != n_layers:
        raise ConfigError(f"{metadata.where}: {name} speaks of {len(pattern)} layers, there are {n_layers}")
    return [bool(layer) for layer in pattern]


def _layer_types(slides: list[bool]) -> list[str]:
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _like_llama(source: Source) -> str | None:
    """A Llama with routed experts is a Mixtral, one with a window a Mistral: llama.cpp has one name for the three."""
    if source.metadata.number("llama.expert_count", 0):
        return "mixtral"
    return "mistral" if _window(source) else None


def _llama(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The window of a Mistral or a Mixtral, and the experts of the latter."""
    n_experts = {"num_local_experts": source.metadata.number("llama.expert_count", 0)}
    return {"sliding_window": _window(source)} | (_active(source) | n_experts if all(n_experts.values()) else {})


def _active(source: Source) -> dict[str, Any]:
    """How many routed experts act on a token."""
    return {"num_experts_per_tok": source.metadata.size(f"{source.architecture}.expert_used_count")}


def _qwen3_moe(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The routed experts: llama.cpp divides their weights by the sum, as all published models do."""
    active, width = _active(source), config["intermediate_size"]
    return {
        **_no_window(source, config),
        **active,
        "num_experts": source.metadata.size("qwen3moe.expert_count"),
        "moe_intermediate_size": source.metadata.size(
            "qwen3moe.expert_feed_forward_length", width // active["num_experts_per_tok"]
        ),
        "norm_topk_prob": True,
    }


def _olmoe(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The routed experts: llama.cpp leaves their weights as they are, and clips nothing."""
    n_experts = source.metadata.size("olmoe.expert_count")
    return {**_active(source), "num_experts": n_experts, "norm_topk_prob": False, "clip_qkv": None}


def _olmo(source: Source) -> str | None:
    """An OLMo 2 with a window is an OLMo 3."""
    return "olmo3" if _window(source) else None


def _olmo3(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Which layers of an OLMo 3 have the window; these do not scale rotary positions."""
    if not _window(source):
        return {}
    rope = config["rope_parameters"]
    plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    theta = source.metadata.number("olmo2.rope.freq_base_swa", plain["rope_theta"])
    return {
        "sliding_window": _window(source),
        "layer_types": _layer_types(_slides(source, config, every=4)),
        "rope_parameters": {"full_attention": rope, "sliding_attention": {**plain, "rope_theta": float(theta)}},
    }


def _granite(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """By what logits are divided."""
    name = "granite.rope.scaling.finetuned"  # a switch for rotary positions, in this architecture
    if source.metadata.get(name) is False:
        raise ConfigError(f"{source.metadata.where}: {name}=False, no rotary positions, is not implemented for granite")
    return {"logits_scaling": source.metadata.number("granite.logit_scale")}


def _cohere(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Whether each head has norms of its own, as in Command R+."""
    return {"use_qk_norm": "blk.0.attn_q_norm.weight" in source.tensors}


def _cohere2(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Which layers have the window."""
    window = source.metadata.size("cohere2.attention.sliding_window")
    return {"sliding_window": window, "layer_types": _layer_types(_slides(source, config, every=4))}


def _smollm3(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """llama.cpp has rotary positions in three of four layers; its files do not say which."""
    return {"no_rope_layer_interval": 4, "use_sliding_window": False}


def _ministral3(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """How queries grow. Of the two numbers that scale cosine and sine, llama.cpp takes one to be 1."""
    metadata, rope = source.metadata, dict(config["rope_parameters"])
    if rope["rope_type"] != "yarn":
        raise ConfigError(f"{metadata.where}: rotary scaling {rope['rope_type']!r} is not implemented for mistral3")
    scale = metadata.number("mistral3.rope.scaling.yarn_log_multiplier", 0)
    if scale:
        rope |= {"mscale": 1.0, "mscale_all_dim": scale}
    rope["llama_4_scaling_beta"] = metadata.number("mistral3.attention.temperature_scale")
    return {"rope_parameters": rope, "sliding_window": None, **_no_window(source, config)}


def _query_scalar(config: Mapping[str, Any], n_layers_of_27b: int) -> int:
    """HF's `query_pre_attn_scalar`, by llama.cpp's rule: in the model of 27 billion it is not the width of a head."""
    if config["num_hidden_layers"] == n_layers_of_27b:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _gemma2(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scale of scores, and the window of every other layer."""
    window = source.metadata.size("gemma2.attention.sliding_window", 4096)  # older files do not say it
    return {"query_pre_attn_scalar": _query_scalar(config, n_layers_of_27b=46), "sliding_window": window}


def _gemma3(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scale of scores, which layers have a window, and how these rotate positions."""
    metadata = source.metadata
    metadata.needed("gemma3.rope.freq_base")
    name = "gemma3.attention.sliding_window"
    window = metadata.size(name) if metadata.get(name) else None
    slides = _slides(source, config, every=6)
    return {
        "query_pre_attn_scalar": _query_scalar(config, n_layers_of_27b=62),
        "sliding_window": window,
        "layer_types": _layer_types([bool(window) and slide for slide in slides]),
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": float(metadata.number("gemma3.rope.freq_base_swa", 10_000.0)),
            },
        },
    }


def _phi3(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The window, which is 0 in models without one."""
    window = source.metadata.number("phi3.attention.sliding_window")
    original = source.metadata.size("phi3.rope.scaling.original_context_length", config["max_position_embeddings"])
    return {
        "sliding_window": window if 0 < window < config["max_position_embeddings"] else None,
        "original_max_position_embeddings": original,
    }


def _gpt_neox(source: Source, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"use_parallel_residual": bool(source.metadata.needed("gptneox.use_parallel_residual"))}


_SOFT_CAPS = {"attn_logit_softcapping": "attn_softcap", "final_logit_softcapping": "logit_softcap"}
_WINDOW = frozenset({"attention.sliding_window"})
_PATTERN = _WINDOW | {"attention.sliding_window_pattern", "rope.freq_base_swa"}
_EXPERTS = frozenset({"expert_count", "expert_used_count", "expert_feed_forward_length"})
# The two dimensions of a rotated pair stand side by side in queries and keys. In HF's layout, and in the other
# architectures, they are half a head apart.
_SIDE_BY_SIDE = {
    f"attn_{part}.{kind}": f"({n} e t) ... -> ({n} t e) ..."
    for part, n in (("q", "h"), ("k", "k"))
    for kind in ("weight", "bias")
}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(
            "llama",
            _SIZES | _RMS,
            layouts=_SIDE_BY_SIDE,
            more=_llama,
            others=_WINDOW | _EXPERTS,
            instead=_like_llama,
        ),
        "qwen2": Architecture("qwen2", _SIZES | _RMS, more=_no_window, others=_WINDOW),
        "qwen3": Architecture("qwen3", _SIZES | _RMS, more=_no_window, others=_WINDOW),
        "gemma2": Architecture("gemma2", _SIZES | _RMS, _SOFT_CAPS, more=_gemma2, others=_WINDOW),
        "gemma3": Architecture(
            "gemma3_text",
            _SIZES | _RMS,
            {"final_logit_softcapping": "logit_softcap"},
            more=_gemma3,
            others=_PATTERN,
        ),
        "phi3": Architecture("phi3", _SIZES | _RMS, more=_phi3, others=_WINDOW),
        "mistral3": Architecture(
            "ministral3",
            _SIZES | _RMS,
            layouts=_SIDE_BY_SIDE,
            more=_ministral3,
            others=_WINDOW | {"attention.temperature_scale", "rope.scaling.yarn_log_multiplier"},
        ),
        "smollm3": Architecture("smollm3", _SIZES | _RMS, layouts=_SIDE_BY_SIDE, more=_smollm3),
        "granite": Architecture(
            "granite",
            _SIZES
            | _RMS
            | {"attention.scale": "attn_scale", "embedding_scale": "embed_scale", "residual_scale": "resid_scale"},
            layouts=_SIDE_BY_SIDE,
            more=_granite,
            others=frozenset({"logit_scale"}),
        ),
        "olmo2": Architecture("olmo2", _SIZES | _RMS, more=_olmo3, others=_PATTERN, instead=_olmo),
        "olmoe": Architecture("olmoe", _SIZES | _RMS, more=_olmoe, others=_EXPERTS),
        "qwen3moe": Architecture("qwen3_moe", _SIZES | _RMS, more=_qwen3_moe, others=_WINDOW | _EXPERTS),
        "starcoder2": Architecture("starcoder2", _SIZES | _LAYER_NORM),
        "command-r": Architecture("cohere", _SIZES | _LAYER_NORM | _LOGITS, more=_cohere),
        "cohere2": Architecture("cohere2", _SIZES | _LAYER_NORM | _LOGITS, more=_cohere2, others=_PATTERN),
        "gptneox": Architecture(
            "gpt_neox",
            _SIZES | _LAYER_NORM,
            layouts={f"attn_qkv.{kind}": "(n h e) ... -> (h n e) ..." for kind in ("weight", "bias")},
            more=_gpt_neox,
            others=frozenset({"use_parallel_residual"}),
        ),
        "gpt2": Architecture(
            "gpt2",
            _SIZES | _LAYER_NORM,
            layouts={
                f"{name}.weight": "out in -> in out" for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
            },
        ),
    }
)
"""Every architecture that is read, by its name in `general.architecture`."""


def family_of(source: Source) -> Family:
    """The family that a file is read as.

    Args:
        source: the file, or its metadata and names.
    """
    entry = ARCHITECTURES[source.architecture]
    return FAMILIES[entry.instead(source) or entry.family]


def hf_config(source: Source) -> dict[str, Any]:
    """The content of the config.json that HF would write for a model.

    Args:
        source: the file.

    Raises:
        CheckpointError: an entry is missing, or has a value that cannot be used.
        ConfigError: an entry is unknown, or asks for something that is not implemented.
    """
    entry, metadata, prefix = ARCHITECTURES[source.architecture], source.metadata, f"{source.architecture}."
    family = family_of(source)
    _refuse_unknown(source, family)
    attributes = {"d_mlp": "intermediate_size", **{ours: hf for hf, ours in family.fields.items()}}
    config: dict[str, Any] = {"model_type": family.model_type}
    for key, field in entry.keys.items():
        name = prefix + key
        config[attributes[field]] = metadata.size(name) if key in _SIZES else metadata.number(name)
    for key, field in entry.optional.items():
        config[attributes[field]] = metadata.number(prefix + key) if metadata.get(prefix + key) else None
    d_model, n_heads = (config[attributes[field]] for field in ("d_model", "n_heads"))
    n_kv_heads = metadata.size(f"{prefix}attention.head_count_kv", n_heads)
    d_head = _head_width(source, family, d_model // n_heads)
    for field, value, only in (("n_kv_heads", n_kv_heads, n_heads), ("d_head", d_head, d_model // n_heads)):
        if field in attributes:
            config[attributes[field]] = value
        elif value != only:
            raise ConfigError(f"{metadata.where}: {field}={value} is not implemented for {family.model_type}")
    config[attributes["d_vocab"]] = metadata.size(f"{prefix}vocab_size", len(metadata.tokens))
    for field, biases in (("qkv_bias", ("attn_q", "attn_qkv")), ("mlp_bias", ("ffn_up",))):
        if field in attributes:
            config[attributes[field]] = any(f"blk.0.{name}.bias" in source.tensors for name in biases)
    config[attributes["tied"]] = "output.weight" not in source.tensors
    if family.rotary:
        config["rope_parameters"] = _rope(source, family, config[attributes["n_ctx"]], d_head)
    config |= entry.more(source, config)
    config = {name: value for name, value in config.items() if name == "model_type" or name in family.attributes}
    return {"architectures": [family.architecture], **config, **_special_tokens(metadata)}


def _refuse_unknown(source: Source, family: Family) -> None:
    """Refuse entries that may change the model and are not read.

    Raises:
        ConfigError: there are some.
    """
    entry, prefix, metadata = ARCHITECTURES[source.architecture], f"{source.architecture}.", source.metadata
    known = {*entry.keys, *entry.optional, *entry.others, "attention.head_count_kv", "vocab_size", *_WIDTHS}
    known |= _ROTARY if family.rotary else set()
    unknown = {}
    for name in metadata.names():
        key = name.removeprefix(prefix)
        if key == name or key in known:
            continue
        value = metadata.get(name)
        if value not in (0, 0.0, False, "", [], _HARMLESS.get(key)):
            unknown[name] = " ".join(str(value).split())[:60]
    if unknown:
        raise ConfigError(
            f"{metadata.where}: unknown {', '.join(f'{k}={v}' for k, v in unknown.items())}; if it does not "
            f"change the forward pass, pass {' '.join(f'--ignore-config {name}' for name in unknown)}"
        )


def _head_width(source: Source, family: Family, default: int) -> int:
    """The width of a head.

    Raises:
        ConfigError: keys and values are of different width, or only a part of each head is rotated in a family where
            all of it is.
    """
    whole = family.rotary and not family.partly_rotary
    names = [f"{source.architecture}.{key}" for key in (*_WIDTHS, *(("rope.dimension_count",) if whole else ()))]
    sizes = {name: source.metadata.size(name) for name in names if source.metadata.get(name) is not None}
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"{source.metadata.where}: {', '.join(f'{k}={v}' for k, v in sizes.items())} differ; only equal widths of "
            "keys, values and rotated dimensions are implemented"
        )
    return next(iter(sizes.values()), default)


def _rope(source: Source, family: Family, n_ctx: int, d_head: int) -> dict[str, Any]:
    """How positions are rotated, as HF's `rope_parameters`.

    Raises:
        CheckpointError: factors of single dimensions are given that HF has no numbers for.
        ConfigError: positions are scaled in a way that is not read.
    """
    metadata, prefix = source.metadata, f"{source.architecture}.rope."
    kind = metadata.get(f"{prefix}scaling.type")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(metadata.number(f"{prefix}freq_base", 1e4))}
    if family.partly_rotary:
        rope["partial_rotary_factor"] = _share(metadata.size(f"{prefix}dimension_count", d_head), d_head)
    if kind not in (None, "none", "linear", "yarn", "longrope"):
        raise ConfigError(f"{metadata.where}: rotary scaling {kind!r} in a GGUF cannot be read; use safetensors")
    if kind == "yarn":
        return rope | _yarn(metadata, prefix, n_ctx)
    if LONG_FACTORS in source.tensors or SHORT_FACTORS in source.tensors or kind == "longrope":
        return rope | _longrope(source, prefix, n_ctx)
    if LLAMA3_FACTORS in source.tensors:
        return rope | _llama3(source, rope["rope_theta"], d_head)
    factor = next(
        (metadata.number(name) for key in ("scaling.factor", "scale_linear") if metadata.get(name := prefix + key)), 1.0
    )
    return rope if kind == "none" or factor == 1.0 else {**rope, "rope_type": "linear", "factor": factor}


def _share(part: int, whole: int) -> float:
    """The share of a head that is rotated, such that transformers makes the same number of dimensions of it."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 1.0)


def _yarn(metadata: Metadata, prefix: str, n_ctx: int) -> dict[str, Any]:
    """YaRN's numbers. Both programs multiply cosine and sine by 1 + 0.1 ln factor if the file says nothing of it."""
    factor = float(metadata.number(f"{prefix}scaling.factor"))
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        value = metadata.number(f"{prefix}scaling.{key}", 1.0)
        says_it = (
            key == "yarn_attn_factor" and factor >= 1 and math.isclose(value, 1 + 0.1 * math.log(factor), rel_tol=1e-6)
        )
        if value not in (0, 1) and not says_it:
            raise ConfigError(
                f"{metadata.where}: {prefix}scaling.{key} is not implemented with yarn; use the safetensors model"
            )
    betas = {
        name: metadata.number(f"{prefix}scaling.yarn_{name}")
        for name in ("beta_fast", "beta_slow")
        if metadata.get(f"{prefix}scaling.yarn_{name}")
    }
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.size(f"{prefix}scaling.original_context_length", n_ctx),
        **betas,
    }


def _longrope(source: Source, prefix: str, n_ctx: int) -> dict[str, Any]:
    """LongRoPE's factors, which GGUF holds as two tensors."""
    metadata = source.metadata
    missing = sorted({SHORT_FACTORS, LONG_FACTORS} - source.tensors)
    if missing:
        raise CheckpointError(f"{metadata.where}: missing tensor {', '.join(missing)}; download the file again")
    short, long = ([shortest(float(x)) for x in source.vector(name)] for name in (SHORT_FACTORS, LONG_FACTORS))
    original = metadata.size(f"{prefix}scaling.original_context_length", n_ctx)
    rope = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
    }
    usual = math.sqrt(1 + math.log(n_ctx / original) / math.log(original)) if n_ctx > original > 1 else 1.0
    scale = metadata.number(f"{prefix}scaling.attn_factor", usual)
    return rope if math.isclose(scale, usual, rel_tol=1e-5) else {**rope, "attention_factor": scale}


def _llama3(source: Source, theta: float, d_head: int) -> dict[str, Any]:
    """The numbers of Llama 3.1's scaling, of which GGUF holds the outcome: by what each frequency is divided.

    All of Meta's models have the numbers below; only `factor` differs among them. It is read off the lowest frequency.

    Raises:
        CheckpointError: they do not give these frequencies.
    """
    factors = source.vector(LLAMA3_FACTORS)
    numbers = {
        "factor": shortest(float(factors.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, _ = frequencies(Rope(theta), d_head)
    scaled, _ = frequencies(Rope(theta, "llama3", tuple(sorted(numbers.items()))), d_head)
    if factors.shape != plain.shape or not np.allclose(plain / scaled, factors, rtol=1e-4):
        raise CheckpointError(
            f"{source.metadata.where}: {LLAMA3_FACTORS} scales positions in another way than Llama 3.1 does, which "
            "cannot be read; use the safetensors model"
        )
    return {"rope_type": "llama3", **numbers}


def _special_tokens(metadata: Metadata) -> dict[str, Any]:
    """The special tokens that a config.json names; answers end at the end of a turn ("eot") as well."""
    bos, eos, eot, pad = (metadata.token_id(kind) for kind in ("bos", "eos", "eot", "padding"))
    both = eot is not None and eos is not None and eot != eos
    ends = [eos, eot] if both else eot if eos is None else eos
    return {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": pad}
