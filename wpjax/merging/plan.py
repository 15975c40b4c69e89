"""What a merge will do, checked against the models before any weight is merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wpjax.checkpoints.adapter import Adapter
from wpjax.checkpoints.checkpoint import local_path
from wpjax.checkpoints.convert import tensor_name, tensor_shapes
from wpjax.checkpoints.folder import ADAPTER, SafetensorsFolder, check_folder
from wpjax.checkpoints.placing import finite_floats
from wpjax.checkpoints.rewrite import StoredModel, open_model
from wpjax.checkpoints.tokenizer import load_tokenizer
from wpjax.errors import PairError, nearest
from wpjax.merging.recipe import Recipe, layer_of, matches, value_for
from wpjax.merging.registry import MergeError, Parameter
from wpjax.merging.tensor_file import TensorFile
from wpjax.models.config import ModelConfig
from wpjax.models.families import FAMILIES
from wpjax.pairs import differing_tokens

UNRELATED, DISTANT = 0.5, 0.95
"""Cosines between sampled matrices of an expert and of the base. Below the first one the expert has another base, for
matrices of models that were trained apart are orthogonal. Below the second one it went far."""


@dataclasses.dataclass(frozen=True)
class Expert:
    """One of the models that are merged, whose tensors are read one at a time.

    Attributes:
        source: its name, as the user wrote it.
        path: its folder or file.
        cfg: its architecture.
        model: the model in its files; None for an adapter.
        edits: of an adapter, HF name of a tensor -> function from the base's tensor to its own; else None.
    """

    source: str
    path: Path
    cfg: ModelConfig
    model: StoredModel | None
    edits: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None

    def read(self, name: str, base: np.ndarray) -> np.ndarray:
        """One of its tensors in float32, by the full HF name.

        Args:
            name: the name.
            base: the host's tensor of this name, in float32. It is returned if an adapter leaves it as it is.

        Raises:
            CheckpointError: the tensor cannot be read, or holds NaN or infinity.
        """
        if self.edits is not None:
            return finite_floats(self.source, name, self.edits[name](base)) if name in self.edits else base
        assert self.model is not None
        own = name if name in self.model.names else tensor_name(self.cfg, "embed/W_E")  # the head of a tied model
        return finite_floats(self.source, own, self.model.read(own)).astype(np.float32, copy=False)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe and the models that it names, checked against each other.

    Attributes:
        recipe: the recipe.
        host: the model that gives all that is not merged: the base, or the first model.
        experts: the models that are merged.
        values: full HF name of each tensor of the host -> arguments of the method by name; None for a tensor that stays
            as it is in the host.
        files: argument of the method -> its file of tensors, or one of each expert (None where there is none).
        notes: what else is worth knowing, in words.
        more: what the method has prepared: from a tensor's name, further arguments.
    """

    recipe: Recipe
    host: StoredModel
    experts: tuple[Expert, ...]
    values: Mapping[str, dict[str, Any] | None]
    files: Mapping[str, TensorFile | tuple[TensorFile | None, ...]]
    notes: tuple[str, ...]
    more: Callable[[str], dict[str, Any]] | None = None

    @property
    def merged(self) -> tuple[str, ...]:
        """The names of the tensors that are merged."""
        return tuple(name for name, values in self.values.items() if values is not None)

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of the tensors that stay as they are in the host."""
        return tuple(name for name, values in self.values.items() if values is None)

    def preparation(self, name: str) -> Any:
        """What a parameter is that the method's preparation needs; of one that each expert has, a list."""
        parameter = self.recipe.method.parameter(name)
        assert parameter is not None
        return _value(self.recipe, parameter, next(iter(self.values)), self.host.cfg.n_layers)

    def tensors(self) -> Iterator[tuple[str, np.ndarray, Iterator[np.ndarray]]]:
        """Goes through the tensors that are merged: name, the host's tensor and those of the experts, in float32."""
        for name in self.merged:
            base = self.base_tensor(name, self.host.read(name))
            yield name, base, self.expert_tensors(name, base)

    def base_tensor(self, name: str, stored: np.ndarray) -> np.ndarray:
        """A tensor of the host in float32."""
        return finite_floats(self.host.source, name, stored).astype(np.float32, copy=False)

    def expert_tensors(self, name: str, base: np.ndarray) -> Iterator[np.ndarray]:
        """The tensors of the experts under a name, read one after the other."""
        return (self.expert_tensor(k, name, base) for k in range(len(self.experts)))

    def expert_tensor(self, k: int, name: str, base: np.ndarray) -> np.ndarray:
        """The tensor of the k-th expert under a name; `base` is the host's."""
        expert = self.experts[k]
        return base if expert.source == self.host.source else expert.read(name, base)

    def arguments(self, name: str) -> dict[str, Any]:
        """The arguments of the method for a tensor that is merged."""
        values = self.values[name]
        assert values is not None
        shape, family = tensor_shapes(self.host.cfg)[name], FAMILIES[self.host.cfg.family]
        arguments = dict(values)
        for argument, file in self.files.items():
            parts = file if isinstance(file, tuple) else (file,)
            read = [_tensor_of(part, name, len(shape), name.endswith(family.transposed)) for part in parts]
            arguments[argument] = read if isinstance(file, tuple) else read[0]
        if self.more is not None:
            arguments |= self.more(name)
        return arguments


