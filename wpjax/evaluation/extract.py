"""The smallest patch: the fewest parameters of the expert that bring the behaviour back to the base, and their price.

    recovery(S)  =  (pass rate of the base with S - pass rate of the base)  /  (that of the expert - that of the base)

S is searched along a ranking, then thinned out (`evaluation.smallest`). Each set that is tried answers the "sweep"
prompts, and the checker judges. Whether a set reaches the goal is decided by its recovery on exactly these prompts,
not by an interval: with few prompts no interval would lie above a goal of 90 %. A search picks sets that were lucky,
so this figure is too good for the set that it ends with. So all that is reported of that set is measured on the "test"
prompts, which nothing was chosen by, with intervals over queries (docs/method.md, "The smallest patch"; ours).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, MutableMapping, Sequence

import numpy as np
from jaxtyping import Int

from wpjax.behaviours import Behaviour, PromptBatch
from wpjax.behaviours.prompts import Split
from wpjax.components import Component, enumerate_components, n_parameters, n_within, parse_component
from wpjax.errors import WpjaxError
from wpjax.evaluation.extraction import Extraction, TriedSet, bounded
from wpjax.evaluation.harm import Harm, Neutral, Windows, other, perplexity, text_nll, windows_of
from wpjax.evaluation.judge import Judge
from wpjax.evaluation.smallest import Members, drop_blocks, prefix_sizes, smallest_prefix
from wpjax.evaluation.trials import Trials, digest, patched
from wpjax.evaluation.validation import check_same_behaviour, check_same_pair
from wpjax.models.config import ModelConfig
from wpjax.models.decoder import Params
from wpjax.pairs import Pair
from wpjax.results.sweep_result import SweepResult
from wpjax.runtime.progress import Phase, Progress, Schedule, silent
from wpjax.runtime.shards import finished_part
from wpjax.stats import mean_interval, resample

N_POINTS = 64
"""Sizes of the grid along the ranking; about log2 of them are tried."""

MOST_DROPS = 40
"""Blocks that are tried without, at most."""

N_NEUTRAL = 8
"""Prompts without the instruction on which the divergence of a set on the way is measured; for the last set, all."""


class GoalMissed(WpjaxError):
    """No set that was tried reaches the goal; the message says what the best of them reaches.

    Attributes:
        tried: the sets that were tried.
    """

    def __init__(self, message: str, tried: Sequence[TriedSet] = ()):
        super().__init__(message)
        self.tried = tuple(tried)


def extract(
    pair: Pair,
    behaviour: Behaviour,
    result: SweepResult,
    *,
    recover: float | None = None,
    share: float | None = None,
    top: int | None = None,
    by: str | None = None,
    others: Sequence[Behaviour] = (),
    text: str | None = None,
    n_prompts: int = 32,
    max_new_tokens: int = 32,
    most_drops: int = MOST_DROPS,
    n_random: int = 2,
    seed: int = 0,
    done: MutableMapping[str, np.ndarray] | None = None,
    progress: Progress = silent,
    planned: Callable[[Schedule], None] | None = None,
) -> Extraction:
    """The fewest components that bring a behaviour back to the base, along a ranking; or the best ones of a given size.

    Args:
        pair: the models that were swept.
        behaviour: the behaviour that was swept, with a checker.
        result: the sweep.
        recover: the recovery to reach; 0.9 if neither `share` nor `top` is given.
        share: instead, the size: the best components within this share of the parameters of all of these kinds.
        top: instead, the number of components.
        by: name of the ranking; None for the result's `set_ranking`.
        others: other behaviours, whose pass rates are measured, too.
        text: a text whose perplexity is measured; None for none.
        n_prompts: number of prompts to search on, and again to measure on, at most.
        max_new_tokens: length of an answer, at most.
        most_drops: blocks that the second stage tries without, at most; 0 for no second stage.
        n_random: number of random sets to compare with.
        seed: seed of the random sets.
        done: finished parts of an earlier attempt (see `runtime.shards.Shards`). New parts are added as they finish.
        progress: function that is called as work gets done.
        planned: function that is called with the phases and how long they take, once that is known.

    Returns:
        the set and what was measured of it.

    Raises:
        GoalMissed: no set that was tried reaches the goal.
        AnchorRejected: base and expert do not differ in the behaviour on these prompts.
        WpjaxError: the result is of another pair, or has no such ranking; more than one size or goal; one that cannot
            be; or too short a text.
        BehaviourError: the result is of another behaviour, or one of the behaviours has no checker.

    >>> import wpjax as wp
    >>> pair, task = wp.load_pair("tiny:base", "tiny:expert"), wp.behaviour("tiny:english_capital")
    >>> batch = task.encode(pair.tokenizer, n_prompts=4)
    >>> decision = wp.decision_metric(pair, batch, max_new_tokens=8)
    >>> result = wp.sweep(pair, batch, decision, kinds=("mlp",), method="screen")
    >>> patch = wp.extract(pair, task, result, top=8, n_prompts=4, max_new_tokens=8, n_random=0)
    >>> patch.share, len(patch.components), sorted(patch.recovery)
    (1.0, 8, ['patched'])
    """
    goal = check_goal(recover, share, top)
    check_same_pair(pair, result)
    check_same_behaviour(behaviour, result)
    for one in (behaviour, *others):
        one.check_checker()
    windows = None if text is None else windows_of(pair.tokenizer, text, pair.cfg.n_ctx)
    ranking = Ranking.of(pair.cfg, result, by)
    done = {} if done is None else done

    splits: tuple[Split, ...] = ("sweep", "test") if goal is not None else ("test",)
    batches = [behaviour.encode(pair.tokenizer, split, n_prompts) for split in splits]
    others_batches = [one.encode(pair.tokenizer, "test", n_prompts) for one in others]
    for batch in (*batches, *others_batches):
        pair.check_prompts(batch)
    members = ranking.of_size(share, top) if goal is None else ()

    progress("base and expert", 0, len(batches))
    runs = []
    for i, batch in enumerate(batches):
        runs.append(Trials.of(Judge(pair, behaviour, batch, max_new_tokens), done))
        progress("base and expert", i + 1, len(batches))
    points = prefix_sizes(ranking.sizes, N_POINTS)
    if planned is not None:
        n_along, n_drops = (0, 0) if goal is None else (_n_along(points), most_drops)
        n_harm = 2 + 3 * len(others) + (0 if windows is None else 5)
        schedule = _schedule(runs[-1].seconds, n_along, n_drops, 2 + n_random, n_harm)
        progress = schedule.watching(progress)
        planned(schedule)

    tried: list[TriedSet] = []
    if goal is not None:
        search = _Search(pair, ranking, runs[0], goal, Neutral.of(pair, _few(batches[0]), max_new_tokens), done)
        members = search.smallest(points, most_drops, progress)
        tried = search.tried
    components = [ranking.order[i] for i in members]
    measured = runs[-1]
    sets = {"patched": components, **_controls(pair.cfg, ranking.kinds, components, n_random, seed)}
    passes = {"base": measured.base, "expert": measured.expert}
    for i, (name, some) in enumerate(sets.items()):
        progress("controls", i, len(sets))
        passes[name] = measured.passes(some)
    progress("controls", len(sets), len(sets))
    harm = _harm(pair, components, measured, others, others_batches, windows, done, progress)
    resamples = resample(measured.queries)
    return Extraction(
        behaviour=behaviour.name,
        components=tuple(components),
        n_parameters=int(ranking.sizes[list(members)].sum()),
        share=float(ranking.sizes[list(members)].sum() / ranking.n_all),
        kinds=ranking.kinds,
        ranked_by=ranking.name,
        goal=goal,
        tried=tuple(tried),
        searched_on=None if goal is None else (batches[0].split, len(batches[0])),
        measured_on=(batches[-1].split, len(batches[-1])),
        n_queries=len(np.unique(measured.queries)),
        passes={name: mean_interval(of.astype(float), resamples) for name, of in passes.items()},
        recovery={name: measured.recovery(passes[name]) for name in sets},
        harm=harm,
    )


def check_goal(recover: float | None, share: float | None, top: int | None) -> float | None:
    """The recovery to search for, 0.9 if nothing is given; None if a size is given.

    Raises:
        WpjaxError: more than one is given, or one that cannot be.

    >>> check_goal(None, None, None), check_goal(None, 0.02, None)
    (0.9, None)
    """
    if sum(value is not None for value in (recover, share, top)) > 1:
        raise WpjaxError("give one of recover, share and top (--recover, --share, --top): a goal or a size, not both")
    if top is not None and top < 1:
        raise WpjaxError(f"top={top}: at least 1 component")
    for name, value in (("recover", recover), ("share", share)):
        if value is not None and not 0 < value <= 1:
            raise WpjaxError(f"{name}={value:g}: above 0, and at most 1")
    return 0.9 if recover is None and share is None and top is None else recover


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The components of a sweep that own different weights, the best first.

    Attributes:
        name: name of the ranking.
        order: the components that have a number in it.
        sizes: [C], number of parameters of each.
        kinds: their kinds, in the order in which they were swept.
        n_all: number of parameters of all components of these kinds in the model, whether they were swept or not.
    """

    name: str
    order: tuple[Component, ...]
    sizes: Int[np.ndarray, " C"]
    kinds: tuple[str, ...]
    n_all: int

    @classmethod
    def of(cls, cfg: ModelConfig, result: SweepResult, by: str | None = None) -> Ranking:
        """The ranking of a result.

        Args:
            cfg: the model.
            result: the sweep. Of components that overlap, such as a module and its heads, the finest are ranked.
            by: name of the ranking; None for the result's `set_ranking`.

        Raises:
            WpjaxError: the result has no such ranking.
        """
        by = by or result.set_ranking
        # As `validate`: effects fall back on first-order ones for components that were not replaced.
        values = np.where(result.finest, result.best() if by == "effect" else result.values(by), np.nan)
        names = result.dataset["name"].values
        ranked = [i for i in np.argsort(-values, kind="stable") if np.isfinite(values[i])]
        order = tuple(parse_component(cfg, str(names[i])) for i in ranked)
        kinds = tuple(dict.fromkeys(kind for kind in result.finest_kinds if any(c.kind == kind for c in order)))
        sizes = np.array([n_parameters(cfg, c) for c in order])
        return cls(by, order, sizes, kinds, sum(n_parameters(cfg, c) for c in enumerate_components(cfg, kinds)))

    def of_size(self, share: float | None = None, top: int | None = None) -> Members:
        """The first components: within a share of the parameters of all of these kinds, or a number of them.

        Raises:
            WpjaxError: the first alone exceeds the share, or there are not so many.
        """
        if share is not None:
            k = n_within(self.sizes, share * self.n_all)
            if not k:
                least = self.sizes[0] / self.n_all
                raise WpjaxError(
                    f"share={share:g}: the best component, {self.order[0].name}, has {least:.2g} of the parameters by "
                    f"itself; ask for at least that (--share {least * 1.01:.2g})"
                )
            return tuple(range(k))
        if top is None or top > len(self.order):
            raise WpjaxError(f"top={top}: the ranking {self.name} has {len(self.order):,} components; ask for fewer")
        return tuple(range(top))


