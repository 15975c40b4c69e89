"""Patches: a base with some slices of its weights taken from the expert, as a mask says.

    theta_patched[c] = theta_expert[c] if mask[c] else theta_base[c]        (arXiv 2604.13694)

`materialize` is this definition: it makes plain arrays. `patch` gives the same model without making them: its leaves
are `Blend`s, which refer to the weights of both models. So `vmap` over masks copies no weight, and `grad` by a float
mask works. For the reverse patch, base slices in the expert (knock-out), swap the first two arguments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from wpjax.checkpoints.convert import flatten, unflatten
from wpjax.components import (
    LEAVES,
    Component,
    enumerate_components,
    open_units,
    unit_names,
    unit_positions,
    unit_shapes,
)
from wpjax.errors import ComponentError
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.models.leaves import Blend, CustomLeaf, Leaf, Mask
from wpjax.models.parameters import MATRICES, PARAMETERS
from wpjax.models.secant import SecantWeight

PatchedParams: TypeAlias = Params
"""A parameter tree whose leaves may be `Blend`s or other `CustomLeaf`s."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatchMask:
    """Says which units of a model are patched. It is a pytree of arrays.

    An entry is boolean (true: the expert's weights) or a float in [0, 1] (a relaxed patch, which interpolates). A unit
    is *open* where its mask is true or 1, and *closed* where it is false or 0.

    Attributes:
        units: unit -> array of the shape that `components.unit_shapes` gives. A unit that is absent is closed. Its
            leaves then stay plain arrays, which is cheaper.

    >>> from wpjax.models.config import ModelConfig
    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 2 layers, 4 heads, 32 neurons
    >>> mask = PatchMask.of(cfg, ["L0.head.3", "L1.mlp"])
    >>> mask.units["head"].astype(int).tolist(), int(mask.units["neuron"].sum())
    ([[0, 0, 0, 1], [0, 0, 0, 0]], 32)
    """

    units: Mapping[str, Mask]

    @classmethod
    def empty(cls, cfg: ModelConfig, dtype: Any = bool) -> PatchMask:
        """All units closed: nothing is patched."""
        return cls({unit: jnp.zeros(shape, dtype) for unit, shape in unit_shapes(cfg).items()})

    @classmethod
    def full(cls, cfg: ModelConfig, dtype: Any = bool) -> PatchMask:
        """All units open: everything is patched."""
        return cls({unit: jnp.ones(shape, dtype) for unit, shape in unit_shapes(cfg).items()})

    @classmethod
    def of(cls, cfg: ModelConfig, components: str | Iterable[Component | str]) -> PatchMask:
        """The mask that opens some components and nothing else.

        Args:
            cfg: the model.
            components: components or their names; one name alone will do.

        Raises:
            ComponentError: a name is not a component of this model.
        """
        names = [components] if isinstance(components, str) else components
        return cls({unit: jnp.asarray(value) for unit, value in open_units(cfg, names).items()})

    def astype(self, dtype: Any) -> PatchMask:
        """The same mask in another dtype: float32 to differentiate, bool to select."""
        return jax.tree.map(lambda unit: unit.astype(dtype), self)

    def __or__(self, other: PatchMask) -> PatchMask:
        """Union: open where either mask is. For floats, the larger of the two."""
        both = {u: _pairwise(jnp.logical_or, jnp.maximum, self, other, u) for u in self.units if u in other.units}
        return PatchMask({**self.units, **other.units, **both})

    def __and__(self, other: PatchMask) -> PatchMask:
        """Intersection: open where both masks are. For floats, the smaller of the two."""
        return PatchMask(
            {u: _pairwise(jnp.logical_and, jnp.minimum, self, other, u) for u in self.units if u in other.units}
        )

    def __invert__(self) -> PatchMask:
        """Complement: open where this mask is closed. For floats, 1 - m.

        Raises:
            ComponentError: a unit is absent, so that its shape is not known.
        """
        absent = [u for u in unit_names() if u not in self.units and u not in _OPTIONAL_UNITS]
        if absent:
            raise ComponentError(
                f"the complement of a mask needs all its units, this one lacks {', '.join(absent)}; start from "
                "PatchMask.empty(cfg) or PatchMask.of(cfg, ...)"
            )
        return jax.tree.map(lambda m: ~m if m.dtype == jnp.bool_ else 1 - m, self)

    def threshold(self, at: float = 0.5) -> PatchMask:
        """A relaxed mask made boolean: open where it is at least `at`.

        >>> relaxed = PatchMask({"head": jnp.array([[0.2, 0.5, 0.9]])})
        >>> relaxed.threshold(0.5).units["head"].tolist()
        [[False, True, True]]
        """
        return jax.tree.map(lambda m: m if m.dtype == jnp.bool_ else m >= at, self)

    def top_k(self, k: int, units: Iterable[str] | None = None) -> PatchMask:
        """A relaxed mask made boolean: its k largest entries are open.

        An entry is a head, a KV group or a neuron, or a whole unit that has no channels. Of equal entries the first
        counts, in the order of `components.unit_names`. It works under `jit` and `vmap`, too.

        Args:
            k: number of entries.
            units: the units to choose from, say ("head",); None for all of the mask. The others are left out, so they
                are closed.

        Raises:
            ComponentError: k is not between 0 and the number of entries, or the mask lacks one of the units.

        >>> relaxed = PatchMask({"head": jnp.array([[0.2, 0.5, 0.9]]), "kv_group": jnp.array([[0.7]])})
        >>> chosen = relaxed.top_k(2)
        >>> chosen.units["head"].tolist(), chosen.units["kv_group"].tolist()
        ([[False, False, True]], [[True]])
        """
        names = tuple(self.units) if units is None else tuple(units)
        absent = [name for name in names if name not in self.units or name not in unit_names()]
        if absent:
            raise ComponentError(f"this mask has no unit {absent[0]!r}, only {', '.join(self.units)}")
        names = tuple(name for name in unit_names() if name in names)
        arrays = [self.units[name] for name in names]
        n_entries = sum(array.size for array in arrays)
        if not 0 <= k <= n_entries:
            raise ComponentError(f"k={k}: this mask has {n_entries} entries to choose from")
        flat = jnp.concatenate([jnp.ravel(array).astype(jnp.float32) for array in arrays])
        chosen = jnp.zeros(flat.shape, bool).at[jnp.argsort(-flat, stable=True)[:k]].set(True)
        parts = jnp.split(chosen, np.cumsum([array.size for array in arrays])[:-1])
        return PatchMask({n: p.reshape(a.shape) for n, p, a in zip(names, parts, arrays, strict=True)})


