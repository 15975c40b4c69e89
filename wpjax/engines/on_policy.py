"""The anchor along a model's own words: does its state last while the model speaks?

    F_o(M, x) = 1 / |y| sum_t <r_a^M(x, y_<=t), v>,    y generated greedily by M itself
    (docs/method.md, "What the model says"; ours)

A patch acts on F_o in two ways: it changes the state along given words, and it changes the words. Few single patches
change any word. So each patch is run as follows:

1. It is replayed along the base's own answer. That gives its score along these words.
2. A second replay tells whether each of these words stays the patched model's first choice, by a margin that covers
   rounding (in bfloat16 the margin is a guess).
3. Only if some word may not stay, the patched model answers anew and is read along its own answer.

The result is exact. It costs two replays and a few answers.

Greedy words are piecewise constant in the weights. So the slope of F_o is the slope along the base's own words, and
first-order screens take that. Components after the anchor act by words alone; only a real replacement shows them.
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
from wpjax.engines.exact import Changes
from wpjax.engines.plan import Chunk, Plan
from wpjax.errors import MetricRejected
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.answers import ExpertAnswers, answer_of, answer_positions, decision_metric, trimmed, with_answers
from wpjax.metrics.metric import Metric, PreparedMetric, scores
from wpjax.metrics.readouts import Readout, TokensUnchanged
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.models.generate import Generation, generate
from wpjax.pairs import Pair
from wpjax.patching import PatchMask, materialize, patch
from wpjax.runtime.batching import map_batches
from wpjax.runtime.progress import Progress
from wpjax.runtime.shards import finished_part

ANSWERS_AT_ONCE = 32
"""Answers that one program generates on a device, each by a patched model of its own."""


def along_answers(anchor: Anchor, batch: PromptBatch, answers: Generation) -> Metric:
    """The anchor's score, averaged over the tokens of given answers, end token included.

    Args:
        anchor: the direction.
        batch: the prompts; those with the instruction are read.
        answers: an answer to each prompt. With the answers of the scored model itself, the score is its F_o.
    """
    return dataclasses.replace(anchor.metric_along(batch, answers), name="on_policy")


class BaseAnswers:
    """The base's answers to some prompts, and the metrics along them.

    Args:
        pair: base and expert.
        batch: the prompts; those with the instruction are answered.
        anchor: the direction.
        max_new_tokens: length of an answer, in tokens, at most.
        answers: the base's answers, if they are known already; None to generate them.

    Attributes:
        answers: the base's greedy answers.
        metric: the anchor's score along these answers.
    """

    def __init__(
        self,
        pair: Pair,
        batch: PromptBatch,
        anchor: Anchor,
        max_new_tokens: int,
        answers: Generation | None = None,
    ):
        self.pair, self.batch, self.anchor, self.max_new_tokens = pair, batch, anchor, max_new_tokens
        self.answers = trimmed(self.of(pair.base) if answers is None else answers)
        self.metric = along_answers(anchor, batch, self.answers)

    def of(self, params: Params) -> Generation:
        """Greedy answers of a model to these prompts."""
        return answer_of(self.pair, params, self.batch.with_instruction, self.max_new_tokens)

    def score(self, params: Params) -> Float[np.ndarray, " B"]:
        """F_o of a model for each prompt, along its own answers."""
        return scores(self.pair.cfg, params, along_answers(self.anchor, self.batch, self.of(params)))

    @property
    def words_unchanged(self) -> Metric:
        """A metric: the number of the base's words that are surely a model's first choice, given those before."""
        prompts, cfg = self.batch.with_instruction, self.pair.cfg
        at, weight = answer_positions(prompts, self.answers)
        chosen = np.where(weight > 0, np.asarray(self.answers.tokens), 0)
        # Generation and replay round differently. If two logits are nearer than this, either may come out larger.
        margin = 1e-3 if self.pair.base["embed"]["W_E"].dtype == jnp.float32 else 0.2
        readout = TokensUnchanged(jnp.asarray(chosen), margin)
        tokens = with_answers(prompts, self.answers)
        return Metric(tokens, jnp.asarray(at), jnp.asarray(weight), readout, cfg.n_layers - 1, "kept words")


@dataclasses.dataclass(frozen=True)
class OnPolicy:
    """An anchor that is read along each model's own greedy answer. `sweep` takes it as a metric.

    Attributes:
        anchor: the direction.
        max_new_tokens: length of an answer, in tokens, at most.
        answers: the expert's answers, if other metrics share them; the metric that helps a screen reads them.
        words: the base's answers to the prompts of the sweep, if they are known already; None to generate them.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> anchor = wp.fit_anchor(pair, task, causal="skip")
    >>> batch = task.encode(pair.tokenizer, n_prompts=4)
    >>> score = wp.OnPolicy(anchor, max_new_tokens=8).base_answers(pair, batch).score
    >>> bool((score(pair.expert) > score(pair.base)).all())  # each model along its own answers
    True
    """

    anchor: Anchor
    max_new_tokens: int = 32
    answers: ExpertAnswers | None = None
    words: Generation | None = None

    has_fixed_words: ClassVar[bool] = False

    def base_answers(self, pair: Pair, batch: PromptBatch) -> BaseAnswers:
        """The base's answers to some prompts, and the metrics along them."""
        return BaseAnswers(pair, batch, self.anchor, self.max_new_tokens, self.words)

    def prepare(self, pair: Pair, batch: PromptBatch) -> PreparedMetric:
        """What a sweep needs to measure it: every model is scored along its own words, and every component counts.

        Raises:
            AnchorRejected: the anchor belongs to another expert.
        """
        self.anchor.check_belongs(pair)
        base_answers = self.base_answers(pair, batch)

        def decision() -> Metric | None:
            """The decision metric, which chooses candidates too.

            F_o has no slope by way of words. Words change first where base and expert part ways, and the decision
            metric has a slope there.
            """
            try:
                return decision_metric(pair, batch, self.max_new_tokens, self.answers)
            except MetricRejected:  # base and expert part ways on too few prompts
                return None

        return PreparedMetric(
            base_answers.metric,
            reach_metric=base_answers.words_unchanged,
            score=base_answers.score,
            make_engine=functools.partial(OnPolicyEngine, base_answers),
            second_metric=decision,
            columns=self.anchor.columns,
            attributes=self.anchor.attributes(batch.behaviour),
        )


