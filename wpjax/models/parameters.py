"""The table of parameters: every leaf that a decoder may have, with the names of its axes and the unit that owns it.

Checkpoints of all families are read into these leaves. Masks and patches follow from the axes. So a new parameter is
one line here.

The change of a matrix may stand beside it, divided into directions (`layers.Delta`): `delta_q` is beside W_Q.

Axes: vocab, position, d_model, head (query heads), kv_head, d_head, neuron, routed_expert, direction. Leaves under
"blocks" have one more axis in front, that of the layers, which is not listed. The neurons of a routed expert stand side
by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Parameter(NamedTuple):
    """One leaf of the parameter tree.

    Attributes:
        unit: the unit that owns it. A unit is the finest piece that can be patched on its own.
        axes: names of its axes, without that of the layers.
        is_common: whether base and expert have the same numbers there, so that a mask does not matter.

    >>> PARAMETERS["blocks/attn/W_O"].unit, PARAMETERS["blocks/attn/W_O"].channel_axis
    ('head', 0)
    """

    unit: str
    axes: tuple[str, ...]
    is_common: bool = False

    @property
    def channel_axis(self) -> int | None:
        """The axis that counts the unit's channels (heads, KV groups or neurons of a layer); None for other units."""
        axis = CHANNEL_AXES.get(self.unit)
        return None if axis is None else self.axes.index(axis)


MATRICES: Mapping[str, str] = MappingProxyType(
    {
        "q": "blocks/attn/W_Q",
        "k": "blocks/attn/W_K",
        "v": "blocks/attn/W_V",
        "o": "blocks/attn/W_O",
        "gate": "blocks/mlp/W_gate",
        "up": "blocks/mlp/W_in",
        "down": "blocks/mlp/W_out",
    }
)
"""Module -> its matrix, for the modules whose change can be divided into directions."""

CHANNEL_AXES: Mapping[str, str] = MappingProxyType(
    {
        "head": "head",
        "kv_group": "kv_head",
        "neuron": "neuron",
        **{f"{module}_direction": "direction" for module in MATRICES},
    }
)
"""Unit -> name of the axis that counts its channels, for units that have channels."""


def delta_path(module: str, part: str = "") -> str:
    """The path of a module's divided change, or of one of its leaves, "U", "S" or "V".

    >>> delta_path("up", "S")
    'blocks/mlp/delta_up/S'
    """
    return f"{MATRICES[module].rpartition('/')[0]}/delta_{module}" + (f"/{part}" if part else "")


def n_inputs(module: str) -> int:
    """Number of axes of a matrix that its input has: heads and their width of W_O, one of every other."""
    return 2 if module == "o" else 1


def _directions(matrices: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The leaves of divided changes, [*in, r], [r] and [r, *out], from those of the matrices."""
    leaves: dict[str, Parameter] = {}
    for module, path in MATRICES.items():
        unit, axes, n = f"{module}_direction", matrices[path].axes, n_inputs(module)
        leaves |= {
            delta_path(module, "U"): Parameter(unit, (*axes[:n], "direction"), is_common=True),
            delta_path(module, "S"): Parameter(unit, ("direction",)),
            delta_path(module, "V"): Parameter(unit, ("direction", *axes[n:]), is_common=True),
        }
    return leaves


_D = ("d_model",)

_OWN: Mapping[str, Parameter] = MappingProxyType(
    {
        "blocks/attn/W_Q": Parameter("head", ("d_model", "head", "d_head")),
        "blocks/attn/b_Q": Parameter("head", ("head", "d_head")),
        "blocks/attn/W_O": Parameter("head", ("head", "d_head", "d_model")),
        "blocks/attn/W_K": Parameter("kv_group", ("d_model", "kv_head", "d_head")),
        "blocks/attn/b_K": Parameter("kv_group", ("kv_head", "d_head")),
        "blocks/attn/W_V": Parameter("kv_group", ("d_model", "kv_head", "d_head")),
        "blocks/attn/b_V": Parameter("kv_group", ("kv_head", "d_head")),
        "blocks/attn/b_O": Parameter("attn_bias", _D),
        "blocks/attn/norm_q/scale": Parameter("qk_norm", ("d_head",)),
        "blocks/attn/norm_q/bias": Parameter("qk_norm", ("d_head",)),
        "blocks/attn/norm_k/scale": Parameter("qk_norm", ("d_head",)),
        "blocks/attn/norm_k/bias": Parameter("qk_norm", ("d_head",)),
        "blocks/attn/joint_norm_q/scale": Parameter("qk_norm", ("head", "d_head")),
        "blocks/attn/joint_norm_q/bias": Parameter("qk_norm", ("head", "d_head")),
        "blocks/attn/joint_norm_k/scale": Parameter("qk_norm", ("kv_head", "d_head")),
        "blocks/attn/joint_norm_k/bias": Parameter("qk_norm", ("kv_head", "d_head")),
        "blocks/mlp/W_router": Parameter("router", ("d_model", "routed_expert")),
        "blocks/mlp/W_gate": Parameter("neuron", ("d_model", "neuron")),
        "blocks/mlp/b_gate": Parameter("neuron", ("neuron",)),
        "blocks/mlp/W_in": Parameter("neuron", ("d_model", "neuron")),
        "blocks/mlp/b_in": Parameter("neuron", ("neuron",)),
        "blocks/mlp/W_out": Parameter("neuron", ("neuron", "d_model")),
        "blocks/mlp/b_out": Parameter("mlp_bias", _D),
        "blocks/norm_attn/scale": Parameter("norm_attn", _D),
        "blocks/norm_attn/bias": Parameter("norm_attn", _D),
        "blocks/norm_attn_out/scale": Parameter("norm_attn_out", _D),
        "blocks/norm_attn_out/bias": Parameter("norm_attn_out", _D),
        "blocks/norm_mlp/scale": Parameter("norm_mlp", _D),
        "blocks/norm_mlp/bias": Parameter("norm_mlp", _D),
        "blocks/norm_mlp_out/scale": Parameter("norm_mlp_out", _D),
        "blocks/norm_mlp_out/bias": Parameter("norm_mlp_out", _D),
        "embed/W_E": Parameter("embed", ("vocab", "d_model")),
        "embed/W_pos": Parameter("embed", ("position", "d_model")),
        "unembed/W_U": Parameter("unembed", ("d_model", "vocab")),
        "final_norm/scale": Parameter("final_norm", _D),
        "final_norm/bias": Parameter("final_norm", _D),
    }
)
PARAMETERS: Mapping[str, Parameter] = MappingProxyType({**_OWN, **_directions(_OWN)})
"""Path of a leaf in the parameter tree -> its entry."""
