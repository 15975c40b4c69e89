"""A learned ranking: gates over the components of a pair, learned for a behaviour, as one more column of a result.

What the gates are learned for is a sum of parts, each from 1 (the host as it is) to 0 (what the donor does):

    loss(m)  =  sum over parts of  (l(m) - l(donor)) / (l(host) - l(donor))  +  price * KL(host || m) on neutral prompts

A part l is what a metric lacks to the donor's (`relax.objectives.Recover`), or what the checker's reward lacks to 1
(`Reward`). To restore, the host is the base and the donor the expert; to knock out, the other way round; both are
learned for together by one mask (docs/method.md, "Learned masks"; ours).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from wpjax.behaviours import Behaviour, PromptBatch, Tokens
from wpjax.components import (
    Component,
    best_within,
    check_kind,
    check_with_directions,
    enumerate_components,
    gated_kinds,
    n_parameters,
)
from wpjax.engines.memory import device_budget
from wpjax.errors import WpjaxError
from wpjax.estimators.sets import with_ranking
from wpjax.evaluation.harm import windows_of
from wpjax.evaluation.judge import Judge
from wpjax.evaluation.validation import anchor_of, check_same_behaviour, check_same_pair
from wpjax.methods.metrics import answer_metrics
from wpjax.metrics.anchor import Anchor
from wpjax.metrics.answers import ExpertAnswers, answer_of, divergence_metric
from wpjax.metrics.metric import Metric, expect_positive_gap, scores
from wpjax.models.config import ModelConfig
from wpjax.models.generate import Generation
from wpjax.pairs import Pair
from wpjax.patching import PatchMask, patch
from wpjax.relax.gates import Gates
from wpjax.relax.learn import Learned, RelaxConfig, learn
from wpjax.relax.objectives import AnyObjective, Recover, Reward, Weighted
from wpjax.relax.parametrisations import Nested, Parametrisation
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.progress import Progress, Tell, silent, untold
from wpjax.runtime.states import States

Direction = Literal["restore", "knockout"]

DIRECTIONS: dict[str, tuple[Direction, ...]] = {
    "restore": ("restore",), "knockout": ("knockout",), "both": ("restore", "knockout"),
}  # fmt: skip
"""What a mask may be learned to do, by the name that users give: in the base, in the expert, or in both."""

ANCHOR, REWARD = "anchor", "reward"
"""Names of the objectives that are no metric of the answers."""

SHARES = (0.01, 0.02, 0.05)
"""Hard masks that are looked at on the way, as shares of the parameters of all components."""

N_CHECKED = 16
"""Prompts that the patched model answers where a reward is looked at, at most."""

PATIENCE = 20
"""Steps after which a loss that never changed is refused."""

TEXT_WINDOW = 64
"""Tokens of a window of a neutral text."""


def objective_names() -> tuple[str, ...]:
    """What a mask can be learned for; sums are written with a plus sign, say "kl+decision"."""
    return (*answer_metrics(), ANCHOR, REWARD)


@dataclasses.dataclass(frozen=True)
class Aim:
    """What a mask is learned for.

    Attributes:
        objective: one of `objective_names`, or several joined by plus signs.
        direction: a key of `DIRECTIONS`.
        harm: price of 1 nat a token of divergence from the host on neutral prompts, where the whole way from host to
            donor is 1; 0 for none.
        text: a neutral text, whose tokens are such prompts, too; empty for none.
        n_prompts: prompts of the behaviour to learn from, at most.
        prompts_a_step: prompts of each step.
        n_answers: answers that are sampled to each of them, for the reward.
        max_new_tokens: length of an answer, at most.

    >>> Aim("kl+decision").names
    ('kl', 'decision')
    """

    objective: str = "kl"
    direction: str = "restore"
    harm: float = 0.0
    text: str = ""
    n_prompts: int = 64
    prompts_a_step: int = 8
    n_answers: int = 4
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in objective_names()]
        if unknown:
            raise WpjaxError(
                f"unknown objective {unknown[0]!r}; objectives: {', '.join(objective_names())}, or a sum of some, such "
                "as kl+decision"
            )
        if len(set(self.names)) < len(self.names):
            raise WpjaxError(f"objective {self.objective!r} names one twice; name each once")
        if self.direction not in DIRECTIONS:
            raise WpjaxError(f"unknown direction {self.direction!r}; directions: {', '.join(DIRECTIONS)}")
        if not 0 <= self.harm < float("inf"):
            raise WpjaxError(f"harm={self.harm:g}: the price of harm must not be below 0")
        if self.text and not self.harm:
            raise WpjaxError("a neutral text has no use without a price on harm; pass --harm PRICE too")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its objectives."""
        return tuple(name.strip() for name in self.objective.split("+"))


