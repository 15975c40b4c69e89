"""Anchors: a direction in the residual stream that says whether the control state of a behaviour has formed.

    u_l = mean over prompts of h_l(x+) - h_l(x-), in the expert, at the last prompt token      (arXiv 2410.12877)
    F(M, x) = <r_a^M(x)[t*], v>,  v = u_a / |u_a|                                               (arXiv 2604.13694)
    G(x) = F(expert, x) - F(base, x)

x+ is a query with the instruction and x- the query alone; layer l is read at its `resid_post`. The direction is
fitted on the "fit" queries; the gap is measured on the "sweep" queries. Instead of the last prompt token, the mean over
the first tokens of the expert's own answer may be read, everywhere alike (ours; the paper's rule is not known).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError, safe_open

from wpjax.behaviours import PromptBatch, Tokens
from wpjax.errors import AnchorRejected, CheckpointError, WpjaxError
from wpjax.metrics.answers import answer_of, answer_positions, with_answers
from wpjax.metrics.metric import Metric, Prepared, scores
from wpjax.metrics.readouts import Projection
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.models.edits import ClampTo, Edit
from wpjax.models.generate import Generation
from wpjax.models.sites import Site
from wpjax.pairs import Pair
from wpjax.runtime.files import atomic_output, write_tensors

MIN_STABILITY = 0.9
"""Least split-half cosine of an accepted anchor."""

MAX_EXCESS_NLL = 1.0
"""Nats a token by which steered answers may be less likely under the base than the expert's own; beyond: degenerate."""


@dataclasses.dataclass(frozen=True)
class SteeringTest:
    """What moving the residual stream along a direction does to answers; shares of prompts that pass the checker.

    Attributes:
        layer: after which the stream is moved.
        strength: of those tried, the one at which the base passes most without being degenerate.
        steered: base, steered by it.
        steered_random: base, moved as far along random directions.
        gain_low: lower end of the 95 % interval of the difference, over queries.
        removed: expert, held at the base's state.
        removed_random: expert, moved as far along random directions.
        drop_low: lower end of the interval of that difference, random minus removed.
        nll: mean negative log-likelihood, in nats a token, of the steered answers under the base.
        nll_expert: the same of the expert's own answers.
        nll_removed: the same of the answers of the expert that is held at the base's state; NaN where it was not read.
    """

    layer: int
    strength: float
    steered: float
    steered_random: float
    gain_low: float
    removed: float
    removed_random: float
    drop_low: float
    nll: float
    nll_expert: float
    nll_removed: float = math.nan

    @property
    def size(self) -> float:
        """What layers are chosen by: gain of the steered base times loss of the expert, both above the control."""
        return max(self.steered - self.steered_random, 0.0) * max(self.removed_random - self.removed, 0.0)

    def verdict(self) -> str:
        """Empty if both tests pass, otherwise the one that does not, with its figure."""
        if not self.nll <= self.nll_expert + MAX_EXCESS_NLL:
            return (
                f"steered answers are degenerate: {self.nll:.2f} nats a token under the base, the expert's own "
                f"{self.nll_expert:.2f}"
            )
        if not self.gain_low > 0:
            return (
                f"steering the base along it passes the checker on {self.steered:.0%} of prompts, a random direction "
                f"on {self.steered_random:.0%}: not surely more"
            )
        if not self.drop_low > 0:
            return (
                f"without it the expert passes on {self.removed:.0%} of prompts, without a random direction on "
                f"{self.removed_random:.0%}: not surely less"
            )
        if self.nll_removed > self.nll_expert + MAX_EXCESS_NLL:
            return (
                f"without it the expert's answers are degenerate: {self.nll_removed:.2f} nats a token under the base, "
                f"before {self.nll_expert:.2f}"
            )
        return ""