_OPTIONAL_UNITS = frozenset(
    "attn_bias qk_norm mlp_bias router unembed norm_attn norm_mlp norm_attn_out norm_mlp_out".split()
) | {f"{module}_direction" for module in MATRICES}
"""Units that not every architecture has."""


def _pairwise(boolean: Any, real: Any, one: PatchMask, other: PatchMask, unit: str) -> Array:
    """One unit of two masks combined: by `boolean` if both are boolean, otherwise by `real` in float32."""
    a, b = one.units[unit], other.units[unit]
    return boolean(a, b) if a.dtype == b.dtype == jnp.bool_ else real(a.astype(jnp.float32), b.astype(jnp.float32))


def components_of(cfg: ModelConfig, mask: PatchMask, kinds: Iterable[str] | None = None) -> list[Component]:
    """The components that a mask opens: the way back from `PatchMask.of`.

    Args:
        cfg: the model.
        mask: boolean, or float with nothing but zeros and ones. It must not be traced.
        kinds: kinds of components to look for; a component is listed if all that it owns is open. None for the fewest
            components that own just what is open: whole layers before modules, modules before heads and neurons.

    Raises:
        ComponentError: the mask is relaxed, does not fit the model, or (with `kinds` None) opens something that no
            component owns alone, such as the bias that all heads of a layer share.

    >>> from wpjax.models.config import ModelConfig
    >>> cfg = ModelConfig("llama", 2, 16, 4, 2, 4, 32, 50, 64)  # 2 layers, 4 heads
    >>> mask = PatchMask.of(cfg, ["L0.head.3", "L1.mlp"])
    >>> [c.name for c in components_of(cfg, mask)]
    ['L1.mlp', 'L0.head.3']
    >>> [c.name for c in components_of(cfg, PatchMask.of(cfg, "L1.attn"), kinds=["head"])]
    ['L1.head.0', 'L1.head.1', 'L1.head.2', 'L1.head.3']
    """
    shapes, left = unit_shapes(cfg), {}
    for name, entries in mask.units.items():
        values = np.asarray(entries)
        if name not in shapes or values.shape != shapes[name]:
            has = f"has shape {shapes[name]}" if name in shapes else "has none"
            raise ComponentError(f"the mask's unit {name!r} has shape {values.shape}, the model {has}")
        if not np.isin(values, (0, 1)).all():
            raise ComponentError(f"unit {name} is between 0 and 1; make the mask boolean: mask.threshold(0.5) or top_k")
        left[name] = values.astype(bool).reshape(-1).copy()
    found = []
    for component in enumerate_components(cfg, _LARGEST_FIRST if kinds is None else kinds):
        owned = unit_positions(cfg, component)
        if all(unit in left and left[unit][at].all() for unit, at in owned.items()):
            found.append(component)
            if kinds is None:  # what is named is not named again by its parts
                for unit, at in owned.items():
                    left[unit][at] = False
    unnamed = [unit for unit, values in left.items() if values.any()]
    if kinds is None and unnamed:
        raise ComponentError(
            f"the mask opens unit {unnamed[0]}, which no component owns alone; open its whole module, or pass kinds="
        )
    return found


