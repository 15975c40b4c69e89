"""From HF's config.json to a `ModelConfig`. Attributes that may change the model and are not known are refused.

An attribute that transformers' own configuration class does not declare cannot change its forward pass. It is accepted,
and `unread_attributes` lists it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from wpjax.checkpoints.quantised import how_to_dequantise
from wpjax.errors import ConfigError
from wpjax.models.config import ORIGINAL_CONTEXT, ModelConfig, Rope, RopeScaling
from wpjax.models.families import COMMON_IGNORED, FAMILIES, Family, activation
from wpjax.models.families.vision_language import TEXT_TOWERS
from wpjax.models.rotary import frequencies

_ROPE_OPTIONS: dict[RopeScaling, frozenset[str]] = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
        "truncate".split()
    ),
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}
    ),
}
_ANY_ROPE_OPTION = frozenset[str]().union(*_ROPE_OPTIONS.values())
# No configuration class declares these, but transformers acts on them. The value beside a name changes nothing.
_ACTED_ON: dict[str, Any] = {
    "auto_map": None,
    "quantization_config": None,
    "compression_config": None,
    "per_layer_config": None,
    "is_causal": True,
}
_SIZES = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp", "d_vocab", "n_ctx", "window",
          "n_experts", "n_active")  # fmt: skip
_FACTORS = ("attn_scale", "attn_softcap", "logit_softcap", "embed_scale", "resid_scale", "logit_scale", "qkv_clip")


def parse_config(raw: Mapping[str, Any], where: str, ignore: tuple[str, ...] = ()) -> ModelConfig:
    """Read an HF configuration.

    Args:
        raw: the content of config.json.
        where: the file, for messages.
        ignore: attributes that the caller knows not to matter. Without `original_max_position_embeddings`, a model with
            longrope rotates by its long factors, as HF lets it for sequences beyond that context, at every length.

    Raises:
        ConfigError: the family or an attribute is unknown, or a value is missing, impossible or not implemented; or the
            weights are quantised, or the checkpoint brings code of its own.

    >>> raw = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 4, "vocab_size": 50257, "n_positions": 64}
    >>> cfg = parse_config(raw, "config.json")
    >>> cfg.n_layers, cfg.d_mlp, cfg.norm
    (2, 64, 'layer')
    """
    family = _family(raw, where)
    unknown = _unknown(family, raw, ignore)
    _refuse_acted_on(raw, where, ignore)
    if unknown:
        options = " ".join(f"--ignore-config {name}" for name in unknown)
        raise ConfigError(
            f"{where}: unknown attribute {', '.join(f'{k}={raw[k]!r}' for k in unknown)} for {family.model_type}; "
            f"if it does not change the forward pass, pass {options} (in Python ignore_config={tuple(unknown)!r})"
        )
    full = _with_defaults(family, raw, where)  # what config.json leaves out has a default in transformers
    for name, value in family.required.items():
        if name not in ignore and full.get(name) not in (None, value):
            raise ConfigError(f"{where}: {name}={full[name]!r} is not implemented, only {name}={value!r}")
    values: dict[str, Any] = {**family.fixed, **{ours: full.get(hf) for hf, ours in family.fields.items()}}
    act = activation(str(values["act"]))
    if act is None:
        raise ConfigError(f"{where}: activation {values['act']!r} is not implemented")
    values["act"] = act
    _check_sizes(family, values, where)
    _check_layer_types(family, full, where)
    try:
        values |= {field: of(full) for field, of in family.derived.items() if values.get(field) is None}
    except (ArithmeticError, TypeError, KeyError) as error:
        raise ConfigError(f"{where}: its numbers do not fit together ({error!r}); correct them") from error
    values["rope"] = None
    is_long = ORIGINAL_CONTEXT in ignore
    if family.rotary_by_layer:
        by_layer = full["rope_parameters"]
        values["rope"], values["local_rope"] = (
            _parse_rope(family, {**full, "rope_parameters": by_layer[kind]}, where, is_long)
            for kind in ("full_attention", "sliding_attention")
        )
    elif family.rotary:
        values["rope"] = _parse_rope(family, full, where, is_long)
    for rope in (values["rope"], values.get("local_rope")):
        if rope and rope.scaling == "longrope" and not is_long:  # its short factors hold up to the original context
            values["n_ctx"] = int(dict(rope.options)[ORIGINAL_CONTEXT])
    if values.get("window") is None or values["window"] >= values["n_ctx"] or not any(values["sliding"]):
        values |= {"window": None, "sliding": () if values.get("local_rope") is None else values["sliding"]}
    may_lack = {field.name for field in dataclasses.fields(ModelConfig) if field.default is None} | {"rope"}
    missing = sorted(k for k, v in values.items() if v is None and k not in may_lack)
    if missing:
        raise ConfigError(f"{where}: the configuration does not say {', '.join(missing)}")
    _check_sizes(family, values, where)  # also those that were derived
    if not 0 <= values["norm_eps"] < math.inf:
        raise ConfigError(f"{where}: the epsilon of the norms is {values['norm_eps']}, not a small number; correct it")
    names = {ours: hf for hf, ours in family.fields.items()}
    for field in _FACTORS:
        value = values.get(field)
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ConfigError(f"{where}: {names.get(field, field)}={value!r} is not a positive number; correct it")
    cfg = ModelConfig(family=family.model_type, **values)
    for rope in (cfg.rope, cfg.local_rope):
        if rope and not _has_frequencies(rope, cfg.d_head):
            raise ConfigError(f"{where}: rope_parameters give no usable frequencies: {rope}; correct them")
    for field in ("sliding", "unrotated"):
        told = len(getattr(cfg, field))
        if told not in (0, cfg.n_layers):
            raise ConfigError(
                f"{where}: {told} layers are said to have a window or rotary positions or none, but there "
                f"are {cfg.n_layers}; correct layer_types or no_rope_layers"
            )
    if cfg.n_active > cfg.n_experts:
        raise ConfigError(f"{where}: {cfg.n_active} experts cannot act on a token where there are {cfg.n_experts}")
    if cfg.n_heads % cfg.n_kv_heads:
        raise ConfigError(f"{where}: {cfg.n_heads} query heads cannot share {cfg.n_kv_heads} KV heads evenly")
    return cfg


def with_changes(raw: Mapping[str, Any], cfg: ModelConfig, new: ModelConfig, where: str) -> dict[str, Any]:
    """An HF configuration with the attributes that say what was changed, so that the model can be saved again.

    Args:
        raw: the content of a config.json.
        cfg: what it says.
        new: what it shall say; other in context, vocabulary or `tied`.
        where: the model, for messages.

    Raises:
        ConfigError: with these attributes it would say something else. The factors of longrope, for one, may follow
            from the length of the context.

    >>> raw = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 4, "vocab_size": 99}
    >>> cfg = parse_config(raw, "config.json")
    >>> with_changes(raw, cfg, dataclasses.replace(cfg, d_vocab=50, tied=False), "m")["vocab_size"]
    50
    """
    changed = {
        hf: getattr(new, field)
        for hf, field in FAMILIES[cfg.family].fields.items()
        if field in ("n_ctx", "d_vocab", "tied") and getattr(new, field) != getattr(cfg, field)
    }
    written = {**raw, **changed}
    if new != cfg:
        is_long = any(rope is not None and rope.is_long for rope in (new.rope, new.local_rope))
        known = set(raw) - {ORIGINAL_CONTEXT} | ({ORIGINAL_CONTEXT} if is_long else set())  # `raw` was accepted before
        how_run = {name: getattr(new, name) for name in ("activation_splits", "backward", "directions")}
        found = dataclasses.replace(parse_config(written, where, tuple(known)), **how_run)
        wrong = [difference.split(":")[0] for difference in found.differences(new)]
        if wrong:
            raise ConfigError(
                f"{where}: a config.json with {', '.join(f'{k}={v!r}' for k, v in changed.items())} would make another "
                f"model of it, with another {', '.join(wrong)}; give base and expert the same context and the same "
                "sliding window in their config.json"
            )
    return written


def unread_attributes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of an HF configuration that are accepted because transformers does not read them, with their values.

    Its configuration class for the family does not declare them, or its rotary embedding has no use for them.

    Args:
        raw: the content of a config.json that `parse_config` accepts.

    >>> unread_attributes({"model_type": "gpt2", "n_embd": 16, "author": "me"})
    {'author': 'me'}
    """
    family = _family(raw, "config.json")
    declared = _declared(family)
    unread = {
        name: raw[name]
        for name in sorted(set(raw) - (COMMON_IGNORED | family.attributes) - set(declared))
        if raw[name] is not None and name not in _ACTED_ON
    }
    for name in ("rope_scaling", "rope_parameters"):
        options = raw.get(name) if family.rotary else None
        if isinstance(options, Mapping) and (options.get("rope_type") or options.get("type")) in (None, "default"):
            unread |= {f"{name}.{key}": value for key, value in options.items() if key in _ANY_ROPE_OPTION}
    return unread


