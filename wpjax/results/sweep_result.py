"""The result of a sweep: one dataset, one netCDF file, and the questions users ask of it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float

from wpjax.columns import ALWAYS, EFFECT, columns, effect_estimates, rankings
from wpjax.errors import WpjaxError
from wpjax.methods import methods
from wpjax.runtime.files import atomic_output

SCHEMA = 4
"""Version of the file's layout, in its attribute `schema`."""

STORED_AS_JSON = ("noise_floor_by_kind", "rows_per_program")
"""Attributes that are mappings; so are those of methods' own (`Method.marks`) that are text in the file."""

TEXTS = ("behaviour", "metric", "base", "expert", "base_fingerprint", "expert_fingerprint", "split", "date",
         "noise_floor_by_kind")  # fmt: skip
NUMBERS = ("n_prompts", "n_queries", "n_layers", "metric_layer", "given_layer", "gap_mean", "gap_low", "gap_high",
           "coverage", "noise_floor")  # fmt: skip


class Row(NamedTuple):
    """One line of a ranked table.

    Attributes:
        rank: from 1.
        name: component.
        value: what it is ranked by.
        effect: share of the gap it recovers alone (ratio of means).
        ci_low: lower end of the 95 % interval.
        ci_high: upper end.
        q_value: false discovery rate at which it would be reported.
        below_noise_floor: whether rounding alone could have made it.
    """

    rank: int
    name: str
    value: float
    effect: float
    ci_low: float
    ci_high: float
    q_value: float
    below_noise_floor: bool


def write_dataset(dataset: xr.Dataset, path: Path, overwrite: bool = False) -> None:
    """Write a netCDF file, whole or not at all.

    Raises:
        OutputError: the place exists or cannot be written.
    """
    encoding = {v: {"zlib": True} for v, a in dataset.data_vars.items() if a.dtype.kind == "f" and a.ndim}
    with atomic_output(path, overwrite) as temporary:
        dataset.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)


