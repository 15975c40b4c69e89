"""Which ranking's best few per cent of the parameters carry the behaviour?

    python -m experiments.sets.compare --base work/smollm2/base --expert work/smollm2/lora_quotation \
        --behaviour quotation --out experiments/sets/lora_quotation.json

Heads, KV groups and neurons of all layers are ranked on "sweep" prompts. The best ones by each ranking, up to a few
shares of their parameters, are put into the base together, and the strict checker judges its answers to "test" prompts.
`--only` names rankings to compare. Rankings that the file has already are kept, so that a run that was stopped goes on.
The dear ones, greedy growth and learned masks, are made only if they are named.

Every ranking is by score for each parameter, unless it says otherwise. Intervals resample queries.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from experiments.records import made, table, write
from wpjax.behaviours import Behaviour, PromptBatch, behaviour
from wpjax.components import best_within, enumerate_components, n_within
from wpjax.engines.joint import scores_of_sets
from wpjax.estimators.masks import UnitMasks
from wpjax.estimators.screens import integrated_gradients, output_linearised
from wpjax.estimators.secant import secant_adjoint
from wpjax.estimators.sets import parameter_share, set_metrics, weighted_sum
from wpjax.estimators.sweep import DEFAULT_KINDS
from wpjax.evaluation.judge import Judge
from wpjax.evaluation.learned import Aim, learned_mask, parts_of
from wpjax.metrics.answers import ExpertAnswers, decision_metric, kl_metric, response_metric
from wpjax.metrics.metric import Metric, scores
from wpjax.models.decoder import Params
from wpjax.pairs import Pair, load_pair
from wpjax.patching import materialize
from wpjax.relax.gates import Gates
from wpjax.relax.learn import RelaxConfig
from wpjax.relax.parametrisations import HardConcrete, Nested, Parametrisation
from wpjax.stats import Resamples, resample

SHARES = (0.005, 0.01, 0.02, 0.05)
"""Parts of the parameters of all heads, KV groups and neurons, unless others are asked for."""

GOALS = (0.5, 0.8, 0.9)
"""Parts of the expert's pass rate; the smallest share that reaches each is looked for."""

N_RANDOM = 2

SET_METRICS = ("instructed", "partings")
"""Those of the set score."""

SHORT_LIST, ROUNDS, LOOKED_AT = 2.0, 10, 8
"""Of greedy growth: how long the list is, how many rounds there are, and how many prompts tell what a set does."""

STEPS = 60
"""Of a learned mask."""