def _family(raw: Mapping[str, Any], where: str) -> Family:
    """The family of a configuration, by its model_type or else by its architectures.

    Raises:
        ConfigError: it is not supported.
    """
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if model_type is None and isinstance(architectures, list):  # some early files have no model_type
        model_type = next((f.model_type for f in FAMILIES.values() if f.architecture in architectures), None)
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ConfigError(f"{where}: {_unsupported(raw)}")
    return family


@functools.cache
def _declared_by(model_type: str) -> Mapping[str, Any]:
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    default = kind()
    declared = {field.name: getattr(default, field.name, None) for field in dataclasses.fields(kind)}
    # Another name for a declared attribute: transformers moves its value there, and `full` has it there.
    return declared | dict.fromkeys(kind.attribute_map, _ALIAS)


_ALIAS = object()
"""Stands for the default of an attribute that is another name of one."""


def _declared(family: Family) -> Mapping[str, Any]:
    """The attributes that transformers' configuration class of a family declares, with their defaults."""
    return _declared_by(family.model_type)


def _unknown(family: Family, raw: Mapping[str, Any], ignore: tuple[str, ...]) -> list[str]:
    """Attributes that transformers reads and we do not know, with another value than the default."""
    declared = _declared(family)
    others = set(raw) - (COMMON_IGNORED | family.attributes) - set(ignore) - set(_ACTED_ON)
    return sorted(n for n in others if n in declared and declared[n] is not _ALIAS and raw[n] != declared[n])


