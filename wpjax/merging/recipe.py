"""Recipes: what a user wants merged, as a YAML file in mergekit's words, read strictly.

    merge_method: ties
    base_model: base
    models:
      - model: expert-a
        parameters: {weight: 0.6, density: 0.3}
      - model: expert-b
        parameters:
          density: 0.3
          weight:
            - {filter: mlp, value: 0.8}
            - {value: [0.2, 0.6]}        # from the first layer to the last
    parameters: {normalize: true, lambda: 1.0}
    dtype: bfloat16

A key, method or parameter that does not exist is an error, which names the nearest. Filters name whole parts of a
tensor's name: `layers.1` is layer 1, and not 10 to 19 as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from wpjax.errors import nearest
from wpjax.merging.registry import MergeError, MergeMethod, Parameter, find_merge_method
from wpjax.runtime.yaml_files import read_yaml

_KEYS = (
    "merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source", "seed",
)  # fmt: skip
_OTHERS_OF_MERGEKIT = {
    "slices": "layers from here and there make another architecture, which is not done here",
    "modules": "models of several modules are not merged here",
    "tokenizer": "new vocabularies are not made here; tokenizer_source: base, or the name of a model",
    "chat_template": "the chat template is that of the tokenizer; tokenizer_source says whose",
}
DTYPES = ("float32", "bfloat16", "float16")
"""What a merged model can be stored in."""

Value: TypeAlias = bool | float | str | tuple[float, ...]
"""A value of a parameter. A tuple goes from the first layer to the last, with straight lines between."""


class Rule(NamedTuple):
    """A value of a parameter, for some tensors.

    Attributes:
        filter: parts of the tensors' names, such as "mlp", "layers.3" or "self_attn.q_proj"; None for all tensors.
        value: the value.
    """

    filter: str | None
    value: Value


Setting: TypeAlias = tuple[Rule, ...]
"""What a recipe says of one parameter: the first rule that fits a tensor counts."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model of a recipe.

    Attributes:
        model: a folder, a hub id or an embedded model, as the user wrote it.
        parameters: what the recipe says of the parameters that each expert has, by name.
    """

    model: str
    parameters: Mapping[str, Setting]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is to be merged, and how.

    Attributes:
        method: the merge method.
        experts: the models that are merged into the base; of a method without a base, all models.
        base: the base; None if there is none.
        parameters: what the recipe says of the parameters of the merge, and of those that no expert has an own value
            for; by name.
        dtype: what the merged model is stored in; None for what the base is stored in.
        tokenizer: the model whose tokenizer it gets; None for the base's.
        seed: of random numbers.
    """

    method: MergeMethod
    experts: tuple[Source, ...]
    base: str | None
    parameters: Mapping[str, Setting]
    dtype: str | None = None
    tokenizer: str | None = None
    seed: int = 0

    @property
    def host(self) -> str:
        """The model that gives all that is not merged: the base, or the first model if there is none."""
        return self.experts[0].model if self.base is None else self.base

    @property
    def models(self) -> tuple[str, ...]:
        """The names of all models, the host first."""
        return tuple(dict.fromkeys((self.host, *(expert.model for expert in self.experts))))

    def setting(self, parameter: Parameter, expert: int | None = None) -> Setting:
        """What is said of a parameter: by an expert, or else by the recipe as a whole; empty if nothing is."""
        own = () if expert is None else self.experts[expert].parameters.get(parameter.name, ())
        return (*own, *self.parameters.get(parameter.name, ()))

    def filters(self) -> list[str]:
        """All filters, each once."""
        places = (self.parameters, *(expert.parameters for expert in self.experts))
        rules = (rule for place in places for setting in place.values() for rule in setting)
        return list(dict.fromkeys(rule.filter for rule in rules if rule.filter is not None))


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.

    Raises:
        MergeError: it cannot be read, or asks for what does not exist; the message says where.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "merge.yaml"
    >>> _ = path.write_text("{merge_method: linear, models: [a, b], parameters: {weight: 1}}")
    >>> read_recipe(path).method.name
    'linear'
    """
    path = Path(path)
    content = read_yaml(path, MergeError)
    try:
        return recipe_of(content)
    except MergeError as error:
        raise MergeError(f"{path}: {error}") from error


def recipe_of(content: Any) -> Recipe:
    """The recipe that a mapping holds, as a YAML file gives it.

    Raises:
        MergeError: as `read_recipe`.

    >>> recipe_of({"merge_method": "tsv", "base_model": "a", "models": ["b", "c"]}).models
    ('a', 'b', 'c')
    """
    content = _mapping(content, "the recipe")
    for key in content:
        if key in _OTHERS_OF_MERGEKIT:
            raise MergeError(f"{key} is mergekit's, and not known here: {_OTHERS_OF_MERGEKIT[key]}")
    _check_keys(content, _KEYS, "key")
    if not isinstance(content.get("merge_method"), str):
        raise MergeError("no merge_method; add one, say merge_method: ties")
    method = find_merge_method(content["merge_method"])
    base = _model(content["base_model"], "base_model") if content.get("base_model") is not None else None
    if base is None and method.base == "required":
        raise MergeError(f"{method.name} needs base_model, the model that the experts were trained from; add it")
    entries = content.get("models")
    if not isinstance(entries, list) or not entries:
        raise MergeError("models must list the models to merge: models: [{model: NAME}, ...]")
    experts: list[Source] = []
    for i, entry in enumerate(entries):
        where = f"models[{i}]"
        entry = {"model": entry} if isinstance(entry, str) else _mapping(entry, where)
        _check_keys(entry, ("model", "parameters"), f"key in {where}")
        source = Source(
            _model(entry.get("model"), f"{where}.model"),
            _parameters(entry.get("parameters"), method, f"{where}.parameters", of_expert=True),
        )
        if source.model == base and method.base != "none":
            if source.parameters:
                raise MergeError(f"{where} is the base, whose parameters have no effect; remove them")
            continue
        if source.model in (expert.model for expert in experts):
            raise MergeError(f"{where}: {source.model} stands twice under models; remove one")
        experts.append(source)
    least, most = method.n_experts
    if len(experts) < least or (most is not None and len(experts) > most):
        wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        besides = "" if method.base == "none" else " besides the base"
        raise MergeError(f"{method.name} merges {wanted} models{besides}, and models lists {len(experts)}")
    parameters = _parameters(content.get("parameters"), method, "parameters", of_expert=False)
    recipe = Recipe(
        method,
        tuple(experts),
        base,
        parameters,
        _dtype(content),
        _tokenizer(content.get("tokenizer_source"), base, [expert.model for expert in experts]),
        _seed(content.get("seed", 0)),
    )
    _check_given(recipe)
    return recipe


def _check_given(recipe: Recipe) -> None:
    """Refuse a recipe that gives no value to a parameter that needs one."""
    for parameter in recipe.method.parameters:
        if parameter.default is not None or parameter.may_lack:
            continue
        for i, expert in enumerate(recipe.experts) if parameter.per_expert else [(None, None)]:
            if not recipe.setting(parameter, i):
                of = f" for {expert.model}" if expert else ""
                raise MergeError(f"no {parameter.name}{of} ({parameter.help}); add it under parameters")


def _parameters(content: Any, method: MergeMethod, where: str, of_expert: bool) -> dict[str, Setting]:
    """What a mapping says of parameters."""
    content = {} if content is None else _mapping(content, where)
    _check_keys(content, [p.name for p in method.parameters], f"parameter of {method.name} in {where}")
    settings = {}
    for name, value in content.items():
        parameter = method.parameter(name)
        assert parameter is not None
        if of_expert and not parameter.per_expert:
            raise MergeError(f"{where}: {name} is one for the whole merge; put it under the recipe's own parameters")
        settings[name] = _setting(parameter, value, f"{where}.{name}")
    return settings


def _setting(parameter: Parameter, value: Any, where: str) -> Setting:
    """What a recipe says of one parameter: a value, a list from layer to layer, or values with filters."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not any(isinstance(entry, dict) for entry in value):
        return (Rule(None, _value(parameter, value, where)),)
    if not parameter.by_tensor:
        raise MergeError(
            f"{where}: {parameter.name} is the same for all tensors, so filters have no effect; give a value"
        )
    rules: list[Rule] = []
    for i, entry in enumerate(value):
        here = f"{where}[{i}]"
        entry = _mapping(entry, here)
        _check_keys(entry, ("filter", "value"), f"key in {here}")
        if "value" not in entry:
            raise MergeError(f"{here}: no value; add it")
        pattern = entry.get("filter")
        if pattern is not None and (not isinstance(pattern, str | int) or isinstance(pattern, bool) or pattern == ""):
            raise MergeError(f"{here}: filter {pattern!r} is no part of a name; write one like mlp or layers.3")
        if rules and rules[-1].filter is None:
            raise MergeError(
                f"{here} comes after a value without a filter, so it is never reached; move it before that"
            )
        rules.append(
            Rule(None if pattern in (None, "*") else str(pattern), _value(parameter, entry["value"], f"{here}.value"))
        )
    return tuple(rules)


