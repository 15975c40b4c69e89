"""The result of a validation: curves of what patched models do, and the questions users ask of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.stats import spearmanr

from wpjax.errors import WpjaxError
from wpjax.results.answers import Answers, damage_of_answers
from wpjax.results.files import has_form, read_dataset, write_dataset
from wpjax.stats import Interval, Resamples, mean_interval, resample

SCHEMA = 1
"""Version of the layout of the file; the file holds it as its attribute `schema`."""

DIRECTIONS = ("restore", "knockout")
"""Components of the expert put into the base, and components of the base put into the expert."""

CHECKS = ("strict", "loose")
"""Names of the checker's two verdicts: on the answer as it is, and on IFEval's variants of it."""

BINS = ((-np.inf, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0), (1.0, np.inf))
"""Bins [low, high) of the share that a score gives a patched model, for calibration."""


class Calibration(NamedTuple):
    """How well a score foretells the checker, over all patched models of both directions.

    Two numbers of each patched model are compared: how far from base (0) to expert (1) it stands by the score, and how
    far it stands by the share of its answers that pass the strict checker. If the score's gap may be zero, all figures
    but `n_sets` are NaN.

    Attributes:
        measure: name of the score.
        rho: Spearman's rank correlation of the two numbers.
        error: root mean square of their difference, with the score's number clipped to [0, 1].
        passing: mean of the checker's number in each of `BINS` of the score's number; NaN for an empty bin.
        n_sets: number of patched models. The model with all components is the same for every ranking; it counts once.
    """

    measure: str
    rho: float
    error: float
    passing: tuple[float, ...]
    n_sets: int


class Curves:
    """Curves of several rankings, and the questions users ask of them.

    A point of a curve is a patched model: the first components of a ranking, put into the base or out of the expert.

    Dimensions of the dataset:

    - `direction`: "restore", "knockout"; `end`: "base", "expert";
    - `ranking`: the one under test, then the controls; `point`: along a curve, from one component to all; `prompt`.

    Variables:

    - `strict`, `loose` [direction, ranking, point, prompt]: whether the answer passes the checker;
    - `score_NAME` [direction, ranking, point, prompt]: a score that needs no generation, in its own units;
    - `end_NAME` [end, prompt]: the same measures of the base and the expert themselves;
    - `n_components`, `n_parameters` [ranking, point]: size of the patched set; `query` [prompt]: index of the query.
    - `answer`, `answer_passes`, `answer_prompt`: answers to read (see `results.answers`; the property `answers`).

    One prompt a query; half and then all of the answers are brought back:

    >>> passes = np.array([[True, True, False, False], [True] * 4])  # [point, prompt]
    >>> curves = Curves(
    ...     xr.Dataset(
    ...         {
    ...             "strict": (("direction", "ranking", "point", "prompt"), np.stack([passes, ~passes])[:, None]),
    ...             "end_strict": (("end", "prompt"), np.array([[False] * 4, [True] * 4])),
    ...             "n_parameters": (("ranking", "point"), [[10, 1000]]),
    ...             "query": ("prompt", np.arange(4)),
    ...         },
    ...         attrs={"seed": 0},
    ...     )
    ... )
    >>> curves.position("strict")[0]  # restored, [ranking, point]
    array([[0.5, 1. ]])
    >>> curves.area("strict", "restore", 0).mean
    0.75
    """

    def __init__(self, dataset: xr.Dataset):
        self.dataset = dataset

    @property
    def rankings(self) -> list[str]:
        """Names of the rankings: the one under test, then the controls."""
        return [str(name) for name in self.dataset["ranking"].values]

    @property
    def measures(self) -> list[str]:
        """Names of what is measured: "strict" and "loose", then the scores."""
        names = map(str, self.dataset.data_vars)
        return [name.removeprefix("end_") for name in names if name.startswith("end_")]

    @property
    def answers(self) -> Answers | None:
        """What base, patched base and expert say to a few of the prompts; None if the file does not hold it."""
        return Answers.of(self.dataset)

    def __repr__(self) -> str:
        """A few lines: the pair, the behaviour, and how much of it each ranking brings back."""
        attrs = self.dataset.attrs
        lines = [f"Curves of {attrs.get('behaviour', '?')}: {attrs.get('base', '?')} -> {attrs.get('expert', '?')}"]
        for i, name in enumerate(self.rankings):
            back, away = (self.area("strict", direction, i).mean for direction in DIRECTIONS)
            lines.append(f"  {name}: brings back {back:.2f}, takes away {away:.2f} (mean share along the curve)")
        return "\n".join(lines)

    @functools.cached_property
    def _resamples(self) -> Resamples:
        return resample(self.dataset["query"].values, seed=int(self.dataset.attrs["seed"]))

    def gap(self, measure: str) -> Interval:
        """Mean over prompts of expert minus base, in the units of the measure, with its 95 % interval over queries."""
        ends = self.dataset[f"end_{measure}"].values.astype(np.float64)
        return mean_interval(ends[1] - ends[0], self._resamples)

    def share(self, measure: str) -> tuple[Float[np.ndarray, "3 2 R K"], Float[np.ndarray, "3 2 R K"]]:
        """Share of the gap that each patched model brings back (restore) or loses (knockout), by a measure.

        In both directions 0 is no effect and 1 is all of it (docs/method.md, "Restoration and knock-out curves").

        Args:
            measure: name of one of `measures`.

        Returns:
            two arrays [3, direction, ranking, point]; the first axis is a number and the ends of its 95 % interval.
            The first array is the share, a ratio of means, NaN if the gap may be zero. The second is the mean of the
            measure, in its own units.
        """
        data = self.dataset
        ends = data[f"end_{measure}"].values.astype(np.float64)
        values = data[self._variable(measure)].values.astype(np.float64)
        moved = np.stack([values[0] - ends[0], ends[1] - values[1]])  # [direction, ranking, point, prompt]
        weights, tails = self._resamples.weights, self._resamples.tails(0.95)
        gap = self._gaps(measure)
        low, high = _share_bounds(moved @ weights.T, gap[1:], tails)
        means = (values @ weights.T) / weights.sum(1)
        bounds = np.percentile(means, tails, axis=-1)
        return np.stack([moved.sum(-1) / gap[0], low, high]), np.stack([values.mean(-1), *bounds])

    def _gaps(self, measure: str) -> Float[np.ndarray, " N"]:
        """The gap summed over prompts, then each resample of it.

        All are NaN if the gap may be zero, and so is every share, as it is divided by them.
        """
        ends = self.dataset[f"end_{measure}"].values.astype(np.float64)
        gap = ends[1] - ends[0]
        sums = np.array([gap.sum(), *(self._resamples.weights @ gap)])
        return sums if self.gap(measure).low > 0 else np.full_like(sums, np.nan)

    def position(self, measure: str) -> Float[np.ndarray, "2 R K"]:
        """How far from base (0) to expert (1) each patched model stands by a measure, [direction, ranking, point]."""
        restored, lost = self.share(measure)[0][0]
        return np.stack([restored, 1 - lost])

    @property
    def summary(self) -> str:
        """In words: how few components bring half of the behaviour back, and what random ones of that size do.

        The set is the smallest of the first ranking whose share of answers that pass (strict) is at least half way from
        base to expert.
        """
        data, name = self.dataset, self.rankings[0]
        passing = data["strict"].values.mean(-1)  # [direction, ranking, point]
        base, expert = data["end_strict"].values.mean(-1)
        ends = f"alone it passes on {base:.0%}, the expert on {expert:.0%}"
        enough = np.flatnonzero(self.position("strict")[0, 0] >= 0.5)
        if not enough.size:
            return f"No set that was tried brings half of the behaviour back to the base (by {name}); {ends}."
        k, n_all = enough[0], int(data["n_components"].values[0].max())
        n = int(data["n_components"].values[0, k])
        best = "best" if n == 1 else f"{n:,} best"
        told = (
            f"With the {best} of {n_all:,} components (by {name}) the base passes the checker on "
            f"{passing[0, 0, k]:.0%} of the prompts; {ends}. Without them the expert passes on "
            f"{passing[1, 0, k]:.0%}."
        )
        random = [i for i, other in enumerate(self.rankings) if other.startswith("random")]
        if random and n < n_all:
            told += (
                f" With random components of as many parameters the base passes on {passing[0, random, k].mean():.0%}."
            )
        return told

    def _variable(self, measure: str) -> str:
        return measure if measure in CHECKS else f"score_{measure}"

    def area(self, measure: str, direction: str, ranking: int) -> Interval:
        """Mean share along a curve, over the logarithm of the number of parameters, with its 95 % interval.

        It is NaN if the gap of the measure may be zero.

        Args:
            measure: name of one of `measures`.
            direction: "restore" or "knockout".
            ranking: index into `rankings`.
        """
        data, side = self.dataset, DIRECTIONS.index(direction)
        ends = data[f"end_{measure}"].values.astype(np.float64)
        values = data[self._variable(measure)].values[side, ranking].astype(np.float64)
        moved = ends[1] - values if side else values - ends[0]
        x = np.log(data["n_parameters"].values[ranking].astype(np.float64))
        x, first = np.unique(x, return_index=True)  # two points of equal size have no width between them
        by_prompt = moved[first[-1]]  # a curve of one point
        if len(x) > 1:
            by_prompt = np.trapezoid(moved[first], x, axis=0) / (x[-1] - x[0])
        gap, resamples = self._gaps(measure), self._resamples
        low, high = _share_bounds(resamples.weights @ by_prompt, gap[1:], resamples.tails(0.95))
        return Interval(float(by_prompt.sum() / gap[0]), float(low), float(high))

    def calibration(self) -> list[Calibration]:
        """How well each score foretells the checker, one `Calibration` a score."""
        sizes = self.dataset["n_components"].values  # [ranking, point]
        repeated = sizes == sizes[0].max()  # the model with all components is the same whatever the ranking:
        repeated[0] = False  # it counts once, with the first
        passing, calibrations = self.position("strict")[:, ~repeated].ravel(), []
        for measure in (m for m in self.measures if m not in CHECKS):
            claimed = self.position(measure)[:, ~repeated].ravel()
            bins = [passing[(claimed >= low) & (claimed < high)] for low, high in BINS]
            rho = float(spearmanr(claimed, passing).statistic) if np.ptp(claimed) and np.ptp(passing) else float("nan")
            shares = tuple(float(b.mean()) if b.size else float("nan") for b in bins)
            error = float(np.sqrt(np.mean((np.clip(claimed, 0, 1) - passing) ** 2)))
            calibrations.append(Calibration(measure, rho, error, shares, claimed.size))
        return calibrations

    def to_netcdf(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: the place exists or cannot be written.
        """
        write_dataset(self.dataset, Path(path), overwrite)

    @classmethod
    def from_netcdf(cls, path: str | Path) -> Curves:
        """Read a file that `to_netcdf` wrote.

        Raises:
            WpjaxError: there is no such file, it holds no curves, or it is damaged.
        """
        dataset = read_dataset(path, "curves", SCHEMA, "wpjax validate")
        wrong = _damage(dataset)
        if wrong:
            raise WpjaxError(f"{path}: lacks a usable {', '.join(wrong)}; it is damaged, validate again")
        return cls(dataset)


