"""Interference between behaviours of one base: patch the set of one, and let the checker of another judge.

    brings_back[a, b]  =  recovery of behaviour b by the base with a's set of a's expert
    overlap[a, b]      =  |A & B| / |A | B|         A, B: sets that different halves of the queries choose

A set is the best by the set score within a share of the parameters. It is chosen on the "sweep"
queries, and its effect is measured on the "test" queries. Two sets that are chosen from few prompts differ by chance.
So sets are compared between halves of the queries, and what two halves of *one* behaviour's queries give is the
ceiling.

The same is done with whole modules, within as many parameters but at least one. A module's score is the sum of its
units'. Modules of two behaviours may be the same where their units are not (arXiv 2609.25518; the map is ours).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from wpjax.behaviours import Behaviour
from wpjax.components import Component, best_within, enumerate_components, n_parameters
from wpjax.errors import PairError, WpjaxError
from wpjax.estimators.secant import secant_adjoint
from wpjax.estimators.sets import set_metrics
from wpjax.evaluation.judge import Judge, check_behaviour_differs
from wpjax.evaluation.trials import recovery
from wpjax.metrics.metric import Metric, expect_positive_gap, scores
from wpjax.models.config import ModelConfig
from wpjax.pairs import Pair
from wpjax.patching import PatchMask, materialize
from wpjax.results.interference import Interference, Level
from wpjax.runtime.progress import Progress, silent
from wpjax.runtime.shards import finished_part
from wpjax.stats import mean_interval, resample

KINDS = ("head", "kv_group", "neuron")
"""Kinds of units that sets are made of."""

N_HALVINGS = 10
"""Random halvings of the queries, over which overlap and agreement are averaged."""


class Parts(NamedTuple):
    """What a set is made of: P parts, each of some units.

    Attributes:
        member: [C], number of the part that each unit belongs to.
        sizes: [P], number of parameters of each part.
    """

    member: Int[np.ndarray, " C"]
    sizes: Int[np.ndarray, " P"]

    @classmethod
    def of(cls, cfg: ModelConfig, components: Sequence[Component], level: str) -> Parts:
        """Every unit by itself ("units"), or the units of each layer's attention and of its MLP ("modules")."""
        keys = [(c.layer, c.kind == "neuron", 0 if level == "modules" else i) for i, c in enumerate(components)]
        number = {key: i for i, key in enumerate(sorted(set(keys)))}
        member = np.array([number[key] for key in keys])
        sizes = np.array([n_parameters(cfg, c) for c in components])
        return cls(member, np.bincount(member, sizes).astype(int))

    def density(self, share: Float[np.ndarray, " C"]) -> Float[np.ndarray, " P"]:
        """Each part's share of the gap, for each of its parameters."""
        return np.bincount(self.member, share) / self.sizes

    def best(self, density: Float[np.ndarray, " P"], budget: float) -> Bool[np.ndarray, " P"]:
        """The parts that lead a ranking and stay within a budget of parameters; at least one."""
        return best_within(density, self.sizes, budget, least=1)


