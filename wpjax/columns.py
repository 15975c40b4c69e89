"""The columns of a sweep's result, in one table. Files, their checks, rankings and figures all read it.

The columns that every result has are listed here. A method's entry (see `wpjax.methods`) adds the columns that the
method makes. Nothing here imports JAX or NumPy, so that the command line's help is quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

ALWAYS = "always"
"""The group of columns that every result has."""

FLOAT, BOOL, INTEGER, TEXT = "f", "b", "i", "OTU"
"""What a column holds, as letters of `numpy.dtype.kind`. Text may be stored in three ways."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A variable of a result.

    Attributes:
        name: name in the file. Users give it to `top(by=...)` and `--by`.
        label: what figures and the page call it; empty to use the name.
        dims: dimensions, in order.
        dtype: letters of `numpy.dtype.kind` that are allowed.
        has_interval: whether there are columns NAME_low and NAME_high, the ends of its 95 % interval.
        trust: how far the column can be trusted as a ranking of components; larger is better. A result is ranked by its
            most trustworthy column, unless the user names another. None if components cannot be ranked by it.
        estimates_effect: whether the column estimates the effect of a component's own weights, as a share of the gap.
            Then it is used in place of `effect` for components that were not replaced.
        is_tested: whether p- and q-values may be of this column. They are of the most trustworthy such column that was
            measured.
        group: columns of a group are in a file together or not at all. `ALWAYS`: in every file. Empty: the column is a
            group of its own.
        shown: whether the page's table of components shows the column, if the result has it.
        is_coordinate: whether the column names the places along a dimension.
        is_finite: whether infinite numbers are an error. NaN is allowed: nothing was measured there.

    >>> from wpjax.columns import Column
    >>> Column("banzhaf", has_interval=True, trust=20).bounds
    ('banzhaf_low', 'banzhaf_high')
    """

    name: str
    label: str = ""
    dims: tuple[str, ...] = ("component",)
    dtype: str = FLOAT
    has_interval: bool = False
    trust: int | None = None
    estimates_effect: bool = False
    is_tested: bool = False
    group: str = ""
    shown: bool = True
    is_coordinate: bool = False
    is_finite: bool = True

    @property
    def title(self) -> str:
        """The name for figures: the label, or the name of the column."""
        return self.label or self.name

    @property
    def bounds(self) -> tuple[str, ...]:
        """Names of the columns for the lower and the upper end of the interval; empty if it has no interval."""
        if not self.has_interval:
            return ()
        name = "ci" if self.name == EFFECT else self.name  # the effect's are called ci_low and ci_high
        return f"{name}_low", f"{name}_high"

    @property
    def group_name(self) -> str:
        """Name of its group; a column by itself is a group under its own name."""
        return self.group or self.name

    def with_bounds(self) -> Iterator[Column]:
        """The column itself, then the columns for the ends of its interval. Components are not ranked by ends."""
        yield self
        for name in self.bounds:
            yield Column(name, dims=self.dims, dtype=self.dtype, group=self.group_name, shown=False)


EFFECT = "effect"
"""Share of the gap that a component's weights recover alone."""

