"""Behavioural curves: does patching the best components bring the behaviour back, and does taking them out remove it?

    restore    the base with the k best components of the expert        is the set sufficient?
    knockout   the expert with the k best components of the base        is it necessary?

for k on a logarithmic grid. Beside the ranking under test stand controls with as many parameters: random components,
those that changed most, and those that activation patching ranks first. Every patched model answers held-out prompts
freely and is judged by the checker; beside it stand the scores that need no generation, each as a share of the way
from base to expert, so that one can see what they promise (METHOD 8; ours).
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from scipy.stats import spearmanr

from wpjax.anchors import Anchor
from wpjax.behaviours import Behaviour, PromptBatch, loose, strict
from wpjax.components import Component, n_parameters, parse_component
from wpjax.errors import WpjaxError
from wpjax.metrics import ANSWER_METRICS, Along, Metric, answer_positions, scores, with_answers
from wpjax.models.decoder import Params
from wpjax.models.generate import Generation
from wpjax.pairs import Pair
from wpjax.patching import PatchMask, materialize
from wpjax.results import SweepResult, read_dataset, write_dataset
from wpjax.stats import Interval, Resamples, resample
from wpjax.steering import Judge, check_behaviour_differs
from wpjax.sweeps.screens import output_linearised

SCHEMA = 1
DIRECTIONS = ("restore", "knockout")
CHECKS = ("strict", "loose")


class Step(NamedTuple):
    """One set of components on a curve.

    Attributes:
        components: the set.
        n_parameters: how many weights it owns.
    """

    components: tuple[Component, ...]
    n_parameters: int


def log_grid(n: int, points: int) -> list[int]:
    """At most `points` sizes from 1 to n, evenly spaced on a logarithmic scale."""
    return np.unique(np.geomspace(1, n, points).round().astype(int)).tolist()


def steps_of(order: Sequence[Component], sizes: Int[np.ndarray, " C"], budgets: Sequence[int]) -> list[Step]:
    """For each budget of parameters the first components of an order that come nearest to it, at least one.

    Args:
        order: components, the best first.
        sizes: parameters of each.
        budgets: parameters a set may have.
    """
    total = np.cumsum(sizes)
    found = []
    for budget in budgets:
        k = 1 + int(np.abs(total - budget).argmin())
        found.append(Step(tuple(order[:k]), int(total[k - 1])))
    return found


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

    def share(self, measure: str) -> tuple[Float[np.ndarray, "3 2 R K"], Float[np.ndarray, "3 2 R K"]]:
        """How far along the way from base to expert each patched model is by a measure, with its 95 % interval.

        For "knockout" it is the share that is lost, so that in both directions 0 is no effect and 1 is all of it.

        Returns:
            the share (ratio of means, low, high), [3, direction, ranking, point]; and the mean itself in its own
            units, likewise.
        """
        data = self.dataset
        ends = data[f"end_{measure}"].values.astype(np.float64)
        values = data[self._variable(measure)].values.astype(np.float64)
        moved = np.stack([values[0] - ends[0], ends[1] - values[1]])
        weights, tails = self._resamples.weights, self._resamples.tails(0.95)
        drawn = (moved @ weights.T) / (weights @ (ends[1] - ends[0]))
        low, high = np.percentile(drawn, tails, axis=-1)
        means = (values @ weights.T) / weights.sum(1)
        bounds = np.percentile(means, tails, axis=-1)
        gap = float((ends[1] - ends[0]).mean())
        return np.stack([moved.mean(-1) / gap, low, high]), np.stack([values.mean(-1), *bounds])

    def _variable(self, measure: str) -> str:
        return measure if measure in CHECKS else f"score_{measure}"

    def area(self, measure: str, direction: str, ranking: int) -> Interval:
        """Mean share along a curve, over the logarithm of the number of parameters, with its 95 % interval.

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
        gap, resamples = ends[1] - ends[0], self._resamples
        drawn = (resamples.weights @ by_prompt) / (resamples.weights @ gap)
        low, high = np.percentile(drawn, resamples.tails(0.95))
        return Interval(float(by_prompt.mean() / gap.mean()), float(low), float(high))

    def calibration(self) -> list[Calibration]:
        """What each score is worth: how the share that it gives a patched base goes with the share that passes."""
        passing = self.share("strict")[0][0, 0].ravel()
        found = []
        for measure in (m for m in self.measures if m not in CHECKS):
            claimed = self.share(measure)[0][0, 0].ravel()
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