def interference(
    pairs: Sequence[Pair],
    behaviours: Sequence[Behaviour],
    *,
    share: float = 0.02,
    n_prompts: int = 32,
    max_new_tokens: int = 32,
    seed: int = 0,
    done: MutableMapping[str, np.ndarray] | None = None,
    progress: Progress = silent,
) -> Interference:
    """How much each behaviour's set does to the others, by units and by modules.

    Args:
        pairs: N pairs of one base, each with the expert of one behaviour; all of them are held in memory.
        behaviours: the N behaviours, each with a checker.
        share: the part of the parameters of heads, KV groups and neurons that a set stays within.
        n_prompts: prompts of each behaviour that sets are chosen on, and again that they are judged on, at most.
        max_new_tokens: length of an answer, at most.
        seed: seed of the halvings.
        done: finished parts of an earlier attempt; new ones are added.
        progress: function that is called as work gets done.

    Raises:
        PairError: the pairs have different bases.
        AnchorRejected: an expert does not differ from the base in its behaviour.
        MetricRejected: base and expert do not part in their answers.
        WpjaxError: fewer than two behaviours, one named twice, or a share that cannot be.

    Two experts of one behaviour, which so goes by two names:

    >>> import dataclasses
    >>> import wpjax as wp
    >>> pairs = [wp.load_pair("tiny:base", "tiny:expert"), wp.load_pair("tiny:base", "tiny:planted")]
    >>> task = wp.behaviour("tiny:english_capital")
    >>> tasks = [task, dataclasses.replace(task, name="planted")]
    >>> found = wp.interference(pairs, tasks, share=0.05, n_prompts=4, max_new_tokens=4)
    >>> found.levels["units"].overlap.shape, found.levels["units"].brings_back[1][1].mean
    ((2, 2), 1.0)
    """
    names = [one.name for one in behaviours]
    if len(names) < 2 or len(pairs) != len(names) or len(set(names)) < len(names):
        raise WpjaxError(f"an interference map needs two different behaviours or more, each with a pair; got {names}")
    if not 0 < share < 1:
        raise WpjaxError(f"share={share:g}: above 0 and below 1")
    for pair, task in zip(pairs, behaviours, strict=True):
        if pair.fingerprints[0] != pairs[0].fingerprints[0]:
            raise PairError(
                f"{pair.base_checkpoint.source} and {pairs[0].base_checkpoint.source} are different bases; give "
                "experts of one base"
            )
        task.check_checker()
    done, cfg = {} if done is None else done, pairs[0].cfg
    components = enumerate_components(cfg, KINDS)

    n = len(names)
    shares, halves, judges, passes = [], [], [], []
    for i, (pair, task) in enumerate(zip(pairs, behaviours, strict=True)):
        progress("rankings", 3 * i, 3 * n)
        swept = task.encode(pair.tokenizer, "sweep", n_prompts)
        judge = Judge(pair, task, task.encode(pair.tokenizer, "test", n_prompts), max_new_tokens)
        for batch in (swept, judge.batch):
            pair.check_prompts(batch)
        base, expert = judge.answers(pair.base), judge.answers(pair.expert)
        check_behaviour_differs(judge, base, expert)
        judges.append(judge)
        passes.append((judge.passes(base), judge.passes(expert)))
        progress("rankings", 3 * i + 1, 3 * n)
        key = f"shares-{i}"
        if key not in done:
            of_metrics = []
            for k, metric in enumerate(set_metrics(pair, swept, max_new_tokens)):
                progress("rankings", 3 * i + 1 + k, 3 * n)
                of_metrics.append(_shares(pair, components, metric, swept.queries))
            done[key] = np.mean(of_metrics, axis=0)
        shares.append(finished_part(done, key, (len(components), len(swept))))
        halves.append(_halves(swept.queries, np.random.default_rng([seed, i])))
    progress("rankings", 3 * n, 3 * n)

    levels, n_done = {}, 0
    for level in ("units", "modules"):
        parts = Parts.of(cfg, components, level)
        budget = share * parts.sizes.sum()
        sets = [parts.best(parts.density(of.mean(1)), budget) for of in shares]
        rows = []
        for i, (pair, chosen) in enumerate(zip(pairs, sets, strict=True)):
            mask, row, params = (
                PatchMask.of(cfg, [components[c] for c in np.flatnonzero(chosen[parts.member])]),
                [],
                None,
            )
            for j, judge in enumerate(judges):
                progress("patched models", n_done, 2 * n * n)
                key = f"{level}-{i}-{j}"
                if key not in done:
                    params = materialize(pair.base, pair.expert, mask) if params is None else params
                    done[key] = judge.passes(judge.answers(params)).astype(np.float64)
                passing = finished_part(done, key, (len(judge.batch),)) > 0
                row.append(recovery(passing, *passes[j], judge.batch.queries))
                n_done += 1
            rows.append(tuple(row))
        overlap, agreement = alike(parts, shares, halves, budget)
        levels[level] = Level(
            tuple(int(chosen.sum()) for chosen in sets),
            tuple(float(parts.sizes[chosen].sum() / parts.sizes.sum()) for chosen in sets),
            tuple(rows),
            overlap,
            agreement,
        )
    progress("patched models", n_done, n_done)
    rates = {
        name: {
            end: mean_interval(of.astype(float), resample(judge.batch.queries))
            for end, of in zip(("base", "expert"), two, strict=True)
        }
        for name, judge, two in zip(names, judges, passes, strict=True)
    }
    return Interference(tuple(names), share, levels, rates, n_prompts)


def _shares(
    pair: Pair, components: Sequence[Component], metric: Metric, queries: Int[np.ndarray, " B"]
) -> Float[np.ndarray, "C B"]:
    """Each component's share of a metric's gap, by the secant adjoint, prompt by prompt."""
    base, expert = (scores(pair.cfg, params, metric).astype(np.float64) for params in (pair.base, pair.expert))
    expect_positive_gap(expert - base, queries, f"the {metric.name} metric")
    change = secant_adjoint(pair.cfg, pair.base, pair.expert, components, metric)
    return change.astype(np.float64) / (expert - base).mean()


def _halves(
    queries: Int[np.ndarray, " B"], rng: np.random.Generator
) -> list[tuple[Bool[np.ndarray, " B"], Bool[np.ndarray, " B"]]]:
    """Random halvings of the queries: which prompts are in one half, and which in the other."""
    distinct, halvings = np.unique(queries), []
    for _ in range(N_HALVINGS):
        one = np.isin(queries, rng.permutation(distinct)[: len(distinct) // 2])
        halvings.append((one, ~one))
    return halvings


def alike(
    parts: Parts,
    shares: Sequence[Float[np.ndarray, "C B"]],
    halves: Sequence[Sequence[tuple[Bool[np.ndarray, " B"], Bool[np.ndarray, " B"]]]],
    budget: float,
) -> tuple[Float[np.ndarray, "N N"], Float[np.ndarray, "N N"]]:
    """Overlap and agreement of every two behaviours, of one half of the queries each; means over halvings.

    On the diagonal one half meets the other. Elsewhere both halves of one meet both of the other.
    """
    n = len(shares)
    overlap, agreement = np.zeros((2, n, n))
    for h in range(N_HALVINGS):
        densities = [
            [parts.density(of[:, rows].mean(1)) for rows in halvings[h]]
            for of, halvings in zip(shares, halves, strict=True)
        ]
        sets = [[parts.best(half, budget) for half in two] for two in densities]
        ranks = [[rankdata(half) for half in two] for two in densities]
        for a in range(n):
            for b in range(n):
                meetings = [(0, 1)] if a == b else [(i, j) for i in range(2) for j in range(2)]
                overlap[a, b] += np.mean([_jaccard(sets[a][i], sets[b][j]) for i, j in meetings])
                agreement[a, b] += np.mean([np.corrcoef(ranks[a][i], ranks[b][j])[0, 1] for i, j in meetings])
    return overlap / N_HALVINGS, agreement / N_HALVINGS


def _jaccard(a: Bool[np.ndarray, " P"], b: Bool[np.ndarray, " P"]) -> float:
    return float((a & b).sum() / (a | b).sum())
