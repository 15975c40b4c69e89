"""From the tensors of a checkpoint to the parameter tree, and back.

It is strict: every tensor must be known, and none may be missing or have another shape than the configuration says.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from wpjax.checkpoints.placing import Layer, Place, finite_floats, host_rows, put_leaf
from wpjax.checkpoints.quantised import quantised_tensors
from wpjax.errors import CheckpointError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, abstract_params
from wpjax.models.families import FAMILIES, TensorRule

flatten: Callable[[Params], dict[str, Any]] = functools.partial(flatten_dict, sep="/")
"""The leaves of a parameter tree by path, such as "blocks/attn/W_Q"."""

unflatten: Callable[[dict[str, Any]], Params] = functools.partial(unflatten_dict, sep="/")
"""The parameter tree of leaves by path: the inverse of `flatten`."""

OTHER_HEADS = ("score.", "classifier.", "qa_outputs.", "v_head.", "value_head.", "multiple_choice_head.")
"""How the names of heads for other tasks begin: classification, questions, rewards, multiple choice.

They do not take part in the next token.
"""


@runtime_checkable
class TensorSource(Protocol):
    """A set of tensors under their HF names, which are read one at a time.

    Attributes:
        where: the file or folder, for messages.
        configuration: what says how large its tensors are, for messages: "config.json".
    """

    where: str
    configuration: str

    def names(self) -> list[str]:
        """The names of all tensors."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        ...


def left_out(source: TensorSource) -> list[str]:
    """Names of the tensors of a checkpoint that are no part of its language model: heads for other tasks."""
    return sorted(name for name in source.names() if name.startswith(OTHER_HEADS))


@functools.cache
def _rules(cfg: ModelConfig) -> tuple[TensorRule, ...]:
    """The family's rules for tensors that a model of this configuration has."""
    present = set(flatten(abstract_params(cfg)))
    return tuple(r for r in FAMILIES[cfg.family].tensors if set(r.leaves) <= present)


def _sizes(cfg: ModelConfig, pattern: str) -> dict[str, int]:
    """The sizes of the axes that an einops pattern names; see `TensorRule.pattern`."""
    sizes = {
        "d": cfg.d_model,
        "h": cfg.n_heads,
        "k": cfg.n_kv_heads,
        "e": cfg.d_head,
        "p": cfg.d_head // 2,
        "t": 2,
        "f": cfg.d_mlp,
        "x": cfg.n_experts,
        "w": cfg.d_expert if cfg.n_experts else cfg.d_mlp,
        "v": cfg.d_vocab,
        "c": cfg.n_ctx,
        "n": 3,
    }
    return {axis: sizes[axis] for axis in set(re.findall(r"\w", pattern))}


def _patterns(rule: TensorRule) -> tuple[str, ...]:
    """The patterns of the parts that stand one after the other in a tensor; most tensors have one part."""
    return (rule.pattern,) if isinstance(rule.pattern, str) else rule.pattern


def _part_shape(cfg: ModelConfig, pattern: str) -> tuple[int, ...]:
    """The shape of a tensor in the checkpoint, or of a part of it, that has this pattern."""
    sizes = _sizes(cfg, pattern)
    # Axes of the pattern's left side: groups such as "(h e)" and single names.
    axes = re.findall(r"\(([^)]*)\)|(\w+)", pattern.split("->")[0])
    return tuple(math.prod(sizes[axis] for axis in (group or single).split()) for group, single in axes)


def _hf_shape(cfg: ModelConfig, rule: TensorRule) -> tuple[int, ...]:
    """The shape that a tensor must have in the checkpoint."""
    (first, *rest), *others = (_part_shape(cfg, pattern) for pattern in _patterns(rule))
    return (first + sum(shape[0] for shape in others), *rest)