class Rankings:
    """The rankings of one pair, each made when it is asked for.

    Attributes:
        components: the C components.
        gates: their gates.
        sizes: shares of the parameters of the sets that are judged.
    """

    def __init__(self, pair: Pair, task: Behaviour, batch: PromptBatch, max_new_tokens: int, shares: Sequence[float]):
        self.pair, self.task, self.batch, self.sizes = pair, task, batch, shares
        self.components = enumerate_components(pair.cfg, DEFAULT_KINDS)
        self.gates = Gates.of(pair.cfg, self.components)
        self.share = parameter_share(pair, self.components)
        answers = ExpertAnswers(pair, batch.with_instruction, max_new_tokens)
        made = (
            *set_metrics(pair, batch, answers=answers),
            *(make(pair, batch, answers=answers) for make in (decision_metric, kl_metric, response_metric)),
        )
        self.metrics: dict[str, Metric] = {metric.name: metric for metric in made}
        self._known: dict[tuple[str, str], Float[np.ndarray, "C B"]] = {}

    def shares(self, name: str, estimator: Callable[..., Any], **options: Any) -> Float[np.ndarray, "C B"]:
        """What an estimator gives each component on each prompt, as shares of the metric's mean gap."""
        metric, key = self.metrics[name], (name, f"{estimator.__name__} {options}")
        if key not in self._known:
            models = self.pair.base, self.pair.expert
            base, expert = (scores(self.pair.cfg, params, metric).mean() for params in models)
            found = estimator(self.pair.cfg, *models, self.components, metric, **options)
            self._known[key] = found / (expert - base)
        return self._known[key]

    def both(self, *names: str) -> Float[np.ndarray, "C B"]:
        """The mean of the shares of two metrics."""
        one, other = (self.shares(name, secant_adjoint) for name in names)
        return (one + other) / 2

    def set_score(self) -> Float[np.ndarray, "C B"]:
        """The mean of the shares of both metrics of the set score."""
        return self.both(*SET_METRICS)

    def again_and_again(self) -> Float[np.ndarray, "C 1"]:
        """The mean of decision and partings, of what is left, made anew each time that the set is twice as large."""
        scored, is_open, place = np.zeros(len(self.components)), np.zeros(len(self.components), bool), 1.0
        for share in (self.sizes[0] / 2, *self.sizes, 1.0):
            host = self.patched(is_open)
            change = np.mean([self._left(host, self.metrics[name]) for name in ("decision", "partings")], axis=0)
            density = np.where(is_open, -np.inf, change / self.share)
            order = np.argsort(-density, kind="stable")
            new = order[: n_within(self.share[order], share - self.share[is_open].sum())]
            new = new[~is_open[new]]
            scored[new] = place - np.arange(len(new)) / (len(new) + 1)  # those of this round above all later ones
            is_open[new], place = True, place - 1
        return (scored * self.share)[:, None]  # as the others: it is divided by the share of the parameters

    def _left(self, host: Params, metric: Metric) -> Float[np.ndarray, " C"]:
        base, expert = (scores(self.pair.cfg, params, metric).mean() for params in (self.pair.base, self.pair.expert))
        return secant_adjoint(self.pair.cfg, host, self.pair.expert, self.components, metric).mean(1) / (expert - base)

    def greedy(self) -> Float[np.ndarray, "C 1"]:
        """Grown by exact joint evaluations: what adds most for its parameters to the set so far goes in, and so on.

        Each round tries every component of a short list, the best by the set score that own `SHORT_LIST` times the
        largest share, in the set so far, on few prompts, and puts in the best that own a `ROUNDS`th of that share.
        """
        pair, both = self.pair, [self.metrics[name] for name in SET_METRICS]
        ends = [[scores(pair.cfg, params, m).mean() for params in (pair.base, pair.expert)] for m in both]
        (metric,) = weighted_sum(both, np.array([1 / (expert - base) / 2 for base, expert in ends]))
        units = UnitMasks(pair.cfg, self.components)
        listed = np.flatnonzero(self.best(self.set_score().mean(1) / self.share, SHORT_LIST * self.sizes[-1]))
        chosen, scored, last = np.zeros(len(self.components), bool), np.zeros(len(self.components)), 0.0
        metric, place = metric.take(jnp.arange(LOOKED_AT)), float(len(self.components))
        for taken in range(1, ROUNDS + 1):
            left = listed[~chosen[listed]]
            trials = np.repeat(chosen[None], len(left), axis=0)
            trials[np.arange(len(left)), left] = True
            masks = [units.mask(trial) for trial in [chosen, *trials]]
            last, *found = scores_of_sets(pair.cfg, pair.base, pair.expert, masks, metric).mean(1).tolist()
            for i in left[np.argsort(-(np.array(found) - last) / self.share[left], kind="stable")]:
                if self.share[chosen].sum() + self.share[i] > taken / ROUNDS * self.sizes[-1] + 1e-9:
                    break
                chosen[i], scored[i], place = True, place, place - 1
        return (scored * self.share)[:, None]

    def learned(self, parametrisation: Parametrisation) -> Float[np.ndarray, "C 1"]:
        """A mask learned for both metrics of the set score, from the set score: `STEPS` steps of 4 prompts."""
        aim = Aim("+".join(SET_METRICS), n_prompts=len(self.batch), prompts_a_step=4)
        parts = parts_of(self.pair, self.task, self.batch, aim)
        start, config = self.set_score().mean(1) / self.share, RelaxConfig(steps=STEPS)
        found = learned_mask(self.pair, self.components, parts, parametrisation, config, start=start)
        return (found.scores * self.share)[:, None]

    def patched(self, is_open: Bool[np.ndarray, " C"]) -> Params:
        """The base with some components of the expert."""
        mask = self.gates.mask(jnp.asarray(is_open, jnp.float32)).threshold(0.5)
        return materialize(self.pair.base, self.pair.expert, mask)

    def best(self, score: Float[np.ndarray, " C"], share: float) -> Bool[np.ndarray, " C"]:
        """The best components within a share of the parameters."""
        return best_within(score, self.share, share)

    def all(self) -> dict[str, Callable[[], Float[np.ndarray, "C _"]]]:
        """Name -> function that makes the numbers, prompt by prompt where they are; in the order of the table."""
        size, rng = self.share[:, None], np.random.default_rng(0)
        norms = self.pair.delta_norms(self.components)[:, None]
        rankings: dict[str, Callable[[], Float[np.ndarray, "C _"]]] = {
            "set score": self.set_score,
            "decision + partings": lambda: self.both("decision", "partings"),
            "decision + partings, made anew as the set grows": self.again_and_again,
            "instructed, secant": lambda: self.shares("instructed", secant_adjoint),
            "decision, secant": lambda: self.shares("decision", secant_adjoint),
            "partings, secant": lambda: self.shares("partings", secant_adjoint),
            "decision, linearised": lambda: self.shares("decision", output_linearised),
            "decision, integrated": lambda: self.shares("decision", integrated_gradients),
            "kl, secant": lambda: self.shares("kl", secant_adjoint),
            "response, secant": lambda: self.shares("response", secant_adjoint),
            "set score, not for each parameter": lambda: self.set_score() * size,
            "decision + partings, not for each parameter": lambda: self.both("decision", "partings") * size,
            "activation patching (decision, linearised)": lambda: self.shares(
                "decision", output_linearised, inputs="donor"
            ),
            "norm of the change": lambda: norms * np.sqrt(size),  # the root mean square, when divided by the size
            **{f"random {i + 1}": lambda: rng.standard_normal(size.shape) * size for i in range(N_RANDOM)},
        }
        return rankings

    def dear(self) -> dict[str, Callable[[], Float[np.ndarray, "C _"]]]:
        """Those that are made only if they are named."""
        return {
            "greedy, exact": self.greedy,
            "nested mask": lambda: self.learned(Nested()),
            "hard-concrete mask": lambda: self.learned(HardConcrete()),
        }