class _Search:
    """Asks of sets whether they reach the goal, and remembers them."""

    def __init__(
        self,
        pair: Pair,
        ranking: Ranking,
        run: Trials,
        goal: float,
        neutral: Neutral,
        done: MutableMapping[str, np.ndarray],
    ):
        self.pair, self.ranking, self.run, self.goal, self.neutral, self.done = pair, ranking, run, goal, neutral, done
        self.tried = list[TriedSet]()
        base, expert = int(run.base.sum()), int(run.expert.sum())
        # Rounded up; a little less, so that a goal that is met exactly counts as met.
        self.need = int(np.ceil(base + goal * (expert - base) - 1e-6))

    def smallest(self, points: Sequence[int], most_drops: int, progress: Progress) -> Members:
        """The set.

        Raises:
            GoalMissed: nothing that was tried reaches the goal.
        """
        n_along, n_tried = _n_along(points), 0

        def along(k: int) -> bool:
            nonlocal n_tried
            progress("sets along the ranking", min(n_tried, n_along - 1), n_along)
            n_tried += 1
            return self.reaches("ranking", tuple(range(k)))

        k = smallest_prefix(points, along)
        progress("sets along the ranking", n_along, n_along)
        if k is None:
            raise self._missed()
        n_dropped = 0

        def dropping(members: Members) -> bool:
            nonlocal n_dropped
            progress("blocks left out", n_dropped, most_drops)
            n_dropped += 1
            return self.reaches("dropping", members)

        members = drop_blocks(tuple(range(k)), self.ranking.sizes, dropping, most_drops)
        if most_drops:
            progress("blocks left out", most_drops, most_drops)
        return members

    def reaches(self, stage: str, members: Members) -> bool:
        """Whether a set reaches the goal."""
        components = [self.ranking.order[i] for i in members]
        passes = self.run.passes(components, self.need)
        enough = len(passes) == len(self.run.base) and int(passes.sum()) >= self.need
        divergence = float("nan")
        if enough or stage == "ranking":
            key = f"divergence-{digest(components)}"
            if key not in self.done:
                self.done[key] = self.neutral.divergence(self.pair, patched(self.pair, components))
            divergence = float(finished_part(self.done, key, self.neutral.queries.shape).mean())
        size = int(self.ranking.sizes[list(members)].sum())
        share, back = size / self.ranking.n_all, self.run.recovery(passes)
        self.tried.append(TriedSet(stage, len(members), size, share, back, len(passes), enough, divergence))
        return enough

    def _missed(self) -> GoalMissed:
        """The error that says what the best set reaches."""
        n, ends = len(self.run.base), f"the base passes on {self.run.base.mean():.0%}, the expert on "
        ends += f"{self.run.expert.mean():.0%}"
        # Sets that were given up early answered fewer prompts; what they reached is a share of those.
        best = max(self.tried, key=lambda t: (np.nan_to_num(t.recovery.mean, nan=-np.inf), -t.n_parameters))
        return GoalMissed(
            f"no set along {self.ranking.name} that was tried brings back {self.goal:.0%} of "
            f"{self.run.judge.behaviour.name} on {n} {self.run.judge.batch.split} prompts: the best, "
            f"{best.n_components:,} components ({best.share:.2%}), brings back {bounded(best.recovery)} ({ends}); ask "
            "for less (--recover), name a size (--share, --top), or another ranking (--by), or sweep more kinds",
            self.tried,
        )


