"""From HF's config.json to a `ModelConfig`. Attributes that are not known are refused: they may change the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from wpjax.errors import ConfigError
from wpjax.models.config import ModelConfig, Rope, RopeScaling
from wpjax.models.families import COMMON_IGNORED, FAMILIES, Family, activation
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
_SIZES = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp", "d_vocab", "n_ctx")


def parse_config(raw: Mapping[str, Any], where: str, ignore: tuple[str, ...] = ()) -> ModelConfig:
    """Read an HF configuration.

    Args:
        raw: the content of config.json.
        where: the file, for messages.
        ignore: attributes that the caller knows not to matter.

    Raises:
        ConfigError: the family or an attribute is unknown, or a value is missing, impossible or not implemented.

    >>> raw = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 4, "vocab_size": 50257, "n_positions": 64}
    >>> cfg = parse_config(raw, "config.json")
    >>> cfg.n_layers, cfg.d_mlp, cfg.norm
    (2, 64, 'layer')
    """
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise ConfigError(
            f"{where}: model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    known = COMMON_IGNORED | set(family.fields) | set(family.required) | family.ignored | set(ignore)
    known |= family.rotary_attributes if family.rotary else set()
    unknown = sorted(set(raw) - known)
    if unknown:
        raise ConfigError(
            f"{where}: unknown attribute {', '.join(f'{k}={raw[k]!r}' for k in unknown)} for {family.model_type}; "
            f"if it does not change the forward pass, pass ignore_config={tuple(unknown)!r}"
        )
    full = _with_defaults(family, raw, where)  # what config.json leaves out has a default in transformers
    for name, value in family.required.items():
        if full.get(name, value) != value:
            raise ConfigError(f"{where}: {name}={full[name]!r} is not implemented, only {name}={value!r}")
    values: dict[str, Any] = {**family.fixed, **{ours: full.get(hf) for hf, ours in family.fields.items()}}
    act = activation(str(values["act"]))
    if act is None:
        raise ConfigError(f"{where}: activation {values['act']!r} is not implemented")
    values["act"] = act
    _check_sizes(family, values, where)
    for field, value_of in family.derived.items():
        if values.get(field) is None:
            values[field] = value_of(full)
    values["rope"] = _parse_rope(full, where, family.partly_rotary) if family.rotary else None
    if values["rope"] and values["rope"].scaling == "longrope":  # its short factors hold up to the original context
        values["n_ctx"] = int(dict(values["rope"].options)["original_max_position_embeddings"])  # type: ignore[arg-type]
    may_lack = {field.name for field in dataclasses.fields(ModelConfig) if field.default is None} | {"rope"}
    missing = sorted(k for k, v in values.items() if v is None and k not in may_lack)
    if missing:
        raise ConfigError(f"{where}: the configuration does not say {', '.join(missing)}")
    _check_sizes(family, values, where)  # also those that were derived
    if not 0 <= values["norm_eps"] < math.inf:
        raise ConfigError(f"{where}: the epsilon of the norms is {values['norm_eps']}, not a small number; correct it")
    cfg = ModelConfig(family=family.model_type, **values)
    if cfg.rope and not _has_frequencies(cfg):
        raise ConfigError(f"{where}: rope_parameters give no usable frequencies: {cfg.rope}; correct them")
    if cfg.n_heads % cfg.n_kv_heads:
        raise ConfigError(f"{where}: {cfg.n_heads} query heads cannot share {cfg.n_kv_heads} KV heads evenly")
    return cfg


def _with_defaults(family: Family, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration as transformers completes it: with defaults, and older rotary attributes merged.

    Raises:
        ConfigError: transformers does not accept it.
    """
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[family.model_type].from_dict(dict(raw)).to_dict()
    except Exception as error:  # transformers validates with several exception types
        raise ConfigError(f"{where}: transformers rejects it: {' '.join(str(error).split())}") from error


def _check_sizes(family: Family, values: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that are no positive integers; those that are not known yet (None) pass."""
    names = {ours: hf for hf, ours in family.fields.items()}
    for field in _SIZES:
        value = values.get(field)
        if value is not None and not (isinstance(value, int) and 1 <= value < 2**31):
            raise ConfigError(f"{where}: {names.get(field, field)}={value!r} is not a size; correct it")


def _has_frequencies(cfg: ModelConfig) -> bool:
    """Whether the rotary options give finite frequencies."""
    try:
        with np.errstate(all="ignore"):
            inv_freq, scale = frequencies(cfg)
    except (ArithmeticError, ValueError):  # ValueError: factors for another number of dimensions
        return False
    return bool(np.isfinite(inv_freq).all()) and math.isfinite(scale)


def _parse_rope(full: Mapping[str, Any], where: str, partly: bool) -> Rope:
    """The rotary embedding of a configuration.

    Args:
        full: the configuration with defaults.
        where: the file, for messages.
        partly: whether the family may rotate a part of each head (`Family.partly_rotary`).

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
    options = {k: v for k, v in parameters.items() if v is not None}
    fraction = 1.0
    # A factor of 1.0 changes nothing, so any family may name it. Any other stays in `options` and is refused below.
    if partly or options.get("partial_rotary_factor") == 1.0:
        fraction = options.pop("partial_rotary_factor", 1.0)
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