def make_plan(recipe: Recipe, *, ignore_config: tuple[str, ...] = (), unrelated: bool = False) -> Plan:
    """Open the models of a recipe and check that they can be merged. Their weights are not read, but for a sample.

    Args:
        recipe: the recipe.
        ignore_config: attributes of config.json that you know not to matter.
        unrelated: whether experts of another base are merged all the same.

    Raises:
        MergeError: the models do not fit each other or the recipe; or nothing would be merged.
        CheckpointError: a model cannot be read.

    >>> from wpjax.merging.recipe import recipe_of
    >>> plan = make_plan(recipe_of({"merge_method": "isotropic", "base_model": "tiny:base", "models": ["tiny:expert"]}))
    >>> len(plan.merged), plan.kept
    (74, ())
    """
    host = open_model(recipe.host, ignore_config)
    experts = tuple(_open_expert(source.model, host, ignore_config) for source in recipe.experts)
    notes = []
    for expert in experts:
        if expert.source != host.source:
            if recipe.method.base != "none" and expert.path.resolve() == host.path.resolve():
                raise MergeError(f"{expert.source} is the base itself, so it changes nothing; remove it from models")
            notes += _compared(host, expert, unrelated)
    for pattern in recipe.filters():
        _check_filter(pattern, list(host.names))
    files = _files(recipe, host.cfg)
    values = {name: _values(recipe, name, host.cfg.n_layers) for name in host.names}
    plan = Plan(recipe, host, experts, values, files, tuple(notes))
    if not plan.merged:
        raise MergeError("nothing would be merged: the weights of all tensors are 0, or no filter gives them one")
    _check_complete(plan)
    if recipe.method.check is not None:
        for name in plan.merged:
            _checked(recipe.method.check, name, values[name])
    if recipe.method.prepare is not None:
        plan = dataclasses.replace(plan, more=recipe.method.prepare(plan))
    return plan


def _checked(check: Callable[[Mapping[str, Any]], None], name: str, values: Mapping[str, Any] | None) -> None:
    try:
        check(values or {})
    except MergeError as error:
        raise MergeError(f"{name}: {error}") from error


def _open_expert(source: str, host: StoredModel, ignore_config: tuple[str, ...]) -> Expert:
    """A model of a recipe: a whole one, or an adapter of the host."""
    if source == host.source:
        return Expert(source, host.path, host.cfg, host)
    path = local_path(source)
    if path.is_dir() and (path / ADAPTER).exists():
        check_folder(path)
        edits = Adapter(path, source).edits(host.cfg, host.source)
        if edits.cfg != host.cfg:
            raise MergeError(
                f"{source}: the adapter changes {'; '.join(host.cfg.differences(edits.cfg))} of {host.source}, and a "
                "merge keeps them; merge the adapter into a copy of the base first"
            )
        return Expert(source, path, host.cfg, None, edits.edits)
    model = open_model(source, ignore_config)
    return Expert(source, path, model.cfg, model)


