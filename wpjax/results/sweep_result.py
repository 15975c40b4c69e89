"""The result of a sweep: a dataset in a netCDF file, and the questions users ask of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from wpjax.columns import ALWAYS, EFFECT, columns, effect_estimates, rankings
from wpjax.errors import WpjaxError
from wpjax.methods import methods
from wpjax.results.answers import Answers, damage_of_answers
from wpjax.results.files import LARGEST, has_form, read_dataset, write_dataset

SCHEMA = 4
"""Version of the layout of the file; the file holds it as its attribute `schema`."""

MAX_LAYERS, MAX_INDEX, MAX_HEADS = 4096, 2**20, 4096
"""Bounds of what a file may say, larger than any model's: layers, components of a kind in a layer, heads in a layer.

Figures have a place for every layer and every head, so a damaged file must not ask for billions of them.
"""

STORED_AS_JSON = ("noise_floor_by_kind", "rows_per_program")
"""Attributes that are mappings, which netCDF cannot hold: JSON text in the file. `Method.marks` may be such too."""

# Attributes that every file must have, as text or as a number: see `_damage`.
TEXTS = ("behaviour", "metric", "base", "expert", "base_fingerprint", "expert_fingerprint", "split", "date",
         "noise_floor_by_kind")  # fmt: skip
NUMBERS = ("n_prompts", "n_queries", "n_layers", "metric_layer", "given_layer", "gap_mean", "gap_low", "gap_high",
           "coverage", "noise_floor")  # fmt: skip


class Row(NamedTuple):
    """One line of a ranked table.

    Attributes:
        rank: place in the table, from 1.
        name: name of the component, say "L3.head.5".
        value: the number that the table is ranked by.
        effect: share of the gap that the component recovers alone (ratio of means); NaN if it was not replaced.
        ci_low: lower end of the effect's 95 % interval.
        ci_high: upper end of the interval.
        q_value: lowest false discovery rate at which the effect counts as found (Benjamini-Hochberg).
        below_noise_floor: whether rounding alone could make an effect as large.
    """

    rank: int
    name: str
    value: float
    effect: float
    ci_low: float
    ci_high: float
    q_value: float
    below_noise_floor: bool


class SweepResult:
    """The result of a sweep: a dataset, and the questions users ask of it.

    `wpjax.columns` is the table of all variables. `X_low` and `X_high` are the ends of the 95 % interval of `X`.
    Variables run along `component` unless other dimensions stand in brackets. NaN: it was not measured.

    Coordinates:

    - `name`, `kind`, `layer`, `index` of each component; `prompt`, the text exactly as the model got it; `swept_kind`,
      the kinds that were swept; `target`, the later heads and MLPs of the flow.

    Effects of the weights:

    - `effect`: share of the gap that the component's weights recover alone, as a ratio of means; its interval is
      `ci_low`, `ci_high`. NaN where a component was only screened. `exact` says which were replaced.
    - `effect_paper`: the mean over prompts of the same ratio.
    - `delta` [component, prompt]: change of the metric. `gap` [prompt]: the metric of the expert minus the base's.
    - `p_value`, `q_value`, `below_noise_floor`. Without replaced weights, p and q are of activation patches.
    - `delta_norm`: Frobenius norm of the component's change, expert minus base.

    What methods add, where they were run:

    - `screen`, `gradient`, `ig`, `secant`, `race`: estimates of the effect. `attribution`: that of activation patching.
    - `activation`, `source`, `relay`, `interaction`: the 2x2 of weights and input. `knockout`: share of the gap that
      the expert loses without the component. Each with its interval.
    - `beta_low`, `banzhaf`, `beta_high`: share of the gap in the company of few, half and most of the others.
      `redundancy`: the first minus the last. Each with its interval.
    - `set_share`: share of the gap where base and expert part ways, by the secant adjoint. `set_score`: the same for
      the component's share of the parameters, to rank components for patching together (see
      `estimators.sets.add_set_score`). `learned`: another such ranking, by a learned mask (see
      `evaluation.learned.add_learned`).
    - `swept`: False for components that are there for such a ranking only, as those after the anchor's layer. Of them
      nothing else was measured but `delta_norm`. Without this column all components were swept.
    - `flow` [component, target]: the effect, split over the later heads and MLPs that it arrives by, along the slope of
      the metric at the base. Each row sums to the effect. The target `rest`, of metrics that read logits, is what the
      slope does not tell; on-policy also what the patched model does by saying other words.
    - `words_changed`: on-policy, share of prompts on which the patched model says other words.

    Answers to read, if the study made them (see `results.answers`; the property `answers` gives them):

    - `answer` [answerer, shown], `answer_passes` [answerer, shown], `answer_prompt` [shown]: what base, patched base
      and expert say to a few held-out prompts.

    How far to trust it:

    - `coverage_joint` and `coverage_sum` [swept_kind]: share of the gap that each kind recovers as one patch, and as
      the sum of its single effects (of estimates where nothing was replaced).
    - `split_half` [swept_kind]: how reliably the ranking repeats on other queries; of activation patches where no
      weights were replaced, and so is `missed`.
    - `null_permuted`, `null_direction` [swept_kind]: where there is nothing to find, 95 % of effects are smaller.
    - `missed` [swept_kind], with its interval: how many components outside the screen's choice have effects as large as
      the median of the chosen. It is estimated from the random sample that `sampled` marks.
    - `screen_error`: the screen (or the gradient) minus the effect.
    - `anchor_...` [model_layer]: diagnostics of the anchor.

    Attributes of the dataset hold everything else: the models, the metric, the gap, the noise floor, versions.

    `sweep` makes results, and `from_netcdf` reads them. A small one by hand, of two modules that were only screened:

    >>> columns = {"screen": [0.1, 0.4], "below_noise_floor": [False, False]}
    >>> columns |= dict.fromkeys(("effect", "ci_low", "ci_high", "q_value"), [np.nan, np.nan])
    >>> columns |= {"name": ["L0.attn", "L0.mlp"], "kind": ["attn", "mlp"]}
    >>> result = SweepResult(xr.Dataset({name: ("component", values) for name, values in columns.items()}))
    >>> result.ranking
    'screen'
    >>> [(row.rank, row.name, row.value) for row in result.top(by=result.ranking)]
    [(1, 'L0.mlp', 0.4), (2, 'L0.attn', 0.1)]
    """

    def __init__(self, dataset: xr.Dataset):
        self.dataset = dataset

    def __repr__(self) -> str:
        """A few lines: the pair, the behaviour, the metric, the kinds, the gap and the five components that lead."""
        data, attrs, by = self.swept.dataset, self.dataset.attrs, self.ranking
        kinds = data["kind"].values.astype(str).tolist()
        n_by_kind = ", ".join(f"{kinds.count(kind):,} {kind}" for kind in dict.fromkeys(kinds))
        lines = [
            f"SweepResult of {attrs.get('behaviour', '?')}: {attrs.get('base', '?')} -> {attrs.get('expert', '?')}",
            f"  {attrs.get('metric', '?')} metric, method {attrs.get('method', '?')}; {n_by_kind}",
        ]
        if "gap_mean" in attrs:
            gap = f"{attrs['gap_mean']:.3g} [{attrs['gap_low']:.3g}, {attrs['gap_high']:.3g}]"
            together = f"recovered together: {attrs['coverage']:.0%}"
            lines.append(f"  gap {gap} on {attrs['n_prompts']} prompts; {together}")
        lines += [f"  {row.rank}. {row.name} {row.value:+.4f} ({by})" for row in self.top(5, by=by)]
        return "\n".join(lines)

    def values(self, by: str) -> Float[np.ndarray, " C"]:
        """The numbers of a ranking, one for each component; NaN where they were not measured.

        Args:
            by: name of a column to rank by, one of `wpjax.columns.rankings()`.

        Raises:
            WpjaxError: the result has no such ranking, or has no number of it.
        """
        data = self.dataset
        measured = _measured(data)
        if by not in measured:
            raise WpjaxError(f"this result has no ranking {by!r}, only {', '.join(measured)}: name one of these")
        return np.asarray(data[by].values.astype(float))

    def best(self) -> Float[np.ndarray, " C"]:
        """The best number known of each component's effect: exact where it was replaced, elsewhere an estimate.

        A result that has neither gives the numbers of its `ranking`.
        """
        if not any(name in self.dataset for name in effect_estimates()) and not self.dataset["exact"].values.any():
            return self.values(self.ranking)
        names = (EFFECT, *effect_estimates())
        return effect_or_estimate({name: self.dataset[name].values for name in names if name in self.dataset})

    def top(
        self, n: int = 20, *, by: str = "effect", kinds: tuple[str, ...] | None = None, absolute: bool = False
    ) -> list[Row]:
        """The n components that rank highest, the highest first.

        Args:
            n: number of components.
            by: name of the column to rank by, one of `wpjax.columns.rankings()`.
            kinds: kinds of components to rank; None for all.
            absolute: whether to rank by magnitude, so that strong negative effects stand high too.

        Raises:
            WpjaxError: the result has no such ranking, or has no number of it.
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
        """An attribute of the dataset by name; a mapping comes back as one, though the file holds it as JSON."""
        value = self.dataset.attrs[name]
        is_json = name in STORED_AS_JSON or any(name in method.marks for method in methods())
        return json.loads(value) if is_json and isinstance(value, str) else value

    @property
    def swept(self) -> SweepResult:
        """The result without components that are there only to be ranked for sets; those were not swept."""
        if "swept" not in self.dataset:
            return self
        rows = np.flatnonzero(self.dataset["swept"].values)
        return SweepResult(self.dataset.isel(component=rows).drop_vars("swept"))

    def extended(self, new: Mapping[str, np.ndarray], order: Int[np.ndarray, " C"]) -> SweepResult:
        """A result with more components, which were not swept: `swept` says so, and what is not given of them is NaN.

        Args:
            new: column -> [N], what is known of N more components: name, kind, layer, index at least.
            order: [C], where each row of the new result comes from: the components of this result are counted first,
                then the new ones.
        """
        data, n = self.dataset, len(new["name"])
        columns: dict[str, Any] = {"swept": np.ones(data.sizes["component"], bool)}
        columns |= {str(name): column.values for name, column in data.variables.items() if "component" in column.dims}
        variables: dict[bool, dict[str, Any]] = {False: {}, True: {}}
        for name, values in columns.items():
            # Every column of components has the component first.
            nothing = False if values.dtype == bool else np.nan
            more = new[name] if name in new else np.full((n, *values.shape[1:]), nothing, values.dtype)
            dims = data[name].dims if name in data.variables else ("component",)
            variables[name in data.coords][name] = dims, np.concatenate([values, more])[order]
        rest = data.drop_dims("component")
        return SweepResult(rest.assign(variables[False]).assign_coords(variables[True]))

    @property
    def finest(self) -> Bool[np.ndarray, " C"]:
        """Marks components that own different weights, so that their effects may be added up: the finest of each layer.

        They are a layer's heads and KV groups (or its attention module), its neurons (or its MLP) and its norms; or the
        layer itself, if these do not make up all of it. What belongs to no layer is always marked.
        """
        kinds, layers = self.dataset["kind"].values.astype(str), self.dataset["layer"].values
        marked = layers < 0
        for layer in np.unique(layers[layers >= 0]):
            here = layers == layer
            marked |= here & np.isin(kinds, _finest_kinds(set(kinds[here].tolist())))
        return marked

    @property
    def finest_kinds(self) -> list[str]:
        """The kinds of the components that `finest` marks, in the order in which they were swept."""
        return list(dict.fromkeys(self.dataset["kind"].values.astype(str)[self.finest].tolist()))

    @property
    def ranking(self) -> str:
        """The column to rank by unless one is named: the most trustworthy that the result has, `effect` above all."""
        return _measured(self.dataset)[0]

    @property
    def answers(self) -> Answers | None:
        """What base, patched base and expert say to a few held-out prompts; None if the result does not hold it."""
        return Answers.of(self.dataset)

    @property
    def set_ranking(self) -> str:
        """The column that ranks components for patching together: `set_score` if there is one, else `ranking`."""
        return "set_score" if "set_score" in self.dataset else self.ranking

    def to_netcdf(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: the place exists or cannot be written.
        """
        write_dataset(self.dataset, Path(path), overwrite)

    @classmethod
    def from_netcdf(cls, path: str | Path) -> SweepResult:
        """Read a file that `to_netcdf` wrote.

        Raises:
            WpjaxError: there is no such file, it is no sweep of this package, or it is damaged.
        """
        dataset = read_dataset(path, "sweep", SCHEMA, "wpjax sweep")
        wrong = _damage(dataset)
        if wrong:
            raise WpjaxError(f"{path}: lacks a usable {', '.join(wrong)}; it is damaged, sweep again")
        return cls(dataset)


def effect_or_estimate(values: Mapping[str, np.ndarray]) -> Float[np.ndarray, " C"]:
    """The effect of each component where it was measured, elsewhere the most trustworthy estimate; NaN without either.

    Args:
        values: columns [C] by name: `effect`, and any of `columns.effect_estimates()`.

    >>> effect_or_estimate({"effect": np.array([0.5, np.nan]), "screen": np.array([0.4, 0.1])})
    array([0.5, 0.1])
    """
    best = np.array(values[EFFECT], float)
    for name in effect_estimates():
        if name in values:
            best = np.where(np.isfinite(best), best, values[name])
    return best


def _finest_kinds(swept: set[str]) -> list[str]:
    """Of the kinds that were swept in a layer, the finest that own all that the others do."""
    whole_attention = {"head", "kv_group"} <= swept
    attention = ["attn"] if "attn" in swept and not whole_attention else ["head", "kv_group"]
    own = next((kind for kind in ("neuron", "routed_expert") if kind in swept), None)
    mlp = ["mlp"] if own is None else [own, "router"]
    is_covered = (whole_attention or "attn" in swept) and (own is not None or "mlp" in swept)
    return ["layer"] if "layer" in swept and not is_covered else [*attention, *mlp, "norm", "delta_direction"]


def _measured(data: xr.Dataset) -> list[str]:
    """The columns that hold a number to rank by, the most trustworthy first."""
    return [c.name for c in rankings() if c.name in data and np.isfinite(data[c.name].values).any()]


def _are_targets(values: np.ndarray, last: float) -> bool:
    """Whether names are those of the flow's targets: "self", heads and MLPs up to layer `last`, perhaps "rest"."""
    names = [str(value) for value in values]
    inner = names[1:-1] if names[-1] == "rest" else names[1:]
    matches = [re.fullmatch(r"L(\d{1,6})\.(head\.\d+|mlp)", name) for name in inner]
    return names[0] == "self" and all(m is not None and int(m[1]) <= last for m in matches)


def _is_number(value: Any) -> bool:
    """Whether an attribute is a number that can have been measured; NaN is one."""
    return isinstance(value, int | float | np.integer | np.floating) and not abs(float(value)) > LARGEST


def _damage(data: xr.Dataset) -> list[str]:
    """Names of what a dataset lacks, or has in another form than the table of columns says; empty if it is whole."""
    # of a group the file has all columns or none: one column that is there asks for the others
    groups = {ALWAYS, *(column.group_name for column in columns() if column.name in data.variables)}
    wrong = [
        column.name
        for column in columns()
        if column.group_name in groups and not has_form(data, column.name, column.dims, column.dtype, column.is_finite)
    ]
    wrong += [name for name in TEXTS if not isinstance(data.attrs.get(name), str)]
    wrong += [name for name in NUMBERS if not _is_number(data.attrs.get(name))]
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
    wrong += damage_of_answers(data)
    if "target" in data and not _are_targets(data["target"].values, float(data.attrs["metric_layer"])):
        wrong.append("target")
    if data.attrs["n_queries"] != len(np.unique(data["query"].values)):
        wrong.append("n_queries")
    layer, index, n_layers = data["layer"].values, data["index"].values, data.attrs["n_layers"]
    if not 1 <= n_layers <= MAX_LAYERS:
        wrong.append("n_layers")
    if layer.min() < -1 or layer.max() >= n_layers or index.min() < 0 or index.max() >= MAX_INDEX:
        wrong.append("layer and index")
    heads = np.isin(data["kind"].values.astype(str), ("head", "kv_group"))
    if heads.any() and index[heads].max() >= MAX_HEADS:
        wrong.append("index")
    for name, least in (("metric_layer", 0), ("given_layer", -1)):  # -1: no state is given
        if not (least <= data.attrs[name] < n_layers and float(data.attrs[name]).is_integer()):
            wrong.append(name)
    try:
        floors = json.loads(data.attrs["noise_floor_by_kind"])
    except (ValueError, RecursionError):
        floors = None
    if not isinstance(floors, dict) or not all(isinstance(floor, int | float) for floor in floors.values()):
        wrong.append("noise_floor_by_kind")
    return wrong
