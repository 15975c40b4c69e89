"""The sweep: from a pair, prompts and a metric to a ranked result with its controls."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from wpjax.anchors import Anchor
from wpjax.behaviours import PromptBatch
from wpjax.components import KINDS, Component, check_kind, enumerate_components, parse_component
from wpjax.errors import ComponentError, WpjaxError
from wpjax.metrics import Along, Metric, expect_positive_gap
from wpjax.pairs import Pair
from wpjax.patching import PatchMask, permuted
from wpjax.results import SweepResult
from wpjax.sweeps.dataset import Measured, make_dataset
from wpjax.sweeps.exact import Changes, Chunk, Plan, exact_changes, make_plan, sham_plan
from wpjax.sweeps.masks import SHARES, random_masks
from wpjax.sweeps.reference import patched_score
from wpjax.sweeps.replay import flow_targets, run_model
from wpjax.sweeps.rows import Run, Side
from wpjax.sweeps.screens import integrated_gradients, output_linearised, weight_gradient
from wpjax.sweeps.secant import secant_adjoint

Method = Literal["exact", "screen", "screen+exact", "gradient", "ig", "secant", "masks", "activation", "factorial"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class Cell(NamedTuple):
    """Whose model a component is patched in, and whose weights and input it has there."""

    host: Literal["base", "expert"]
    donor: Literal["base", "expert", "permuted"]
    weights: Side = "donor"
    inputs: Side = "host"


CELLS: Mapping[str, Cell] = MappingProxyType(
    {
        "exact": Cell("base", "expert"),
        "activation": Cell("base", "expert", "donor", "donor"),
        "relay": Cell("base", "expert", "host", "donor"),
        "knockout": Cell("expert", "base"),
        "sham": Cell("base", "base"),
        "permuted": Cell("base", "permuted"),
    }
)


class Recipe(NamedTuple):
    """What a method does: which first-order estimates, which of them choose what is replaced, and how it is replaced.

    With cells but nothing that chooses, everything is replaced. With `masks`, sets of components are.
    """

    screens: tuple[str, ...] = ()
    choose: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    masks: bool = False


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "exact": Recipe(cells=("exact",)),
        "screen": Recipe(("screen",)),
        "screen+exact": Recipe(("screen",), ("screen",), ("exact",)),
        "gradient": Recipe(("gradient",)),
        "ig": Recipe(("ig",)),
        "secant": Recipe(("secant",)),
        "masks": Recipe(masks=True),
        "activation": Recipe(("attribution",), ("attribution",), ("activation",)),
        "factorial": Recipe(
            ("screen", "attribution"), ("screen", "attribution"), ("exact", "activation", "relay", "knockout")
        ),
    }
)
METHODS: tuple[str, ...] = tuple(RECIPES)
DEFAULT_KINDS = ("head", "kv_group", "neuron")


def _screen(name: str, pair: Pair, components: Sequence[Component], metric: Metric) -> Float[np.ndarray, "C B"]:
    args = (pair.cfg, pair.base, pair.expert, components, metric)
    screens: dict[str, Callable[..., np.ndarray]] = {
        "screen": output_linearised,
        "gradient": weight_gradient,
        "ig": integrated_gradients,
        "secant": secant_adjoint,
        "attribution": functools.partial(output_linearised, inputs="donor"),
    }
    return screens[name](*args)


def sweep(
    pair: Pair,
    batch: PromptBatch,
    metric: Anchor | Metric,
    *,
    kinds: Sequence[str] = DEFAULT_KINDS,
    components: Iterable[Component | str] | None = None,
    method: Method = "exact",
    top: int = 512,
    stratum: int = 64,
    n_masks: int = 256,
    seed: int = 0,
    n_resamples: int = 1000,
    budget: int | None = None,
    done: MutableMapping[str, np.ndarray] | None = None,
    progress: Progress = lambda what, i, n: None,
) -> SweepResult:
    """Measure how much of the gap between base and expert each component's weights recover.

        effect(c) = sum over prompts of F(base with c of the expert) - F(base)  /  sum of F(expert) - F(base)

    Args:
        pair: base and expert.
        batch: prompts; only those with the instruction are used.
        metric: what is measured: an anchor, or a metric made on this batch (`response_metric`, `decision_metric`).
        kinds: kinds of components to sweep, in all layers that the metric depends on.
        components: sweep these instead of whole kinds, by name or as `Component`s.
        method: "exact" replaces every component for real; "screen" scores all of them by the output-linearised
            first-order effect; "screen+exact" screens, then replaces the `top` ones of each kind; "gradient" is the
            weight-gradient screen, "ig" its average on the way from base to expert, "secant" the secant adjoint, whose
            scores sum to the gap; "masks" replaces random sets (see `sweeps.masks`): what a component does among few,
            half or most of the others; "activation" patches the expert's activations instead of its weights, after
            attribution patching as the screen; "factorial" measures all cells of the 2x2 (source, relay, interaction,
            see `dataset.two_by_two`) and the knock-out in the expert, for the `top` ones of both screens.
        top: how many of each kind are replaced after a screen, chosen by its magnitude.
        stratum: how many of the others of each kind are replaced too, at random, to estimate what the screen missed.
        n_masks: random sets at each share of components, with method "masks".
        seed: of resampling, sign flips, shams, nulls and random sets.
        n_resamples: bootstrap samples of the intervals.
        budget: bytes for a chunk's activations; None to choose from the device.
        done: finished parts of an earlier attempt, extended as the sweep goes on (see `results.Shards`).
        progress: called as work gets done.

    Returns:
        the result; components in the order of the table of kinds, of layers and of indices.

    Raises:
        ComponentError: a kind or component that does not exist, or that comes after what the metric reads.
        AnchorRejected: the anchor belongs to another expert.
        MetricRejected: the gap on these prompts may be zero.
        BehaviourError: prompts that the model cannot take.
    """
    started = time.perf_counter()
    if method not in METHODS:
        raise WpjaxError(f"unknown method {method!r}; methods: {', '.join(METHODS)}")
    anchor = metric if isinstance(metric, Anchor) else None
    if isinstance(metric, Anchor):
        metric.check_belongs(pair)
        metric = metric.on(batch)
    if len(metric) != len(batch):
        raise WpjaxError(f"the metric has {len(metric)} prompts, the batch {len(batch)}; make it on this batch")
    batch.check_fits(pair.cfg.n_ctx, pair.cfg.d_vocab)
    chosen = _swept_components(pair, metric, kinds, components)
    done = {} if done is None else done
    ends = (mask(pair.cfg) for mask in (PatchMask.empty, PatchMask.full))
    base_score, expert_score = (patched_score(pair.cfg, pair.base, pair.expert, mask, metric) for mask in ends)
    gap = (expert_score - base_score).astype(np.float64)
    name = f"the {metric.name} metric of {batch.behaviour}"
    expect_positive_gap(gap, batch.queries, name, seed)

    recipe = RECIPES[method]
    first_order: dict[str, Float[np.ndarray, "C B"]] = {}
    for name in recipe.screens:
        progress(f"{name} of {len(chosen)} components", 0, 1)
        if name not in done:
            done[name] = _screen(name, pair, chosen, metric)
        first_order[name] = _part(done, name, len(chosen), len(batch))
        progress(f"{name} of {len(chosen)} components", 1, 1)
    replaced, sampled = list(range(len(chosen))) if recipe.cells else [], np.zeros(len(chosen), bool)
    if recipe.choose:
        best = {i for name in recipe.choose for i in _highest(chosen, first_order[name].mean(1), top)}
        sampled[_stratum(chosen, best, stratum, seed)] = True
        replaced = sorted({*best, *np.flatnonzero(sampled).tolist()})
    engine = _Engine(pair, metric, chosen, done, progress)
    n_prompts, n_tokens = metric.tokens.ids.shape
    plan = make_plan(pair.cfg, [chosen[i] for i in replaced], n_prompts, n_tokens, budget)
    found = {name: engine.changes(name, plan) for name in recipe.cells}
    cells, flow = {name: delta for name, (delta, _) in found.items()}, found.get("exact", (None, None))[1]
    floor = engine.noise_floor(plan, gap, seed)
    nulls = engine.nulls(plan, gap, seed)
    masks = {
        name: random_masks(
            pair.cfg, pair.base, pair.expert, chosen, metric, p,
            n_masks=n_masks, seed=seed, done=done, progress=progress,
        )
        for name, p in (SHARES.items() if recipe.masks else ())
    }  # fmt: skip
    coverage = _coverage(pair, metric, chosen, gap, base_score, progress)
    measured = Measured(cells, first_order, gap, coverage, floor, plan.rows, flow, nulls, sampled, masks)
    dataset = make_dataset(pair, batch, metric, anchor, chosen, measured, seed, n_resamples)
    dataset.attrs |= {"method": method, "wall_time_s": round(time.perf_counter() - started, 3)}
    return SweepResult(dataset)


def _swept_components(
    pair: Pair, metric: Metric, kinds: Sequence[str], components: Iterable[Component | str] | None
) -> list[Component]:
    if components is not None:
        components = [components] if isinstance(components, str) else list(components)
        if not components:
            raise ComponentError("the list of components to sweep is empty; name at least one, e.g. L3.head.5")
        named = [parse_component(pair.cfg, c if isinstance(c, str) else c.name) for c in components]
    else:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        for kind in kinds:
            check_kind(kind)
        named = enumerate_components(pair.cfg, dict.fromkeys(kinds), range(metric.first_layer, metric.layer + 1))
    beside = [c for c in named if not metric.reaches(c)]
    if beside:
        names = ", ".join(c.name for c in beside[:4])
        if metric.held is not None and beside[0].layer < metric.first_layer:
            raise ComponentError(
                f"{names}: not after layer {metric.first_layer - 1}, where a state is given; sweep later layers"
            )
        raise ComponentError(
            f"{names}: after layer {metric.layer}, which the {metric.name} metric reads, so no patch of it can change "
            "the metric; take one that reads the answer (response, decision, kl)"
        )
    if not named:
        raise ComponentError(f"nothing to sweep: this model has no {', '.join(kinds)}")
    return sorted(dict.fromkeys(named), key=lambda c: (list(KINDS).index(c.kind), c.layer, c.index))


def _highest(components: Sequence[Component], values: Float[np.ndarray, " C"], top: int) -> list[int]:
    """Positions of the `top` largest magnitudes of each kind, in order of position."""
    found: list[int] = []
    for kind in dict.fromkeys(c.kind for c in components):
        mine = [i for i, c in enumerate(components) if c.kind == kind]
        found += sorted(mine, key=lambda i: -abs(values[i]))[:top]
    return sorted(found)


def _stratum(components: Sequence[Component], best: set[int], n: int, seed: int) -> list[int]:
    """Positions of up to n random components of each kind that were not chosen."""
    rng = np.random.default_rng(seed)
    found: list[int] = []
    for kind in dict.fromkeys(c.kind for c in components):
        rest = [i for i, c in enumerate(components) if c.kind == kind and i not in best]
        found += sorted(rng.permutation(rest)[:n].tolist()) if rest else []
    return found


class _Engine:
    """Replaces components for real, cell by cell, keeping finished chunks in `done`."""

    def __init__(
        self,
        pair: Pair,
        metric: Metric,
        chosen: Sequence[Component],
        done: MutableMapping[str, np.ndarray],
        progress: Progress,
    ):
        self.pair, self.metric, self.done, self.progress = pair, metric, done, progress
        self.models = {"base": pair.base, "expert": pair.expert}
        self.position = {c: i for i, c in enumerate(chosen)}
        self.runs: dict[str, Run] = {}

    def run(self, model: str) -> Run:
        """The model's own forward pass, once."""
        if model not in self.runs:
            self.runs[model] = run_model(self.pair.cfg, self.models[model], self.metric)
        return self.runs[model]

    def perform(
        self, name: str, plan: Plan, jitter_seed: int | None = None, label: str | None = None
    ) -> Iterator[Changes]:
        """The chunks of a plan with their changes, in one cell; parts are kept under a label, the cell's name."""
        cell, label = CELLS[name], label or name
        keys = {_key(label, chunk): chunk for chunk in plan.chunks}
        with_flow = label == "exact" and isinstance(self.metric.readout, Along)

        def finished(key: str, chunk: Chunk) -> bool:
            return key in self.done and (not with_flow or _key("flow", chunk) in self.done)

        waiting = Plan(plan.rows, tuple(chunk for key, chunk in keys.items() if not finished(key, chunk)))
        n_done = len(keys) - len(waiting.chunks)
        runs = self.run(cell.host), self.run(cell.donor) if cell.inputs == "donor" else None
        host, donor = self.models[cell.host], self.models[cell.donor]
        parts = exact_changes(
            self.pair.cfg, host, donor, runs, self.metric, waiting,
            weights=cell.weights, inputs=cell.inputs, jitter_seed=jitter_seed,
        )  # fmt: skip
        for chunk, delta, flow in parts:
            if with_flow:
                assert flow is not None
                self.done[_key("flow", chunk)] = flow
            self.done[_key(label, chunk)] = delta
            n_done += 1
            self.progress(f"{label} patches", n_done, len(keys))
        n_targets = len(flow_targets(self.pair.cfg, self.metric.layer))
        for key, chunk in keys.items():
            n = len(chunk.components)
            flow = _part(self.done, _key("flow", chunk), n, n_targets) if with_flow else None
            yield Changes(chunk, _part(self.done, key, n, len(self.metric)), flow)

    def changes(self, name: str, plan: Plan) -> tuple[Float[np.ndarray, "C B"], Float[np.ndarray, "C U"] | None]:
        """Changes of the metric in one cell, and the flow; NaN for components that the plan leaves out.

        Raises:
            WpjaxError: a change that is not finite.
        """
        delta = np.full((len(self.position), len(self.metric)), np.nan)
        flow: np.ndarray | None = None
        for chunk, changes, through in self.perform(name, plan):
            if not np.isfinite(changes).all():
                names = ", ".join(c.name for c in chunk.components[:4])
                raise WpjaxError(f"a patch of {names} gives scores that are not finite; check the checkpoints for NaN")
            where = [self.position[c] for c in chunk.components]
            delta[where] = changes
            if through is not None:
                flow = np.full((len(self.position), through.shape[1]), np.nan) if flow is None else flow
                flow[where] = through
        return delta, flow

    def noise_floor(self, plan: Plan, gap: Float[np.ndarray, " B"], seed: int) -> dict[str, float]:
        """The largest effect of shams of each kind."""
        floor = dict.fromkeys(plan.rows, 0.0)
        for chunk, changes, _ in self.perform("sham", sham_plan(plan), seed):
            floor[chunk.kind] = max(floor[chunk.kind], float(np.abs(changes.mean(1)).max() / gap.mean()))
        return floor

    def nulls(self, plan: Plan, gap: Float[np.ndarray, " B"], seed: int) -> dict[str, dict[str, float]]:
        """What effects there are where there is nothing to find, by kind: 95 % of them are smaller.

        "permuted": the same components, with changes of weights dealt out anew among their like. "direction" (for an
        anchor): the true patches, read along random directions instead of the anchor, as shares of the same gap.
        """
        few = sham_plan(plan)
        channels = [kind for kind in plan.rows if KINDS[kind].in_layer and kind != "norm"]
        dealt = Plan(few.rows, tuple(chunk for chunk in few.chunks if chunk.kind in channels))
        found: dict[str, list[Changes]] = {"permuted": [], "direction": []}
        if dealt.chunks:
            self.models["permuted"] = permuted(self.pair.base, self.pair.expert, seed)
            found["permuted"] = list(self.perform("permuted", dealt))
            del self.models["permuted"]
        if isinstance(self.metric.readout, Along):
            rng = np.random.default_rng(seed)
            for i in range(N_DIRECTIONS):
                vector = rng.standard_normal(self.pair.cfg.d_model).astype(np.float32)
                readout = Along(jnp.asarray(vector / np.linalg.norm(vector)))
                metric = dataclasses.replace(self.metric, readout=readout)
                other = _Engine(self.pair, metric, list(self.position), self.done, self.progress)
                found["direction"] += other.perform("exact", few, label=f"direction-{i}")

        def quantile(parts: Sequence[Changes], kind: str) -> float:
            sizes = [np.abs(part.delta.mean(1)) / gap.mean() for part in parts if part.chunk.kind == kind]
            return float(np.quantile(np.concatenate(sizes), 0.95)) if sizes else float("nan")

        return {name: {kind: quantile(parts, kind) for kind in plan.rows} for name, parts in found.items()}