def _compared(host: StoredModel, expert: Expert, unrelated: bool) -> list[str]:
    """What differs in an expert and may, in words.

    Raises:
        MergeError: something differs that may not.
    """
    names = f"{host.source} and {expert.source}"
    ours, theirs = host.cfg, expert.cfg
    if ours.d_vocab != theirs.d_vocab:
        raise MergeError(
            f"{names} have vocabularies of {ours.d_vocab} and {theirs.d_vocab} rows, so their embeddings cannot be "
            "merged; cut or pad one of them first"
        )
    if ours.tied and not theirs.tied:
        raise MergeError(
            f"{expert.source} has a head of its own, and that of {host.source} is its embedding; name {expert.source} "
            "as base_model, or leave it out"
        )
    differences = ours.differences(dataclasses.replace(theirs, n_ctx=ours.n_ctx, tied=ours.tied))
    if differences:
        raise MergeError(f"{names} are not one architecture: {'; '.join(differences)}")
    notes = _vocabularies(host, expert, names)
    if ours.n_ctx != theirs.n_ctx:
        notes.append(f"contexts of {ours.n_ctx} and {theirs.n_ctx} tokens: that of {host.source} is kept")
    if expert.model is None:
        return notes
    _check_shapes(expert.model)
    stored = [_stored_dtype(model) for model in (host, expert.model)]
    if all(stored) and stored[0] != stored[1]:
        notes.append(f"{names} are stored as {stored[0]} and {stored[1]}; all is computed in float32")
    cosine, where = _likeness(host, expert)
    if cosine < UNRELATED and not unrelated:
        raise MergeError(
            f"{expert.source} was not trained from {host.source}: the cosine between their {where} is {cosine:.2f}, "
            "and models of one base have nearly 1; name its own base, or pass --unrelated if it is meant"
        )
    if cosine < DISTANT:
        notes.append(f"{expert.source} is far from {host.source}: the cosine between their {where} is {cosine:.2f}")
    return notes


def _vocabularies(host: StoredModel, expert: Expert, names: str) -> list[str]:
    """What to say of the tokenizers of two models.

    Raises:
        MergeError: ordinary tokens have other ids.
    """
    folders = [path for path in (host.path, expert.path) if path.is_dir()]
    files = [folder / "tokenizer.json" for folder in folders]
    if len(files) == 2 and all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return []
    tokenizers = [load_tokenizer(folder) for folder in folders]
    if len(tokenizers) < 2 or any(tokenizer is None for tokenizer in tokenizers):  # an adapter often has none
        return []
    try:
        return differing_tokens(tokenizers[0], tokenizers[1], names)
    except PairError as error:
        raise MergeError(f"{error}; models of two vocabularies cannot be merged") from error


def _check_shapes(model: StoredModel) -> None:
    """Refuse tensors that do not have the shape that the configuration says, as far as files tell without reading."""
    if not isinstance(model.tensors, SafetensorsFolder):
        return
    for name, shape in tensor_shapes(model.cfg).items():
        found = model.tensors.shape(model.names[name])
        if found != shape:
            raise MergeError(f"{model.source}: tensor {name} has shape {found}, and its configuration says {shape}")


def _stored_dtype(model: StoredModel) -> str:
    """The dtype of most matrices of a model, as its files name it; empty if they do not tell."""
    if not isinstance(model.tensors, SafetensorsFolder):
        return ""
    return model.tensors.dtype(next(iter(model.names.values())))