_KINDS, _LAYERS = ("swept_kind",), ("model_layer",)
_GAPS = ("anchor_gap", "anchor_specific")
_BASIC = (
    Column("name", dtype=TEXT, group=ALWAYS, is_coordinate=True),
    Column("kind", dtype=TEXT, group=ALWAYS, is_coordinate=True),
    Column("layer", dtype=INTEGER, group=ALWAYS, is_coordinate=True),
    Column("index", dtype=INTEGER, group=ALWAYS, is_coordinate=True),
    Column("prompt", dims=("prompt",), dtype=TEXT, group=ALWAYS, is_coordinate=True),
    Column("swept_kind", dims=_KINDS, dtype=TEXT, group=ALWAYS, is_coordinate=True),
    Column(EFFECT, "effect of the weights", has_interval=True, trust=100, is_tested=True, group=ALWAYS),
    Column("effect_paper", group=ALWAYS, is_finite=False),  # version 0.1.0 wrote means of ratios by 0
    Column("p_value", group=ALWAYS),
    Column("q_value", group=ALWAYS),
    Column("below_noise_floor", dtype=BOOL, group=ALWAYS),
    Column("exact", dtype=BOOL, group=ALWAYS),  # the weights were replaced for real
    Column("delta", dims=("component", "prompt"), group=ALWAYS),  # change of the metric
    Column("gap", dims=("prompt",), group=ALWAYS),
    Column("query", dims=("prompt",), dtype="iu", group=ALWAYS),
    Column("delta_norm", "norm of the change", trust=0, group=ALWAYS),
    Column("coverage_joint", dims=_KINDS, group=ALWAYS),
    Column("coverage_sum", dims=_KINDS, group=ALWAYS),
    Column("n_components", dims=_KINDS, dtype=INTEGER, group=ALWAYS),
    # How far the ranking of each kind can be trusted; there if components were replaced.
    Column("split_half", dims=_KINDS, group="reliability"),
    Column("null_permuted", dims=_KINDS, group="reliability"),
    Column("null_direction", dims=_KINDS, group="reliability"),
    # How many components a screen missed, estimated from a random sample of those it left out.
    Column("missed", dims=_KINDS, has_interval=True, group="sample"),
    Column("sampled", dtype=BOOL, group="sample"),
    Column("screen_error"),  # first-order estimate minus effect
    Column("words_changed"),  # on-policy: share of prompts on which the patched model says something else
    Column("set_score", "set score", trust=10, shown=False),
    Column("set_share", "share of the gap, for the set score", shown=False),
    Column("learned", "learned mask", trust=5, shown=False),  # a ranking for sets, too
    Column("swept", dtype=BOOL, shown=False),  # False: the component is there to be ranked for sets only
    # By way of which later heads and MLPs each effect arrives.
    Column("flow", dims=("component", "target"), group="flow"),
    Column("target", dims=("target",), dtype=TEXT, group="flow", is_coordinate=True),
    # The anchor's diagnostics, layer by layer, and its direction.
    Column("anchor_stability", dims=_LAYERS, group="diagnostics"),
    *(Column(name, dims=_LAYERS, has_interval=True, group="diagnostics") for name in _GAPS),
    *(Column(f"{name}_sd", dims=_LAYERS, group="diagnostics") for name in _GAPS),
    Column("anchor_vector", dims=("d_model",)),
    # What base, patched base and expert say to a few held-out prompts.
    Column("answerer", dims=("answerer",), dtype=TEXT, group="answers", is_coordinate=True),
    Column("answer", dims=("answerer", "shown"), dtype=TEXT, group="answers"),
    Column("answer_passes", dims=("answerer", "shown"), group="answers"),
    Column("answer_prompt", dims=("shown",), dtype=TEXT, group="answers"),
)

_table: dict[str, Column] = {}


def add_columns(columns: Iterable[Column]) -> None:
    """Add columns, and the ends of their intervals, to the table. Several methods may share one column.

    Raises:
        ValueError: the table has a different column of the same name.
    """
    for column in (part for whole in columns for part in whole.with_bounds()):
        if _table.setdefault(column.name, column) != column:
            raise ValueError(f"there is another column {column.name!r} already; choose another name")


def columns() -> tuple[Column, ...]:
    """All columns, ends of intervals included, in the order in which they were added."""
    return tuple(_table.values())


def find_column(name: str) -> Column | None:
    """The column of a name; None if the table has none. A file may hold a column of a method that is unknown here."""
    return _table.get(name)


def title_of(name: str) -> str:
    """What figures call a column; the name itself if the table has no such column."""
    column = _table.get(name)
    return name if column is None else column.title


def rankings() -> tuple[Column, ...]:
    """The columns that components can be ranked by, the most trustworthy first.

    >>> from wpjax.columns import rankings
    >>> rankings()[0].name
    'effect'
    """
    ranked = [column for column in columns() if column.trust is not None]
    return tuple(sorted(ranked, key=lambda column: -(column.trust or 0)))


def effect_estimates() -> tuple[str, ...]:
    """Names of the columns that can be used in place of `effect`, the most trustworthy first."""
    return tuple(column.name for column in rankings() if column.estimates_effect)


add_columns(_BASIC)