N_DIRECTIONS = 2
"""Random directions that are read beside an anchor."""


def _part(done: Mapping[str, np.ndarray], key: str, n: int, n_prompts: int) -> Float[np.ndarray, "C B"]:
    part = np.asarray(done[key])
    if part.shape != (n, n_prompts) or part.dtype.kind != "f":
        raise WpjaxError(
            f"the finished part {key} has shape {part.shape} and dtype {part.dtype}, not floats of shape "
            f"{(n, n_prompts)}: it is damaged; delete its file, and go on with --resume"
        )
    return part


def _key(prefix: str, chunk: Chunk) -> str:
    names = " ".join(c.name for c in chunk.components)
    return f"{prefix}-{chunk.kind}-{chunk.layer}-{hashlib.blake2b(names.encode(), digest_size=8).hexdigest()}"


def _coverage(
    pair: Pair,
    metric: Metric,
    chosen: Sequence[Component],
    gap: Float[np.ndarray, " B"],
    base_score: Float[np.ndarray, " B"],
    progress: Progress,
) -> dict[str, float]:
    """Share of the gap recovered by all swept components of each kind together, and by all of them ("all")."""
    sets = {kind: [c for c in chosen if c.kind == kind] for kind in dict.fromkeys(c.kind for c in chosen)}
    sets["all"] = list(chosen)
    joint: dict[str, float] = {}
    for i, (kind, members) in enumerate(sets.items()):
        mask = PatchMask.of(pair.cfg, members)
        score = patched_score(pair.cfg, pair.base, pair.expert, mask, metric)
        joint[kind] = float((score - base_score).mean(dtype=np.float64) / gap.mean())
        progress("joint patches", i + 1, len(sets))
    return joint