class Part(NamedTuple):
    """One part of what a mask is learned for.

    Attributes:
        name: objective and direction, in words; "harm" for what it costs.
        objective: the loss.
        weight: what it is multiplied by in the sum.
        recovered: function of a hard mask that says how far it goes, from 0 (host) to 1 (donor); None for harm.
    """

    name: str
    objective: AnyObjective
    weight: float
    recovered: Callable[[PatchMask], float] | None


def mirrored(pair: Pair) -> Pair:
    """The pair with base and expert exchanged."""
    return dataclasses.replace(
        pair,
        base=pair.expert,
        expert=pair.base,
        base_checkpoint=pair.expert_checkpoint,
        expert_checkpoint=pair.base_checkpoint,
    )


def parts_of(
    pair: Pair,
    behaviour: Behaviour,
    batch: PromptBatch,
    aim: Aim,
    anchor: Anchor | None = None,
    progress: Progress = silent,
) -> list[Part]:
    """The parts of what a mask is learned for.

    Args:
        pair: base and expert.
        behaviour: the behaviour, whose checker gives the reward.
        batch: prompts to learn from.
        aim: what the mask is learned for.
        anchor: of the objective "anchor".
        progress: called as models answer.

    Raises:
        MetricRejected: the gap of a metric may be zero, so there is nothing to learn.
        BehaviourError: the reward needs a checker, and there is none or it fails.
        WpjaxError: there is no anchor, or the neutral text is too short.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> batch = task.encode(pair.tokenizer, n_prompts=4)
    >>> part, = parts_of(pair, task, batch, Aim("kl", max_new_tokens=4))
    >>> ends = wp.PatchMask.empty(pair.cfg), wp.PatchMask.full(pair.cfg)
    >>> part.name, [abs(round(part.recovered(mask), 3)) for mask in ends]
    ('kl, restore', [0.0, 1.0])
    """
    if ANCHOR in aim.names and anchor is None:
        raise WpjaxError("the result was not swept on an anchor, so no mask can be learned for it: another --objective")
    if REWARD in aim.names:
        behaviour.check_checker()
    parts = []
    for d, direction in enumerate(DIRECTIONS[aim.direction]):
        progress("answers to learn from", d, len(DIRECTIONS[aim.direction]))
        view = pair if direction == "restore" else mirrored(pair)
        answers = ExpertAnswers(view, batch.with_instruction, aim.max_new_tokens)
        for name in aim.names:
            label = f"{name}, {direction}"
            if name == REWARD:
                parts.append(_rewarded(label, view, behaviour, batch, aim, direction))
            elif name == ANCHOR:
                assert anchor is not None
                metric, sign = anchor.metric(pair, batch), 1.0 if direction == "restore" else -1.0
                metric = dataclasses.replace(metric, weight=sign * metric.weight)
                parts.append(_recovering(label, view, batch, metric, aim))
            else:
                metric = answer_metrics()[name](view, batch, aim.max_new_tokens, answers)
                parts.append(_recovering(label, view, batch, metric, aim))
        if aim.harm:
            parts += _harm(view, batch, aim)
    progress("answers to learn from", 1, 1)
    return parts