def jaccard(rankings: Rankings, by_prompt: Float[np.ndarray, "C B"], share: float) -> float:
    """Overlap of the best sets by two halves of the prompts: what both have, of what either has."""
    one, other = (rankings.best(by_prompt[:, half::2].mean(1) / rankings.share, share) for half in (0, 1))
    return float((one & other).sum() / max((one | other).sum(), 1))


def measure(
    pair: Pair,
    name: str,
    n_prompts: int,
    n_judged: int,
    max_new_tokens: int,
    only: list[str],
    shares: Sequence[float],
    out: Path,
) -> dict[str, Any]:
    """The sets of every ranking, or only of some, judged; the file is written after each ranking."""
    task = behaviour(name)
    rankings = Rankings(pair, task, task.encode(pair.tokenizer, "sweep", n_prompts), max_new_tokens, shares)
    batch = task.encode(pair.tokenizer, "test", n_judged)
    judge = Judge(pair, task, batch, max_new_tokens)

    def passes(params: Params) -> str:
        """One digit a prompt: 1 if the answer passes."""
        return "".join(str(int(ok)) for ok in judge.passes(judge.answers(params)))

    report: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {
        "what": "answers that pass the strict checker, prompt by prompt, of the base with the best components by each "
        "ranking, for shares of the parameters of all heads, KV groups and neurons",
        "behaviour": name,
        "n_prompts": n_prompts,
        "max_new_tokens": max_new_tokens,
        "dtype": "float32",
        "shares": list(shares),
        "n_components": len(rankings.components),
        "queries": batch.queries.tolist(),
        "base": passes(pair.base),
        "expert": passes(pair.expert),
        "rankings": {},
        **made(),
    }  # fmt: skip
    wanted = {**rankings.all(), **rankings.dear()} if only else rankings.all()
    for ranking, make in wanted.items():
        if ranking in report["rankings"] or (only and ranking not in only):
            continue
        started = time.perf_counter()
        values = make()
        row: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 1)}
        sets = [rankings.best(values.mean(1) / rankings.share, share) for share in shares]
        row["n_components"] = [int(chosen.sum()) for chosen in sets]
        row["passes"] = [passes(rankings.patched(chosen)) for chosen in sets]
        if values.shape[1] > 1:
            row["jaccard"] = {
                str(share): round(jaccard(rankings, values, share), 3) for share in (shares[1], shares[-1])
            }
        report["rankings"][ranking] = row
        print(ranking, [f"{digits(p).mean():.3f}" for p in row["passes"]], flush=True)
        write(out, report)
    return report


def digits(passes: str) -> Float[np.ndarray, " B"]:
    """What a text of zeros and ones says of each prompt."""
    return np.array([float(digit) for digit in passes])


