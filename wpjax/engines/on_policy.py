"""The anchor along a model's own words: does the state last while it speaks, and what does one component do to that?

    F_o(M, x) = 1 / |y| sum_t <r_a^M(x, y_<=t), v>,    y generated greedily by M itself
    (docs/method.md, "What the model says"; ours)

A component acts on it twice: on the state along given words, and by changing the words. Few single components change
any word, so every patch is replayed along the base's own answer, which gives the score there and tells whether each
word stays the first choice, by a margin for what rounding does (in bfloat16 a guess). Only where one does not surely
stay, the patched model answers anew and is read along that answer: exact, for the price of two replays and a few
answers. (Those are not divided among devices.)

Greedy words are piecewise constant in the weights. So the slope of F_o is that along the base's own words, which every
first-order screen takes; what comes after the anchor acts by words alone, and only a real replacement shows it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.behaviours import PromptBatch, Tokens
from wpjax.components import Component, open_units
from wpjax.engines.engine import CELLS, Engine, part_key
from wpjax.engines.exact import Changes, Chunk, Plan
from wpjax.errors import MetricRejected
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.answers import answer_of, answer_positions, decision_metric, trimmed, with_answers
from wpjax.metrics.metric import Metric, Prepared, scores
from wpjax.metrics.readouts import Readout, TokensUnchanged
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.models.generate import Generation, generate
from wpjax.pairs import Pair
from wpjax.patching import PatchMask, materialize, patch
from wpjax.runtime.batching import map_batches
from wpjax.runtime.placement import Placement
from wpjax.runtime.progress import Progress
from wpjax.runtime.shards import finished_part

ANSWERS_AT_ONCE = 32
"""Patched models that answer a prompt each in one program."""


def along(anchor: Anchor, batch: PromptBatch, answers: Generation) -> Metric:
    """The anchor's score averaged over the tokens of some answers, the end token included.

    Args:
        anchor: the direction.
        batch: prompts with the instruction.
        answers: of the model that is scored, for its on-policy score.
    """
    return dataclasses.replace(anchor.on(batch, answers), name="on_policy")


class Speech:
    """What the base says to some prompts, and what is measured along it.

    Args:
        pair: base and expert.
        batch: prompts with the instruction.
        anchor: that is read.
        max_new_tokens: length of an answer.
    """

    def __init__(self, pair: Pair, batch: PromptBatch, anchor: Anchor, max_new_tokens: int):
        self.pair, self.batch, self.anchor, self.max_new_tokens = pair, batch, anchor, max_new_tokens
        self.answers = trimmed(self.of(pair.base))
        self.metric = along(anchor, batch, self.answers)

    def of(self, params: Params) -> Generation:
        """Greedy answers of a model."""
        return answer_of(self.pair, params, self.batch.with_instruction, self.max_new_tokens)

    def score(self, params: Params) -> Float[np.ndarray, " B"]:
        """F_o of a model, along its own answers."""
        return scores(self.pair.cfg, params, along(self.anchor, self.batch, self.of(params)))

    @property
    def kept(self) -> Metric:
        """How many of the base's words a model surely says too, when it is given those before."""
        prompts, cfg = self.batch.with_instruction, self.pair.cfg
        at, here = answer_positions(prompts, self.answers)
        chosen = np.where(here > 0, np.asarray(self.answers.tokens), 0)
        # Generation and replay round differently: what is nearer than this may fall either way.
        margin = 1e-3 if self.pair.base["embed"]["W_E"].dtype == jnp.float32 else 0.2
        readout = TokensUnchanged(jnp.asarray(chosen), margin)
        tokens = with_answers(prompts, self.answers)
        return Metric(tokens, jnp.asarray(at), jnp.asarray(here), readout, cfg.n_layers - 1, "kept words")