@dataclasses.dataclass(frozen=True)
class LayerDiagnostics:
    """What a candidate anchor at one layer looks like.

    Attributes:
        layer: 0-based block whose `resid_post` is read.
        stability: mean cosine between directions fitted on random halves of the queries.
        norm: |u|, the size of the instruction's trace in the expert.
        gap: mean of G over the "sweep" prompts, with `gap_low` and `gap_high` its 95 % interval.
        gap_sd: standard deviation of G over prompts.
        specific: mean of [F_E - F_B](x+) - [F_E - F_B](x-), the part of the gap that the instruction makes, without
            what the expert moved anyway (difference in differences), with `specific_low` and `specific_high`.
        specific_sd: its standard deviation over prompts.
        base_trace: mean of F(base, x+) - F(base, x-), as a share of the same in the expert.
        strength: the first of the figures of `SteeringTest`, which see; NaN where it was not made.
    """

    layer: int
    stability: float
    norm: float
    gap: float
    gap_low: float
    gap_high: float
    gap_sd: float
    specific: float
    specific_low: float
    specific_high: float
    specific_sd: float
    base_trace: float
    strength: float = math.nan
    steered: float = math.nan
    steered_random: float = math.nan
    gain_low: float = math.nan
    removed: float = math.nan
    removed_random: float = math.nan
    drop_low: float = math.nan
    nll: float = math.nan
    nll_expert: float = math.nan
    nll_removed: float = math.nan

    @property
    def steering(self) -> SteeringTest | None:
        """The causal tests at this layer, if they were made."""
        if math.isnan(self.strength):
            return None
        return SteeringTest(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SteeringTest)})

    @property
    def signal(self) -> float:
        """What the instruction makes of the gap, in standard deviations over prompts."""
        return self.specific / max(self.specific_sd, 1e-30)

    def verdict(self) -> str:
        """Empty if the layer can carry an anchor as far as projections say, otherwise the test it fails."""
        if not self.stability >= MIN_STABILITY:  # written so that NaN fails
            return f"split-half cosine {self.stability:.2f} < {MIN_STABILITY}"
        if not self.gap_low > 0:
            return f"gap {self.gap:.3g} [{self.gap_low:.3g}, {self.gap_high:.3g}] is not positive"
        if not self.specific_low > 0:
            specific = f"{self.specific:.3g} [{self.specific_low:.3g}, {self.specific_high:.3g}]"
            return f"gap {self.gap:.3g} is drift: what the instruction makes of it is {specific}, not positive"
        return ""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vector"],
    meta_fields=["layer", "n_response"],
    drop_fields=["behaviour", "expert_fingerprint", "diagnostics"],
)
@dataclasses.dataclass(frozen=True)
class Anchor:
    """A unit direction at one layer; a pytree, so it can be an argument of a jitted function.

    Only the vector, the layer and where it is read go through JAX's transformations and tree operations: what comes out
    of one has no labels, so `check_belongs` comes before.

    Attributes:
        vector: [D] float32, unit norm.
        layer: 0-based block whose `resid_post` is read (static).
        behaviour: what it stands for.
        expert_fingerprint: the model it was fitted in.
        diagnostics: every layer that was considered.
        n_response: read as the mean over so many first tokens of the expert's answer; 0: at the last prompt token
            (static).
    """

    vector: Float[Array, " D"]
    layer: int
    behaviour: str = ""
    expert_fingerprint: str = ""
    diagnostics: tuple[LayerDiagnostics, ...] = ()
    n_response: int = 0

    has_fixed_words: ClassVar[bool] = True

    def on(self, batch: PromptBatch | Tokens, answers: Generation | None = None) -> Metric:
        """F on some prompts: the residual stream after the anchor's layer, along the vector.

        Args:
            batch: prompts.
            answers: read their tokens, averaged; None to read the last prompt token.

        Raises:
            WpjaxError: the anchor is read on answers, and there are none; see `metric`.
        """
        if self.n_response and answers is None:
            raise WpjaxError(
                "this anchor is read on the expert's answers: give them, or use `anchor.metric(pair, batch)`"
            )
        prompts = batch.with_instruction if isinstance(batch, PromptBatch) else batch
        tokens, at, weight = read_at(prompts, answers)
        return Metric(tokens, jnp.asarray(at), jnp.asarray(weight), Projection(self.vector), self.layer, "anchor")

    def metric(self, pair: Pair, batch: PromptBatch) -> Metric:
        """F on some prompts, on the expert's answers to them if that is where the anchor is read."""
        return self.on(batch, first_answers(pair, batch.with_instruction, self.n_response))

    def prepare(self, pair: Pair, batch: PromptBatch) -> Prepared:
        """What a sweep needs of it.

        Raises:
            AnchorRejected: it belongs to another expert.
        """
        self.check_belongs(pair)
        return Prepared(self.metric(pair, batch), columns=self.columns, attributes=self.attributes)

    @property
    def columns(self) -> dict[str, tuple[str, Any]]:
        """What a sweep's result keeps of it: dimension and values by name."""
        kept: dict[str, tuple[str, Any]] = {"anchor_vector": ("d_model", np.asarray(self.vector))}
        for field in dataclasses.fields(LayerDiagnostics) if self.diagnostics else ():
            if field.name != "layer":
                values = [getattr(d, field.name) for d in self.diagnostics]
                kept[f"anchor_{field.name}"] = ("model_layer", values)
        return kept

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of a sweep's result: whether the causal tests hold, and where it is read."""
        return {"anchor_acceptance": self.acceptance, "anchor_n_response": self.n_response}

    def score(
        self, cfg: ModelConfig, params: Params, batch: PromptBatch | Tokens, answers: Generation | None = None
    ) -> Float[Array, " B"]:
        """F(M, x) of each prompt, in the units of the residual stream.

        Pure in all its arguments: it composes with `jit`, `vmap` and `grad`, and `params` may hold `Blend`s.

        Raises:
            WpjaxError: the model has no such layer, a prompt exceeds its context, or answers are missing.
        """
        return self.on(batch, answers)(cfg, params)

    def clamp_to(self, pair: Pair, batch: PromptBatch, metric: Metric) -> Metric:
        """A metric of models that are given the anchor's state: what comes after it executes the behaviour.

        From the last prompt token on, the stream after the anchor's layer is held at the expert's mean score:

            h += (mean F(expert) - <h, v>) v        (ours)

        Args:
            pair: base and expert.
            batch: prompts with the instruction, those of the metric.
            metric: what is measured; it must read a later layer.

        Raises:
            WpjaxError: the metric reads no later layer, or has another number of prompts.
        """
        if metric.layer <= self.layer:
            raise WpjaxError(
                f"the {metric.name} metric reads layer {metric.layer}, the anchor is at layer {self.layer}: nothing "
                "comes between; take a metric that reads the answer (response, decision, kl)"
            )
        if len(metric) != len(batch):
            raise WpjaxError(f"the metric has {len(metric)} prompts, the batch {len(batch)}; make it on this batch")
        state = scores(pair.cfg, pair.expert, self.metric(pair, batch)).mean()
        vector = jnp.asarray(self.vector)
        clamp = ClampTo(vector, vector, jnp.asarray(state, jnp.float32))
        start = jnp.asarray(batch.with_instruction.last)
        return dataclasses.replace(metric, held=Edit(Site.RESID_POST, clamp, jnp.asarray(self.layer), start))

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the vector as safetensors, with everything else in its metadata.

        Raises:
            OutputError: the place exists or cannot be written.
        """
        metadata = {
            "layer": str(self.layer),
            "n_response": str(self.n_response),
            "behaviour": self.behaviour,
            "expert_fingerprint": self.expert_fingerprint,
            "diagnostics": json.dumps([dataclasses.asdict(d) for d in self.diagnostics]),
        }
        with atomic_output(Path(path), overwrite) as temporary:
            write_tensors(temporary, {"vector": np.asarray(self.vector)}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Anchor:
        """Read what `save` wrote.

        Raises:
            CheckpointError: not an anchor file.
        """
        try:
            with safe_open(path, framework="np") as file:
                meta: Mapping[str, str] = file.metadata() or {}
                vector = file.get_tensor("vector")
            diagnostics = tuple(LayerDiagnostics(**d) for d in json.loads(meta["diagnostics"]))
            if not all(isinstance(v, int | float) for d in diagnostics for v in dataclasses.astuple(d)):
                raise ValueError("diagnostics that are not numbers")
            layer, n_response = int(meta["layer"]), int(meta["n_response"])
            behaviour, of = meta["behaviour"], meta["expert_fingerprint"]
            if n_response < 0:
                raise ValueError("n_response is negative")
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not an anchor file ({error}); make one with `wpjax anchor`") from error
        if vector.ndim != 1 or vector.dtype != np.float32 or not np.isclose(np.linalg.norm(vector), 1, atol=1e-3):
            raise CheckpointError(f"{path}: its vector is not a float32 unit vector; make it anew with `wpjax anchor`")
        return cls(jnp.asarray(vector), layer, behaviour, of, diagnostics, n_response)

    @property
    def acceptance(self) -> str:
        """Whether the causal tests hold: "accepted", "not tested", or the test that failed."""
        tests = [d.steering for d in self.diagnostics if d.layer == self.layer]
        if not tests or tests[0] is None:
            return "not tested"
        return tests[0].verdict() or "accepted"

    def check_belongs(self, pair: Pair) -> None:
        """Refuse an anchor of another expert.

        Raises:
            AnchorRejected: the fingerprints differ, or the vector or layer does not fit the model.
        """
        if self.vector.shape != (pair.cfg.d_model,) or not 0 <= self.layer < pair.cfg.n_layers:
            raise AnchorRejected(
                f"the anchor has {self.vector.shape[0]} dimensions at layer {self.layer}, the model {pair.cfg.d_model} "
                f"and layers 0 to {pair.cfg.n_layers - 1}; fit one with `wpjax anchor`"
            )
        if self.expert_fingerprint and self.expert_fingerprint != pair.fingerprints[1]:
            raise AnchorRejected(
                f"the anchor was fitted in another expert (fingerprint {self.expert_fingerprint}, this one is "
                f"{pair.fingerprints[1]}), or in this one at another dtype; fit one with `wpjax anchor`"
            )


class Reading(NamedTuple):
    """Where the stream is read: tokens, positions [B, S] in them, and the weight [B, S] of each in the mean."""

    tokens: Tokens
    at: Int[Array | np.ndarray, "B S"]
    weight: Float[Array | np.ndarray, "B S"]


def read_at(prompts: Tokens, answers: Generation | None) -> Reading:
    """The last prompt token, or all tokens of some answers, the end token included."""
    if answers is None:
        return Reading(prompts, prompts.last[:, None], np.ones((len(prompts.ids), 1), np.float32))
    at, here = answer_positions(prompts, answers)
    # A position predicts the token after it; the state of a token is read where it stands.
    return Reading(with_answers(prompts, answers), np.where(here > 0, at + 1, 0), here / here.sum(1, keepdims=True))


def first_answers(pair: Pair, prompts: Tokens, n: int) -> Generation | None:
    """The first n tokens of the expert's greedy answers; None for n = 0."""
    return answer_of(pair, pair.expert, prompts, n) if n else None
