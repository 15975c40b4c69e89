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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError, safe_open

from wpjax.behaviours import Behaviour, PromptBatch, Tokens
from wpjax.errors import AnchorRejected, CheckpointError, WpjaxError
from wpjax.files import atomic_output, write_tensors
from wpjax.metrics import Metric, Prepared, answer_of, answer_positions, scores, with_answers
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, forward
from wpjax.models.edits import ClampTo, Edit
from wpjax.models.generate import Generation
from wpjax.models.sites import Site
from wpjax.pairs import Pair
from wpjax.parts import in_parts
from wpjax.readouts import Along
from wpjax.stats import mean_interval, resample
from wpjax.steering import Judge, SteeringTest, steering_tests

Causal: TypeAlias = Literal["require", "report", "skip"]

MIN_STABILITY = 0.9
"""Least split-half cosine of an accepted anchor."""

N_CANDIDATES = 4
"""Layers that are tried causally."""


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
        return Metric(tokens, jnp.asarray(at), jnp.asarray(weight), Along(self.vector), self.layer, "anchor")

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

    def give(self, pair: Pair, batch: PromptBatch, metric: Metric) -> Metric:
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


@functools.partial(jax.jit, static_argnames="cfg")
def _mean_states(cfg: ModelConfig, params: Params, ids: Array, at: Array, weight: Array) -> Float[Array, "L B D"]:
    resid = forward(cfg, params, ids, sites=(Site.RESID_POST,), logits=False).sites[Site.RESID_POST]
    return jnp.einsum("lbsd,bs->lbd", jnp.take_along_axis(resid, at[None, ..., None], axis=2), weight)


def mean_states(cfg: ModelConfig, params: Params, reading: Reading, batch_size: int = 32) -> Float[np.ndarray, "L B D"]:
    """`resid_post` of every layer where it is read, float32."""
    tokens, at, weight = reading

    def run(rows: Int[np.ndarray, " N"]) -> Float[Array, "L N D"]:
        return _mean_states(cfg, params, *(jnp.asarray(a[rows]) for a in (tokens.ids, at, weight)))

    return in_parts(len(at), batch_size, run, axis=1)


