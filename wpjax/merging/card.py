"""What stands beside a merged model: a model card, and recipes that say again how it was made."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

import wpjax
from wpjax.merging.plan import Plan
from wpjax.merging.recipe import Rule, Setting
from wpjax.runtime.cards import one_line, public_name

RECIPE, MERGEKIT = "merge.yaml", "mergekit.yaml"
"""Files of a merged model: the recipe, and what mergekit would make the same, or nearly the same, model from."""

_PATHS = ("scores", "fisher", "activations", "mask")


def recipe_text(plan: Plan) -> str:
    """The recipe as YAML, with names that tell nothing of this machine."""
    return _dumped(_content(plan))


def _content(plan: Plan) -> dict[str, Any]:
    recipe = plan.recipe
    content: dict[str, Any] = {"merge_method": recipe.method.name}
    if recipe.base is not None:
        content["base_model"] = public_name(recipe.base)
    content["models"] = []
    for source in recipe.experts:
        entry: dict[str, Any] = {"model": public_name(source.model)}
        if source.parameters:
            entry["parameters"] = _settings(source.parameters)
        content["models"].append(entry)
    if recipe.parameters:
        content["parameters"] = _settings(recipe.parameters)
    if recipe.dtype is not None:
        content["out_dtype"] = recipe.dtype
    if recipe.tokenizer is not None:
        content["tokenizer_source"] = public_name(recipe.tokenizer)
    if recipe.method.random or "control" in recipe.parameters:
        content["seed"] = recipe.seed
    return content


def _settings(parameters: Mapping[str, Setting]) -> dict[str, Any]:
    """What a recipe says of parameters, as YAML has it."""
    settings: dict[str, Any] = {}
    for name, setting in parameters.items():
        values = [list(rule.value) if isinstance(rule.value, tuple) else rule.value for rule in setting]
        if name in _PATHS:
            values = [public_name(str(value)) for value in values]
        if len(setting) == 1 and setting[0].filter is None:
            settings[name] = values[0]
        else:
            settings[name] = [
                {"value": value} if rule.filter is None else {"filter": rule.filter, "value": value}
                for rule, value in zip(setting, values, strict=True)
            ]
    return settings


def mergekit_text(plan: Plan) -> str | None:
    """A recipe for mergekit; None if it has nothing like the method.

    Of a method that mergekit has it is the same recipe. Of `score_gated` it says, tensor by tensor, the mean of the
    gates as weights of task arithmetic: mergekit knows whole tensors only. The comment at its top says so.
    """
    recipe = plan.recipe
    if recipe.method.in_mergekit:
        content = _content(plan)
        content.pop("seed", None)
        for parameters in (content.get("parameters", {}), *(m.get("parameters", {}) for m in content["models"])):
            parameters.pop("rescale_by", None)
        return (
            "# The same merge for mergekit. Its filters fit parts of names: layers.1 fits layers.10, too.\n"
            + ("# Its random numbers are others.\n" if recipe.method.random else "")
            + _dumped(content)
        )
    if plan.more is None:
        return None
    weights: list[list[dict[str, Any]]] = [[] for _ in plan.experts]
    for name in plan.merged:
        arguments = plan.arguments(name)
        for k, own in enumerate(weights):
            mean = float(
                arguments["weight"][k] * arguments["lambda_"] * np.mean(arguments["gates"](k), dtype=np.float64)
            )
            if mean:
                own.append({"filter": name, "value": round(mean, 6)})
    content = {
        "merge_method": "task_arithmetic",
        "base_model": public_name(plan.host.source),
        "models": [
            {"model": public_name(expert.source), "parameters": {"weight": [*own, {"value": 0.0}]}}
            for expert, own in zip(plan.experts, weights, strict=True)
        ],
        "dtype": "float32",
    }
    return (
        "# Not the same merge: mergekit weighs whole tensors. Each weight here is the mean of a tensor's gates, over\n"
        "# its heads, KV groups or neurons, times the expert's weight. The model beside this file has each by itself.\n"
        + _dumped(content)
    )


def masked_text(plan: Plan, folders: Sequence[str]) -> str:
    """A recipe for mergekit that makes the merge of masked experts (`merge.masked_experts`).

    Args:
        plan: the plan, of `score_gated`.
        folders: the folder of each masked expert, beside the recipe.
    """
    recipe, models = plan.recipe, []
    for k, folder in enumerate(folders):
        setting = _merged_settings(plan, "weight", k)
        models.append({"model": f"./{folder}", "parameters": {"weight": setting}})
    content = {
        "merge_method": "task_arithmetic",
        "base_model": public_name(plan.host.source),
        "models": models,
        "parameters": {"lambda": _merged_settings(plan, "lambda", None)},
        "dtype": "float32",
    }
    if recipe.dtype is not None:
        content["out_dtype"] = recipe.dtype
    return "# Run mergekit in this folder: it makes the same merge as the experts with their gates.\n" + _dumped(
        content
    )


def _merged_settings(plan: Plan, name: str, expert: int | None) -> Any:
    """What a recipe says of a parameter, its default included."""
    parameter = plan.recipe.method.parameter(name)
    assert parameter is not None
    setting = plan.recipe.setting(parameter, expert) or (Rule(None, parameter.default),)
    return _settings({name: setting})[name]


def masked_card(plan: Plan, k: int) -> str:
    """The text of the model card of a masked expert."""
    base, expert = public_name(plan.host.source), public_name(plan.experts[k].source)
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [wpjax, merge]",
            "---",
            "",
            f"# `{expert}`, masked",
            "",
            f"The weights of `{base}`, and of what `{expert}` changed the part that its gates let through: at the "
            "heads, KV groups, neurons or modules that its scores say it needs. No weight was trained.",
            "",
            f"- Made by wpjax {wpjax.__version__}",
            f"- `{RECIPE}` says which scores, and which experts it is to be merged with",
            "",
        ]
    )


def _dumped(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


def model_card(plan: Plan) -> str:
    """The text of a model card: which models were merged, how, and where the method comes from."""
    recipe, method = plan.recipe, plan.recipe.method
    names = [public_name(name) for name in recipe.models]
    hub = [name for name in names if "/" in name]  # other names mean nothing to others
    head = ["---", "library_name: transformers", "tags: [wpjax, merge]"]
    if hub:
        head.append(f"base_model: {json.dumps(hub)}")
    merged = names if recipe.base is None or method.base == "none" else [public_name(e.source) for e in plan.experts]
    into = "" if recipe.base is None else f" into `{public_name(recipe.base)}`"
    kept = f"; {len(plan.kept):,} are those of `{names[0]}`" if plan.kept else ""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return "\n".join(
        [
            *head,
            "---",
            "",
            f"# A merge of {', '.join(f'`{name}`' for name in merged)}",
            "",
            f"Merged{into} by `{method.name}` ({method.source}), which {method.help}. No weight was trained.",
            "",
            f"- {len(plan.merged):,} tensors were merged{kept}",
            f"- Computed in float32, stored as {recipe.dtype or 'the first model is'}",
            f"- Made by wpjax {wpjax.__version__}, {date}",
            *(f"- Note: {one_line(note)}" for note in _public_notes(plan)),
            "",
            f"The recipe, `{RECIPE}`:",
            "",
            "```yaml",
            recipe_text(plan).replace("```", "'''").rstrip(),
            "```",
            "",
        ]
    )


def _public_notes(plan: Plan) -> list[str]:
    """The notes, with names that tell nothing of this machine."""
    notes = []
    for note in plan.notes:
        for name in sorted(plan.recipe.models, key=len, reverse=True):
            note = note.replace(name, public_name(name))
        notes.append(note)
    return notes