@dataclasses.dataclass(frozen=True)
class OnPolicy:
    """An anchor that is read along each model's own greedy answer; what `sweep` takes as a metric.

    Attributes:
        anchor: the direction.
        max_new_tokens: length of an answer.
    """

    anchor: Anchor
    max_new_tokens: int = 32

    has_fixed_words: ClassVar[bool] = False

    def speech(self, pair: Pair, batch: PromptBatch) -> Speech:
        """What the base says to some prompts, and what is measured along it."""
        return Speech(pair, batch, self.anchor, self.max_new_tokens)

    def prepare(self, pair: Pair, batch: PromptBatch) -> Prepared:
        """What a sweep needs of it: every model is scored along its own words, and every component counts.

        Raises:
            AnchorRejected: the anchor belongs to another expert.
        """
        self.anchor.check_belongs(pair)
        speech = self.speech(pair, batch)

        def decision() -> Metric | None:
            """Words have no slope; where base and expert part ways, one may tip."""
            try:
                return decision_metric(pair, batch, self.max_new_tokens)
            except MetricRejected:  # they hardly part
                return None

        return Prepared(
            speech.metric,
            reached_by=speech.kept,
            score=speech.score,
            make_engine=functools.partial(OnPolicyEngine, speech),
            chooses_too=decision,
            columns=self.anchor.columns,
            attributes=self.anchor.attributes,
        )