BINS = ((-np.inf, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0), (1.0, np.inf))
"""Of the share that a score gives, for calibration."""


class Calibration(NamedTuple):
    """How a score goes with the checker, over all sets of components that were patched into the base.

    Attributes:
        measure: the score.
        rho: Spearman's rank correlation of its share with the share that passes the checker.
        error: root mean square of their difference, the score's share cut to [0, 1].
        passing: mean share that passes, for each of `BINS` of the score's share; NaN where there is no set.
        n_sets: sets.
    """

    measure: str
    rho: float
    error: float
    passing: tuple[float, ...]
    n_sets: int


_DIMS = ("direction", "ranking", "point", "prompt")


def _damage(data: xr.Dataset) -> list[str]:
    measures = [str(name).removeprefix("end_") for name in data.data_vars if str(name).startswith("end_")]
    layout: dict[str, tuple[tuple[str, ...], str]] = {
        "ranking": (("ranking",), "OTU"),
        "query": (("prompt",), "iu"),
        **dict.fromkeys(("n_components", "n_parameters"), (("ranking", "point"), "iu")),
        **{f"end_{m}": (("end", "prompt"), "fb") for m in (*CHECKS, *measures)},
        **{m if m in CHECKS else f"score_{m}": (_DIMS, "fb") for m in (*CHECKS, *measures)},
    }
    wrong = [
        name
        for name, (dims, kinds) in layout.items()
        if name not in data
        or data[name].dims != dims
        or data[name].dtype.kind not in kinds
        or not data[name].size
        or (data[name].dtype.kind == "f" and not np.isfinite(data[name].values).all())
    ]
    if not wrong and (data.sizes["direction"], data.sizes["end"]) != (2, 2):
        wrong.append("direction and end")
    if not wrong and not (data["n_parameters"].values > 0).all():
        wrong.append("n_parameters")
    texts = [name for name in ("behaviour", "base", "expert") if not isinstance(data.attrs.get(name), str)]
    numbers = [name for name in ("seed",) if not isinstance(data.attrs.get(name), int | np.integer)]
    return wrong + texts + numbers


def orders(
    pair: Pair,
    behaviour: Behaviour,
    result: SweepResult,
    anchor: Anchor | None,
    *,
    by: str | None = None,
    n_random: int = 2,
    max_new_tokens: int = 32,
    seed: int = 0,
) -> dict[str, list[Component]]:
    """The ranking under test and its controls: orders of a sweep's components, the best first.

    Activation patching's order is taken from the result if it has one, otherwise from its screen on the sweep's
    prompts.
    """
    data, rng = result.dataset, np.random.default_rng(seed)
    by = by or result.ranking
    components = [parse_component(pair.cfg, str(name)) for name in data["name"].values]
    values = {by: result.best() if by == "effect" else result.values(by)}
    known = next((name for name in ("activation", "attribution") if name in data and name != by), None)
    if known:
        values["activation"] = result.values(known)
    else:
        batch = behaviour.encode(pair.tokenizer, data.attrs["split"], int(data.attrs["n_prompts"]))
        metric = _metric(str(data.attrs["metric"]), pair, batch, anchor, max_new_tokens)
        reached = [c for c in components if metric.reaches(c)]
        found = output_linearised(pair.cfg, pair.base, pair.expert, reached, metric, inputs="donor").mean(1)
        lookup = dict(zip(reached, found, strict=True))
        values["activation"] = np.array([lookup.get(c, -np.inf) for c in components])
    values["delta_norm"] = data["delta_norm"].values
    for i in range(n_random):
        values[f"random {i + 1}"] = rng.standard_normal(len(components))
    return {
        name: [components[i] for i in np.argsort(-np.nan_to_num(v, nan=-np.inf), kind="stable")]
        for name, v in values.items()
    }


