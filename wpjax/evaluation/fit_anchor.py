"""Fitting anchors: a direction at every layer, measured on other queries, tried causally, accepted or refused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.behaviours import Behaviour, PromptBatch
from wpjax.errors import AnchorRejected
from wpjax.evaluation.judge import Judge
from wpjax.evaluation.steering import steering_tests
from wpjax.metrics.anchor import MIN_STABILITY, Anchor, LayerDiagnostics, Reading, SteeringTest, first_answers, read_at
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, forward
from wpjax.models.sites import Site
from wpjax.pairs import Pair
from wpjax.runtime.batching import map_batches
from wpjax.runtime.progress import Progress, silent
from wpjax.stats import mean_interval, resample

Causal: TypeAlias = Literal["require", "report", "skip"]

N_CANDIDATES = 4
"""Layers that are tried causally."""


@functools.partial(jax.jit, static_argnames="cfg")
def _mean_states(cfg: ModelConfig, params: Params, ids: Array, at: Array, weight: Array) -> Float[Array, "L B D"]:
    resid = forward(cfg, params, ids, sites=(Site.RESID_POST,), logits=False).sites[Site.RESID_POST]
    return jnp.einsum("lbsd,bs->lbd", jnp.take_along_axis(resid, at[None, ..., None], axis=2), weight)


def mean_states(cfg: ModelConfig, params: Params, reading: Reading, batch_size: int = 32) -> Float[np.ndarray, "L B D"]:
    """`resid_post` of every layer where it is read, float32."""
    tokens, at, weight = reading

    def run(rows: Int[np.ndarray, " N"]) -> Float[Array, "L N D"]:
        return _mean_states(cfg, params, *(jnp.asarray(a[rows]) for a in (tokens.ids, at, weight)))

    return map_batches(len(at), batch_size, run, axis=1)


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
    progress: Progress = silent,
) -> Anchor:
    """Fit a direction at every layer, measure its gap on other queries, try it causally, and choose the layer.

    First by projections: the split-half cosine must be at least `MIN_STABILITY`, and gap and specific gap positive
    with their whole intervals. Of the layers that pass, the `N_CANDIDATES` whose specific gap is largest against its
    spread over prompts are steered along (see `evaluation.steering`): the direction must bring the behaviour into the
    base and its removal take it from the expert, each more than a random direction does, by the checker. The layer
    where gain times loss is largest is chosen. The last sixth of the layers is not considered: there the stream at the
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
