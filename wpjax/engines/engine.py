"""The engine of a sweep: it runs chunks of patches, keeps what is finished, and resumes.

It runs any cell of the 2x2 (docs/method.md, "Source or relay"), knock-outs, and the two controls: shams and nulls
(docs/method.md, "Controls and statistics").
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from wpjax.components import KINDS, Component
from wpjax.engines.contributions import Run, Side
from wpjax.engines.exact import Changes, exact_changes
from wpjax.engines.flow import flow_targets
from wpjax.engines.joint import scores_of_sets
from wpjax.engines.packing import Shape, pack
from wpjax.engines.plan import Chunk, Plan, agreed_plan, make_plan, sham_plan
from wpjax.engines.replay import run_packed
from wpjax.errors import WpjaxError
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import Projection
from wpjax.models.decoder import Params
from wpjax.models.sharding import place
from wpjax.pairs import Pair
from wpjax.patching import PatchMask, permuted
from wpjax.runtime.farm import shared_out
from wpjax.runtime.progress import Progress
from wpjax.runtime.shards import finished_part


class Cell(NamedTuple):
    """One kind of patch: whose model receives it, and whose weights and input the component has there.

    Attributes:
        host: the model that receives the patch.
        donor: the other model. "permuted" is an expert whose changes are dealt out anew (`patching.permuted`).
        weights: whose weights the component takes.
        inputs: whose input the component sees.
    """

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
"""Every kind of patch, by name."""


N_DIRECTIONS = 2
"""Number of random directions that patches are read along in turn, to compare with the anchor."""


class Engine:
    """Replaces components for real, and keeps finished chunks in `done`.

    Args:
        pair: base and expert.
        metric: what is measured.
        chosen: all C components that are swept. Results come in this order.
        done: key -> finished part (`part_key`). The engine adds to it and runs nothing that is in it already.
        progress: called after every chunk.
        with_flow: whether to follow by way of what effects arrive.
        shape: shape to pack the prompts into; None for the cheapest.

    >>> import numpy as np
    >>> import wpjax as wp
    >>> from wpjax.metrics.readouts import Projection
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> tokens = task.encode(pair.tokenizer, n_prompts=4).with_instruction
    >>> direction = Projection(jnp.ones(pair.cfg.d_model) / pair.cfg.d_model**0.5)
    >>> last = jnp.asarray(tokens.last)[:, None]
    >>> metric = Metric(tokens, last, jnp.ones((4, 1)), direction, 1, "anchor")  # reads layer 1
    >>> heads = wp.enumerate_components(pair.cfg, ["head"], layers=[1])
    >>> engine = Engine(pair, metric, heads, done={}, progress=lambda *_: None)
    >>> changes, flow = engine.changes("exact", engine.plan(heads))
    >>> changes.shape == (len(heads), 4), flow.shape == (len(heads), len(engine.targets))
    (True, True)
    """

    def __init__(
        self,
        pair: Pair,
        metric: Metric,
        chosen: Sequence[Component],
        done: MutableMapping[str, np.ndarray],
        progress: Progress,
        with_flow: bool = True,
        shape: Shape | None = None,
    ):
        self.pair, self.done, self.progress, self.with_flow = pair, done, progress, with_flow
        self.models: dict[str, Params] = {"base": pair.base, "expert": pair.expert}
        self.placement = pair.placement  # the devices that share every chunk
        self.metric = self.placement.replicate(metric)
        self.position = {c: i for i, c in enumerate(chosen)}
        self.packing = pack(metric, shape)
        self.runs: dict[str, Run] = {}

    def with_metric(self, metric: Metric) -> Engine:
        """An engine of the same components with another metric of the same prompts; finished parts are shared."""
        return Engine(self.pair, metric, list(self.position), self.done, self.progress)

    @property
    def targets(self) -> list[str]:
        """Names of the columns of the flow."""
        return flow_targets(self.pair.cfg, self.metric)

    @property
    def columns(self) -> dict[str, Float[np.ndarray, " C"]]:
        """More that is known of each component after it was replaced, by column of the result; nothing here."""
        return {}

    def plan(self, components: Sequence[Component], budget: int | None = None) -> Plan:
        """How patches of some components are cut into chunks; see `make_plan`. All parts of a farm cut them alike."""
        plan = make_plan(self.pair.cfg, components, self.packing, budget, placement=self.placement)
        return agreed_plan(plan, components, self.done)

    def joint(self, masks: Sequence[PatchMask], budget: int | None = None) -> Float[np.ndarray, "M B"]:
        """The metric of the base with each of M sets of components taken from the expert.

        Args:
            masks: the M sets.
            budget: bytes for the activations of the sets that run at once; None to choose from the device.

        Returns:
            [M, B], F of each patched model and prompt.
        """
        return scores_of_sets(self.pair.cfg, self.pair.base, self.pair.expert, masks, self.metric, budget=budget)

    def run(self, model: str) -> Run:
        """The packed run of a model, by its name in `models`. It is made once and then remembered."""
        if model not in self.runs:
            run = run_packed(self.pair.cfg, self.models[model], self.metric, self.packing, self.with_flow)
            self.runs[model] = run
        return self.runs[model]

    def own(self, name: str, plan: Plan, label: str | None = None) -> Plan:
        """The chunks of a plan that this process runs, or reads: in a farm its own and those that are done, else all.

        Args:
            name: the cell.
            plan: the chunks.
            label: as of `perform`.
        """
        return plan.with_chunks(shared_out(self.done, plan.chunks, lambda chunk: self.is_done(label or name, chunk)))

    def is_done(self, label: str, chunk: Chunk) -> bool:
        """Whether all that `perform` yields of a chunk is in `done`."""
        keys = [label, "flow"] if label == "exact" and self.with_flow else [label]
        return all(part_key(key, chunk) in self.done for key in keys)

    def perform(
        self, name: str, plan: Plan, jitter_seed: int | None = None, label: str | None = None
    ) -> Iterator[Changes]:
        """Run the chunks of a plan in one cell; those that are in `done` are not run again.

        Args:
            name: the cell, a key of `CELLS`.
            plan: the chunks.
            jitter_seed: seed of a sham; None for patches.
            label: what the finished parts are filed under in `done`; None for the name of the cell.

        Yields:
            the changes of each chunk, in the plan's order.
        """
        if not plan.chunks:
            return
        cell, label = CELLS[name], label or name
        keys = {part_key(label, chunk): chunk for chunk in plan.chunks}
        with_flow = label == "exact" and self.with_flow
        waiting = plan.with_chunks(chunk for chunk in keys.values() if not Engine.is_done(self, label, chunk))
        n_done = len(keys) - len(waiting.chunks)
        doing = f"{label} patches"
        for chunk, delta, flow in self._run(cell, waiting, jitter_seed) if waiting.chunks else ():
            if with_flow:
                assert flow is not None
                self.done[part_key("flow", chunk)] = flow
            self.done[part_key(label, chunk)] = delta
            n_done += 1
            self.progress(doing, n_done, len(keys))
        n_targets = len(flow_targets(self.pair.cfg, self.metric))
        for key, chunk in keys.items():
            n = len(chunk.components)
            flow = finished_part(self.done, part_key("flow", chunk), (n, n_targets)) if with_flow else None
            yield Changes(chunk, finished_part(self.done, key, (n, len(self.metric))), flow)

    def _run(self, cell: Cell, plan: Plan, jitter_seed: int | None) -> Iterator[Changes]:
        """Run all chunks of a plan in one cell."""
        runs: tuple[Run, Run | None] = (self.run(cell.host), None)
        if cell.inputs == "donor":  # another compiled program anyway, so it can leave out the flow, which nobody needs
            runs = runs[0]._replace(slope=None, written=None), self.run(cell.donor)._replace(slope=None, written=None)
        host, donor = self.models[cell.host], self.models[cell.donor]
        yield from exact_changes(
            self.pair.cfg, host, donor, runs, self.metric, self.packing, plan,
            weights=cell.weights, inputs=cell.inputs, jitter_seed=jitter_seed,
        )  # fmt: skip

    def changes(self, name: str, plan: Plan) -> tuple[Float[np.ndarray, "C B"], Float[np.ndarray, "C U"] | None]:
        """The change of the metric by each of the C components in one cell, and the flow.

        Args:
            name: the cell, a key of `CELLS`.
            plan: the chunks.

        Returns:
            [C, B] changes and [C, U] flow (None if it is not followed). NaN for components that the plan leaves out
            and, in a part of a farm, for those of other parts.

        Raises:
            WpjaxError: a change is not finite.
        """
        delta = np.full((len(self.position), len(self.metric)), np.nan)
        flow: np.ndarray | None = None
        for chunk, changes, through in self.perform(name, self.own(name, plan)):
            if not np.isfinite(changes).all():
                names = ", ".join(c.name for c in chunk.components[:4])
                raise WpjaxError(f"a patch of {names} gives scores that are not finite; check the checkpoints for NaN")
            rows = [self.position[c] for c in chunk.components]
            delta[rows] = changes
            if through is not None:
                flow = np.full((len(self.position), through.shape[1]), np.nan) if flow is None else flow
                flow[rows] = through
        return delta, flow

    def noise_floor(self, plan: Plan, gap: Float[np.ndarray, " B"], seed: int) -> dict[str, float]:
        """The largest effect of shams, by kind: what rounding alone can make.

        Args:
            plan: the plan of the sweep.
            gap: F(expert) - F(base) of each prompt.
            seed: seed of the rounding steps.
        """
        floor = dict.fromkeys(plan.rows, 0.0)
        for chunk, changes, _ in self.perform("sham", self.own("sham", sham_plan(plan)), seed):
            floor[chunk.kind] = max(floor[chunk.kind], float(np.abs(changes.mean(1)).max() / gap.mean()))
        return floor

    def nulls(self, plan: Plan, gap: Float[np.ndarray, " B"], seed: int) -> dict[str, dict[str, float]]:
        """How large effects get where there is nothing to find: 95 % of them are smaller.

        Args:
            plan: the plan of the sweep; a few chunks of it are run.
            gap: F(expert) - F(base) of each prompt.
            seed: seed of the permutations and directions.

        Returns:
            null -> kind -> share of the gap, NaN where a null does not apply. The nulls are

            - "permuted": patches from an expert whose changes of weights are dealt out anew among components of a
              kind and layer;
            - "direction", for an anchor: the true patches, each read along one of `N_DIRECTIONS` random directions, as
              shares of the same gap.
        """
        few = sham_plan(plan)
        # Changes are dealt out among channels; norms and the kinds outside the layers have none. Directions would keep
        # their vectors, and only change their sizes among them.
        with_channels = [kind for kind in plan.rows if KINDS[kind].in_layer and kind not in ("norm", "delta_direction")]
        dealt = few.with_chunks(chunk for chunk in few.chunks if chunk.kind in with_channels)
        dealt = self.own("permuted", dealt)
        changes: dict[str, list[Changes]] = {"permuted": [], "direction": []}
        if dealt.chunks:
            (self.models["permuted"],) = place(self.placement, permuted(self.pair.base, self.pair.expert, seed))
            changes["permuted"] = list(self.perform("permuted", dealt))
            del self.models["permuted"]  # a whole model, not needed any more
        if isinstance(self.metric.readout, Projection):
            rng = np.random.default_rng(seed)
            for i in range(N_DIRECTIONS):
                vector = rng.standard_normal(self.pair.cfg.d_model).astype(np.float32)
                readout = Projection(jnp.asarray(vector / np.linalg.norm(vector)))
                metric = dataclasses.replace(self.metric, readout=readout)
                some = few.with_chunks(few.chunks[i::N_DIRECTIONS])  # each patch is read along one of them
                label, engine = f"direction-{i}", self.with_metric(metric)
                changes["direction"] += engine.perform("exact", engine.own("exact", some, label), label=label)

        def quantile(parts: Sequence[Changes], kind: str) -> float:
            sizes = [np.abs(part.delta.mean(1)) / gap.mean() for part in parts if part.chunk.kind == kind]
            return float(np.quantile(np.concatenate(sizes), 0.95)) if sizes else float("nan")

        return {name: {kind: quantile(parts, kind) for kind in plan.rows} for name, parts in changes.items()}


def part_key(prefix: str, chunk: Chunk) -> str:
    """The key of a chunk's finished part: prefix, kind, layer and a hash of the components' names."""
    names = " ".join(c.name for c in chunk.components)
    return f"{prefix}-{chunk.kind}-{chunk.layer}-{hashlib.blake2b(names.encode(), digest_size=8).hexdigest()}"