_LARGEST_FIRST = tuple(
    "layer attn mlp norm head kv_group router routed_expert neuron embed unembed final_norm delta_direction".split()
)
"""Kinds of components, those that own the most first."""


def patch(base: Params, expert: Params, mask: PatchMask) -> PatchedParams:
    """The base with the masked slices of the expert. Leaves become `Blend`s; no weight is copied.

    Args:
        base: parameter tree of the host.
        expert: parameter tree of the donor, of the same structure and shapes.
        mask: what is patched. It may be traced, batched by `vmap` or differentiated.

    Raises:
        ComponentError: a unit does not exist or has another shape in this model, or the parameters are patched already.

    >>> import wpjax as wp
    >>> pair = wp.load_pair("tiny:base", "tiny:expert")
    >>> tokens = jnp.arange(5)[None]
    >>> patched = wp.patch(pair.base, pair.expert, wp.PatchMask.full(pair.cfg))  # everything: this is the expert
    >>> out, expert = (wp.forward(pair.cfg, params, tokens).logits for params in (patched, pair.expert))
    >>> bool(jnp.array_equal(out, expert))
    True
    """
    return _masked(Blend, base, expert, mask.units, "")


def secant_patch(base: Params, expert: Params, mask: PatchMask) -> PatchedParams:
    """Base and expert at once: leaves become `SecantWeight`s, and what is computed with them is a `Secant`.

    The change of that `Secant` is linear in the mask. With the full mask it is the expert's value minus the base's
    (docs/method.md, "Path estimators").

    Args:
        base: parameter tree of one end of the way.
        expert: parameter tree of the other end, of the same structure and shapes.
        mask: float, with all units of the model; it may be traced or differentiated.

    Raises:
        ComponentError: as `patch`.

    >>> import wpjax as wp
    >>> pair = wp.load_pair("tiny:base", "tiny:expert")
    >>> full = wp.PatchMask.full(pair.cfg, dtype=jnp.float32)
    >>> logits = wp.forward(pair.cfg, secant_patch(pair.base, pair.expert, full), jnp.arange(5)[None]).logits
    >>> bool(jnp.allclose(logits.change, logits.expert - logits.base, atol=1e-3))
    True
    """
    return _masked(SecantWeight, base, expert, mask.units, "")


def patch_layer(base: Params, expert: Params, units: Mapping[str, Mask]) -> PatchedParams:
    """`patch` for one layer.

    Args:
        base: parameters of the layer in the host: the tree "blocks" without its axis of layers.
        expert: the same of the donor.
        units: unit -> mask of that layer, without an axis of layers.

    Raises:
        ComponentError: as `patch`.
    """
    return _masked(Blend, base, expert, units, "blocks/")


def _masked(
    leaf_type: type[Blend] | type[SecantWeight], base: Params, expert: Params, units: Mapping[str, Mask], prefix: str
) -> PatchedParams:
    """Masked leaves of a tree; `prefix` is what its paths lack at the front, "blocks/" for a single layer."""
    ours, theirs = flatten(base), flatten(expert)
    checked = _checked(units, {prefix + path: leaf for path, leaf in ours.items()}, stacked=not prefix)

    def masked(path: str, leaf: Array) -> Leaf:
        unit, axis = LEAVES[prefix + path]
        if unit not in checked or PARAMETERS[prefix + path].is_common:
            return leaf
        return leaf_type(leaf, theirs[path], checked[unit], axis)

    return unflatten({path: masked(path, leaf) for path, leaf in ours.items()})


def _checked(units: Mapping[str, Mask], leaves: Mapping[str, Any], stacked: bool) -> dict[str, Mask]:
    """The units as arrays, checked: each exists and fits the leaves that it owns.

    Raises:
        ComponentError: as `patch`.
    """
    arrays = {name: jnp.asarray(unit) for name, unit in units.items()}
    for name, array in arrays.items():
        if array.dtype != jnp.bool_ and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ComponentError(f"unit {name} is {array.dtype}; give a boolean mask, or a float one in [0, 1]")
    unknown = sorted(set(arrays) - set(unit_names()))
    if unknown:
        raise ComponentError(f"a mask has no unit {unknown[0]!r}; units: {', '.join(unit_names())}")
    for path, leaf in leaves.items():
        unit, axis = LEAVES[path]
        if isinstance(leaf, CustomLeaf):
            raise ComponentError(f"{path} is patched already; give plain parameters, or join the masks with |")
        if unit not in arrays:
            continue
        layers = leaf.shape[:1] if stacked and path.startswith("blocks/") else ()
        expected = layers if axis is None else (*layers, leaf.shape[axis + len(layers)])
        if arrays[unit].shape != expected:
            raise ComponentError(
                f"unit {unit} has shape {arrays[unit].shape}, the model needs {expected}; for many masks, jax.vmap "
                "over the leading axis"
            )
    return arrays


