"""The columns of a sweep's result: one table that makes the file, checks it, ranks by it and draws it.

What every result has stands here. What a method makes stands in its entry (see `wpjax.methods`), which adds it to
this table. Nothing here imports JAX or NumPy, so that the command line's help is quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

ALWAYS = "always"
"""Group of the columns that every result has."""

FLOAT, BOOL, INTEGER, TEXT = "f", "b", "i", "OTU"
"""Kinds of NumPy dtype that a column may have; text has several."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A variable of a result.

    Attributes:
        name: in the file, and what `top(by=...)` and `--by` take.
        label: in the legends of figures, and as a hint on the page; empty for the name.
        dims: its dimensions.
        dtype: letters of the kinds of NumPy dtype that it may have.
        has_interval: whether `name_low` and `name_high` stand beside it, its 95 % interval.
        trust: place among the columns that components can be ranked by: the most trustworthy, with the largest number,
            is the one that a result is ranked by unless the user names another. None: nothing is ranked by it.
        estimates_effect: it estimates what a component's own weights do, as a share of the gap, so it stands in for
            `effect` where that was not measured on all prompts.
        is_tested: p- and q-values are of it, if nothing more trustworthy was measured.
        group: columns of one group are in a file together, or none of them is; `ALWAYS`: in every file; empty: by
            itself, where it was measured.
        shown: of columns that may be absent, whether the page's table of components has it.
        is_coordinate: it names places along a dimension.
        is_finite: numbers in it are finite, or NaN where nothing was measured.
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
        """What figures call it."""
        return self.label or self.name

    @property
    def bounds(self) -> tuple[str, ...]:
        """Names of the lower and the upper end of its interval; none if it has none."""
        if not self.has_interval:
            return ()
        name = "ci" if self.name == EFFECT else self.name  # the file's names for the ends of the effect's interval
        return f"{name}_low", f"{name}_high"

    @property
    def together(self) -> str:
        """The group that it is in or, alone, is."""
        return self.group or self.name

    def with_bounds(self) -> Iterator[Column]:
        """The column, then the ends of its interval as columns that nothing is ranked by."""
        yield self
        for name in self.bounds:
            yield Column(name, dims=self.dims, dtype=self.dtype, group=self.together, shown=False)


EFFECT = "effect"
"""Share of the gap that a component's weights recover alone; the columns below say the rest."""

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
    Column("effect_paper", group=ALWAYS, is_finite=False),  # mean over prompts of ratios, some of them by 0
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
    # how far each kind's ranking can be trusted, where something was replaced
    Column("split_half", dims=_KINDS, group="reliability"),
    Column("null_permuted", dims=_KINDS, group="reliability"),
    Column("null_direction", dims=_KINDS, group="reliability"),
    # what a screen missed, from a random sample of what it left out
    Column("missed", dims=_KINDS, has_interval=True, group="sample"),
    Column("sampled", dtype=BOOL, group="sample"),
    Column("screen_error"),
    Column("words_changed"),
    Column("set_score", "set score", trust=10, shown=False),
    Column("flow", dims=("component", "target"), group="flow"),
    Column("target", dims=("target",), dtype=TEXT, group="flow", is_coordinate=True),
    Column("anchor_stability", dims=_LAYERS, group="diagnostics"),
    *(Column(name, dims=_LAYERS, has_interval=True, group="diagnostics") for name in _GAPS),
    *(Column(f"{name}_sd", dims=_LAYERS, group="diagnostics") for name in _GAPS),
    Column("anchor_vector", dims=("d_model",)),
)

_table: dict[str, Column] = {}


def add_columns(columns: Iterable[Column]) -> None:
    """Put columns, and the ends of their intervals, into the table. Several methods may make one and the same column.

    Raises:
        ValueError: another column has this name.
    """
    for column in (part for whole in columns for part in whole.with_bounds()):
        if _table.setdefault(column.name, column) != column:
            raise ValueError(f"there is another column {column.name!r} already; choose another name")


def columns() -> tuple[Column, ...]:
    """The table, ends of intervals included, in the order in which columns were added."""
    return tuple(_table.values())


def find_column(name: str) -> Column | None:
    """A column by its name; None if no method that is known makes it."""
    return _table.get(name)


def title_of(name: str) -> str:
    """What figures call a column; its name if the table does not have it."""
    column = _table.get(name)
    return name if column is None else column.title


def rankings() -> tuple[Column, ...]:
    """The columns that components can be ranked by, the most trustworthy first."""
    ranked = [column for column in columns() if column.trust is not None]
    return tuple(sorted(ranked, key=lambda column: -(column.trust or 0)))


def effect_estimates() -> tuple[str, ...]:
    """Names of the columns that stand in for `effect`, the most trustworthy first."""
    return tuple(column.name for column in rankings() if column.estimates_effect)


add_columns(_BASIC)