def _harm(
    pair: Pair,
    components: Sequence[Component],
    run: Trials,
    others: Sequence[Behaviour],
    batches: Sequence[PromptBatch],
    windows: Windows | None,
    done: MutableMapping[str, np.ndarray],
    progress: Progress,
) -> Harm:
    """What the patch does besides; base and expert beside it."""
    total = 1 + (windows is not None) + len(others)
    progress("harm", 0, total)
    models = {"base": pair.base, "patched": patched(pair, components), "expert": pair.expert}

    def part(what: str, model: str, n: int, make: Callable[[Params], np.ndarray]) -> np.ndarray:
        key = f"{what}-{model}" + (f"-{digest(components)}" if model == "patched" else "")
        if key not in done:
            done[key] = make(models[model]).astype(np.float64)
        return finished_part(done, key, (n,))

    neutral = Neutral.of(pair, run.judge.batch, run.judge.max_new_tokens)
    divergence = {
        model: neutral.mean(part("neutral", model, len(neutral.queries), lambda p: neutral.divergence(pair, p)))
        for model in ("patched", "expert")
    }
    progress("harm", 1, total)
    of_text = None
    if windows is not None:
        nll = {m: part("text", m, len(windows.n_predicted), lambda p: text_nll(pair.cfg, p, windows)) for m in models}
        of_text = perplexity(nll, windows)
        progress("harm", 2, total)
    of_others = {}
    for i, (one, batch) in enumerate(zip(others, batches, strict=True)):
        judge = Judge(pair, one, batch, run.judge.max_new_tokens)

        def passing(params: Params, judge: Judge = judge) -> np.ndarray:
            return judge.passes(judge.answers(params))

        passes = {m: part(f"other-{i}", m, len(batch), passing) > 0 for m in models}
        of_others[one.name] = other(passes, batch.queries)
        progress("harm", total - len(others) + i + 1, total)
    return Harm(divergence, of_text, of_others)


