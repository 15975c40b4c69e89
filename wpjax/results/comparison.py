"""Two sweeps side by side: do they rank alike, do their tops overlap, and which effects surely differ?

Where both hold effects on the same prompts, differences are tested query by query (ours):

    d_i(c) = delta_a,i(c) / mean gap_a  -  delta_b,i(c) / mean gap_b        i: a query;  a, b: the sweeps

The null hypothesis is that a query is as likely to give the two effects the other way round, so the signs of whole
queries are flipped, as in the tests of a sweep. q is Benjamini-Hochberg over all components that both swept; those that
were not replaced in both count with p = 1. Elsewhere intervals are compared, which is unpaired and sees less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

from wpjax.columns import EFFECT, find_column
from wpjax.errors import WpjaxError
from wpjax.results.reach import LEVEL, Reach
from wpjax.results.sweep_result import SweepResult
from wpjax.stats import benjamini_hochberg, ratio_difference, resample, sign_flip_p

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


_NONE = (math.nan, math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class Side:
    """One component in two sweeps; NaN where there is no number or no interval.

    Attributes:
        name: name of the component.
        a: its number in the first sweep, then the ends of its 95 % interval.
        b: the same in the second.
        apart: whether the two intervals have no point in common. Intervals that overlap may still hide a difference.
        difference: the first number minus the second, then the ends of its 95 % interval; NaN where it is not paired.
        q_value: lowest false discovery rate at which the two effects count as different; NaN likewise.
    """

    name: str
    a: tuple[float, float, float]
    b: tuple[float, float, float]
    apart: bool
    difference: tuple[float, float, float] = _NONE
    q_value: float = math.nan


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
        unpaired: why differences are not tested query by query; empty if they are.
        n_tested: number of common components whose difference is tested.
        n_differ: number of those with q < 0.05.
        reach: what so few queries cannot show, in words; empty if a single component can be found to differ.
    """

    by: tuple[str, str]
    differs: dict[str, tuple[str, str]]
    kinds: tuple[KindComparison, ...]
    sides: tuple[Side, ...]
    n_apart: int
    n_intervals: int
    unpaired: str
    n_tested: int = 0
    n_differ: int = 0
    reach: str = ""


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
    >>> [(kind.kind, kind.rho, kind.n_shared) for kind in found.kinds], found.n_tested, found.n_differ
    ([('attn', 1.0, 3), ('mlp', 1.0, 3)], 14, 0)
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
    unpaired, tests, reach = _paired(a.swept, b.swept, rankings)
    sides = [
        Side(name, numbers[0][name], numbers[1][name], _apart(numbers[0][name], numbers[1][name]), *tests.get(name, ()))
        for name in shown
    ]
    sides.sort(key=lambda side: -max(abs(side.a[0]), abs(side.b[0])))
    bounded = [name for name in common if np.isfinite([*numbers[0][name], *numbers[1][name]]).all()]
    n_apart = sum(_apart(numbers[0][name], numbers[1][name]) for name in bounded)
    n_differ = sum(q < LEVEL for _, q in tests.values())
    differs = _differences(a, b)
    counts = n_apart, len(bounded), unpaired, len(tests), n_differ
    return Comparison(rankings, differs, tuple(rows), tuple(sides), *counts, reach)


def _paired(
    a: SweepResult, b: SweepResult, rankings: tuple[str, str]
) -> tuple[str, dict[str, tuple[tuple[float, float, float], float]], str]:
    """The differences of effects, query by query.

    Returns:
        why there are none, empty if there are; name -> difference with its interval, and q; and what so few queries
        cannot show.
    """
    if rankings != (EFFECT, EFFECT):
        return f"only effects are kept query by query, not {' and '.join(dict.fromkeys(rankings))}", {}, ""
    if not all(name in r.dataset for r in (a, b) for name in ("delta", "gap", "query")):
        return "the effects on each query are not in both files", {}, ""
    orders = [np.argsort(r.dataset["prompt"].values.astype(str), kind="stable") for r in (a, b)]
    data = [r.dataset.isel(prompt=order) for r, order in zip((a, b), orders, strict=True)]
    queries = [d["query"].values for d in data]
    if data[0]["prompt"].values.astype(str).tolist() != data[1]["prompt"].values.astype(str).tolist():
        return "the two were swept on different prompts", {}, ""
    n_both = len(np.unique(np.stack(queries), axis=1).T)
    if any(n_both != len(np.unique(q)) for q in queries):
        return "the two count different prompts as one query", {}, ""
    rows = [{name: i for i, name in enumerate(d["name"].values.astype(str).tolist())} for d in data]
    names = [name for name in rows[0] if name in rows[1]]
    delta = [
        d["delta"].values[[row[name] for name in names]].astype(np.float64) for d, row in zip(data, rows, strict=True)
    ]
    tested = np.isfinite(delta[0]).all(1) & np.isfinite(delta[1]).all(1)
    if not tested.any():
        return "no component was replaced in both", {}, ""
    mine, theirs = (d[tested] for d in delta)
    gaps = data[0]["gap"].values.astype(np.float64), data[1]["gap"].values.astype(np.float64)
    figures = ratio_difference((mine, theirs), gaps, resample(queries[0]))
    p = np.ones(len(names))
    p[tested] = sign_flip_p(mine / gaps[0].mean() - theirs / gaps[1].mean(), queries[0])
    q = benjamini_hochberg(p)[tested].tolist()
    found = [names[i] for i in np.flatnonzero(tested)]
    rest = zip(zip(*(values.tolist() for values in figures), strict=True), q, strict=True)
    reach = Reach.of(len(np.unique(queries[0])), len(names), int(tested.sum()))
    return "", dict(zip(found, rest, strict=True)), str(reach)


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
