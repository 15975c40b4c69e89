"""Two sweeps side by side: do they rank alike, do their tops overlap, and which effects surely differ?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

from wpjax.columns import find_column
from wpjax.errors import WpjaxError
from wpjax.results.sweep_result import SweepResult

_ABOUT = ("behaviour", "base", "expert", "base_fingerprint", "expert_fingerprint", "metric", "metric_layer",
          "given_layer", "method", "split", "n_prompts", "dtype", "seed", "anchor_acceptance", "behaviour_differs",
          "wpjax_version")  # fmt: skip
"""Attributes of a result that say what was swept and how."""


@dataclasses.dataclass(frozen=True)
class KindComparison:
    """How alike two sweeps rank the components of one kind.

    Attributes:
        kind: the kind.
        n_common: number of its components that both have a number of.
        rho: Spearman's rank correlation over them; NaN for fewer than three, or if a sweep gives all the same number.
        n_top: number of components of a top: the number asked for, but at most half of the common ones.
        n_shared: number of components in both tops.
        by_chance: how many that would be, on average, for two unrelated rankings: n_top^2 / n_common.
    """

    kind: str
    n_common: int
    rho: float
    n_top: int
    n_shared: int
    by_chance: float


@dataclasses.dataclass(frozen=True)
class Side:
    """One component in two sweeps; NaN where there is no number or no interval.

    Attributes:
        name: name of the component.
        a: its number in the first sweep, then the ends of its 95 % interval.
        b: the same in the second.
        apart: whether the two intervals have no point in common. Intervals that overlap may still hide a difference.
    """

    name: str
    a: tuple[float, float, float]
    b: tuple[float, float, float]
    apart: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two sweeps side by side.

    Attributes:
        by: the column that was compared in each.
        differs: attribute -> its value in each, for those that are not the same.
        kinds: the comparison of each kind that both swept.
        sides: the components of either top, the largest first.
        n_apart: number of common components, of all kinds, whose intervals have no point in common.
        n_intervals: number of common components that have an interval in both.
    """

    by: tuple[str, str]
    differs: dict[str, tuple[str, str]]
    kinds: tuple[KindComparison, ...]
    sides: tuple[Side, ...]
    n_apart: int
    n_intervals: int


def compare(a: SweepResult, b: SweepResult, *, by: str | None = None, top: int = 10) -> Comparison:
    """Compare two sweeps, component by component.

    Args:
        a: a sweep.
        b: another, of the same pair or of another pair of the same architecture.
        by: the column to compare; None for each result's own `ranking`.
        top: number of components of a top.

    Raises:
        WpjaxError: the models have different shapes, so that equal names are not the same component; or no component
            is in both; or a result has no such ranking.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:title")
    >>> anchor, batch = wp.fit_anchor(pair, task, n_prompts=8, causal="skip"), task.encode(pair.tokenizer, n_prompts=4)
    >>> result = wp.sweep(pair, batch, anchor, kinds=("attn", "mlp"), method="exact")
    >>> found = wp.compare(result, result, top=3)
    >>> [(kind.kind, kind.rho, kind.n_shared) for kind in found.kinds], found.n_apart
    ([('attn', 1.0, 3), ('mlp', 1.0, 3)], 0)
    """
    _check_shapes(a, b)
    rankings = by or a.ranking, by or b.ranking
    numbers = [_numbers(result, column) for result, column in zip((a, b), rankings, strict=True)]
    common = [name for name in numbers[0] if name in numbers[1]]
    if not common:
        raise WpjaxError("the two results have no component in common; sweep the same kinds in both")
    names, kinds = (a.dataset[column].values.astype(str).tolist() for column in ("name", "kind"))
    of_kind = dict(zip(names, kinds, strict=True))
    rows, shown = [], dict[str, None]()
    for kind in dict.fromkeys(of_kind[name] for name in common):
        names = [name for name in common if of_kind[name] == kind]
        row, tops = _kind(kind, names, [np.array([n[name][0] for name in names]) for n in numbers], top)
        rows.append(row)
        shown |= dict.fromkeys(tops)
    sides = [
        Side(name, numbers[0][name], numbers[1][name], _apart(numbers[0][name], numbers[1][name])) for name in shown
    ]
    sides.sort(key=lambda side: -max(abs(side.a[0]), abs(side.b[0])))
    bounded = [name for name in common if np.isfinite([*numbers[0][name], *numbers[1][name]]).all()]
    n_apart = sum(_apart(numbers[0][name], numbers[1][name]) for name in bounded)
    return Comparison(rankings, _differences(a, b), tuple(rows), tuple(sides), n_apart, len(bounded))


def _check_shapes(a: SweepResult, b: SweepResult) -> None:
    """Refuse results of models whose components of equal names are not the same."""
    one, other = a.dataset, b.dataset
    if one.attrs["base_fingerprint"] == other.attrs["base_fingerprint"]:
        return
    shapes = [{"layers": int(data.attrs["n_layers"])} for data in (one, other)]
    if all("d_model" in data.sizes for data in (one, other)):
        for shape, data in zip(shapes, (one, other), strict=True):
            shape["dimensions"] = data.sizes["d_model"]
    for what, n in shapes[0].items():
        if shapes[1][what] != n:
            raise WpjaxError(
                f"{one.attrs['base']} has {n} {what}, {other.attrs['base']} has {shapes[1][what]}: equal names are not "
                "the same components there, so nothing can be compared; compare sweeps of one architecture"
            )


def _numbers(result: SweepResult, by: str) -> dict[str, tuple[float, float, float]]:
    """Name -> number and ends of its interval, for components that have a number."""
    values, column = result.values(by), find_column(by)
    bounds = [result.dataset[name].values.astype(float) for name in (column.bounds if column else ())]
    low, high = bounds or [np.full(len(values), np.nan)] * 2
    names = result.dataset["name"].values.astype(str).tolist()
    rows = zip(names, values.tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: (value, lo, hi) for name, value, lo, hi in rows if np.isfinite(value)}


def _kind(kind: str, names: Sequence[str], values: Sequence[np.ndarray], top: int) -> tuple[KindComparison, list[str]]:
    """The comparison of one kind, and the names in either top."""
    n = len(names)
    n_top = max(1, min(top, n // 2))
    tops = [[names[i] for i in np.argsort(-v, kind="stable")[:n_top]] for v in values]
    varies = n > 2 and all(np.ptp(v) > 0 for v in values)
    rho = float(spearmanr(*values).statistic) if varies else float("nan")
    shared = len(set(tops[0]) & set(tops[1]))
    return KindComparison(kind, n, rho, n_top, shared, n_top**2 / n), [*tops[0], *tops[1]]


def _apart(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    return a[1] > b[2] or b[1] > a[2]  # false for NaN


def _differences(a: SweepResult, b: SweepResult) -> dict[str, tuple[str, str]]:
    one, other = ({name: r.dataset.attrs.get(name) for name in _ABOUT} for r in (a, b))
    found = {name: (str(one[name]), str(other[name])) for name in _ABOUT if str(one[name]) != str(other[name])}
    prompts = [r.dataset["prompt"].values.astype(str).tolist() for r in (a, b)]
    if prompts[0] != prompts[1]:
        n = len(set(prompts[0]) & set(prompts[1]))
        found["prompts"] = (f"{len(prompts[0])}", f"{len(prompts[1])}, {n} in both")
    return found