@functools.partial(jax.jit, static_argnames=("cfg", "layer", "max_new_tokens"))
def _anew(
    cfg: ModelConfig,
    host: Params,
    donor: Params,
    readout: Readout,
    stop_tokens: Int[Array, " S"],
    units: Mapping[str, Array],
    ids: Int[Array, "P T"],
    lengths: Int[Array, " P"],
    *,
    layer: int,
    max_new_tokens: int,
) -> tuple[Float[Array, " P"], Generation]:
    """P patched models answer one prompt each, and are scored along their own answers; the weights are shared.

    Args:
        cfg: the model (static).
        host: parameters that receive the patches.
        donor: parameters that the components come from.
        readout: the projection on the anchor.
        stop_tokens: ids that end an answer.
        units: unit -> the masks of the P models, stacked along the first axis.
        ids: one prompt for each model.
        lengths: tokens of each prompt.
        layer: the anchor's layer (static).
        max_new_tokens: length of an answer, at most (static).
    """

    def one(mask: Mapping[str, Array], ids: Array, n: Array) -> tuple[Array, Generation]:
        params = patch(host, donor, PatchMask(mask))
        said = generate(cfg, params, ids[None], n[None], max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
        room = jnp.pad(ids, (0, max_new_tokens))
        # Prompt and answer in one row. Tokens after the end of the answer change nothing: attention is causal.
        full = jax.lax.dynamic_update_slice(room, said.tokens[0].astype(room.dtype), (n,))
        step = jnp.arange(max_new_tokens)
        counts = (step < said.lengths[0]).astype(jnp.float32)
        tokens = Tokens(full[None], n[None] + said.lengths)
        at, weight = jnp.where(counts > 0, n + step, 0)[None], (counts / counts.sum())[None]
        score = Metric(tokens, at, weight, readout, layer, "on_policy")(cfg, params)
        return score[0], Generation(said.tokens[0], said.lengths[0])

    return jax.vmap(one)(dict(units), ids, lengths)


class OnPolicyEngine(Engine):
    """An engine that reads every patched model along its own answer; this module says how.

    Args:
        base_answers: the base's answers to the metric's prompts.
        chosen: all C components that are swept, in any layer.
        done: key -> finished part; the engine adds to it.
        progress: called after every chunk.
        metric: another metric along the base's answers; None for that of `base_answers`.
        words: an engine whose metric is `base_answers.words_unchanged`, to share with this one; None for a new one.
    """

    def __init__(
        self,
        base_answers: BaseAnswers,
        chosen: Sequence[Component],
        done: MutableMapping[str, np.ndarray],
        progress: Progress,
        metric: Metric | None = None,
        words: Engine | None = None,
    ):
        super().__init__(base_answers.pair, metric or base_answers.metric, chosen, done, progress)
        self.base_answers, self.chosen = base_answers, chosen
        self.fits: dict[str, int] = {}
        if words is None:
            words = Engine(base_answers.pair, base_answers.words_unchanged, chosen, done, progress, with_flow=False)
        self.models = words.models  # one dict for both: `nulls` puts a third model there for a while
        self.words = words
        self.changed = np.full(len(chosen), np.nan)  # share of prompts on which each component changes words

    def with_metric(self, metric: Metric) -> Engine:
        """An engine of the same components with another metric along the same words."""
        return OnPolicyEngine(self.base_answers, self.chosen, self.done, self.progress, metric, self.words)

    @property
    def targets(self) -> list[str]:
        """Names of the columns of the flow: those along the base's words, and "rest", what other words do."""
        return [*super().targets, "rest"]

    @property
    def columns(self) -> dict[str, Float[np.ndarray, " C"]]:
        """`words_changed`: the share of prompts on which a component changes words; NaN if it was not replaced."""
        return {"words_changed": self.changed} if np.isfinite(self.changed).any() else {}

    def joint(self, masks: Sequence[PatchMask], budget: int | None = None) -> Float[np.ndarray, "M B"]:
        """F_o of the base with each of M sets of the expert, [M, B]: each model answers, one after the other."""
        pair = self.pair
        return np.stack([self.base_answers.score(materialize(pair.base, pair.expert, mask)) for mask in masks])

    def is_done(self, label: str, chunk: Chunk) -> bool:
        """Whether all that `perform` yields of a chunk is in `done`; the correction for new words is made last."""
        along_base = not self.metric.reaches(chunk.components[0]) or super().is_done(label, chunk)
        return along_base and part_key(f"{label}-anew", chunk) in self.done

    def perform(
        self, name: str, plan: Plan, jitter_seed: int | None = None, label: str | None = None
    ) -> Iterator[Changes]:
        """Run the chunks of a plan in one cell, along each patched model's own words; arguments as `Engine.perform`.

        A sham that has to answer anew does so without its rounding step.
        """
        label = label or name
        # Components after the anchor do not change it along given words.
        reaching = plan.with_chunks(c for c in plan.chunks if self.metric.reaches(c.components[0]))
        along_base = {c.chunk: c for c in super().perform(name, reaching, jitter_seed, label)}
        # Filed under the cell, not the label: which words stay does not depend on the direction that is read.
        kept = {c.chunk: c.delta for c in self.words.perform(name, plan, jitter_seed, f"{name}-words")}
        n_targets = len(self.targets)
        for i, chunk in enumerate(plan.chunks):
            shape = len(chunk.components), len(self.metric)
            delta, flow = np.zeros(shape), None
            if chunk in along_base:
                delta, flow = along_base[chunk].delta, along_base[chunk].flow
            key = part_key(f"{label}-anew", chunk)
            if key not in self.done:
                self.done[key] = np.stack(self._corrected(name, chunk, delta, kept[chunk]))
                self.progress(f"{label} patches that change words", i + 1, len(plan.chunks))
            spoken, changed = finished_part(self.done, key, (2, *shape))
            if label == "exact":
                self.changed[[self.position[c] for c in chunk.components]] = changed.mean(1)
                flow = np.zeros((shape[0], n_targets - 1)) if flow is None else flow
                # "rest" is what the new words add to the change along the base's words.
                flow = np.concatenate([flow, (spoken - delta).mean(1, keepdims=True)], axis=1)
            yield Changes(chunk, spoken, flow)

    def _corrected(
        self, name: str, chunk: Chunk, delta: Float[np.ndarray, "n B"], kept: Float[np.ndarray, "n B"]
    ) -> tuple[Float[np.ndarray, "n B"], Float[np.ndarray, "n B"]]:
        """Correct the changes of a chunk where a patched model may say other words than the base.

        Args:
            name: the cell.
            chunk: the n components.
            delta: changes of the score along the base's words.
            kept: changes of the number of the base's words that surely stay.

        Returns:
            changes of the score along each patched model's own words; and 1 where those are not the base's, else 0.
        """
        answers, cfg = self.base_answers.answers, self.pair.cfg
        lengths = np.asarray(answers.lengths)
        # Counts of words are whole numbers: all words stay if the count is that of the answer.
        same = np.asarray(self.words.run("base").score) + kept > lengths - 0.5
        anew = np.argwhere(~same)  # [n, 2]: component and prompt
        spoken, changed = delta.copy(), np.zeros(delta.shape)
        if not len(anew):
            return spoken, changed
        prompts, cell = self.base_answers.batch.with_instruction, CELLS[name]
        host, donor = self.models[cell.host], self.models[cell.donor]
        masks = [open_units(cfg, [c]) for c in chunk.components]
        stacked = {unit: np.stack([mask[unit] for mask in masks]) for unit in masks[0]}
        units = {unit: value for unit, value in stacked.items() if value.any()}  # leaves of absent units stay plain

        stop = jnp.asarray(self.pair.stop_tokens, jnp.int32)
        whole = self.placement.replicate((host, donor, self.metric.readout, stop))
        options = {"layer": self.metric.layer, "max_new_tokens": self.base_answers.max_new_tokens}

        def run(rows: Int[np.ndarray, " N"]) -> tuple[Array, Generation]:
            c, b = anew[rows].T
            masks = {unit: jnp.asarray(value[c]) for unit, value in units.items()}
            some = masks, jnp.asarray(prompts.ids[b]), jnp.asarray(prompts.lengths[b])
            return self.placement.call(_anew, (cfg,), whole, some, **options)

        # Filled up to full parts by repeating rows, so that one compiled program serves all.
        parts = self.placement.n_patch
        rows = np.arange(-(-len(anew) // (parts * ANSWERS_AT_ONCE)) * parts * ANSWERS_AT_ONCE) % len(anew)
        score, said = map_batches(
            len(rows), ANSWERS_AT_ONCE, lambda part: run(rows[part]), what="answers", fits=self.fits, parts=parts
        )
        own = np.asarray(self.run(cell.host).score)
        for (c, b), f, tokens, n in zip(anew, score, said.tokens, said.lengths, strict=False):
            # If the words are the base's after all, `delta` is right already.
            if n != lengths[b] or (tokens[:n] != np.asarray(answers.tokens)[b, :n]).any():
                spoken[c, b], changed[c, b] = f - own[b], 1.0
        return spoken, changed