def _controls(
    cfg: ModelConfig, kinds: Sequence[str], components: Sequence[Component], n_random: int, seed: int
) -> dict[str, list[Component]]:
    """The complement of a set, and random sets within as many parameters; none if the set is everything."""
    everything, chosen = enumerate_components(cfg, kinds), set(components)
    rest = [c for c in everything if c not in chosen]
    if not rest:
        return {}
    rng, budget = np.random.default_rng(seed), sum(n_parameters(cfg, c) for c in components)
    controls = {"complement": rest}
    for i in range(n_random):
        order = [everything[j] for j in rng.permutation(len(everything))]
        controls[f"random {i + 1}"] = order[: max(1, n_within(np.array([n_parameters(cfg, c) for c in order]), budget))]
    return controls


def _schedule(seconds: float, n_along: int, n_drops: int, n_controls: int, n_harm: int) -> Schedule:
    """The phases after the first, each as so many times the time that one model takes to answer."""
    phases = [
        Phase("sets along the ranking", f"{n_along} patched models", n_along * seconds),
        Phase("blocks left out", f"at most {n_drops} patched models", n_drops * seconds),
        Phase("controls", f"{n_controls} patched models", n_controls * seconds),
        Phase("harm", "answers and text of three models", n_harm * seconds),
    ]
    return Schedule([phase for phase in phases if phase.seconds])


def _n_along(points: Sequence[int]) -> int:
    """How many sets a binary search over a grid tries, about: the largest, and one for each halving."""
    return 1 + int(np.ceil(np.log2(len(points))))


def _few(batch: PromptBatch) -> PromptBatch:
    """The first `N_NEUTRAL` prompts, each of another query."""
    return batch.take(np.sort(np.unique(batch.queries, return_index=True)[1])[:N_NEUTRAL])