def split_half_cosine(
    contrast: Float[np.ndarray, "L B D"], queries: np.ndarray, n_splits: int = 20, seed: int = 0
) -> Float[np.ndarray, " L"]:
    """Mean cosine, over random halvings of the queries, of the two halves' mean contrasts."""
    rng, distinct = np.random.default_rng(seed), np.unique(queries)
    cosines = []
    for _ in range(n_splits):
        half = np.isin(queries, rng.permutation(distinct)[: len(distinct) // 2])
        a, b = contrast[:, half].mean(1), contrast[:, ~half].mean(1)
        cosines.append((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1) + 1e-30))
    return np.mean(cosines, axis=0)


def fit_anchor(
    pair: Pair,
    behaviour: Behaviour,
    *,
    layer: int | None = None,
    n_response: int = 0,
    n_prompts: int | None = 64,
    causal: Causal = "require",
    n_steered: int = 64,
    max_new_tokens: int = 32,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Anchor:
    """Fit a direction at every layer, measure its gap on other queries, try it causally, and choose the layer.

    First by projections: the split-half cosine must be at least `MIN_STABILITY`, and gap and specific gap positive
    with their whole intervals. Of the layers that pass, the `N_CANDIDATES` whose specific gap is largest against its
    spread over prompts are steered along (see `wpjax.steering`): the direction must bring the behaviour into the base
    and its removal take it from the expert, each more than a random direction does, by the checker. The layer where
    gain times loss is largest is chosen. The last sixth of the layers is not considered: there the stream at the
    last prompt token already holds the first token of the answer. These rules are our choice; the paper's are not
    known.

    Args:
        pair: base and expert.
        behaviour: prompts and checker.
        layer: force this layer; it must still pass.
        n_response: read the stream as the mean over so many first tokens of the expert's own greedy answer (with the
            instruction and without, each its own); 0: at the last prompt token.
        n_prompts: at most this many for fitting, and for measuring.
        causal: "require" the causal tests; "report" them, and take the best layer also if none passes; "skip" them
            and choose the layer by its projections alone.
        n_steered: prompts of the causal tests, at most.
        max_new_tokens: length of the answers that are judged.
        seed: of splits, resampling and random directions.
        progress: called as work gets done.

    Raises:
        AnchorRejected: no layer passes, or the forced one does not; with the test that failed and its figure.
        BehaviourError: prompts that the model cannot take, or a checker that fails.
    """
    if layer is not None and not 0 <= layer < pair.cfg.n_layers:
        raise AnchorRejected(f"layer {layer}: the model has layers 0 to {pair.cfg.n_layers - 1}")
    fit = behaviour.encode(pair.tokenizer, "fit", n_prompts)
    check = behaviour.encode(pair.tokenizer, "sweep", n_prompts)
    for batch in (fit, check):
        batch.check_fits(pair.cfg.n_ctx, pair.cfg.d_vocab)
    told, alone = _readings(pair, fit, n_response)
    state = mean_states(pair.cfg, pair.expert, told)
    contrast = state - mean_states(pair.cfg, pair.expert, alone)
    direction = contrast.mean(1)
    norm = np.linalg.norm(direction, axis=-1)
    unit = direction / np.maximum(norm, 1e-30)[:, None]
    stability = split_half_cosine(contrast, fit.queries, seed=seed)
    diagnostics = _diagnose(pair, check, n_response, unit, norm, stability, seed)
    candidates = _candidates(diagnostics, behaviour.name, layer)
    best = candidates[0]
    if causal != "skip":
        host_state = mean_states(pair.cfg, pair.base, told)
        means = [np.einsum("lbd,ld->l", s, unit) / s.shape[1] for s in (host_state, state)]
        judge = Judge(pair, behaviour, behaviour.encode(pair.tokenizer, "sweep", n_steered), max_new_tokens)
        tried = [d.layer for d in candidates[:N_CANDIDATES]]
        tests = steering_tests(judge, tried, unit, *means, seed=seed, progress=progress)
        best = diagnostics[_choose(tests, behaviour.name, causal).layer]
        found = {test.layer: dataclasses.asdict(test) for test in tests}
        diagnostics = tuple(dataclasses.replace(d, **found.get(d.layer, {})) for d in diagnostics)
    vector, of = jnp.asarray(unit[best.layer]), pair.fingerprints[1]
    return Anchor(vector, best.layer, behaviour.name, of, diagnostics, n_response)


def _readings(pair: Pair, batch: PromptBatch, n_response: int) -> tuple[Reading, Reading]:
    """Where prompts with the instruction are read, and those without."""
    sides = (batch.with_instruction, batch.without)
    told, alone = (read_at(prompts, first_answers(pair, prompts, n_response)) for prompts in sides)
    return told, alone


def _diagnose(
    pair: Pair,
    check: PromptBatch,
    n_response: int,
    unit: Float[np.ndarray, "L D"],
    norm: Float[np.ndarray, " L"],
    stability: Float[np.ndarray, " L"],
    seed: int,
) -> tuple[LayerDiagnostics, ...]:
    def project(params: Params, reading: Reading) -> Float[np.ndarray, "L B"]:
        return np.einsum("lbd,ld->lb", mean_states(pair.cfg, params, reading), unit)

    told, alone = _readings(pair, check, n_response)
    expert, base = project(pair.expert, told), project(pair.base, told)
    expert_alone, base_alone = project(pair.expert, alone), project(pair.base, alone)
    gap, resamples = expert - base, resample(check.queries, seed=seed)
    specific = gap - (expert_alone - base_alone)
    with np.errstate(divide="ignore", invalid="ignore"):  # a layer without any trace of the instruction
        trace = (base - base_alone).mean(1) / (expert - expert_alone).mean(1)
    rows = []
    for i in range(len(gap)):
        figures = [(*mean_interval(values, resamples), float(values.std(ddof=1))) for values in (gap[i], specific[i])]
        rows.append(
            LayerDiagnostics(
                i, float(stability[i]), float(norm[i]), *figures[0], *figures[1], base_trace=float(trace[i])
            )
        )
    return tuple(rows)


def _candidates(diagnostics: tuple[LayerDiagnostics, ...], name: str, layer: int | None) -> list[LayerDiagnostics]:
    """The layers that pass by their projections, the strongest signal first."""
    early = len(diagnostics) - max(1, len(diagnostics) // 6) if len(diagnostics) > 1 else 1
    considered = diagnostics[:early] if layer is None else diagnostics[layer : layer + 1]
    passing = [d for d in considered if not d.verdict()]
    if passing:
        return sorted(passing, key=lambda d: -d.signal)
    nearest = max(considered, key=lambda d: (d.stability >= MIN_STABILITY, np.nan_to_num(d.gap_low, nan=-np.inf)))
    which = f"layer {layer}" if layer is not None else f"no layer passes; the nearest, layer {nearest.layer}"
    raise AnchorRejected(
        f"anchor for {name} rejected: {which}: {nearest.verdict()}; the expert does not carry this behaviour more than "
        "the base on these prompts: check the pair and the behaviour, or use more prompts"
    )


def _choose(tests: Sequence[SteeringTest], name: str, causal: Causal) -> SteeringTest:
    """The layer whose direction does most, among those that pass both causal tests."""
    best = max(tests, key=lambda t: (not t.verdict(), t.size))
    if best.verdict() and causal == "require":
        raise AnchorRejected(
            f"anchor for {name} rejected: of {len(tests)} layers tried none passes the causal tests; the nearest, "
            f"layer {best.layer}: {best.verdict()}; use more prompts, or accept it unproven (causal='report', "
            "`--causal report`): its result is marked"
        )
    return best