def _likeness(host: StoredModel, expert: Expert) -> tuple[float, str]:
    """The smallest cosine between matrices of two models, of a few small ones, and which it is."""
    shapes = {
        name: shape for name, shape in tensor_shapes(host.cfg).items() if len(shape) == 2 and layer_of(name) is not None
    }
    last = host.cfg.n_layers - 1
    smallest, where = 2.0, ""
    for layer in dict.fromkeys((0, last // 2, last)):
        name = min((name for name in shapes if layer_of(name) == layer), key=lambda name: np.prod(shapes[name]))
        ours = host.read(name).astype(np.float32).ravel()
        theirs = expert.read(name, ours).ravel()
        scale = float(np.linalg.norm(ours)) * float(np.linalg.norm(theirs))
        cosine = float(ours @ theirs) / scale if scale > 0 else 1.0
        if cosine < smallest:
            smallest, where = cosine, name
    return smallest, where


def _check_filter(pattern: str, names: Sequence[str]) -> None:
    """Refuse a filter that fits no tensor; the message names the nearest that does."""
    if any(matches(pattern, name) for name in names):
        return
    parts = [name.split(".") for name in names]
    n_parts = len(pattern.strip(".").split("."))
    runs = {".".join(part[i : i + n_parts]) for part in parts for i in range(len(part) - n_parts + 1)}
    raise MergeError(
        f"filter {pattern!r} fits no tensor{nearest(pattern, runs)}; filters name whole parts of a tensor's name, and "
        f"one is {names[len(names) // 2]}"
    )


def _files(recipe: Recipe, cfg: ModelConfig) -> dict[str, TensorFile | tuple[TensorFile | None, ...]]:
    """The files of tensors that a recipe names, by argument of the method."""
    shapes = tensor_shapes(cfg)
    opened: dict[str, TensorFile] = {}

    def open_file(path: str | None) -> TensorFile | None:
        if path is None:
            return None
        if path not in opened:
            opened[path] = TensorFile(path)
            opened[path].check(shapes, FAMILIES[cfg.family].transposed)
        return opened[path]

    files: dict[str, TensorFile | tuple[TensorFile | None, ...]] = {}
    for parameter in recipe.method.parameters:
        if parameter.kind != "tensors":
            continue
        paths = _value(recipe, parameter, next(iter(shapes)), cfg.n_layers)
        if parameter.per_expert:
            files[parameter.argument] = tuple(open_file(path) for path in paths)
        elif (file := open_file(paths)) is not None:
            files[parameter.argument] = file
    return files


def _check_complete(plan: Plan) -> None:
    """Refuse files that lack a tensor which the method needs."""
    for parameter in plan.recipe.method.parameters:
        files = plan.files.get(parameter.argument)
        if files is None or parameter.partial:
            continue
        for file in files if isinstance(files, tuple) else (files,):
            absent = [name for name in plan.merged if file is not None and name not in file.names]
            if file is not None and absent:
                raise MergeError(
                    f"{file.path}: holds no {absent[0]}, and {parameter.name} is needed for each tensor that is merged"
                    + (f" (as for {len(absent) - 1} more)" if len(absent) > 1 else "")
                )


def _tensor_of(file: TensorFile | None, name: str, n_axes: int, transposed: bool) -> np.ndarray | None:
    """What a file holds for a tensor. One number of each input channel of a matrix [in, out] gets a second axis."""
    if file is None or name not in file.names:
        return None
    tensor = file.read(name)
    return tensor[:, None] if tensor.ndim == 1 and n_axes == 2 and transposed else tensor


def _value(recipe: Recipe, parameter: Parameter, name: str, n_layers: int) -> Any:
    """What a parameter is for a tensor; of one that each expert has, a list."""

    def of(expert: int | None) -> Any:
        value = value_for(recipe.setting(parameter, expert), name, n_layers)
        return parameter.default if value is None else value

    return [of(i) for i in range(len(recipe.experts))] if parameter.per_expert else of(None)


def _values(recipe: Recipe, name: str, n_layers: int) -> dict[str, Any] | None:
    """The arguments of the method for a tensor; None if it stays as it is in the host."""
    values: dict[str, Any] = {}
    for parameter in recipe.method.parameters:
        if parameter.ignored or parameter.of_preparation or parameter.kind == "tensors":
            continue
        value = _value(recipe, parameter, name, n_layers)
        if parameter.name == "weight":
            value = [0.0 if w is None else w for w in value]
            if not any(value):  # no filter fits it, or it is left out
                if recipe.base is None:
                    raise MergeError(
                        f"{name}: its weights are 0 or not given, and without base_model there is nothing to keep; "
                        "give it a weight, or name a base_model"
                    )
                return None
        elif value is None or (isinstance(value, list) and None in value):
            return None
        values[parameter.argument] = (
            int(value) if isinstance(parameter.default, int) and not isinstance(value, bool) else value
        )
    return values
