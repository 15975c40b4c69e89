"""The history of a behaviour: one sweep a checkpoint (or a stage of training), all on one ruler, in one netCDF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float

from wpjax.columns import ALWAYS, columns, find_column, rankings, title_of
from wpjax.errors import WpjaxError
from wpjax.results.files import has_form, read_dataset, write_dataset
from wpjax.results.sweep_result import MAX_INDEX, MAX_LAYERS, SweepResult
from wpjax.results.words import counted, enumerated
from wpjax.stats import Interval, missed_interval, ratio_of_means, resample

SCHEMA = 1
"""Version of the layout of the file."""

WHAT = "history"
"""What such a file says that it holds."""

MAKES = "wpjax sweep --expert run/checkpoint-*"
"""The command that makes such files, for messages."""

HALF = 0.5
"""A component, or the behaviour, is there from the step on at which it has this share of its largest effect."""

OF_STEPS = ("base", "expert", "base_fingerprint", "expert_fingerprint")
"""Attributes of a sweep that every step has its own of, as text."""

NUMBERS_OF_STEPS = ("coverage", "noise_floor")
"""Attributes of a sweep that every step has its own of, as a number."""

TEXTS = ("behaviour", "metric", "method", "split", "date")
NUMBERS = (
    "n_prompts",
    "n_queries",
    "n_layers",
    "metric_layer",
    "given_layer",
    "gap_mean",
    "gap_low",
    "gap_high",
    "seed",
)


class Step(NamedTuple):
    """One checkpoint of a line, or one stage of training.

    Attributes:
        number: step of the training; of a stage its place, from 1.
        label: what it is called in tables and figures.
        base: source of the model that its components are put into.
        expert: source of the checkpoint.
    """

    number: int
    label: str
    base: str
    expert: str


class Course(NamedTuple):
    """One component over the steps.

    Attributes:
        name: name of the component.
        effects: [S], share of the final gap that its weights of each step bring back; NaN where it was not measured.
        known: [S], the same, with an estimate where it was not replaced but screened, as at some stages.
        peak: number (from 0) of the step at which its effect is largest.
        since: number of the first step at which it has half of that.
        found: whether its largest effect is surely there: q < .05, and above the noise floor.
        fades: whether less than half of its largest effect is left at the last step.
    """

    name: str
    effects: Float[np.ndarray, " S"]
    known: Float[np.ndarray, " S"]
    peak: int
    since: int
    found: bool
    fades: bool


class History:
    """The history of a behaviour over the checkpoints of one fine-tuning, or over stages of training.

    All steps are measured with one ruler: the metric of the last expert, on the same prompts, reading the same words.
    All effects are shares of the final gap F(last expert) - F(base), so that steps can be compared:

        effect(c, t) = sum over prompts of F(base with c of checkpoint t) - F(base)  /  sum of F(last) - F(base)
        share(t)     = sum over prompts of F(checkpoint t) - F(base)                 /  sum of F(last) - F(base)

    Of stages, the expert of each is the base of the next, and F(expert of the stage before) takes the place of F(base)
    above the line; so the shares of all stages add up to 1.

    Variables, beside the columns of a sweep (`wpjax.columns`), which have the dimension `step` first:

    - coordinates `step` (its number), `label`, `base`, `expert` and both fingerprints [step]; `name`, `kind`, `layer`,
      `index` [component]; `prompt`; `swept_kind`.
    - `step_gap` [step, prompt]: the metric of each step's expert minus that of its base. `share` [step], with its
      interval: how much of the final gap that is.
    - `gap` [prompt]: the final gap. `query` [prompt].
    - `coverage` [step]: share of the final gap that all swept components of a step bring back together.
      `noise_floor` [step], and by kind `floor` [step, swept_kind].

    Attributes hold everything else; `stages` says whether the steps are stages.

    `wp.run_history` makes histories, `from_netcdf` reads them.
    """

    def __init__(self, dataset: xr.Dataset):
        self.dataset = dataset

    def __repr__(self) -> str:
        attrs, what = self.dataset.attrs, "stages" if self.are_stages else "checkpoints"
        shares = ", ".join(f"{label} {share:.0%}" for label, share in zip(self.labels, self.share, strict=True))
        lines = [
            f"History of {attrs.get('behaviour', '?')} over {len(self)} {what}: {shares} of the final gap",
            f"  {attrs.get('metric', '?')} metric, method {attrs.get('method', '?')}",
        ]
        lines += [f"  {c.name} {c.effects[c.peak]:+.4f}, from {self.labels[c.since]}" for c in self.courses(5)]
        return "\n".join(lines)

    def __len__(self) -> int:
        return int(self.dataset.sizes["step"])

    @property
    def are_stages(self) -> bool:
        """Whether the steps are stages of training, each over the one before."""
        return bool(self.dataset.attrs["stages"])

    @property
    def labels(self) -> list[str]:
        """What the steps are called."""
        return [str(label) for label in self.dataset["label"].values]

    @property
    def share(self) -> Float[np.ndarray, " S"]:
        """Share of the final gap that each whole checkpoint has, or that each stage adds."""
        return np.asarray(self.dataset["share"].values.astype(float))

    def at(self, i: int) -> SweepResult:
        """One step as the result of a sweep; its effects are shares of the final gap.

        Args:
            i: number of the step, from 0; negative numbers count from the end.
        """
        step = self.dataset.isel(step=i).drop_vars(("step", "label"))
        own = {name: step[name].values.item() for name in (*OF_STEPS, *NUMBERS_OF_STEPS)}
        floors = {str(k): float(f) for k, f in zip(step["swept_kind"].values, step["floor"].values, strict=True)}
        floors = {kind: floor for kind, floor in floors.items() if np.isfinite(floor)}
        gone = [*OF_STEPS, *NUMBERS_OF_STEPS, "floor", "step_gap", "share", "share_low", "share_high"]
        attrs = {name: value for name, value in self.dataset.attrs.items() if name != "stages"}
        attrs |= {**own, "what": "sweep", "schema": self.dataset.attrs["sweep_schema"]}
        attrs.pop("sweep_schema")
        return SweepResult(step.drop_vars(gone).assign_attrs(attrs | {"noise_floor_by_kind": json.dumps(floors)}))

    @property
    def ranking(self) -> str:
        """The column that components are compared by: the most trustworthy that the steps have, `effect` above all."""
        return self.at(-1).ranking

    def values(self) -> Float[np.ndarray, "S C"]:
        """The best number known of each component's effect at each step: exact where replaced, else an estimate."""
        return np.stack([self.at(i).best() for i in range(len(self))])

    def courses(self, n: int = 20, kinds: Sequence[str] | None = None) -> list[Course]:
        """The n components of largest effect at any step, the largest first.

        Args:
            n: number of components.
            kinds: kinds of components; None for all.
        """
        data, by = self.dataset, self.ranking
        values = data[by].values.astype(float)
        known = np.isfinite(values).any(0)
        if kinds is not None:
            known &= np.isin(data["kind"].values.astype(str), list(kinds))
        filled = np.where(np.isfinite(values), values, -np.inf)
        peaks = filled.argmax(0)
        largest = filled.max(0)
        best = self.values()
        q, below = data["q_value"].values, data["below_noise_floor"].values
        courses = []
        for c in sorted(np.flatnonzero(known), key=lambda c: (-largest[c], c))[:n]:
            peak = int(peaks[c])
            is_there = filled[:, c] >= (HALF * largest[c] if largest[c] > 0 else largest[c])
            found = bool(largest[c] > 0 and q[peak, c] < 0.05 and not below[peak, c])
            courses.append(
                Course(
                    str(data["name"].values[c]),
                    values[:, c],
                    best[:, c],
                    peak,
                    since=int(is_there.argmax()),
                    found=found,
                    fades=not is_there[-1],
                )
            )
        return courses

    @property
    def since(self) -> int | None:
        """Number of the first checkpoint with half of the final gap; None for stages, each of which adds its own."""
        return None if self.are_stages else int((self.share >= HALF).argmax())

    @property
    def missed(self) -> Interval | None:
        """How many components outside the choice of the last checkpoint are, at some step, as strong as half of it is.

        As strong as the median of the chosen at the last step; estimated from the random sample, kind by kind, whose
        numbers are added up. None if there is no sample, or no weights were replaced.
        """
        data = self.dataset
        if self.are_stages or "sampled" not in data or not data["sampled"].values.any():
            return None
        size, kinds = np.abs(data["delta"].values.mean(2)), data["kind"].values.astype(str)
        sampled, replaced = data["sampled"].values[-1].astype(bool), np.isfinite(size).all(0)
        intervals = []
        for kind in dict.fromkeys(kinds.tolist()):
            chosen, drawn = (kinds == kind) & replaced & ~sampled, (kinds == kind) & sampled
            if chosen.any() and drawn.any():
                n_hits = int((size[:, drawn].max(0) >= np.median(size[-1, chosen])).sum())
                n_rest = int(((kinds == kind) & ~chosen).sum())
                intervals.append(missed_interval(n_hits, int(drawn.sum()), n_rest))
        return Interval(*np.sum(intervals, axis=0).tolist()) if intervals else None

    @property
    def summary(self) -> str:
        """What the history says, a sentence or more a line."""
        return "\n".join(f"{heading}: {sentence}" for heading, sentence in self.points)

    @property
    def points(self) -> tuple[tuple[str, str], ...]:
        """What the history says, as headings and sentences."""
        return _stage_points(self) if self.are_stages else _line_points(self)

    def figures(self, n: int, kinds: Sequence[str] | None = None) -> dict[str, Any]:
        """What commands print as JSON: the steps, and the n components of largest effect.

        Args:
            n: number of components.
            kinds: kinds of components; None for all.

        Returns:
            values that JSON can hold; NaN where nothing was measured.
        """
        data = self.dataset
        names = ("share", "share_low", "share_high", *NUMBERS_OF_STEPS)
        steps = [
            {"step": int(data["step"].values[i]), "label": label, **{s: str(data[s].values[i]) for s in OF_STEPS}}
            | {name: float(data[name].values[i]) for name in names}
            for i, label in enumerate(self.labels)
        ]
        top = [
            {**c._asdict(), "effects": c.effects.tolist(), "known": c.known.tolist()}
            | {"peak": self.labels[c.peak], "since": self.labels[c.since]}
            for c in self.courses(n, kinds)
        ]
        marks = {name: data.attrs[name] for name in ("anchor_acceptance", "behaviour_differs") if name in data.attrs}
        return {
            "what": WHAT,
            "stages": self.are_stages,
            "behaviour": str(data.attrs["behaviour"]),
            "metric": str(data.attrs["metric"]),
            "ranked_by": self.ranking,
            "steps": steps,
            "top": top,
            "says": [list(point) for point in self.points],
            **marks,
        }

    def to_netcdf(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: the place exists or cannot be written.
        """
        write_dataset(self.dataset, Path(path), overwrite)

    @classmethod
    def from_netcdf(cls, path: str | Path) -> History:
        """Read a file that `to_netcdf` wrote.

        Raises:
            WpjaxError: there is no such file, it is no history of this package, or it is damaged.
        """
        dataset = read_dataset(path, WHAT, SCHEMA, MAKES)
        if wrong := _damage(dataset):
            raise WpjaxError(f"{path}: lacks a usable {', '.join(wrong)}; it is damaged, sweep again")
        return cls(dataset)


def joined(
    steps: Sequence[Step],
    sweeps: Sequence[SweepResult],
    step_gaps: Float[np.ndarray, "S B"],
    *,
    stages: bool,
    columns: Mapping[str, tuple[str, Any]],
    attributes: Mapping[str, Any],
) -> History:
    """One history from the sweeps of its steps.

    Args:
        steps: the S steps.
        sweeps: their sweeps, of the same components and prompts, with effects as shares of the final gap.
        step_gaps: [S, B], metric of each step's expert minus that of its base.
        stages: whether the steps are stages.
        columns: variables that belong to the ruler: name -> (dimension, values).
        attributes: attributes of the whole.
    """
    data = [sweep.dataset for sweep in sweeps]
    last = data[-1]
    variables: dict[str, tuple[tuple[str, ...], Any]] = {
        name: ((dim,), values) for name, (dim, values) in columns.items()
    }
    for name in dict.fromkeys(str(name) for one in data for name in one.data_vars):
        dims = tuple(str(dim) for dim in next(one[name].dims for one in data if name in one))
        if dims[0] in ("component", "swept_kind") and "target" not in dims:
            variables[name] = ("step", *dims), np.stack([_of_step(one, name, data) for one in data])
    gap, query = last["gap"].values, last["query"].values
    share = ratio_of_means(step_gaps, gap, resample(query, seed=int(last.attrs["seed"])))
    variables |= {name: (("step",), v) for name, v in zip(("share", "share_low", "share_high"), share, strict=True)}
    variables |= {"step_gap": (("step", "prompt"), step_gaps), "gap": (("prompt",), gap), "query": (("prompt",), query)}
    for name in NUMBERS_OF_STEPS:
        variables[name] = ("step",), np.array([one.attrs[name] for one in data], float)
    floors = [sweep.attribute("noise_floor_by_kind") for sweep in sweeps]
    kinds = last["swept_kind"].values
    table = np.array([[of.get(str(kind), np.nan) for kind in kinds] for of in floors], float)
    variables["floor"] = ("step", "swept_kind"), table
    coordinates: dict[str, tuple[tuple[str, ...], Any]] = {
        name: (("component",), last[name].values) for name in ("name", "kind", "layer", "index")
    }
    coordinates |= {"prompt": (("prompt",), last["prompt"].values), "swept_kind": (("swept_kind",), kinds)}
    coordinates |= {"step": (("step",), np.array([step.number for step in steps], np.int64))}
    coordinates |= {"label": (("step",), np.array([step.label for step in steps], object))}
    prints = ("base_fingerprint", "expert_fingerprint")
    coordinates |= {name: (("step",), np.array([str(one.attrs[name]) for one in data], object)) for name in prints}
    # Two steps of equal weights are swept once, so the sweep's own names may be those of the other.
    for name in ("base", "expert"):
        coordinates[name] = ("step",), np.array([getattr(step, name) for step in steps], object)
    gone = {*OF_STEPS, *NUMBERS_OF_STEPS, "noise_floor_by_kind", "wall_time_s", "what", "schema"}
    kept = {name: value for name, value in last.attrs.items() if name not in gone}
    said = {"what": WHAT, "schema": SCHEMA, "sweep_schema": last.attrs["schema"], "stages": int(stages)}
    return History(xr.Dataset(variables, coordinates, {**kept, **said, **attributes}))


def _of_step(data: xr.Dataset, name: str, all_data: Sequence[xr.Dataset]) -> np.ndarray:
    """A column of one step. Where it lacks what others have, as a random sample for which none was left: nothing."""
    if name in data:
        return np.asarray(data[name].values)
    like = next(one[name].values for one in all_data if name in one)
    return np.zeros(like.shape, bool) if like.dtype == bool else np.full(like.shape, np.nan)


def _percent(low_high: tuple[float, float, float]) -> str:
    value, low, high = (f"{x:.0%}".replace("-0%", "0%") for x in low_high)
    return f"{value} [{low}, {high}]"


def _shares(history: History) -> list[str]:
    """The share of each step with its interval, in words."""
    ends = (history.dataset[name].values.tolist() for name in ("share", "share_low", "share_high"))
    return [_percent(share) for share in zip(*ends, strict=True)]


def _named(courses: Sequence[Course], n: int = 5) -> str:
    """Components with their largest effects, in words."""
    names = [f"{course.name} ({course.effects[course.peak]:+.1%})" for course in courses[:n]]
    more = f" and {len(courses) - n} more" if len(courses) > n else ""
    return (", ".join(names) + more) if more else enumerated(names)


N_TOP, N_UNSURE, N_BETWEEN = 50, 10, 6
"""How many components the words are about, those of largest effect at any step; how many of them where none is surely
found; and how many steps between the first and the last."""


def _line_points(history: History) -> tuple[tuple[str, str], ...]:
    """What a line of checkpoints says."""
    data, shares = history.dataset, _shares(history)
    at = [f"step {label}" for label in history.labels]
    since = history.since or 0
    unsure = np.flatnonzero(~(data["share_low"].values > 0))
    first = min(int(unsure[-1]) + 1, len(history) - 1) if len(unsure) else 0
    when = f"From {at[first]} on, every checkpoint surely has some of the behaviour, each by its own interval: "
    when += f"{shares[first]} of the final gap at {at[first]}."
    if since == first and history.share[first] >= HALF:
        when += " That is half of it or more."
    else:
        when += f" Half of it is there at {at[since]}{' already' if since < first else ''}: {shares[since]}."
    if history.share[most := int(history.share.argmax())] > 1.05:
        when += f" It is largest at {at[most]}: {shares[most]}; the last checkpoint has less."
    points = [("When", when)]
    leading = history.courses(N_TOP)
    found = [course for course in leading if course.found]
    if not found:  # as with few queries
        tested = np.isfinite(data["q_value"].values).any()
        none = "No component is surely found at any step (q < .05)" if tested else "This method makes no tests"
        points.append(("Which", f"{none}: what follows is by size alone."))
        found = [course for course in leading[:N_UNSURE] if course.effects[course.peak] > 0]
    come = {i: [course for course in found if course.since == i] for i in sorted({course.since for course in found})}
    said = [f"at {at[i]}: {_named(courses)}" for i, courses in come.items()]
    if said:
        points.append(("First", f"Half of their largest effect is there {said[0]}."))
    if between := said[1:-1]:
        more = f"; and others at {len(between) - N_BETWEEN} more steps" if len(between) > N_BETWEEN else ""
        points.append(("Then", f"{'; '.join(between[:N_BETWEEN])}{more}."))
    if len(said) > 1:
        points.append(("Last", f"{said[-1]}."))
    if faded := [course for course in found if course.fades]:
        points.append(("Fading", f"Less than half of it is left in the last checkpoint: {_named(faded)}."))
    return (*points, _about(history))


def _stage_points(history: History) -> tuple[tuple[str, str], ...]:
    """What each stage added, and which components carry it."""
    data, shares, points = history.dataset, _shares(history), []
    for i, label in enumerate(history.labels):
        low, high = float(data["share_low"].values[i]), float(data["share_high"].values[i])
        said = (
            f"It adds {shares[i]} of the final gap" if low > 0 else f"It changes the metric by {shares[i]} of the gap"
        )
        said += ", away from the behaviour." if high < 0 else "." if low > 0 else ", which may be nothing."
        step = history.at(i)
        rows = [row for row in step.top(5, by=step.ranking) if row.value > 0]
        sure = [row for row in rows if row.q_value < 0.05 and not row.below_noise_floor]
        if rows:
            tested = np.isfinite(step.dataset["q_value"].values).any()
            why = "none is surely found (q < .05)" if tested else "this method makes no tests"
            most = "Most by" if sure else f"Most, by size alone as {why}, by"
            said += f" {most} {enumerated([f'{row.name} ({row.value:+.1%})' for row in sure or rows[:3]])};"
            said += f" all that were swept bring {float(data['coverage'].values[i]):.0%} together."
        points.append((label, said))
    return (*points, _about(history))


def _about(history: History) -> tuple[str, str]:
    """What the numbers are shares of, what the tests say of the ruler, and how components were chosen."""
    data, attrs = history.dataset, history.dataset.attrs
    replaced = np.isfinite(data["p_value"].values)
    gap = f"{attrs['gap_mean']:.3g} [{attrs['gap_low']:.3g}, {attrs['gap_high']:.3g}]"
    said = f"Effects are shares of the gap of the last expert, {gap}, on {attrs['n_prompts']} prompts."
    if "anchor_acceptance" in attrs:
        said += f" Its anchor: {attrs['anchor_acceptance']}."
    elif "behaviour_differs" in attrs:
        said += f" Whether base and last expert differ in the behaviour: {attrs['behaviour_differs']}."
    if not replaced.any():
        column = find_column(history.ranking)
        if column is not None and column.estimates_effect:
            return "Ruler", f"{said} They are estimates: nothing was replaced."
        return "Ruler", f"{said} Components are ranked by {title_of(history.ranking)}: none was replaced alone."
    if replaced.all():
        return "Ruler", f"{said} Every component was replaced at every step."
    if history.are_stages:
        return "Ruler", f"{said} Which components were replaced, a screen of each stage chose."
    chosen = counted(data["kind"].values.astype(str)[replaced.all(0)].tolist())
    said += f" A screen of the last checkpoint chose which were replaced at every step: {chosen}."
    if (missed := history.missed) is not None:
        said += f" By the random sample, {missed.mean:.0f} [{missed.low:.0f}, {missed.high:.0f}] of the others are, at "
        said += "some step, as strong as the median of these is in the last checkpoint."
    return "Ruler", said


def _damage(data: xr.Dataset) -> list[str]:
    """Names of what a dataset lacks, or has in another form; empty if it is whole."""
    wrong = [name for name in TEXTS if not isinstance(data.attrs.get(name), str)]
    wrong += [name for name in NUMBERS if not isinstance(data.attrs.get(name), int | float | np.number)]
    wrong += [name for name in ("stages", "sweep_schema") if not isinstance(data.attrs.get(name), int | np.integer)]
    forms: dict[str, tuple[tuple[str, ...], str]] = {
        **dict.fromkeys(("share", "share_low", "share_high", *NUMBERS_OF_STEPS), (("step",), "f")),
        **dict.fromkeys(("label", *OF_STEPS), (("step",), "OTU")),
        "step": (("step",), "iu"),
        "step_gap": (("step", "prompt"), "f"),
        "floor": (("step", "swept_kind"), "f"),
    }
    for column in columns():
        if column.group != ALWAYS and column.name not in data:
            continue
        by_step = not column.is_coordinate and column.dims[0] in ("component", "swept_kind")
        forms[column.name] = (("step", *column.dims) if by_step else column.dims), column.dtype
    # Means of ratios may be infinite (`columns`).
    anything = {column.name for column in columns() if not column.is_finite}
    wrong += [name for name, form in forms.items() if not has_form(data, name, *form, name not in anything)]
    if wrong:
        return wrong
    layer, index = data["layer"].values, data["index"].values
    if not 1 <= data.attrs["n_layers"] <= MAX_LAYERS:
        wrong.append("n_layers")
    elif layer.min() < -1 or layer.max() >= data.attrs["n_layers"] or index.min() < 0 or index.max() >= MAX_INDEX:
        wrong.append("layer and index")
    if not any(np.isfinite(data[c.name].values[-1]).any() for c in rankings() if c.name in data):
        wrong.append("ranking")
    if not np.isfinite(data["share"].values).all():
        wrong.append("share")
    return wrong
