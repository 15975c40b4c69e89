"""Behavioural curves: what patched models do, set by set of components, and the questions users ask of it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.stats import spearmanr

from wpjax.errors import WpjaxError
from wpjax.results.sweep_result import fits, read_dataset, write_dataset
from wpjax.stats import Interval, Resamples, mean_interval, resample

SCHEMA = 1
"""Version of the file's layout, in its attribute `schema`."""

DIRECTIONS = ("restore", "knockout")
CHECKS = ("strict", "loose")
BINS = ((-np.inf, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0), (1.0, np.inf))
"""Of the share that a score gives, for calibration."""


class Calibration(NamedTuple):
    """How a score goes with the checker, over all patched models: sets put into the base, and out of the expert.

    All figures but the number of sets are NaN for a score whose gap may be zero.

    Attributes:
        measure: the score.
        rho: Spearman's rank correlation of its share with the share that passes the checker.
        error: root mean square of their difference, the score's share cut to [0, 1].
        passing: mean share that passes, for each of `BINS` of the score's share; NaN where there is no set.
        n_sets: patched models; that with everything is counted once.
    """

    measure: str
    rho: float
    error: float
    passing: tuple[float, ...]
    n_sets: int


class Curves:
    """Curves of several rankings, with the questions users ask of them.

    Dimensions: `direction` ("restore", "knockout"), `ranking` (the one under test first), `point` along the curve,
    `prompt`, `end` ("base", "expert"). Variables: `n_components`, `n_parameters` [ranking, point]; `strict`, `loose`
    (whether each answer passes) and `score_NAME` [direction, ranking, point, prompt]; each of them at the ends as
    `end_NAME` [end, prompt]; `query` [prompt].
    """

    def __init__(self, dataset: xr.Dataset):
        self.dataset = dataset

    @property
    def rankings(self) -> list[str]:
        """The ranking under test, then the controls."""
        return [str(name) for name in self.dataset["ranking"].values]

    @property
    def measures(self) -> list[str]:
        """What is measured: "strict" and "loose", then the scores."""
        names = map(str, self.dataset.data_vars)
        return [name.removeprefix("end_") for name in names if name.startswith("end_")]

    @functools.cached_property
    def _resamples(self) -> Resamples:
        return resample(self.dataset["query"].values, seed=int(self.dataset.attrs["seed"]))

    def gap(self, measure: str) -> Interval:
        """Mean of expert minus base by a measure, in its own units, with its 95 % interval over queries."""
        ends = self.dataset[f"end_{measure}"].values.astype(np.float64)
        return mean_interval(ends[1] - ends[0], self._resamples)

    def share(self, measure: str) -> tuple[Float[np.ndarray, "3 2 R K"], Float[np.ndarray, "3 2 R K"]]:
        """How far along the way from base to expert each patched model is by a measure, with its 95 % interval.

        For "knockout" it is the share that is lost, so that in both directions 0 is no effect and 1 is all of it.

        Returns:
            the share (ratio of means, low, high), [3, direction, ranking, point], NaN if the gap may be zero; and the
            mean itself in its own units, likewise.
        """
        data = self.dataset
        ends = data[f"end_{measure}"].values.astype(np.float64)
        values = data[self._variable(measure)].values.astype(np.float64)
        moved = np.stack([values[0] - ends[0], ends[1] - values[1]])
        weights, tails = self._resamples.weights, self._resamples.tails(0.95)
        gap = self._gaps(measure)
        low, high = _share_bounds(moved @ weights.T, gap[1:], tails)
        means = (values @ weights.T) / weights.sum(1)
        bounds = np.percentile(means, tails, axis=-1)
        return np.stack([moved.sum(-1) / gap[0], low, high]), np.stack([values.mean(-1), *bounds])

    def _gaps(self, measure: str) -> Float[np.ndarray, " N"]:
        """The gap summed over prompts, then its resamples; NaN if it may be zero, as is whatever is divided by it."""
        ends = self.dataset[f"end_{measure}"].values.astype(np.float64)
        gap = ends[1] - ends[0]
        found = np.array([gap.sum(), *(self._resamples.weights @ gap)])
        return found if self.gap(measure).low > 0 else np.full_like(found, np.nan)

    def standing(self, measure: str) -> Float[np.ndarray, "2 R K"]:
        """Where between base (0) and expert (1) every patched model stands by a measure."""
        restored, lost = self.share(measure)[0][0]
        return np.stack([restored, 1 - lost])

    def _variable(self, measure: str) -> str:
        return measure if measure in CHECKS else f"score_{measure}"

    def area(self, measure: str, direction: str, ranking: int) -> Interval:
        """Mean share along a curve, over the logarithm of the number of parameters, with its 95 % interval.

        NaN if the measure's gap may be zero.

        Args:
            measure: of `measures`.
            direction: "restore" or "knockout".
            ranking: its position.
        """
        data, side = self.dataset, DIRECTIONS.index(direction)
        ends = data[f"end_{measure}"].values.astype(np.float64)
        values = data[self._variable(measure)].values[side, ranking].astype(np.float64)
        moved = ends[1] - values if side else values - ends[0]
        x = np.log(data["n_parameters"].values[ranking].astype(np.float64))
        x, first = np.unique(x, return_index=True)
        by_prompt = moved[first[-1]]
        if len(x) > 1:
            by_prompt = np.trapezoid(moved[first], x, axis=0) / (x[-1] - x[0])
        gap, resamples = self._gaps(measure), self._resamples
        low, high = _share_bounds(resamples.weights @ by_prompt, gap[1:], resamples.tails(0.95))
        return Interval(float(by_prompt.sum() / gap[0]), float(low), float(high))

    def calibration(self) -> list[Calibration]:
        """What each score is worth: how the share that it gives a patched model goes with the share that passes."""
        sizes = self.dataset["n_components"].values
        everything = sizes == sizes[0].max()
        everything[0] = False  # one set, whatever it was ranked by
        passing, found = self.standing("strict")[:, ~everything].ravel(), []
        for measure in (m for m in self.measures if m not in CHECKS):
            claimed = self.standing(measure)[:, ~everything].ravel()
            bins = [passing[(claimed >= low) & (claimed < high)] for low, high in BINS]
            rho = float(spearmanr(claimed, passing).statistic) if np.ptp(claimed) and np.ptp(passing) else float("nan")
            shares = tuple(float(b.mean()) if b.size else float("nan") for b in bins)
            error = float(np.sqrt(np.mean((np.clip(claimed, 0, 1) - passing) ** 2)))
            found.append(Calibration(measure, rho, error, shares, claimed.size))
        return found

    def to_netcdf(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: the place exists or cannot be written.
        """
        write_dataset(self.dataset, Path(path), overwrite)

    @classmethod
    def from_netcdf(cls, path: str | Path) -> Curves:
        """Read what `to_netcdf` wrote.

        Raises:
            WpjaxError: no such file, or not one of this package.
        """
        dataset = read_dataset(path, "curves", SCHEMA, "wpjax validate")
        wrong = _damage(dataset)
        if wrong:
            raise WpjaxError(f"{path}: lacks a usable {', '.join(wrong)}; it is damaged, validate again")
        return cls(dataset)


def _share_bounds(
    moved: Float[np.ndarray, "*n N"], gaps: Float[np.ndarray, " N"], tails: tuple[float, float]
) -> Float[np.ndarray, " 2 *n"]:
    """Interval of a share from resamples; those that hold no prompt which tells base from expert have none."""
    some = gaps > 0
    if not some.any():
        return np.full((2, *moved.shape[:-1]), np.nan)
    return np.percentile(moved[..., some] / gaps[some], tails, axis=-1)


DIMS = ("direction", "ranking", "point", "prompt")
"""Of what is measured along curves."""


def _damage(data: xr.Dataset) -> list[str]:
    measures = [str(name).removeprefix("end_") for name in data.data_vars if str(name).startswith("end_")]
    layout: dict[str, tuple[tuple[str, ...], str]] = {
        "ranking": (("ranking",), "OTU"),
        "query": (("prompt",), "iu"),
        **dict.fromkeys(("n_components", "n_parameters"), (("ranking", "point"), "iu")),
        **{f"end_{m}": (("end", "prompt"), "fb") for m in (*CHECKS, *measures)},
        **{m if m in CHECKS else f"score_{m}": (DIMS, "fb") for m in (*CHECKS, *measures)},
    }
    wrong = [name for name, (dims, kinds) in layout.items() if not fits(data, name, dims, kinds)]
    wrong += [n for n in layout if n not in wrong and data[n].dtype.kind == "f" and np.isnan(data[n].values).any()]
    if not wrong and (data.sizes["direction"], data.sizes["end"]) != (2, 2):
        wrong.append("direction and end")
    if not wrong and not (data["n_parameters"].values > 0).all():
        wrong.append("n_parameters")
    texts = [name for name in ("behaviour", "base", "expert") if not isinstance(data.attrs.get(name), str)]
    numbers = [name for name in ("seed",) if not isinstance(data.attrs.get(name), int | np.integer)]
    return wrong + texts + numbers