def _value(parameter: Parameter, value: Any, where: str) -> Value:
    """A value of a parameter, or values from the first layer to the last."""
    if isinstance(value, list):
        if parameter.kind != "number" or not parameter.by_tensor:
            raise MergeError(f"{where}: {value!r} is a list, and {parameter.name} takes one value; give one")
        if not value:
            raise MergeError(f"{where}: an empty list; give a value")
        return tuple(_number(parameter, entry, where) for entry in value)
    if parameter.kind == "number":
        return _number(parameter, value, where)
    if parameter.kind == "switch":
        if not isinstance(value, bool):
            raise MergeError(f"{where}: {value!r} is neither true nor false; write one of them")
        return value
    if not isinstance(value, str) or not value:
        raise MergeError(f"{where}: {value!r} is no {'path' if parameter.kind == 'tensors' else 'word'}; correct it")
    if parameter.choices and value not in parameter.choices:
        raise MergeError(
            f"{where}: {value!r}{nearest(value, parameter.choices)}; there are {', '.join(parameter.choices)}"
        )
    return value


def _number(parameter: Parameter, value: Any, where: str) -> float:
    if isinstance(value, str):  # YAML 1.1 takes 1e-3 for text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise MergeError(f"{where}: {value!r} is no number; correct it")
    least, most = parameter.least, parameter.most
    if (least is not None and value < least) or (most is not None and value > most):
        bounds = f"at least {least:g}" if most is None else f"between {least:g} and {most:g}"
        raise MergeError(f"{where}: {value:g} is out of bounds; {parameter.name} is {bounds}")
    return value