def _refuse_acted_on(raw: Mapping[str, Any], where: str, ignore: tuple[str, ...]) -> None:
    """Refuse attributes that no configuration class declares, but that transformers acts on.

    Raises:
        ConfigError: there is one; the message says what it is and how to mend it.
    """
    for name, harmless in _ACTED_ON.items():
        value = raw.get(name, harmless)
        if value == harmless or value is None or name in ignore:
            continue
        if name in ("quantization_config", "compression_config"):
            what = how_to_dequantise(value)
        elif name == "auto_map":
            what = "names code inside the checkpoint, and such code is never run; if the model is a plain one of its "
            what += f"model_type, pass --ignore-config {name}"
        else:
            what = f"={value!r} is not implemented; if it does not change the forward pass, pass --ignore-config {name}"
        raise ConfigError(f"{where}: {name}{'' if what.startswith('=') else ': '}{what}")


_FEATURES = {
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts", "shared_intermediate_size"),
        "shared experts beside the routed ones",
    ),
    **dict.fromkeys(("state_size", "ssm_cfg", "mamba_d_state", "ssm_state_size", "d_state"), "state-space layers"),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), "latent attention"),
    **dict.fromkeys(("alibi", "alibi_bias_max"), "ALiBi positions"),
    **dict.fromkeys(("is_encoder_decoder", "encoder_layers", "num_encoder_layers"), "an encoder"),
    **dict.fromkeys(("linear_num_key_heads", "linear_conv_kernel_dim"), "linear attention"),
    **dict.fromkeys(("vision_config", "audio_config", "image_size", "patch_size"), "images or sound"),
}
"""HF attributes that tell of something which no family here has, in words."""


def _unsupported(raw: Mapping[str, Any]) -> str:
    """Say of a family that is not supported what is missing, and which family here is nearest to it.

    The nearest is the one that shares most attributes with it: of those that either of them has, the largest part.
    """
    attributes = set(raw) - COMMON_IGNORED

    def shared(family: Family) -> float:
        known = family.attributes - COMMON_IGNORED
        return len(attributes & known) / len(attributes | known)

    nearest = max(FAMILIES.values(), key=shared)
    features = dict.fromkeys(what for name, what in _FEATURES.items() if raw.get(name))
    lacking = sorted(attributes - nearest.attributes - set(_ACTED_ON))
    says = f"model_type {raw.get('model_type')!r} is not supported; "
    if raw.get("auto_map"):
        says += "it is code inside the checkpoint (auto_map), and such code is never run; "
    if features:
        says += f"it has {' and '.join(features)}, which no family here has; "
    if isinstance(raw.get("text_config"), Mapping):
        says += f"a text tower is read of {', '.join(TEXT_TOWERS)} only; "
    says += f"the nearest family is {nearest.model_type}"
    if lacking:
        more = f" and {len(lacking) - 6} more" if len(lacking) > 6 else ""
        says += f", which does not know {', '.join(lacking[:6])}{more}"
    return f"{says}; supported: {', '.join(FAMILIES)}"