def read_dataset(path: str | Path, what: str, schema: int, command: str) -> xr.Dataset:
    """Read a netCDF file of this package.

    Args:
        path: of the file.
        what: kind of result that it must be, its attribute `what`.
        schema: version of the layout that is understood.
        command: that makes such files, for the message.

    Raises:
        WpjaxError: no such file, or not such a result.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about HDF5 that is not netCDF
            dataset = xr.load_dataset(path, engine="h5netcdf")
    except Exception as error:  # HDF5's readers raise what they like on a damaged file
        raise WpjaxError(f"{path}: not a readable result file ({error}); make one with `{command}`") from error
    kind: Any = dataset.attrs.get("what")
    if isinstance(kind, str) and kind != what:
        raise WpjaxError(f"{path}: holds {kind}, not {what}; make that with `{command}`")
    found: Any = dataset.attrs.get("schema")
    if not np.array_equal(found, schema):
        raise WpjaxError(f"{path}: schema {found}, this version reads {schema}; make it anew with `{command}`")
    return dataset


class SweepResult:
    """A sweep's dataset, with the questions users ask of it.

    Dimension `component` has coordinates `name`, `kind`, `layer`, `index`; dimension `prompt` has `prompt`, the text
    exactly as the model was given it. Variables: `effect` (ratio of means, NaN where a component was only screened),
    `effect_paper` (mean of ratios), `ci_low`, `ci_high`, `p_value`, `q_value`, `below_noise_floor`, `exact`,
    `delta[component, prompt]`, `gap[prompt]`, `delta_norm` (Frobenius norm of the component's task vector), the
    estimates that the method makes (`screen`, `gradient`, `ig`, `secant`, `race`, `attribution`), and `activation`,
    `source`, `relay`, `interaction` and `knockout` (share of the gap lost in the expert), each with `_low` and `_high`,
    where those cells were measured; `beta_low`, `banzhaf` and `beta_high` (share of the gap in the company of few, half
    and most of the others) and `redundancy` (the first minus the last), likewise; `set_score`, what components are
    ranked by to be patched together (share of the gaps of anchor and decision score, see `sweeps.add_set_score`).
    `coverage_joint[swept_kind]` and
    `coverage_sum[swept_kind]` say how much of the gap each kind recovers as one patch and as the sum of its single
    effects (first-order ones where nothing was replaced); `split_half[swept_kind]` how reliably its ranking repeats on
    other queries; `null_permuted` and `null_direction` what 95 % of effects are smaller than where there is nothing to
    find; `missed` (with `_low`, `_high`) how many components outside the screen's choice have effects as large as its
    median, from the random sample `sampled[component]`. `screen_error[component]` is the screen (or the gradient) minus
    the effect. p, q, `split_half` and `missed` are of activation patches where no weights were replaced;
    `flow[component, target]` says by way of which later heads and MLPs an effect arrives, along the metric's slope at
    the base, and its rows sum to the effect (the target `rest`, of metrics that read logits, is what the slope does not
    tell, on-policy what the patched model does by saying something else); `words_changed[component]`, on-policy, the
    share of prompts on which it does;
    `anchor_*[model_layer]` are the anchor's diagnostics. Attributes hold everything else. `wpjax.columns` is the table
    of all of them.
    """

    def __init__(self, dataset: xr.Dataset):
        self.dataset = dataset

    def values(self, by: str) -> Float[np.ndarray, " C"]:
        """What components are ranked by; NaN where it was not measured.

        Raises:
            WpjaxError: the result has no such ranking, or it is nowhere measured.
        """
        data = self.dataset
        measured = _measured(data)
        if by not in measured:
            raise WpjaxError(f"this result has no ranking {by!r}, only {', '.join(measured)}; pass by={measured[0]!r}")
        return np.asarray(data[by].values.astype(float))

    def best(self) -> Float[np.ndarray, " C"]:
        """The exact effect where a component was replaced, the first-order one elsewhere; without either, `ranking`."""
        if not any(name in self.dataset for name in effect_estimates()) and not self.dataset["exact"].values.any():
            return self.values(self.ranking)
        names = (EFFECT, *effect_estimates())
        return effect_or_estimate({name: self.dataset[name].values for name in names if name in self.dataset})

    def top(
        self, n: int = 20, *, by: str = "effect", kinds: tuple[str, ...] | None = None, absolute: bool = False
    ) -> list[Row]:
        """The n components that rank highest.

        Args:
            n: how many.
            by: variable to rank by, one of `wpjax.columns.rankings()`.
            kinds: only these kinds.
            absolute: rank by magnitude, so that strong negative effects stand high too; the default is signed.

        Raises:
            WpjaxError: the result has no such variable, or it is nowhere measured.
        """
        data, values = self.dataset, self.values(by)
        usable = np.isfinite(values)
        if kinds is not None:
            usable &= np.isin(data["kind"].values.astype(str), kinds)
        keys = np.abs(values) if absolute else values
        order = [i for i in np.argsort(-keys, kind="stable") if usable[i]][:n]
        return [
            Row(
                rank,
                str(data["name"].values[i]),
                float(values[i]),
                float(data["effect"].values[i]),
                float(data["ci_low"].values[i]),
                float(data["ci_high"].values[i]),
                float(data["q_value"].values[i]),
                bool(data["below_noise_floor"].values[i]),
            )
            for rank, i in enumerate(order, 1)
        ]

    def attribute(self, name: str) -> Any:
        """An attribute, parsed if it is one that is stored as JSON."""
        value = self.dataset.attrs[name]
        is_json = name in STORED_AS_JSON or any(name in method.marks for method in methods())
        return json.loads(value) if is_json and isinstance(value, str) else value

    @property
    def ranking(self) -> str:
        """The best ranking there is: exact effects if anything was replaced, otherwise the first-order ones."""
        return _measured(self.dataset)[0]

    @property
    def set_ranking(self) -> str:
        """The ranking whose best components are patched together: `set_score` where there is one."""
        return "set_score" if "set_score" in self.dataset else self.ranking

    def to_netcdf(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: the place exists or cannot be written.
        """
        write_dataset(self.dataset, Path(path), overwrite)

    @classmethod
    def from_netcdf(cls, path: str | Path) -> SweepResult:
        """Read what `to_netcdf` wrote.

        Raises:
            WpjaxError: no such file, or not a result of this package.
        """
        dataset = read_dataset(path, "sweep", SCHEMA, "wpjax sweep")
        wrong = _damage(dataset)
        if wrong:
            raise WpjaxError(f"{path}: lacks a usable {', '.join(wrong)}; it is damaged, sweep again")
        return cls(dataset)


def effect_or_estimate(values: Mapping[str, np.ndarray]) -> Float[np.ndarray, " C"]:
    """The effect where it was measured, elsewhere the most trustworthy estimate of it that there is; NaN without one.

    Args:
        values: columns by name: `effect`, and any of `columns.effect_estimates()`.
    """
    best = np.array(values[EFFECT], float)
    for name in effect_estimates():
        if name in values:
            best = np.where(np.isfinite(best), best, values[name])
    return best


def _measured(data: xr.Dataset) -> list[str]:
    """What components can be ranked by, the most trustworthy first."""
    return [c.name for c in rankings() if c.name in data and np.isfinite(data[c.name].values).any()]


def fits(data: xr.Dataset, name: str, dims: tuple[str, ...], kinds: str, is_finite: bool = True) -> bool:
    """Whether a dataset has a variable of these dimensions and of one of these kinds of dtype.

    Args:
        data: the dataset.
        name: of the variable.
        dims: that it must have, all of them longer than 0.
        kinds: letters of NumPy's kinds of dtype.
        is_finite: numbers must not be infinite; they may be NaN, where nothing was measured.
    """
    if name not in data:
        return False
    variable = data[name]
    if variable.dims != dims or variable.dtype.kind not in kinds or not variable.size:
        return False
    return not is_finite or variable.dtype.kind != "f" or not (np.abs(variable.values) > 1e30).any()


def _are_targets(values: np.ndarray, last: float) -> bool:
    names = [str(value) for value in values]
    inner = names[1:-1] if names[-1] == "rest" else names[1:]
    found = [re.fullmatch(r"L(\d{1,6})\.(head\.\d+|mlp)", name) for name in inner]
    return names[0] == "self" and all(m is not None and int(m[1]) <= last for m in found)


def _damage(data: xr.Dataset) -> list[str]:
    """What a dataset lacks, or has in another form than the table of columns says."""
    begun = {ALWAYS, *(column.together for column in columns() if column.name in data.variables)}
    wrong = [
        column.name
        for column in columns()
        if column.together in begun and not fits(data, column.name, column.dims, column.dtype, column.is_finite)
    ]
    wrong += [name for name in TEXTS if not isinstance(data.attrs.get(name), str)]
    wrong += [name for name in NUMBERS if not isinstance(data.attrs.get(name), int | float | np.number)]
    if wrong:
        return wrong
    if not _measured(data):
        wrong.append("ranking")
    if "anchor_vector" in data:
        n_response = data.attrs.get("anchor_n_response")
        if not isinstance(n_response, int | np.integer) or n_response < 0:
            wrong.append("anchor_n_response")
        if not np.isfinite(data["anchor_vector"].values).all():
            wrong.append("anchor_vector")
    if "target" in data and not _are_targets(data["target"].values, float(data.attrs["metric_layer"])):
        wrong.append("target")
    layer, index = data["layer"].values, data["index"].values
    if layer.min() < -1 or layer.max() >= data.attrs["n_layers"] or index.min() < 0 or index.max() >= 2**31:
        wrong.append("layer and index")
    try:
        floors = json.loads(data.attrs["noise_floor_by_kind"])
    except (ValueError, RecursionError):
        floors = None
    if not isinstance(floors, dict) or not all(isinstance(floor, int | float) for floor in floors.values()):
        wrong.append("noise_floor_by_kind")
    return wrong