def _share_bounds(
    moved: Float[np.ndarray, "*n N"], gaps: Float[np.ndarray, " N"], tails: tuple[float, float]
) -> Float[np.ndarray, " 2 *n"]:
    """Interval of a share from resamples.

    Resamples whose gap is not positive are left out: they hold no prompt that tells base from expert.

    Args:
        moved: [..., N], numerator of the share in each resample.
        gaps: [N], denominator of the share in each resample; NaN if there is no share.
        tails: percentiles of the interval's ends.

    Returns:
        [2, ...], lower and upper end; NaN if no resample is left.
    """
    usable = gaps > 0
    if not usable.any():
        return np.full((2, *moved.shape[:-1]), np.nan)
    return np.percentile(moved[..., usable] / gaps[usable], tails, axis=-1)


DIMS = ("direction", "ranking", "point", "prompt")
"""Dimensions of a measure along the curves."""


def _damage(data: xr.Dataset) -> list[str]:
    """Names of what a dataset lacks, or has in another form; empty if it is whole."""
    measures = [str(name).removeprefix("end_") for name in data.data_vars if str(name).startswith("end_")]
    layout: dict[str, tuple[tuple[str, ...], str]] = {
        "ranking": (("ranking",), "OTU"),
        "query": (("prompt",), "iu"),
        **dict.fromkeys(("n_components", "n_parameters"), (("ranking", "point"), "iu")),
        **{f"end_{m}": (("end", "prompt"), "fb") for m in (*CHECKS, *measures)},
        **{m if m in CHECKS else f"score_{m}": (DIMS, "fb") for m in (*CHECKS, *measures)},
    }
    wrong = [name for name, (dims, kinds) in layout.items() if not has_form(data, name, dims, kinds)]
    wrong += [n for n in layout if n not in wrong and data[n].dtype.kind == "f" and np.isnan(data[n].values).any()]
    if not wrong and (data.sizes["direction"], data.sizes["end"]) != (2, 2):
        wrong.append("direction and end")
    if not wrong and not (data["n_parameters"].values > 0).all():
        wrong.append("n_parameters")
    wrong += damage_of_answers(data)
    texts = [name for name in ("behaviour", "base", "expert") if not isinstance(data.attrs.get(name), str)]
    numbers = [name for name in ("seed",) if not isinstance(data.attrs.get(name), int | np.integer)]
    return wrong + texts + numbers