def _recovering(label: str, view: Pair, batch: PromptBatch, metric: Metric, aim: Aim) -> Part:
    """A part that a metric gives."""
    metric = metric.to_learn
    host, donor = (scores(view.cfg, params, metric) for params in (view.base, view.expert))
    expect_positive_gap(donor - host, batch.queries, f"the objective {label},")
    gap = float((donor - host).mean())
    recover = Recover(view.cfg, view.base, view.expert, metric, jnp.asarray(donor), aim.prompts_a_step)

    def recovered(mask: PatchMask) -> float:
        patched = scores(view.cfg, patch(view.base, view.expert, mask), metric)
        return float((patched - host).mean()) / gap

    return Part(label, recover, 1 / gap, recovered)


def _rewarded(label: str, view: Pair, behaviour: Behaviour, batch: PromptBatch, aim: Aim, direction: Direction) -> Part:
    """A part that the checker gives: answers of the patched model should pass it, or fail it."""
    judge = Judge(view, behaviour, batch, aim.max_new_tokens)

    def reward(answers: Generation, rows: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        passes = judge.take(rows).passes(answers)
        return (passes if direction == "restore" else ~passes).astype(np.float32)

    few = np.arange(min(len(batch), N_CHECKED))
    checked = judge.take(few)
    ends = [reward(checked.answers(params), few).mean() for params in (view.base, view.expert)]
    if not ends[1] > ends[0]:
        raise WpjaxError(
            f"{behaviour.name}: the checker gives the base and the expert {ends[0]:.0%} and {ends[1]:.0%} of the "
            f"reward ({direction}), so there is nothing to learn; check the pair and the checker"
        )

    def recovered(mask: PatchMask) -> float:
        patched = reward(checked.answers(patch(view.base, view.expert, mask)), few).mean()
        return float((patched - ends[0]) / (ends[1] - ends[0]))

    objective = Reward(
        view.cfg,
        view.base,
        view.expert,
        batch.with_instruction,
        view.stop_tokens,
        reward,
        aim.prompts_a_step,
        aim.n_answers,
        aim.max_new_tokens,
    )
    return Part(label, objective, 1.0, recovered)


def _harm(view: Pair, batch: PromptBatch, aim: Aim) -> list[Part]:
    """What the patched host does besides: its divergence from the host on neutral prompts, and on a text."""
    _, first = np.unique(batch.queries, return_index=True)
    prompts = batch.take(first).without
    metrics = [divergence_metric(view.cfg, view.base, prompts, answer_of(view, view.base, prompts, aim.max_new_tokens))]
    if aim.text:
        # The first token of each window stands for a prompt, the others for the answer.
        windows = windows_of(view.tokenizer, aim.text, min(TEXT_WINDOW, view.cfg.n_ctx)).tokens
        ids, lengths = np.asarray(windows.ids), np.asarray(windows.lengths)
        opening = Tokens(ids[:, :1], np.ones(len(ids), np.int32))
        metrics.append(divergence_metric(view.cfg, view.base, opening, Generation(ids[:, 1:], lengths - 1)))
    return [
        Part(
            "harm",
            Recover(view.cfg, view.base, view.expert, metric, jnp.zeros(len(metric)), aim.prompts_a_step),
            aim.harm / len(metrics),
            None,
        )
        for metric in metrics
    ]


def learned_mask(
    pair: Pair,
    components: Sequence[Component],
    parts: Sequence[Part],
    parametrisation: Parametrisation | None = None,
    config: RelaxConfig | None = None,
    *,
    start: Float[np.ndarray, " C"] | None = None,
    check_every: int = 50,
    states: States | None = None,
    tell: Tell = untold,
    progress: Progress = silent,
) -> Learned:
    """Learn the gates of components for some parts, and say on the way how it goes.

    Args:
        pair: base and expert.
        components: C components that own different weights.
        parts: what the mask is learned for.
        parametrisation: how numbers become gates; None for `Nested()`.
        config: how to learn; None for the defaults.
        start: [C], a ranking to begin with; None for none.
        check_every: steps between two looks at hard masks of `SHARES` of the parameters.
        states: where states are saved; None for nowhere (see `relax.learn.learn`).
        tell: called with a line after each look: the loss, and how far the hard masks go.
        progress: called as work gets done.

    Raises:
        ComponentError: two components own the same weights.
        WpjaxError: the loss is not finite, or it never changes.
    """
    gates, config = Gates.of(pair.cfg, components), config or RelaxConfig()
    objective = Weighted(tuple(part.objective for part in parts), jnp.array([part.weight for part in parts]))
    sizes = np.array([n_parameters(pair.cfg, component) for component in components])
    said = 0

    def watch(learned: Learned) -> None:
        nonlocal said
        taken = learned.losses.shape[1]
        if taken == min(PATIENCE, config.steps) and np.ptp(learned.losses) == 0:
            raise WpjaxError(
                f"the loss is {learned.losses[0, 0]:g} in each of the first {taken} steps: the checker judges all "
                "sampled answers alike, so nothing can be learned from them; begin with a ranking that is "
                "trusted (--start set_score --spread 4), or add an objective that has a slope everywhere (kl+reward)"
            )
        if taken // check_every == said and taken < config.steps:
            return
        said = taken // check_every
        far = []
        for share in SHARES:
            best = best_within(learned.scores, sizes, share * sizes.sum())
            mask = gates.mask(jnp.asarray(best, jnp.float32))
            by_part = [part.recovered(mask) for part in parts if part.recovered is not None]
            far.append(f"{share:.0%}: {np.mean(by_part):.0%}")
        loss = learned.losses[:, -min(taken, check_every) :].mean()
        tell(
            f"step {taken} of {config.steps}: loss {loss:.3f}; recovered by the best components that own so much of "
            f"the parameters: {', '.join(far)}"
        )

    return learn(objective, gates, parametrisation, config, start=start, states=states, watch=watch, progress=progress)


def add_learned(
    pair: Pair,
    behaviour: Behaviour,
    result: SweepResult,
    aim: Aim | None = None,
    parametrisation: Parametrisation | None = None,
    config: RelaxConfig | None = None,
    *,
    kinds: Sequence[str] | None = None,
    start: str | None = None,
    anchor: Anchor | None = None,
    check_every: int = 50,
    states: States | None = None,
    tell: Tell = untold,
    progress: Progress = silent,
) -> SweepResult:
    """Add the ranking `learned` to a result: the gates of all components of some kinds, learned together.

    Args:
        pair: the models that were swept.
        behaviour: the behaviour that was swept. Its "sweep" prompts are learned from.
        result: result of the sweep.
        aim: what the mask is learned for; None for `Aim()`.
        parametrisation: how numbers become gates; None for `Nested()`.
        config: how to learn; None for the defaults.
        kinds: kinds of components, which must not overlap. Those of all layers get a gate. None for heads, KV groups
            and neurons, or the directions of a divided pair.
        start: name of a ranking of the result to begin with; None to begin with all gates alike.
        anchor: of the objective "anchor"; None for the anchor that was swept on.
        check_every: steps between two looks at hard masks.
        states: where states are saved; None for nowhere.
        tell: called with a line after each look.
        progress: called as work gets done.

    Returns:
        a new result. Components that were not swept are added to it (see `estimators.sets.with_ranking`).

    Raises:
        MetricRejected: the gap of a metric may be zero.
        ComponentError: kinds that do not exist, or that overlap.
        WpjaxError: the result is of another pair or behaviour, or lacks the ranking or the anchor; or nothing can be
            learned, as no sampled answer passes.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> batch = task.encode(pair.tokenizer, n_prompts=4)
    >>> result = wp.sweep(pair, batch, wp.decision_metric(pair, batch, 4), kinds=("mlp",), method="screen")
    >>> aim, config = Aim("decision", n_prompts=4, max_new_tokens=4), RelaxConfig(steps=4, steps_at_once=2)
    >>> learned = add_learned(pair, task, result, aim, config=config, kinds=("attn", "mlp"))
    >>> len(learned.top(100, by="learned")), learned.swept.dataset.sizes["component"]
    (16, 8)
    """
    aim, config = aim or Aim(), config or RelaxConfig()
    check_same_pair(pair, result)
    check_same_behaviour(behaviour, result)
    kinds = kinds or gated_kinds(pair.division is not None)
    for kind in kinds:
        check_kind(kind)
    check_with_directions(kinds, pair.division is not None)
    components = enumerate_components(pair.cfg, kinds)
    Gates.of(pair.cfg, components)  # kinds that overlap are refused before any model answers
    first = None if start is None else starting_values(result, start, components)
    batch = behaviour.encode(pair.tokenizer, "sweep", aim.n_prompts)
    pair.check_prompts(batch)
    parts = parts_of(pair, behaviour, batch, aim, anchor_of(result) if anchor is None else anchor, progress)
    learned = learned_mask(
        pair,
        components,
        parts,
        parametrisation,
        config,
        start=first,
        check_every=check_every,
        states=states,
        tell=tell,
        progress=progress,
    )
    ranked = with_ranking(pair, result, "learned", components, np.asarray(learned.scores, np.float64))
    ranked.dataset.attrs["learned_for"] = (
        f"{aim.objective}, {aim.direction}, harm {aim.harm:g}; {parametrisation or Nested()}; {config.steps} steps of "
        f"{aim.prompts_a_step} prompts, {config.restarts} restarts, seed {config.seed}"
    )
    return ranked


def starting_values(result: SweepResult, by: str, components: Sequence[Component]) -> Float[np.ndarray, " C"]:
    """The numbers of a ranking for some components; those that it lacks come last.

    Raises:
        WpjaxError: the result has no such ranking, or none of these components.
    """
    known = dict(zip(result.dataset["name"].values.astype(str).tolist(), result.values(by).tolist(), strict=True))
    values = np.array([known.get(component.name, np.nan) for component in components])
    if not np.isfinite(values).any():
        raise WpjaxError(f"the ranking {by!r} has no number of any component that gets a gate; start from another")
    return np.where(np.isfinite(values), values, np.nanmin(values) - 1)


def bytes_of_step(cfg: ModelConfig, n_tokens: int, n_read: int) -> int:
    """Bytes of temporary memory that a step of one restart takes, estimated: what the backward pass needs again.

    Args:
        cfg: the model.
        n_tokens: tokens that are read, padding included.
        n_read: positions whose logits are read.
    """
    heads = cfg.d_head * (2 * cfg.n_heads + 2 * cfg.n_kv_heads)
    products = 2 * (heads + 2 * cfg.d_model + 3 * cfg.d_mlp)  # of both models
    return 4 * (n_tokens * cfg.n_layers * products + 4 * n_read * cfg.d_vocab)


def restarts_at_once(cfg: ModelConfig, aim: Aim, width: int, restarts: int) -> int:
    """How many restarts fit into memory together; at least one.

    Args:
        cfg: the model.
        aim: what the mask is learned for.
        width: tokens of the longest prompt.
        restarts: their number.
    """
    n_read = aim.prompts_a_step * aim.max_new_tokens
    budget = device_budget()
    if budget is None:  # a CPU: a third of what is free
        budget = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3
    one = bytes_of_step(cfg, aim.prompts_a_step * (width + aim.max_new_tokens), n_read)
    return int(np.clip(budget // one, 1, restarts))