def _with_defaults(family: Family, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration as transformers completes it: with defaults, and older rotary attributes merged.

    Raises:
        ConfigError: transformers does not accept it.
    """
    return transformers_config(family.model_type, raw, where).to_dict()


def transformers_config(model_type: str, raw: Mapping[str, Any], where: str) -> Any:
    """The configuration as an object of transformers.

    Raises:
        ConfigError: transformers does not accept it.
    """
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(raw))
    except Exception as error:  # transformers validates with several exception types
        raise ConfigError(f"{where}: transformers rejects it: {' '.join(str(error).split())}") from error


def _check_sizes(family: Family, values: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that are no positive integers; those that are not known yet (None) pass."""
    names = {ours: hf for hf, ours in family.fields.items()}
    for field in _SIZES:
        value = values.get(field)
        if value is not None and not (isinstance(value, int) and 1 <= value < 2**31):
            raise ConfigError(f"{where}: {names.get(field, field)}={value!r} is not a size; correct it")


def _check_layer_types(family: Family, full: Mapping[str, Any], where: str) -> None:
    """Refuse layers whose attention is neither full nor of a sliding window, in families that say so by layer."""
    kinds = set(full.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if kinds and "layer_types" in family.attributes:
        raise ConfigError(f"{where}: layer_types has {', '.join(sorted(map(str, kinds)))}, which is not implemented")


def _has_frequencies(rope: Rope, d_head: int) -> bool:
    """Whether the rotary options give finite frequencies."""
    try:
        with np.errstate(all="ignore"):
            inv_freq, scale = frequencies(rope, d_head)
    except (ArithmeticError, ValueError):  # ValueError: factors for another number of dimensions
        return False
    return bool(np.isfinite(inv_freq).all()) and math.isfinite(scale)


def _parse_rope(family: Family, full: Mapping[str, Any], where: str, is_long: bool) -> Rope:
    """The rotary embedding of a configuration.

    Args:
        family: the family.
        full: the configuration with defaults.
        where: the file, for messages.
        is_long: whether longrope is to use its long factors.

    Raises:
        ConfigError: a variant or an option is unknown, missing or of no use.
    """
    parameters = dict(full.get("rope_parameters") or {})
    scaling = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)  # the older name, if both are there
    theta = parameters.pop("rope_theta", None)
    theta = next(value for value in (theta, full.get("rope_theta"), 10_000.0) if value is not None)
    if not isinstance(scaling, str) or scaling not in _ROPE_OPTIONS:
        raise ConfigError(f"{where}: rope_type {scaling!r} is not implemented; known: {', '.join(_ROPE_OPTIONS)}")
    options = {k: v for k, v in parameters.items() if v is not None and k not in family.rope_ignored}
    fraction = 1.0
    # A factor of 1.0 changes nothing, so any family may name it. Any other stays in `options` and is refused below.
    if family.partly_rotary or options.get("partial_rotary_factor") == 1.0:
        fraction = options.pop("partial_rotary_factor", 1.0)
    if scaling == "default":  # transformers reads none of the other variants' numbers here
        options = {k: v for k, v in options.items() if k not in _ANY_ROPE_OPTION}
    unknown = sorted(set(options) - _ROPE_OPTIONS[scaling])
    if unknown:
        raise ConfigError(f"{where}: rope_parameters has unknown {', '.join(unknown)} for rope_type {scaling!r}")
    for name, value in {"rope_theta": theta, "partial_rotary_factor": fraction, **options}.items():
        if not _is_rope_value(name, value):
            raise ConfigError(f"{where}: {name}={value!r} is not a value that rotary embedding can use; correct it")
    n_ctx = full["max_position_embeddings"]
    if scaling in ("llama3", "yarn", "longrope"):
        original = options.setdefault("original_max_position_embeddings", n_ctx)
        options.setdefault("factor", n_ctx / original)
    missing = sorted({"linear": {"factor"}, "llama3": _ROPE_OPTIONS["llama3"]}.get(scaling, set()) - set(options))
    if missing:
        raise ConfigError(f"{where}: rope_parameters lacks {', '.join(missing)} for rope_type {scaling!r}")
    if is_long and scaling == "longrope":
        options["long"] = True
    hashable = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return Rope(float(theta), scaling, tuple(sorted(hashable.items())), float(fraction))


def _is_rope_value(name: str, value: Any) -> bool:
    """Whether a rotary option has a possible value.

    That is a positive number for most options, a list of these for factors by dimension, and a boolean for `truncate`.
    A few may also be 0, which counts as not given.
    """
    if name == "truncate":
        return isinstance(value, bool)
    if name in ("short_factor", "long_factor"):
        return isinstance(value, list) and all(_is_rope_value("", item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if name == "partial_rotary_factor":
        return 0 < value <= 1
    return 0 < value < math.inf or (value == 0 and name in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow"))