def materialize(base: Params, expert: Params, mask: PatchMask) -> Params:
    """The patched model as plain arrays: `where(mask, expert, base)` leaf by leaf, the definition of a patch.

    Args:
        base: parameter tree of the host.
        expert: parameter tree of the donor, of the same structure and shapes.
        mask: what is patched. Float entries interpolate.

    Raises:
        ComponentError: as `patch`.

    >>> import wpjax as wp
    >>> pair = wp.load_pair("tiny:base", "tiny:expert")
    >>> model = wp.materialize(pair.base, pair.expert, wp.PatchMask.of(pair.cfg, ["L2.head.0"]))
    >>> w_q = model["blocks"]["attn"]["W_Q"][2]  # [D, H, Dh] of layer 2
    >>> theirs = pair.expert["blocks"]["attn"]["W_Q"][2]
    >>> bool((w_q[:, 0] == theirs[:, 0]).all()), bool((w_q[:, 1] == theirs[:, 1]).all())
    (True, False)
    """
    ours, theirs = flatten(base), flatten(expert)
    units = _checked(mask.units, ours, stacked=True)

    def select(path: str, host: Array, donor: Array) -> Array:
        name, axis = LEAVES[path]
        if name not in units:
            return host
        unit, stacked = units[name], path.startswith("blocks/")
        shape = [1] * host.ndim  # the mask stands along the axes of layers and channels, and broadcasts along others
        if stacked:
            shape[0] = unit.shape[0]
        if axis is not None:
            shape[axis + stacked] = unit.shape[-1]
        unit = unit.reshape(shape)
        if unit.dtype == jnp.bool_:
            return jnp.where(unit, donor, host)
        return ((1 - unit) * host + unit * donor).astype(host.dtype)

    return unflatten({path: select(path, leaf, theirs[path]) for path, leaf in ours.items()})


def permuted(base: Params, expert: Params, seed: int = 0) -> Params:
    """A null model: an expert whose changes are dealt out anew among components of a kind and layer.

    Each head, KV group and neuron gets the whole change of a random one of its kind in its layer. So the changes are
    as large as the expert's, but they meet weights that they were not trained with. All other leaves are the base's
    (docs/method.md, "Controls and statistics").

    Args:
        base: parameter tree of the base.
        expert: parameter tree of the expert, of the same structure and shapes.
        seed: seed of the permutations.
    """
    rng = np.random.default_rng(seed)
    ours, theirs = flatten(base), flatten(expert)
    orders: dict[str, Array] = {}

    def deal(path: str, host: Array, donor: Array) -> Array:
        unit, axis = LEAVES[path]
        if axis is None or not path.startswith("blocks/"):
            return host
        shape = (host.shape[0], host.shape[axis + 1])
        if unit not in orders:  # one order for all leaves of a unit: a change stays whole
            orders[unit] = jnp.asarray(np.stack([rng.permutation(shape[1]) for _ in range(shape[0])]))
        return deal_out(host, donor, orders[unit], axis)

    return unflatten({path: deal(path, leaf, theirs[path]) for path, leaf in ours.items()})


@functools.partial(jax.jit, static_argnames="axis")
def deal_out(host: Array, donor: Array, order: Int[Array, "L n"], axis: int) -> Array:
    """One stacked leaf of the base, plus the changes of the expert's channels in another order.

    It is one compiled program, so that no copy of a leaf in float32 stays in memory.

    Args:
        host: the base's leaf, layers first.
        donor: the expert's leaf, likewise.
        order: [L, n], the channel whose change each channel gets, layer by layer.
        axis: the axis of the channels in one layer's leaf (static).

    >>> host, donor = jnp.zeros((1, 3)), jnp.array([[1.0, 2.0, 3.0]])  # one layer, three channels
    >>> deal_out(host, donor, jnp.array([[2, 0, 1]]), axis=0).tolist()
    [[3.0, 1.0, 2.0]]
    """

    def dealt(leaf: Array) -> Array:
        return jax.vmap(lambda a, to: jnp.take(a, to, axis=axis))(leaf, order).astype(jnp.float32)

    precision = jnp.finfo(host.dtype)  # a change is rounded to the precision of the weights
    change = jax.lax.reduce_precision(dealt(donor) - dealt(host), precision.nexp, precision.nmant)
    return (host.astype(jnp.float32) + change).astype(host.dtype)