def smallest(rates: Float[np.ndarray, "S N"], shares: tuple[float, ...], goal: Float[np.ndarray, " N"]) -> np.ndarray:
    """The smallest share at which a curve reaches a goal, between two sizes by the logarithm; infinite if none does.

    Args:
        rates: [S, N], pass rates at S shares, N resamples of them.
        shares: the S shares.
        goal: [N], what is to be reached.
    """
    x, found = np.log(shares), np.full(rates.shape[1], np.inf)
    for n, curve in enumerate(rates.T):
        reached = np.flatnonzero(curve >= goal[n] - 1e-9)
        if reached.size:
            k = reached[0]
            part = 0.0 if k == 0 else (goal[n] - curve[k - 1]) / (curve[k] - curve[k - 1])
            found[n] = np.exp(x[k] if k == 0 else x[k - 1] + part * (x[k] - x[k - 1]))
    return found


def figures(report: dict[str, Any], row: dict[str, Any]) -> dict[str, list[float]]:
    """Of one ranking: each figure with the ends of its 95 % interval over queries."""
    resamples: Resamples = resample(np.array(report["queries"]), seed=0)
    weights = np.vstack([np.ones((1, len(report["queries"]))), resamples.weights])
    weights = weights / weights.sum(1, keepdims=True)
    rates = (
        np.stack([digits(passes) for passes in row["passes"]]) @ weights.T
    )  # [share, all prompts and then resamples]
    expert = digits(report["expert"]) @ weights.T
    low, high = resamples.tails(0.95)

    def with_ends(values: Float[np.ndarray, " N"]) -> list[float]:
        # Without interpolation, as a share that is never reached is infinite.
        return [float(values[0]), *(float(np.percentile(values[1:], q, method="nearest")) for q in (low, high))]

    x = np.log(report["shares"])
    found = {f"at {share:g}": with_ends(rates[i] / expert) for i, share in enumerate(report["shares"])}
    found["area"] = with_ends(np.trapezoid(rates, x, axis=0) / (x[-1] - x[0]) / expert)
    for goal in GOALS:
        found[f"reaches {goal:g}"] = with_ends(smallest(rates, tuple(report["shares"]), goal * expert))
    return found


def markdown(report: dict[str, Any]) -> str:
    """The table of one pair: parts of the expert's pass rate, and the smallest sets."""

    def part(values: list[float]) -> str:
        return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"

    def size(values: list[float]) -> str:
        if values[0] == np.inf:
            return f"> {report['shares'][-1]:.0%}"
        return f"{values[0]:.1%} [{values[1]:.1%}, {'–' if values[2] == np.inf else f'{values[2]:.1%}'}]"

    rows, agreed = [], (report["shares"][1], report["shares"][-1])
    for name, row in report["rankings"].items():
        found, stable = figures(report, row), row.get("jaccard", {})
        rows.append(
            [
                name,
                *(part(found[f"at {share:g}"]) for share in report["shares"]),
                part(found["area"]),
                *(size(found[f"reaches {goal:g}"]) for goal in GOALS),
                *(f"{stable[str(share)]:.2f}" if stable else "" for share in agreed),
            ]
        )
    columns = [
        "ranking", *(f"{share:.1%}" for share in report["shares"]), "area", *(f"{g:.0%} reached at" for g in GOALS),
        f"halves agree, {agreed[0]:.0%}", f"{agreed[1]:.0%}",
    ]  # fmt: skip
    base, expert = digits(report["base"]).mean(), digits(report["expert"]).mean()
    about = (
        f"{report['behaviour']}: of {len(report['queries'])} prompts the base passes {base:.2f}, "
        f"the expert {expert:.2f}; {report['device']}, {report['dtype']}, {report['date']}."
    )
    return f"{about}\n\n{table(columns, rows)}"


def main() -> None:
    """Compare the rankings of one pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--expert", "--behaviour"):
        parser.add_argument(name, required=True)
    parser.add_argument("--n-prompts", type=int, default=32)
    parser.add_argument("--n-judged", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--only", nargs="+", default=[], help="rankings to compare, by name; all if absent")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the parameters")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    pair = load_pair(a.base, a.expert)
    report = measure(pair, a.behaviour, a.n_prompts, a.n_judged, a.max_new_tokens, a.only, a.shares, a.out)
    print(markdown(report))


if __name__ == "__main__":
    main()