def _metric(name: str, pair: Pair, batch: PromptBatch, anchor: Anchor | None, max_new_tokens: int) -> Metric:
    if name in ANSWER_METRICS:
        return ANSWER_METRICS[name](pair, batch, max_new_tokens)
    if anchor is None:
        raise WpjaxError("a sweep of the anchor metric is validated with its anchor: pass anchor= (--anchor)")
    return anchor.on(batch)


def validate(
    pair: Pair,
    behaviour: Behaviour,
    result: SweepResult,
    *,
    anchor: Anchor | None = None,
    by: str | None = None,
    n_prompts: int = 32,
    n_points: int = 8,
    n_random: int = 2,
    max_new_tokens: int = 32,
    seed: int = 0,
    done: MutableMapping[str, np.ndarray] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, i, n: None,
) -> Curves:
    """Restoration and knock-out curves of a sweep's ranking, with three controls at equal numbers of parameters.

    Args:
        pair: the models that were swept.
        behaviour: its "test" prompts and its checker judge.
        result: the sweep.
        anchor: to measure its recovery too; the sweep's own if it used one. None: the one in the result, if any.
        by: the ranking under test; None for the result's best.
        n_prompts: held-out prompts, at most.
        n_points: sizes of sets, from one component to all of them on a logarithmic grid.
        n_random: random orders.
        max_new_tokens: length of the answers.
        seed: of random orders and resampling.
        done: finished parts of an earlier attempt (see `results.Shards`).
        progress: called after every patched model.

    Raises:
        AnchorRejected: base and expert do not differ in the behaviour on these prompts.
        WpjaxError: the result is of another pair, or has no such ranking.
        BehaviourError: prompts that the model cannot take, or a checker that fails.
    """
    check_same_pair(pair, result)
    behaviour.check_checker()
    anchor = anchor_of(result) if anchor is None else anchor
    if anchor is not None:
        anchor.check_belongs(pair)
    done = {} if done is None else done
    found = orders(pair, behaviour, result, anchor, by=by, n_random=n_random, max_new_tokens=max_new_tokens, seed=seed)
    test = next(iter(found))
    sizes = {name: np.array([n_parameters(pair.cfg, c) for c in order]) for name, order in found.items()}
    totals = np.cumsum(sizes[test])
    budgets = [int(totals[k - 1]) for k in log_grid(len(totals), n_points)]
    steps = {name: steps_of(order, sizes[name], budgets) for name, order in found.items()}

    batch = behaviour.encode(pair.tokenizer, "test", n_prompts)
    batch.check_fits(pair.cfg.n_ctx, pair.cfg.d_vocab)
    judge = Judge(pair, behaviour, batch, max_new_tokens)
    own = judge.answers(pair.expert)
    check_behaviour_differs(judge, judge.answers(pair.base), own)
    metrics = {name: make(pair, batch, max_new_tokens, own) for name, make in ANSWER_METRICS.items()}
    if anchor is not None:
        metrics = {"anchor": anchor.on(batch), **metrics}
    names = (*CHECKS, *metrics, *(() if anchor is None else ("on_policy",)))

    def measure(params: Params) -> Float[np.ndarray, "M B"]:
        answers = judge.answers(params)
        read = [*metrics.values(), *(() if anchor is None else (on_policy(anchor, batch, answers),))]
        checked = [judge.passes(answers, check).astype(np.float64) for check in (strict, loose)]
        return np.stack([*checked, *(scores(pair.cfg, params, m).astype(np.float64) for m in read)])

    ends = np.stack([measure(pair.base), measure(pair.expert)])
    models = {"restore": (pair.base, pair.expert), "knockout": (pair.expert, pair.base)}
    total = len(DIRECTIONS) * sum(map(len, steps.values()))
    values = np.full((len(DIRECTIONS), len(steps), len(budgets), len(names), len(batch)), np.nan)
    made = 0
    for d, direction in enumerate(DIRECTIONS):
        host, donor = models[direction]
        for r, (name, some) in enumerate(steps.items()):
            for k, step in enumerate(some):
                key = f"{direction}-{name.replace(' ', '-')}-{k}"
                if key not in done:
                    done[key] = measure(materialize(host, donor, PatchMask.of(pair.cfg, step.components)))
                values[d, r, k] = done[key]
                made += 1
                progress("patched models", made, total)
    return Curves(_dataset(pair, result, batch.queries, steps, names, values, ends, seed, n_prompts, max_new_tokens))