def _model(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise MergeError(f"{where}: {value!r} is no model; name a folder, a hub id or an embedded model")
    return value


def _dtype(content: Mapping[str, Any]) -> str | None:
    """What the merged model is stored in. mergekit computes in `dtype`; here it is always float32."""
    dtype = content.get("out_dtype") or content.get("dtype")
    for key in ("dtype", "out_dtype"):
        if content.get(key) is not None and content[key] not in DTYPES:
            raise MergeError(f"{key}: {content[key]!r}{nearest(content[key], DTYPES)}; there are {', '.join(DTYPES)}")
    return dtype


def _tokenizer(value: Any, base: str | None, models: Sequence[str]) -> str | None:
    if value is None:
        return None
    if value == "base":
        if base is None:
            raise MergeError("tokenizer_source: base, and there is no base_model; add it, or name one of the models")
        return base
    if value == "union":
        raise MergeError(
            "tokenizer_source: union makes a new vocabulary, which is not done here; write base, or the name of a model"
        )
    known = [*models, *([base] if base else [])]
    if value not in known:
        raise MergeError(
            f"tokenizer_source: {value!r}{nearest(value, known)}; write base, or one of {', '.join(known)}"
        )
    return str(value)


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise MergeError(f"seed: {value!r} is no number from 0 on; correct it")
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise MergeError(f"{where}: expected keys with values, like key: value")
    return value


def _check_keys(content: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    known = list(known)
    for key in content:
        if key not in known:
            raise MergeError(f"unknown {what}: {key!r}{nearest(key, known)}; there are {', '.join(known) or 'none'}")


def matches(pattern: str, name: str) -> bool:
    """Whether a filter names whole parts of a tensor's name, which stand beside each other.

    >>> [matches("layers.1", f"model.layers.{layer}.mlp.up_proj.weight") for layer in (1, 10)]
    [True, False]
    """
    return f".{pattern.strip('.')}." in f".{name}."


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor stands in; None if it stands in none.

    >>> layer_of("model.layers.10.mlp.up_proj.weight"), layer_of("model.embed_tokens.weight")
    (10, None)
    """
    found = re.search(r"\.(\d+)\.", f".{name}")
    return int(found[1]) if found else None


def value_for(setting: Setting, name: str, n_layers: int) -> Value | None:
    """The value of a parameter for a tensor; None if no rule fits it.

    Of a list of k values, layer l of L gets the one at the place (k - 1) l / (L - 1) in it, on a straight line between
    neighbours; tensors outside the layers get the first, and the one layer of a model with one layer the last. So does
    mergekit.

    Args:
        setting: what the recipe says.
        name: HF name of the tensor.
        n_layers: number of layers of the model.

    >>> value_for((Rule("mlp", 0.5), Rule(None, (0.0, 1.0))), "model.layers.1.self_attn.q_proj.weight", 5)
    0.25
    """
    for rule in setting:
        if rule.filter is None or matches(rule.filter, name):
            if not isinstance(rule.value, tuple):
                return rule.value
            layer = layer_of(name)
            along = 0.0 if layer is None else layer / (n_layers - 1) if n_layers > 1 else 1.0
            place = along * (len(rule.value) - 1)
            first = min(int(place), len(rule.value) - 1)
            second = min(first + 1, len(rule.value) - 1)
            return (1 - (place - first)) * rule.value[first] + (place - first) * rule.value[second]
    return None
