"""Fits anchors: a direction at every layer, measured on other queries, tested causally, then accepted or refused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import MutableMapping, Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wpjax.behaviours import Behaviour, PromptBatch
from wpjax.errors import AnchorRejected, CheckpointError
from wpjax.evaluation.judge import Judge
from wpjax.evaluation.steering import Directions, candidates, screen_layers, steering_tests
from wpjax.metrics.anchor import Anchor, identity_of
from wpjax.metrics.diagnostics import MIN_STABILITY, LayerDiagnostics, SteeringTest
from wpjax.metrics.metric import LARGEST_STATE
from wpjax.metrics.reading import Reading, first_answers, read_at
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params, decoder
from wpjax.models.layouts import Packed
from wpjax.models.sites import Site
from wpjax.pairs import Pair
from wpjax.runtime.batching import map_batches
from wpjax.runtime.placement import Placement
from wpjax.runtime.progress import Progress, silent
from wpjax.stats import mean_interval, resample

Causal: TypeAlias = Literal["require", "report", "skip"]
"""What to do with the causal tests of an anchor; see `fit_anchor`."""

N_CANDIDATES = 2
"""Layers that are tested causally, at most."""

N_TRIED = 6
"""Layers that are tried by answers to a few prompts, at most."""

N_SCREENED_PROMPTS, N_TRIED_PROMPTS = 16, 8
"""Prompts on which layers are screened for the causal tests, and on which they are tried, at most."""


@functools.partial(jax.jit, static_argnames=("cfg", "n_shared"))
def _mean_states(
    cfg: ModelConfig, params: Params, ids: Array, at: Array, weight: Array, *, n_shared: int
) -> Float[Array, "L B D"]:
    n_prompts, n_tokens = ids.shape
    packed, n_own = Packed.side_by_side(n_prompts, n_tokens, n_shared), n_tokens - n_shared
    out = decoder(cfg, params)(packed.lay(ids), sites=(Site.RESID_POST,), logits=False, layout=packed)
    # The place of each position in the packed row: shared tokens first, then every prompt's own.
    place = jnp.where(at < n_shared, at, at + jnp.arange(n_prompts)[:, None] * n_own)
    picked = out.sites[Site.RESID_POST][:, 0, place]  # [L, 1, T, D] -> [L, B, S, D]
    return jnp.einsum("lbsd,bs->lbd", picked, weight)


def mean_states(cfg: ModelConfig, params: Params, reading: Reading, batch_size: int = 32) -> Float[np.ndarray, "L B D"]:
    """The residual stream after every layer, averaged over the positions that are read, in float32.

    Args:
        cfg: architecture of the model.
        params: its parameters.
        reading: tokens of B prompts, positions and weights.
        batch_size: prompts of one forward pass, at most.

    Raises:
        CheckpointError: a number is not finite or larger than `LARGEST_STATE`; the message names the first layer.
    """
    tokens, at, weight = reading
    tokens = tokens.widened(cfg.n_ctx)
    n_shared = min(tokens.n_shared, tokens.ids.shape[1] - 1)

    placement = Placement.of(params)

    def run(rows: Int[np.ndarray, " N"]) -> Float[Array, "L N D"]:
        some = tuple(jnp.asarray(a[rows]) for a in (tokens.ids, at, weight))
        return placement.call(_mean_states, (cfg,), (params,), some, axis=1, n_shared=n_shared)

    states = map_batches(len(at), batch_size, run, axis=1, parts=placement.n_patch)
    damaged = np.flatnonzero(~(np.abs(states) <= LARGEST_STATE).all((1, 2)))  # so written, NaN is too large
    if damaged.size:
        raise CheckpointError(
            f"the residual stream reaches {np.abs(states[damaged[0]]).max():g} at layer {damaged[0]}, so no anchor can "
            "be fitted; check the weights of base and expert there"
        )
    return states


def split_half_cosine(
    contrast: Float[np.ndarray, "L B D"], queries: np.ndarray, n_splits: int = 20, seed: int = 0
) -> Float[np.ndarray, " L"]:
    """How stable a direction is: the mean cosine between directions fitted on two random halves of the queries.

    Args:
        contrast: [L, B, D], stream with the instruction minus stream without it, by layer and prompt.
        queries: [B], index of each prompt's query; the halves are of whole queries.
        n_splits: number of random halvings.
        seed: seed of the halvings.

    Returns:
        [L], in [-1, 1].
    """
    rng, distinct = np.random.default_rng(seed), np.unique(queries)
    cosines = []
    for _ in range(n_splits):
        half = np.isin(queries, rng.permutation(distinct)[: len(distinct) // 2])
        a, b = contrast[:, half].mean(1), contrast[:, ~half].mean(1)
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosines.append((a * b).sum(-1) / (norms + 1e-30))  # 0, not NaN, where there is no contrast
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
    done: MutableMapping[str, np.ndarray] | None = None,
    progress: Progress = silent,
) -> Anchor:
    """Fit a direction at every layer, test it, and choose the layer of the anchor.

    1. By projections. The split-half cosine must be at least `MIN_STABILITY`. On queries that were not used for
       fitting, the gap and the specific gap must be positive with their whole 95 % intervals. The last sixth of the
       layers is left out: there the stream at the last prompt token already holds the first token of the answer.
    2. By cause (see `evaluation.steering`), at the best layer of a screen, and at another one if that is not accepted
       (`N_CANDIDATES` at most). The direction must bring the behaviour into the base, and its removal must take it from
       the expert, each surely more than a random direction does. The checker of the behaviour judges the answers.

    An anchor is "accepted", "rejected" if it surely does too little, and "undecided" if the prompts do not tell
    (`SteeringTest.verdict`). Of the layers with the best outcome, the one where gain times loss is largest is chosen.
    These rules are our choice; the paper's are not known (docs/method.md, "The anchor").

    Args:
        pair: base and expert.
        behaviour: prompts and checker.
        layer: 0-based layer to use, which must still pass; None to choose one.
        n_response: 0 to read the stream at the last prompt token; n to read its mean over the first n tokens of the
            expert's greedy answer. Prompts without the instruction have answers of their own.
        n_prompts: number of prompts for fitting, and for measuring, at most; None for all.
        causal: "require" refuses an anchor that is rejected; one that is undecided is returned, and says so. "report"
            makes the tests, and takes the best layer whatever they say. "skip" leaves them out, and chooses the layer
            by projections alone.
        n_steered: number of prompts for the causal tests, at most; of each query the first is used. They stop as soon
            as they are decided.
        max_new_tokens: length of the answers that are judged, at most. It grows where the checker needs their end
            (`Judge.with_room`).
        seed: seed of splits, resampling and random directions.
        done: finished answers of an earlier attempt; new ones are added.
        progress: function that is called as work gets done.

    Raises:
        AnchorRejected: no layer passes, or `layer` does not. The message names the test that failed, with its figures;
            the error's `diagnostics` are those of all layers.
        BehaviourError: the model cannot take the prompts, or the checker fails.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> anchor = wp.fit_anchor(pair, task, causal="skip", n_prompts=16)  # the causal tests would take longer
    >>> anchor.vector.shape, anchor.acceptance
    ((128,), 'not tested')
    """
    if layer is not None and not 0 <= layer < pair.cfg.n_layers:
        raise AnchorRejected(f"layer {layer}: the model has layers 0 to {pair.cfg.n_layers - 1}")
    fit = behaviour.encode(pair.tokenizer, "fit", n_prompts)
    check = behaviour.encode(pair.tokenizer, "sweep", n_prompts)
    for batch in (fit, check):
        pair.check_prompts(batch)
    instructed, plain = _readings(pair, fit, n_response)
    state = mean_states(pair.cfg, pair.expert, instructed)
    contrast = state - mean_states(pair.cfg, pair.expert, plain)  # [L, B, D]
    direction = contrast.mean(1)
    norm = np.linalg.norm(direction, axis=-1)
    unit = direction / np.maximum(norm, 1e-30)[:, None]
    stability = split_half_cosine(contrast, fit.queries, seed=seed)
    diagnostics = _diagnose(pair, check, n_response, unit, norm, stability, seed)
    passing = _passing(diagnostics, behaviour.name, layer)
    best = passing[0]
    if causal != "skip":
        base_state = mean_states(pair.cfg, pair.base, instructed)
        means = [np.einsum("lbd,ld->l", s, unit) / s.shape[1] for s in (base_state, state)]
        directions = Directions(unit, *means)
        layers = [d.layer for d in passing]
        few = fit.take(np.arange(min(len(fit), N_SCREENED_PROMPTS)))
        progress("layers screened", 0, 1)
        screening, answers = Judge(pair, behaviour, few, max_new_tokens).with_room(pair.expert)
        layers = screen_layers(pair, few, answers, layers, directions)[:N_TRIED]
        progress("layers screened", 1, 1)
        few_answer = screening.take(np.arange(min(len(few), N_TRIED_PROMPTS)))
        batch = behaviour.encode(pair.tokenizer, "sweep", n_steered)
        tests = steering_tests(
            Judge(pair, behaviour, batch, screening.max_new_tokens),
            candidates(few_answer, layers, directions, progress),
            directions,
            n_candidates=min(N_CANDIDATES, len(layers)),
            seed=seed,
            done=done,
            progress=progress,
        )
        by_layer = {test.layer: dataclasses.asdict(test) for test in tests}
        diagnostics = tuple(dataclasses.replace(d, **by_layer.get(d.layer, {})) for d in diagnostics)
        best = diagnostics[_choose(tests, diagnostics, behaviour.name, causal).layer]
    vector, labels = jnp.asarray(unit[best.layer]), (behaviour.name, pair.fingerprints[1])
    identity = identity_of(pair, behaviour)
    return Anchor(vector, best.layer, *labels, diagnostics, n_response, fit.template_date, identity)


def _readings(pair: Pair, batch: PromptBatch, n_response: int) -> tuple[Reading, Reading]:
    """Where to read the prompts with the instruction, and where to read those without it."""
    sides = (batch.with_instruction, batch.without)
    instructed, plain = (read_at(prompts, first_answers(pair, prompts, n_response)) for prompts in sides)
    return instructed, plain


def _diagnose(
    pair: Pair,
    check: PromptBatch,
    n_response: int,
    unit: Float[np.ndarray, "L D"],
    norm: Float[np.ndarray, " L"],
    stability: Float[np.ndarray, " L"],
    seed: int,
) -> tuple[LayerDiagnostics, ...]:
    """The diagnostics of every layer, from prompts that the directions were not fitted on."""

    def project(params: Params, reading: Reading) -> Float[np.ndarray, "L B"]:
        return np.einsum("lbd,ld->lb", mean_states(pair.cfg, params, reading), unit)

    instructed, plain = _readings(pair, check, n_response)
    expert, base = project(pair.expert, instructed), project(pair.base, instructed)
    expert_plain, base_plain = project(pair.expert, plain), project(pair.base, plain)
    gap, resamples = expert - base, resample(check.queries, seed=seed)
    specific = gap - (expert_plain - base_plain)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 in a layer where the instruction leaves no trace
        trace = (base - base_plain).mean(1) / (expert - expert_plain).mean(1)
    rows = []
    for i in range(len(gap)):
        figures = [(*mean_interval(values, resamples), float(values.std(ddof=1))) for values in (gap[i], specific[i])]
        rows.append(
            LayerDiagnostics(
                i, float(stability[i]), float(norm[i]), *figures[0], *figures[1], base_trace=float(trace[i])
            )
        )
    return tuple(rows)


def _passing(diagnostics: tuple[LayerDiagnostics, ...], name: str, layer: int | None) -> list[LayerDiagnostics]:
    """The layers that pass the tests of projections, the one of strongest signal first."""
    # The last sixth of the layers is left out, at least one layer, but never all of them.
    early = len(diagnostics) - max(1, len(diagnostics) // 6) if len(diagnostics) > 1 else 1
    considered = diagnostics[:early] if layer is None else diagnostics[layer : layer + 1]
    passing = [d for d in considered if not d.verdict()]
    if passing:
        return sorted(passing, key=lambda d: -d.signal)
    nearest = max(considered, key=lambda d: (d.stability >= MIN_STABILITY, np.nan_to_num(d.gap_low, nan=-np.inf)))
    which = f"layer {layer}" if layer is not None else f"no layer passes; the nearest, layer {nearest.layer}"
    cause = "the expert does not carry this behaviour more than the base on these prompts: check the pair and the "
    cause += "behaviour, or use more prompts"
    if nearest.stability < MIN_STABILITY and nearest.gap_low > 0:  # halves of the prompts point different ways
        cause = "halves of the prompts give different directions: use more prompts (--n-prompts)"
    raise AnchorRejected(f"anchor for {name} rejected: {which}: {nearest.verdict()}; {cause}")


def _choose(
    tests: Sequence[SteeringTest], diagnostics: tuple[LayerDiagnostics, ...], name: str, causal: Causal
) -> SteeringTest:
    """The outcome at the layer of the best outcome and, of equals, of the largest effect."""
    order = ("rejected", "undecided", "accepted")
    best = max(tests, key=lambda t: (order.index(t.outcome), t.effect_size))
    if best.outcome == "rejected" and causal == "require":
        reason = best.verdict().removeprefix("rejected: ")
        raise AnchorRejected(
            f"anchor for {name} rejected: of {len(tests)} layers tried none passes the causal tests; the nearest, "
            f"layer {best.layer}: {reason}; try other prompts or a longer answer (--max-new-tokens), another metric "
            "(--metric decision needs no anchor), or accept it unproven (causal='report', `--causal report`): its "
            "result is marked",
            diagnostics,
        )
    return best