def _to_leaves(cfg: ModelConfig, rule: TensorRule, tensor: np.ndarray) -> list[np.ndarray]:
    """What a tensor of the checkpoint holds of each leaf of its rule (see `TensorRule.pattern`)."""
    patterns = _patterns(rule)
    ends = np.cumsum([_part_shape(cfg, pattern)[0] for pattern in patterns])[:-1]
    ours = [
        einops.rearrange(part, pattern, **_sizes(cfg, pattern))
        for part, pattern in zip(np.split(tensor, ends), patterns, strict=True)
    ]
    return ours if len(ours) == len(rule.leaves) else list(ours[0])


def _from_leaves(cfg: ModelConfig, rule: TensorRule, leaves: list[np.ndarray]) -> np.ndarray:
    """The tensor of the checkpoint that holds these leaves: the inverse of `_to_leaves`."""
    patterns = _patterns(rule)
    ours = leaves if len(leaves) == len(patterns) else [np.stack(leaves)]
    backwards = [" -> ".join(side.strip() for side in reversed(pattern.split("->"))) for pattern in patterns]
    parts = [einops.rearrange(a, p, **_sizes(cfg, p)) for a, p in zip(ours, backwards, strict=True)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def params_from_hf(
    cfg: ModelConfig,
    source: TensorSource,
    dtype: str = "float32",
    place: Place | None = None,
    like: Params | None = None,
) -> Params:
    """Read every tensor of a checkpoint into a parameter tree; the arguments are those of `leaves_from_hf`."""
    return unflatten(dict(leaves_from_hf(cfg, source, dtype, place, like)))


def leaves_from_hf(
    cfg: ModelConfig,
    source: TensorSource,
    dtype: str = "float32",
    place: Place | None = None,
    like: Params | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """The leaves of a checkpoint's parameter tree, one after the other.

    One leaf at a time is in host memory, all of its layers; of a leaf that is divided, what this process's devices
    hold.

    Args:
        cfg: the configuration that the tensors must fit.
        source: the tensors.
        dtype: dtype of all leaves, "float32" or "bfloat16".
        place: where each leaf is to stand; None for the default device.
        like: parameters that may hold the same numbers, such as those of the model that this one was trained from.

    Yields:
        path of a leaf, and the leaf; if `like` holds the very same bytes, that array.

    Raises:
        CheckpointError: a tensor is unknown, missing, of another shape, not of floats, or not finite. The message
            names it.
    """
    names, shapes = match_names(cfg, source), _leaf_shapes(cfg)
    twins = {} if like is None else flatten(like)

    def tensor(rule: TensorRule, own: tuple[str, ...]) -> np.ndarray:
        parts = [one(rule, full_name) for full_name in own]
        return np.stack(parts) if rule.by_expert else parts[0]

    def one(rule: TensorRule, full_name: str) -> np.ndarray:
        value, shape = source.read(names[full_name]), _hf_shape(cfg, rule)[rule.by_expert :]
        if value.shape != shape:
            raise CheckpointError(
                f"{source.where}: tensor {full_name} has shape {value.shape}, {source.configuration} says {shape}"
            )
        # Of stacked tensors `put_leaf` would name the first.
        return finite_floats(source.where, full_name, value) if rule.by_expert else value

    for rule in _rules(cfg):
        for part, path in enumerate(rule.leaves):
            # Read anew for each leaf of a tensor, so that only one leaf is held. Of a file, a view of it.
            layers = (
                Layer(own[0], _to_leaves(cfg, rule, tensor(rule, own))[part]) for own in _names_of(cfg, rule).values()
            )
            sharding = None if place is None else place(path, shapes[path])
            yield path, put_leaf(shapes[path], jnp.dtype(dtype), layers, sharding, source.where, twins.get(path))


def _leaf_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all leaves of a model by path."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(abstract_params(cfg)).items()}


def _names_of(cfg: ModelConfig, rule: TensorRule) -> dict[int | None, tuple[str, ...]]:
    """Layer -> HF names of the tensors that a rule is about; of one outside the layers, None -> its name.

    That is one tensor, or one for each routed expert.
    """
    layers = range(cfg.n_layers) if "{l}" in rule.hf else [None]
    experts = range(cfg.n_experts) if rule.by_expert else [0]
    return {
        layer: tuple(rule.hf.replace("{l}", str(layer)).replace("{x}", str(expert)) for expert in experts)
        for layer in layers
    }


def match_names(cfg: ModelConfig, source: TensorSource) -> dict[str, str]:
    """The tensors of a model in a checkpoint: full HF name -> name in the source.

    The two differ if the checkpoint leaves out the family's prefix, or holds a tied embedding as `lm_head.weight`.

    Args:
        cfg: the configuration that the tensors must fit.
        source: the tensors.

    Raises:
        CheckpointError: tensors are missing or unknown, or a tied model has another head.
    """
    family = FAMILIES[cfg.family]
    if cfg.n_layers > len(source.names()):  # a damaged config.json may say millions; make no list of so many names
        raise CheckpointError(
            f"{source.where}: {len(source.names())} tensors cannot make the {cfg.n_layers} layers of "
            f"{source.configuration}; the weights do not belong to it"
        )
    expected = list(tensor_shapes(cfg))
    present = [n for n in source.names() if not n.endswith(family.skipped) and not n.startswith(OTHER_HEADS)]
    bare = not any(name.startswith(family.prefix) for name in present)
    names = {name: name.removeprefix(family.prefix) if bare else name for name in expected}
    if cfg.tied and "lm_head.weight" in present:
        _match_tied(cfg, names, source)
        present = [n for n in present if n != "lm_head.weight" or n in names.values()]
    missing = [n for n in names.values() if n not in set(present)]
    unknown = sorted(set(present) - set(names.values()))
    if missing or unknown:
        quantised = quantised_tensors(unknown)
        if quantised:
            raise CheckpointError(f"{source.where}: {quantised}")
        raise CheckpointError(
            f"{source.where}: "
            + "; ".join(
                f"{what} tensor{'s' if len(tensors) > 1 else ''} {_first_few(tensors)}"
                for what, tensors in (("missing", missing), ("unknown", unknown))
                if tensors
            )
            + f"; the weights do not belong to this {source.configuration}"
        )
    return names


def _match_tied(cfg: ModelConfig, names: dict[str, str], source: TensorSource) -> None:
    """Settle what `lm_head.weight` is in the checkpoint of a tied model: the embedding itself, or a copy of it.

    Raises:
        CheckpointError: it differs from the embedding.
    """
    embedding = tensor_name(cfg, "embed/W_E")
    if names[embedding] not in source.names():  # safetensors.torch.save_model keeps one name of a shared tensor
        names[embedding] = "lm_head.weight"
    elif not np.array_equal(source.read("lm_head.weight"), source.read(names[embedding])):
        raise CheckpointError(
            f"{source.where}: lm_head.weight differs from {names[embedding]}, although {source.configuration} ties "
            f"them; if the model has a head of its own, set tie_word_embeddings to false in its {source.configuration}"
        )


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def hf_tensors(cfg: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a parameter tree as a checkpoint holds them, one at a time.

    Yields:
        the HF name of a tensor, and the tensor in HF's layout.

    >>> from wpjax.models.decoder import init_params
    >>> cfg = ModelConfig("llama", 1, 16, 4, 2, 4, 32, 50, 64)
    >>> tensors = dict(hf_tensors(cfg, init_params(cfg, jax.random.key(0))))
    >>> tensors["model.layers.0.self_attn.k_proj.weight"].shape  # [K Dh, D]
    (8, 16)
    """
    if cfg.directions:
        raise CheckpointError("a model whose change is divided into directions has no place for them in its files")
    flat = flatten(params)
    for name in _places(cfg):
        yield name, hf_tensor(cfg, flat, name)


def hf_tensor(cfg: ModelConfig, leaves: Mapping[str, Any], name: str) -> np.ndarray:
    """One tensor as a checkpoint holds it.

    Args:
        cfg: the configuration.
        leaves: the leaves of a parameter tree by path (`flatten`), or any arrays of their shapes.
        name: HF name of the tensor.

    >>> cfg = ModelConfig("llama", 1, 16, 4, 2, 4, 32, 50, 64)
    >>> per_neuron = np.broadcast_to(np.arange(32), (1, 16, 32))  # [L, D, F]
    >>> hf_tensor(cfg, {"blocks/mlp/W_in": per_neuron}, "model.layers.0.mlp.up_proj.weight")[:, 0].tolist()[:3]
    [0, 1, 2]
    """
    rule, layer, expert = _places(cfg)[name]
    whole = _from_leaves(cfg, rule, [_on_host(leaves[path], layer) for path in rule.leaves])
    return np.ascontiguousarray(whole[expert] if rule.by_expert else whole)


@functools.cache
def _places(cfg: ModelConfig) -> Mapping[str, tuple[TensorRule, int | None, int]]:
    """HF name of every tensor of a model -> its rule, its layer (None outside the layers), and its routed expert."""
    return {
        name: (rule, layer, expert)
        for rule in _rules(cfg)
        for layer, own in _names_of(cfg, rule).items()
        for expert, name in enumerate(own)
    }


@functools.lru_cache(maxsize=8)
def tensor_shapes(cfg: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """HF name of every tensor of a model -> its shape in a checkpoint.

    >>> tensor_shapes(ModelConfig("llama", 1, 16, 4, 2, 4, 32, 50, 64))["model.layers.0.self_attn.k_proj.weight"]
    (8, 16)
    """
    shapes = {rule: _hf_shape(cfg, rule)[rule.by_expert :] for rule in _rules(cfg)}
    return MappingProxyType({name: shapes[rule] for name, (rule, _, _) in _places(cfg).items()})


def tensor_name(cfg: ModelConfig, leaf: str, layer: int | None = None) -> str:
    """HF name of the one tensor that holds a leaf, and no other.

    Args:
        cfg: the configuration.
        leaf: path of the leaf.
        layer: number of the layer, of a leaf in the layers.

    Raises:
        CheckpointError: there is no one tensor, because each routed expert has its own.

    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)
    >>> tensor_name(cfg, "embed/W_E"), tensor_name(cfg, "blocks/mlp/W_out", 1)
    ('model.embed_tokens.weight', 'model.layers.1.mlp.down_proj.weight')
    """
    names = tensor_names(cfg, leaf, layer)
    if len(names) > 1:
        raise CheckpointError(f"{leaf} is not one tensor in {cfg.family}: each of {len(names)} routed experts has one")
    return names[0]


def tensor_names(cfg: ModelConfig, leaf: str, layer: int | None = None) -> tuple[str, ...]:
    """HF names of the tensors that hold a leaf, and no other: one, or one for each routed expert; as `tensor_name`."""
    return next(_names_of(cfg, rule)[layer] for rule in _rules(cfg) if rule.leaves == (leaf,))


def leaf_factors(cfg: ModelConfig, name: str, a: np.ndarray, b: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The factors of a change of low rank of a tensor, leaf by leaf: of a fused tensor, several leaves.

    Args:
        cfg: the configuration.
        name: HF name of the tensor, a matrix of attention or of an MLP.
        a: [r, in].
        b: [out, r]. The change is b a, whichever way the matrix lies in the family's files.

    Returns:
        path -> (p [in, r], q [r, out]): the change of one layer of the leaf is p q, with its axes of in and of out
        each as one.

    >>> cfg = ModelConfig("llama", 1, 16, 4, 2, 4, 32, 50, 64)
    >>> factors = leaf_factors(cfg, "model.layers.0.mlp.down_proj.weight", np.ones((3, 32)), np.ones((16, 3)))
    >>> {path: (p.shape, q.shape) for path, (p, q) in factors.items()}
    {'blocks/mlp/W_out': ((32, 3), (3, 16))}
    """
    rule, _, _ = _places(cfg)[name]
    is_transposed, rank = name.endswith(FAMILIES[cfg.family].transposed), len(a)
    # One side of the matrix is as wide as the stream. With r in place of that width, the factor of the other side is
    # laid out as the matrix is.
    writes = rule.leaves[0] in ("blocks/attn/W_O", "blocks/mlp/W_out")
    side = a if writes else b
    leaves = _to_leaves(dataclasses.replace(cfg, d_model=rank), rule, side.T if is_transposed else side)
    if writes:
        return {path: (leaf.reshape(-1, rank), b.T) for path, leaf in zip(rule.leaves, leaves, strict=True)}
    return {path: (a.T, leaf.reshape(rank, -1)) for path, leaf in zip(rule.leaves, leaves, strict=True)}


def edit_tensors(
    cfg: ModelConfig,
    params: Params,
    edits: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    new_cfg: ModelConfig,
    place: Place | None = None,
) -> Params:
    """A parameter tree with some of its tensors changed. All other leaves are the very arrays of `params`.

    Args:
        cfg: the configuration of `params`.
        params: parameters, which stay as they are.
        edits: HF name of a tensor -> a function from the tensor, in HF's layout and the dtype of its leaf, to what
            takes its place. The result is cast to that dtype.
        new_cfg: the configuration of the result; another than `cfg` if a tensor gets another shape.
        place: where new leaves are to stand; None for the default device.

    Returns:
        the tree. A leaf that holds an edited tensor is a new array; so are the other leaves of this tensor.

    >>> from wpjax.models.decoder import init_params
    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)
    >>> params = init_params(cfg, jax.random.key(0))
    >>> edited = edit_tensors(cfg, params, {"model.layers.1.mlp.up_proj.weight": lambda w: 2 * w}, cfg)
    >>> was, now = params["blocks"]["mlp"], edited["blocks"]["mlp"]
    >>> now["W_out"] is was["W_out"], bool((now["W_in"][1] == 2 * was["W_in"][1]).all())
    (True, True)
    """
    flat, shapes = flatten(params), _leaf_shapes(new_cfg)
    for rule in _rules(cfg):
        names = _names_of(cfg, rule)
        if not any(edits.keys() & set(own) for own in names.values()):
            continue
        new: dict[str, Any] = {}
        for part, path in enumerate(rule.leaves):
            layers = (
                Layer(own[0], _edited(cfg, new_cfg, rule, flat, layer, part, [edits.get(name) for name in own]))
                for layer, own in names.items()
            )
            sharding = None if place is None else place(path, shapes[path])
            new[path] = put_leaf(shapes[path], flat[path].dtype, layers, sharding)
        flat |= new
    return unflatten(flat)


def _edited(
    cfg: ModelConfig,
    new_cfg: ModelConfig,
    rule: TensorRule,
    leaves: Mapping[str, Any],
    layer: int | None,
    part: int,
    edits: list[Callable[[np.ndarray], np.ndarray] | None],
) -> np.ndarray:
    """One layer of a leaf, the `part`th of its rule, after edits of its tensors; as it is where there is no edit."""
    if not any(edits):
        return _on_host(leaves[rule.leaves[part]], layer)
    whole = _from_leaves(cfg, rule, [_on_host(leaves[path], layer) for path in rule.leaves])
    tensors = whole if rule.by_expert else [whole]
    new = [tensor if edit is None else edit(tensor) for edit, tensor in zip(edits, tensors, strict=True)]
    return _to_leaves(new_cfg, rule, np.stack(new) if rule.by_expert else new[0])[part]


def _on_host(leaf: Any, layer: int | None) -> np.ndarray:
    """One layer of a leaf, or all of one without layers."""
    return host_rows(leaf, 0, len(leaf)) if layer is None else host_rows(leaf, layer, layer + 1)[0]