@functools.partial(jax.jit, static_argnames=("cfg", "layer", "max_new_tokens"))
def _anew(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    units: Mapping[str, Array],
    ids: Int[Array, "P T"],
    lengths: Int[Array, " P"],
    readout: Readout,
    stop_tokens: Int[Array, " S"],
    layer: int,
    max_new_tokens: int,
) -> tuple[Float[Array, " P"], Generation]:
    """Patched models' scores along their own answers, a prompt each, and the answers; weights are shared."""

    def one(mask: Mapping[str, Array], ids: Array, n: Array) -> tuple[Array, Generation]:
        params = patch(host, donor, PatchMask(mask))
        said = generate(cfg, params, ids[None], n[None], max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
        room = jnp.pad(ids, (0, max_new_tokens))
        # What stands after the end of an answer is seen by nothing that is read.
        full = jax.lax.dynamic_update_slice(room, said.tokens[0].astype(room.dtype), (n,))
        step = jnp.arange(max_new_tokens)
        here = (step < said.lengths[0]).astype(jnp.float32)
        tokens = Tokens(full[None], n[None] + said.lengths)
        at, weight = jnp.where(here > 0, n + step, 0)[None], (here / here.sum())[None]
        score = Metric(tokens, at, weight, readout, layer, "on_policy")(cfg, params)
        return score[0], Generation(said.tokens[0], said.lengths[0])

    return jax.vmap(one)(dict(units), ids, lengths)


class OnPolicyEngine(Engine):
    """An engine whose patched models say what they would say; see the module.

    Args:
        speech: of the base, on the metric's prompts.
        chosen: every component that is swept; in any layer.
        done: finished parts, extended.
        progress: called after every chunk.
        metric: along the base's words; None for that of `speech`.
        placement: the devices that share every chunk; None for one.
        models: base and expert where they stand on the devices.
        words: the engine of the words; None for a new one.
    """

    def __init__(
        self,
        speech: Speech,
        chosen: Sequence[Component],
        done: MutableMapping[str, np.ndarray],
        progress: Progress,
        placement: Placement | None = None,
        metric: Metric | None = None,
        models: Mapping[str, Params] | None = None,
        words: Engine | None = None,
    ):
        placement = Placement.single() if placement is None else placement
        whole = placement.whole
        super().__init__(speech.pair, whole(metric or speech.metric), chosen, done, progress, placement, models)
        self.speech, self.chosen = speech, chosen
        self.fits: dict[str, int] = {}
        if words is None:
            words = Engine(
                speech.pair, whole(speech.kept), chosen, done, progress, placement, self.models, with_flow=False
            )
            words.models = self.models  # that of a null comes and goes
        self.words = words
        self.changed = np.full(len(chosen), np.nan)

    def beside(self, metric: Metric) -> Engine:
        """Along the same words."""
        return OnPolicyEngine(
            self.speech, self.chosen, self.done, self.progress, self.placement, metric, self.models, self.words
        )

    @property
    def targets(self) -> list[str]:
        """Of the flow along the base's words, and what other words do."""
        return [*super().targets, "rest"]

    @property
    def columns(self) -> dict[str, Float[np.ndarray, " C"]]:
        """On what share of prompts each component that was replaced changes words."""
        return {"words_changed": self.changed} if np.isfinite(self.changed).any() else {}

    def joint(self, masks: Sequence[PatchMask], budget: int | None = None) -> Float[np.ndarray, "M B"]:
        """Each set's model answers for itself, one model after the other."""
        pair = self.pair
        return np.stack([self.speech.score(materialize(pair.base, pair.expert, mask)) for mask in masks])

    def perform(
        self, name: str, plan: Plan, jitter_seed: int | None = None, label: str | None = None
    ) -> Iterator[Changes]:
        """Changes along each patched model's own words; a sham answers without its step."""
        label = label or name
        felt = plan.with_chunks(c for c in plan.chunks if self.metric.reaches(c.components[0]))
        given = {c.chunk: c for c in super().perform(name, felt, jitter_seed, label)}
        # The words' replay depends on the cell alone, whatever direction is read.
        kept = {c.chunk: c.delta for c in self.words.perform(name, plan, jitter_seed, f"{name}-words")}
        n_targets = len(self.targets)
        for i, chunk in enumerate(plan.chunks):
            shape = len(chunk.components), len(self.metric)
            delta, flow = np.zeros(shape), None
            if chunk in given:
                delta, flow = given[chunk].delta, given[chunk].flow
            key = part_key(f"{label}-anew", chunk)
            if key not in self.done:
                self.done[key] = np.stack(self._corrected(name, chunk, delta, kept[chunk]))
                self.progress(f"{label} patches that change words", i + 1, len(plan.chunks))
            spoken, changed = finished_part(self.done, key, (2, *shape))
            if label == "exact":
                self.changed[[self.position[c] for c in chunk.components]] = changed.mean(1)
                flow = np.zeros((shape[0], n_targets - 1)) if flow is None else flow
                flow = np.concatenate([flow, (spoken - delta).mean(1, keepdims=True)], axis=1)
            yield Changes(chunk, spoken, flow)

    def _corrected(
        self, name: str, chunk: Chunk, delta: Float[np.ndarray, "n B"], kept: Float[np.ndarray, "n B"]
    ) -> tuple[Float[np.ndarray, "n B"], Float[np.ndarray, "n B"]]:
        """Changes of the score along each patched model's own words, and 1 where those are not the base's."""
        answers, cfg = self.speech.answers, self.pair.cfg
        lengths = np.asarray(answers.lengths)
        same = np.asarray(self.words.run("base").score) + kept > lengths - 0.5
        where = np.argwhere(~same)
        spoken, changed = delta.copy(), np.zeros(delta.shape)
        if not len(where):
            return spoken, changed
        prompts, cell = self.speech.batch.with_instruction, CELLS[name]
        host, donor = self.models[cell.host], self.models[cell.donor]
        masks = [open_units(cfg, [c]) for c in chunk.components]
        stacked = {unit: np.stack([mask[unit] for mask in masks]) for unit in masks[0]}
        units = {unit: value for unit, value in stacked.items() if value.any()}  # what is closed costs nothing

        def run(rows: Int[np.ndarray, " N"]) -> tuple[Array, Generation]:
            c, b = where[rows].T
            return _anew(
                cfg,
                host,
                donor,
                {unit: jnp.asarray(value[c]) for unit, value in units.items()},
                jnp.asarray(prompts.ids[b]),
                jnp.asarray(prompts.lengths[b]),
                self.metric.readout,
                jnp.asarray(self.pair.stop_tokens, jnp.int32),
                self.metric.layer,
                self.speech.max_new_tokens,
            )

        rows = np.arange(-(-len(where) // ANSWERS_AT_ONCE) * ANSWERS_AT_ONCE) % len(where)  # one shape
        score, said = map_batches(
            len(rows), ANSWERS_AT_ONCE, lambda some: run(rows[some]), what="answers", fits=self.fits
        )
        own = np.asarray(self.run(cell.host).score)
        for (c, b), f, tokens, n in zip(where, score, said.tokens, said.lengths, strict=False):
            if n != lengths[b] or (tokens[:n] != np.asarray(answers.tokens)[b, :n]).any():
                spoken[c, b], changed[c, b] = f - own[b], 1.0  # the same words were read already
        return spoken, changed