def anchor_of(result: SweepResult) -> Anchor | None:
    """The anchor that was swept on, without its diagnostics; None if it was another metric."""
    data, attrs = result.dataset, result.dataset.attrs
    if "anchor_vector" not in data:
        return None
    vector = jnp.asarray(data["anchor_vector"].values)
    return Anchor(vector, int(attrs["metric_layer"]), attrs["behaviour"], attrs["expert_fingerprint"])


def on_policy(anchor: Anchor, batch: PromptBatch, answers: Generation) -> Metric:
    """The anchor's score averaged over the tokens of a model's own answers: does the state last while it speaks?

        F_o(M, x) = 1 / |y| sum_t <r_a^M(x, y_<=t), v>,    y generated by M itself        (METHOD 8; ours)

    Args:
        anchor: the direction.
        batch: prompts with the instruction.
        answers: of the model that is scored.
    """
    prompts = batch.with_instruction
    at, here = answer_positions(prompts, answers)
    weight = jnp.asarray(here / np.maximum(here.sum(1, keepdims=True), 1))
    # A position predicts the token after it; the state of a token is read where it stands.
    where = jnp.asarray(np.where(here > 0, at + 1, 0))
    return Metric(with_answers(prompts, answers), where, weight, Along(anchor.vector), anchor.layer, "on_policy")


def check_same_pair(pair: Pair, result: SweepResult) -> None:
    """Refuse a result of other models.

    Raises:
        WpjaxError: the fingerprints differ.
    """
    theirs = tuple(result.dataset.attrs.get(f"{end}_fingerprint") for end in ("base", "expert"))
    if theirs != pair.fingerprints:
        raise WpjaxError(
            f"the result is of the pair {theirs[0]}, {theirs[1]}, these models are {pair.fingerprints[0]}, "
            f"{pair.fingerprints[1]}; name the models (and the dtype) that were swept"
        )


def _dataset(
    pair: Pair,
    result: SweepResult,
    queries: Int[np.ndarray, " B"],
    steps: Mapping[str, Sequence[Step]],
    names: Sequence[str],
    values: Float[np.ndarray, "2 R K M B"],
    ends: Float[np.ndarray, "2 M B"],
    seed: int,
    n_prompts: int,
    max_new_tokens: int,
) -> xr.Dataset:
    variables: dict[str, Any] = {
        "n_components": (("ranking", "point"), [[len(s.components) for s in some] for some in steps.values()]),
        "n_parameters": (("ranking", "point"), [[s.n_parameters for s in some] for some in steps.values()]),
        "query": ("prompt", queries),
    }
    for i, name in enumerate(names):
        kind = np.float32 if name not in CHECKS else bool
        variables[name if name in CHECKS else f"score_{name}"] = (_DIMS, values[:, :, :, i].astype(kind))
        variables[f"end_{name}"] = (("end", "prompt"), ends[:, i].astype(kind))
    coords = {
        "direction": ("direction", np.array(DIRECTIONS, dtype=object)),
        "ranking": ("ranking", np.array(list(steps), dtype=object)),
        "end": ("end", np.array(["base", "expert"], dtype=object)),
    }
    kept = ("base", "expert", "base_fingerprint", "expert_fingerprint", "behaviour", "metric", "metric_layer", "dtype")
    attributes = {name: result.dataset.attrs[name] for name in kept}
    attributes |= {
        "what": "curves",
        "schema": SCHEMA,
        "n_prompts": n_prompts,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "largest_sets": json.dumps({name: [c.name for c in some[-1].components[:64]] for name, some in steps.items()}),
        "device": jax.devices()[0].platform,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return xr.Dataset(variables, coords, attributes)
