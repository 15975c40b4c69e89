"""How long a study will take, phase by phase, before it begins: its operations, and how fast this machine is.

    seconds of a phase  =  operations / (EFFICIENCY * operations a second of a matrix product)  +  programs * COMPILING

Operations are those of the weights' products (`engines.operations`). The speed is measured, once the pair is known.
The other numbers are rough. So a `Schedule` corrects the estimates by what finished phases really took.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wpjax.arguments import SweepConfig
from wpjax.behaviours import Behaviour, PromptBatch
from wpjax.components import Component, enumerate_components, parse_component
from wpjax.engines.operations import of_layer, of_logits, of_patches
from wpjax.engines.packing import pack
from wpjax.engines.plan import make_plan, sham_plan
from wpjax.evaluation.fit_anchor import N_SCREENED_PROMPTS, N_TRIED, N_TRIED_PROMPTS
from wpjax.evaluation.learned import DIRECTIONS, REWARD, Aim
from wpjax.evaluation.steering import LAYERS_AT_ONCE, N_RANDOM, N_SCREENED, PROMPTS_A_LOOK, STRENGTHS
from wpjax.methods import check_method
from wpjax.methods.metrics import check_metric
from wpjax.metrics.metric import Metric
from wpjax.metrics.readouts import Projection
from wpjax.models.config import ModelConfig
from wpjax.pairs import Pair
from wpjax.relax.learn import RelaxConfig
from wpjax.runtime.farm import Part
from wpjax.runtime.placement import Placement
from wpjax.runtime.progress import Phase, Schedule

EFFICIENCY, OF_ANSWERS = 0.7, 0.35
"""Share of the speed of one large product that forward passes reach, and that answers, made token by token, reach."""

COMPILING = 1.5
"""Seconds that one program takes to compile, about."""

PASSES_OF_ESTIMATE, PASSES_OF_SECANT = 5.0, 10.0
"""Forward passes that first-order estimates cost, and that the secant adjoint costs, about."""

PASSES_OF_MASK = 4.5
"""Forward passes that a step of a learned mask costs, about."""

DECIDED = 0.75
"""Share of the prompts of two looks that decide the tests of an anchor, about."""

ANCHOR_AT = 0.8
"""Where an anchor that is yet to be fitted is likely to stand, as a share of the layers."""


class Pace(NamedTuple):
    """How fast this machine works.

    Attributes:
        operations: operations a second of a large product of matrices.
        compiling: seconds that one program takes to compile.
    """

    operations: float
    compiling: float = COMPILING

    def seconds(self, operations: float, programs: int = 0, efficiency: float = EFFICIENCY) -> float:
        """How long some work takes.

        Args:
            operations: its operations.
            programs: how many programs are compiled for it.
            efficiency: share of the speed of a product that it reaches.
        """
        return operations / (efficiency * self.operations) + programs * self.compiling


def measured_pace(cfg: ModelConfig, dtype: str = "float32", placement: Placement | None = None) -> Pace:
    """Time a product of the size of the model's MLP, on all devices at once. It takes a fraction of a second.

    Args:
        cfg: the model.
        dtype: dtype of the weights.
        placement: the devices; None for one.

    >>> import wpjax as wp
    >>> measured_pace(wp.load_model("tiny:base").cfg).operations > 1e6
    True
    """
    n_tokens = 1024
    shapes = (n_tokens, cfg.d_model), (cfg.d_model, cfg.d_mlp)
    mesh = (Placement.single() if placement is None else placement).mesh
    pairs = [
        [jax.device_put(np.ones(shape, np.dtype(dtype)), device) for shape in shapes] for device in mesh.local_devices
    ]
    product = jax.jit(lambda x, w: x @ w)
    jax.block_until_ready([product(*pair) for pair in pairs])
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([product(*pair) for pair in pairs])
        best = min(best, time.perf_counter() - start)
    return Pace(2.0 * n_tokens * cfg.d_model * cfg.d_mlp * mesh.size / best)


class Forecast:
    """The phases of work on one pair and behaviour.

    Args:
        pair: base and expert.
        behaviour: the behaviour.
        max_new_tokens: length of an answer, at most.
        pace: how fast this machine is; None to measure it.
    """

    def __init__(self, pair: Pair, behaviour: Behaviour, max_new_tokens: int, pace: Pace | None = None):
        self.pair, self.behaviour, self.cfg = pair, behaviour, pair.cfg
        dtype = str(pair.base["embed"]["W_E"].dtype)
        self.pace = measured_pace(pair.cfg, dtype, pair.placement) if pace is None else pace
        self.through = of_layer(pair.cfg) * pair.cfg.n_layers  # operations of a token in all layers
        self.answer = max_new_tokens * (self.through + of_logits(pair.cfg))  # of an answer to one prompt

    def anchor(self, n_prompts: int, causal: str, n_steered: int) -> list[Phase]:
        """The phases of `fit_anchor`; the arguments are its own."""
        n_fit = len(self.behaviour.select("fit", n_prompts))
        n_tested = len({prompt.without for prompt in self.behaviour.select("sweep", n_steered)})  # one of each query
        width = self.behaviour.encode(self.pair.tokenizer, "fit", n_prompts).with_instruction.ids.shape[1]
        n_passes = 6 if causal == "skip" else 7
        seconds = self.pace.seconds(n_passes * n_fit * width * self.through, 4)
        phases = [Phase("anchor", f"{n_passes} passes over {n_fit} prompts", seconds)]
        if causal == "skip":
            return phases
        n_few, n_tried = min(n_fit, N_SCREENED_PROMPTS), min(n_fit, N_TRIED_PROMPTS)
        # The usual course: strengths are tried at two layers, and the first that is tested is decided within two looks.
        tried = 2 + N_TRIED + LAYERS_AT_ONCE * len(STRENGTHS)  # steered models, those that are not steered included
        tested = 2 * (2 + N_RANDOM)
        answers = n_few * (2 + N_SCREENED / 4) + n_tried * tried + min(n_tested, 2 * PROMPTS_A_LOOK) * tested * DECIDED
        work = f"up to {n_tested} prompts, {tested} versions of the models"
        seconds = self.pace.seconds(2 * answers * self.answer, 10, OF_ANSWERS)  # they are made, then read by the base
        reports = ("layers screened", "strengths tried", "steering tests")
        return [*phases, Phase("tests of the anchor", work, seconds, reports)]

    def sweep(self, config: SweepConfig, batch: PromptBatch, layer: int | None) -> list[Phase]:
        """The phases of a sweep, and of what a study adds to its result.

        Of one part of several (`config.part`) only what the part does: patches are dealt out, and what needs all of
        them is left to the process that collects the parts.

        Args:
            config: arguments of the study.
            batch: its prompts.
            layer: the layer that the metric reads; None if that is yet to be found.
        """
        cfg, method, pace = self.cfg, check_method(config.method), self.pace
        last = round(ANCHOR_AT * (cfg.n_layers - 1)) if layer is None else layer
        tokens = batch.with_instruction
        at, readout = jnp.asarray(tokens.last)[:, None], Projection(jnp.zeros(cfg.d_model))
        packing = pack(Metric(tokens, at, jnp.ones((len(batch), 1)), readout, last, "plan"))
        n_tokens = packing.n_tokens
        one_pass = tokens.ids.size * (last + 1) * of_layer(cfg)
        swept = _swept(cfg, config, last)
        chosen = _chosen(swept, config.top + config.stratum) if method.estimates else swept
        n_kinds = len({c.kind for c in swept})
        part = None if config.part is None else Part.parse(config.part)
        n_parts, dealt = (1, "") if part is None else (part.of, f", part {part}")
        phases = []
        for estimate in method.estimates:
            seconds = pace.seconds(PASSES_OF_ESTIMATE * one_pass, 2)
            phases.append(Phase(estimate.column.name, f"{len(swept):,} components, to first order", seconds))
        if method.estimates or (method.cells == ("exact",) and len(method.columns) == 0):
            plan = make_plan(cfg, chosen, packing)
            controls = [c for chunk in sham_plan(plan).chunks for c in chunk.components]
            work = f"{len(chosen):,} of {len(swept):,} components, {len(batch)} prompts{dealt}"
            for cell in method.cells:
                seconds = pace.seconds(of_patches(cfg, n_tokens, last, chosen) / n_parts, n_kinds + 3)
                phases.append(Phase(f"{cell} patches", work, seconds))
            if method.cells:
                n_runs = 3 if "exact" in method.cells else 1  # shams, permuted changes, random directions
                seconds = n_runs * pace.seconds(of_patches(cfg, n_tokens, last, controls) / n_parts, 2)
                reports = ("sham patches", "permuted patches", "direction")
                phases.append(Phase("controls", f"{n_runs} times {len(controls)} patches{dealt}", seconds, reports))
        else:  # how many patches a race or random sets take is found out on the way
            work = f"{len(swept):,} components{dealt}"
            phases.append(Phase(method.name, work, None, ("race", "random masks", "exact")))
        if part is not None:
            return phases
        n_sets = n_kinds + 2
        phases.append(Phase("joint patches", f"{n_sets} sets", pace.seconds(2 * n_sets * one_pass, 4)))
        if config.set_score and config.given_anchor is None:
            seconds = pace.seconds(len(batch) * self.answer, 2, OF_ANSWERS)
            seconds += pace.seconds(PASSES_OF_SECANT * one_pass, 2)
            phases.append(Phase("set score", f"the secant adjoint on {len(batch)} prompts", seconds))
        if config.answers:
            seconds = pace.seconds(5 * max(config.answers, 4) * self.answer, 5, OF_ANSWERS)
            phases.append(Phase("answers to read", f"{config.answers} held-out prompts", seconds))
        return phases

    def learned(self, aim: Aim, config: RelaxConfig, batch: PromptBatch) -> Schedule:
        """The schedule of a learned mask.

        Args:
            aim: what it is learned for.
            config: how it is learned.
            batch: prompts to learn from.
        """
        n_directions, width = len(DIRECTIONS[aim.direction]), batch.with_instruction.ids.shape[1]
        n_models = n_directions * (2 if aim.harm else 1)
        answers = self.pace.seconds(n_models * len(batch) * self.answer, 6, OF_ANSWERS)
        n_prompts, step = min(aim.prompts_a_step, len(batch)), 0.0
        for name in (*aim.names, *(("harm",) if aim.harm else ())):
            n_rows = n_prompts * (aim.n_answers if name == REWARD else 1)
            read = (width + aim.max_new_tokens) * self.through + aim.max_new_tokens * of_logits(self.cfg)
            # Sampling goes through both models, token by token: as slow as answers, with twice the products.
            sampled = 2 * self.answer * EFFICIENCY / OF_ANSWERS if name == REWARD else 0.0
            step += n_directions * n_rows * (PASSES_OF_MASK * read + sampled)
        steps = self.pace.seconds(config.steps * config.restarts * step, 4 * n_directions)
        n_gated = f"{config.steps} steps of {n_prompts} prompts"
        if config.restarts > 1:
            n_gated += f", {config.restarts} times"
        return Schedule(
            [
                Phase("answers to learn from", f"{len(batch)} prompts", answers),
                Phase("learned mask", n_gated, steps),
            ]
        )

    def study(self, config: SweepConfig, batch: PromptBatch, layer: int | None) -> Schedule:
        """The schedule of a study whose pair is loaded.

        Args:
            config: arguments of the study.
            batch: its prompts.
            layer: the layer of the anchor that it is given; None if there is none.
        """
        phases = self._measure(config, batch, layer)
        return Schedule([*phases, *self.sweep(config, batch, self._read(config, layer))])

    def history(self, config: SweepConfig, batch: PromptBatch, layer: int | None, labels: Sequence[str]) -> Schedule:
        """The schedule of a history: the metric is made, then every step is swept. Programs are compiled once.

        Args:
            config: arguments of the history.
            batch: its prompts.
            layer: as of `study`.
            labels: names of the steps, in the order in which they are swept. Work at a step reports progress under its
                own name behind "LABEL: ".
        """
        config = dataclasses.replace(config, set_score=False, answers=0)
        phases, pace = self._measure(config, batch, layer), self.pace
        for label in labels:
            parts = self.sweep(config, batch, self._read(config, layer))
            reports = tuple(f"{label}: {report}" for part in parts for report in (part.reports or (part.name,)))
            known = [part.seconds for part in parts]
            seconds = None if None in known else sum(part.seconds or 0.0 for part in parts)
            phases.append(Phase(label, max((part.work for part in parts), key=len), seconds, reports))
            self.pace = pace._replace(compiling=0.0)
        self.pace = pace
        return Schedule(phases)

    def _read(self, config: SweepConfig, layer: int | None) -> int | None:
        """The layer that the metric reads; None if that is yet to be found."""
        return layer if check_metric(config.metric).reads_anchor else self.cfg.n_layers - 1

    def _measure(self, config: SweepConfig, batch: PromptBatch, layer: int | None) -> list[Phase]:
        """The phases of making a metric."""
        entry = check_metric(config.metric)
        phases = []
        if not (entry.reads_anchor and entry.has_fixed_words):
            seconds = self.pace.seconds((2 if config.causal != "skip" else 1) * len(batch) * self.answer, 2, OF_ANSWERS)
            phases.append(Phase("behaviour check", f"answers to {len(batch)} prompts", seconds))
        if entry.reads_anchor and layer is None:
            phases += self.anchor(config.n_prompts, config.causal, config.n_steered)
        return phases


def _swept(cfg: ModelConfig, config: SweepConfig, last: int) -> list[Component]:
    """The components of a sweep that reads a layer, about: those that cannot change the metric are refused later."""
    if config.components is not None:
        return [parse_component(cfg, name) for name in config.components]
    return enumerate_components(cfg, config.kinds, range(last + 1))


def _chosen(swept: list[Component], most: int) -> list[Component]:
    """Some components of each kind, spread evenly over the layers: which ones a screen will choose is not known."""
    chosen = []
    for kind in dict.fromkeys(c.kind for c in swept):
        of_kind = [c for c in swept if c.kind == kind]
        at = np.linspace(0, len(of_kind) - 1, min(most, len(of_kind))).round().astype(int)
        chosen += [of_kind[i] for i in at]
    return chosen
