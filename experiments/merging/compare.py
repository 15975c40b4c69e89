"""One model out of several experts: how much of every behaviour is in it, by the checkers?

    python -m experiments.merging.compare --base tiny:base --expert tiny:title=work/merging/seed0/title \
        --expert tiny:quotation=work/merging/seed0/quotation --out experiments/merging/tiny.0.json

Every method is merged with several factors. What passes on validation prompts most often is judged on test prompts.
`score_gated` opens as many parameters by each of several rankings: the set score, weight gradients of the same two
metrics, a learned nested mask, the size of the change, chance.

Queries are apart: half of the "sweep" queries rank components, the other half validates, "test" queries judge. Rows
that the file has already are kept, so that a run that was stopped goes on. `--factors-of` takes the factors that
another run (say of another seed) has chosen, and validates nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Float
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from experiments.records import made, write
from experiments.tiny_pair.language import questions
from wpjax.behaviours import Behaviour, PromptBatch, behaviour, render
from wpjax.checkpoints.checkpoint import local_path
from wpjax.checkpoints.convert import hf_tensors, params_from_hf
from wpjax.components import Component, enumerate_components
from wpjax.estimators.screens import weight_gradient
from wpjax.estimators.secant import secant_adjoint
from wpjax.estimators.sets import parameter_share, set_metrics
from wpjax.estimators.sweep import DEFAULT_KINDS
from wpjax.evaluation.harm import Neutral
from wpjax.evaluation.judge import Judge
from wpjax.evaluation.learned import Aim, learned_mask, parts_of
from wpjax.finetuning import answer
from wpjax.merging.merge import merged_tensor
from wpjax.merging.plan import Plan, make_plan
from wpjax.merging.recipe import recipe_of
from wpjax.merging.registry import find_merge_method
from wpjax.merging.scores import Scores, write_scores
from wpjax.metrics.metric import scores
from wpjax.models.decoder import Params
from wpjax.pairs import Pair, load_pair
from wpjax.relax.learn import RelaxConfig
from wpjax.training import Example, encode_examples, loss_fn

SUMS, MEANS = (0.4, 0.7, 1.0, 1.5), (1.0, 1.5, 2.0, 3.0)
"""Factors of what a merge changes: of methods that add the experts' changes up, and of those that take their mean."""

FLAT = (0.7, 1.0, 1.5, 2.0, 3.0, 6.0, 12.0, 24.0)
"""The same of `isotropic`: where changes have a low rank, the mean of their singular values is small."""

SHARES = (0.02, 0.05, 0.1, 0.2)
"""Parts of the parameters of all heads, KV groups and neurons that the gates of each expert open."""

SOURCES = ("set score", "weight gradient", "nested mask", "norm of the change", "random")
"""What orders the components for `score_gated`."""


class Row(NamedTuple):
    """One way to merge.

    Attributes:
        name: its name in the table.
        method: its name in a recipe.
        parameters: those of the recipe.
        factors: factors of the change to try; all but these is set.
        source: of `score_gated`, what orders the components.
        share: and the share that opens.
    """

    name: str
    method: str
    parameters: Mapping[str, Any] = {}
    factors: tuple[float, ...] = (1.0,)
    source: str = ""
    share: float = 0.0


ROWS = (
    Row("linear", "linear"),
    Row("fisher", "fisher"),
    Row("model_stock", "model_stock"),
    Row("task_arithmetic", "task_arithmetic", factors=SUMS),
    Row("ties", "ties", {"density": 0.2}, MEANS),
    Row("dare_linear", "dare_linear", {"density": 0.2}, SUMS),
    Row("dare_ties", "dare_ties", {"density": 0.2}, SUMS),
    Row("della_linear", "della_linear", {"density": 0.3}, SUMS),
    Row("della", "della", {"density": 0.3}, MEANS),
    Row("breadcrumbs", "breadcrumbs", {"density": 0.5}, SUMS),
    Row("breadcrumbs_ties", "breadcrumbs_ties", {"density": 0.5}, SUMS),
    Row("sce", "sce", {"select_topk": 0.1}, MEANS),
    Row("tall_mask", "tall_mask", {"threshold": 0.4, "agreement": 1}, SUMS),
    Row("localize_and_stitch", "localize_and_stitch", {"density": 0.05}, (1.0, 1.5)),
    Row("aim", "aim", factors=SUMS),
    Row("isotropic", "isotropic", factors=FLAT),
    Row("tsv", "tsv", factors=SUMS),
    Row("emr, a mask for each behaviour", "emr"),
    *(Row(f"score_gated, {source}, {share:.0%}", "score_gated", factors=(1.0, 1.5), source=source, share=share)
      for source in SOURCES for share in SHARES),
    *(Row(f"score_gated, sums, set score, {share:.0%}", "score_gated", {"conflict": "sum"}, (1.0, 1.5),
          "set score", share) for share in SHARES),
)  # fmt: skip


class Task:
    """One behaviour with its expert, and the prompts that rank, validate and test.

    Attributes:
        name: the behaviour.
        folder: the expert.
        pair: base and expert.
        ranking: prompts that rank components: of half of the "sweep" queries, two phrasings each.
        judges: "validation", with prompts of the other half, and "test".
    """

    def __init__(self, base: str, name: str, folder: str, n_judged: int, max_new_tokens: int):
        self.name, self.folder, self.pair = name, folder, load_pair(base, folder)
        self.behaviour: Behaviour = behaviour(name)
        swept = self.behaviour.encode(self.pair.tokenizer, "sweep", 64)
        queries = np.unique(swept.queries)
        first = np.isin(swept.queries, queries[: len(queries) // 2])
        others = swept.take(np.flatnonzero(~first))
        one_each = others.take(np.unique(others.queries, return_index=True)[1])
        self.ranking: PromptBatch = swept.take(np.flatnonzero(first))
        tested = self.behaviour.encode(self.pair.tokenizer, "test", n_judged)
        self.judges = {
            split: Judge(self.pair, self.behaviour, batch, max_new_tokens)
            for split, batch in (("validation", one_each), ("test", tested))
        }

    def passes(self, params: Params, split: str) -> str:
        """One digit a prompt: 1 if the model's answer passes."""
        judge = self.judges[split]
        return "".join(str(int(ok)) for ok in judge.passes(judge.answers(params)))

    def score(self, source: str, components: list[Component], steps: int) -> Float[np.ndarray, " C"]:
        """A score of each component for each parameter."""
        metrics = set_metrics(self.pair, self.ranking, 32)
        share = parameter_share(self.pair, components)
        if source == "nested mask":
            aim = Aim("instructed+partings", n_prompts=32, prompts_a_step=4)
            parts = parts_of(self.pair, self.behaviour, self.ranking, aim)
            start = self.score("set score", components, steps)
            return learned_mask(self.pair, components, parts, config=RelaxConfig(steps=steps), start=start).scores
        estimator = {"set score": secant_adjoint, "weight gradient": weight_gradient}[source]
        models, found = (self.pair.base, self.pair.expert), []
        for metric in metrics:
            base, expert = (scores(self.pair.cfg, params, metric).mean() for params in models)
            found.append(estimator(self.pair.cfg, *models, components, metric).mean(1) / (expert - base))
        return np.mean(found, axis=0) / share


class Merger:
    """Merges the experts of some tasks in memory.

    Args:
        base: the base.
        tasks: the experts.
        work: a folder for files of scores and so on.
        steps: steps of a learned mask.
    """

    def __init__(self, base: str, tasks: list[Task], work: Path, steps: int):
        self.base, self.tasks, self.work, self.steps = base, tasks, work, steps
        self.cfg, self.host = tasks[0].pair.cfg, tasks[0].pair.base
        self.components = enumerate_components(self.cfg, DEFAULT_KINDS)

    def merged(self, row: Row, **more: Any) -> Params:
        """The merged model with factor 1, in float32; `more` are parameters beside those of the row."""
        parameters, models = {**row.parameters, **more}, []
        for i, task in enumerate(self.tasks):
            own: dict[str, Any] = {}
            if row.source:
                own = {"share": row.share, "scores": str(self._scores(i, row.source))}
            if row.method == "fisher":
                own = {"fisher": str(self._fisher(i))}
            if find_merge_method(row.method).parameter("weight"):
                own["weight"] = 1.0
            models.append({"model": task.folder, "parameters": own})
        if row.source in ("norm of the change", "random"):
            parameters["control"] = {"norm of the change": "delta", "random": "random"}[row.source]
        if row.method == "aim":
            parameters["activations"] = str(self._activations())
        return params_from_hf(self.cfg, Merged(make_plan(recipe_of(
            {"merge_method": row.method, "base_model": self.base, "models": models, "parameters": parameters}
        ))))  # fmt: skip

    def models(self, row: Row) -> list[Params]:
        """The merged model that each task gets, with factor 1: the same one, but by EMR."""
        if row.method == "emr":
            return [self.merged(row, task=i + 1) for i in range(len(self.tasks))]
        return [self.merged(row)] * len(self.tasks)

    def scaled(self, models: list[Params], factor: float) -> list[Params]:
        """The base plus a factor times what a merge changed that is the same for all tasks."""
        if factor == 1:
            return models
        scaled = jax.tree.map(lambda base, new: base + jnp.float32(factor) * (new - base), self.host, models[0])
        return [scaled] * len(models)

    def _scores(self, i: int, source: str) -> Path:
        source = source if source in SOURCES[:3] else SOURCES[0]  # controls take the components of any
        path = self.work / f"{source.replace(' ', '-')}-{i}.safetensors"
        if not path.exists():
            values = self.tasks[i].score(source, self.components, self.steps)
            write_scores(path, self.cfg, Scores(tuple(self.components), values, {}))
        return path

    def _fisher(self, i: int) -> Path:
        """The mean squared gradient of the log-likelihood of the expert's own answers."""
        path = self.work / f"fisher-{i}.safetensors"
        if path.exists():
            return path
        task = self.tasks[i]
        judge = Judge(task.pair, task.behaviour, task.ranking.take(np.arange(16)), 32)
        prompts = [render(task.pair.tokenizer, p.with_instruction) for p in judge.batch.pairs]
        texts = judge.texts(judge.answers(task.pair.expert))
        data = encode_examples(task.pair.tokenizer, [Example(*both) for both in zip(prompts, texts, strict=True)])
        slope = jax.jit(jax.grad(lambda params, ids, weights: loss_fn(self.cfg, params, ids, weights)))
        total = jax.tree.map(jnp.zeros_like, task.pair.expert)
        for ids, weights in zip(data.ids, data.weights, strict=True):
            # The loss is a mean over tokens; Fisher information is of their sum.
            found = slope(task.pair.expert, jnp.asarray(ids[None]), jnp.asarray(weights[None]))
            n = jnp.float32(weights.sum())
            total = jax.tree.map(lambda sum_, g, n=n: sum_ + (n * g) ** 2, total, found)
        mean = jax.tree.map(lambda a: a / len(data.ids), total)
        save_file(dict(hf_tensors(self.cfg, mean)), path)
        return path

    def _activations(self) -> Path:
        """The mean size of what goes into each linear layer of the base, over prompts without instruction."""
        path = self.work / "activations.safetensors"
        if path.exists():
            return path
        model = AutoModelForCausalLM.from_pretrained(local_path(self.base), dtype=torch.float32)
        found: dict[str, np.ndarray] = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.register_forward_pre_hook(
                    lambda _, inputs, name=name: found.__setitem__(
                        f"{name}.weight", found.get(f"{name}.weight", 0) + inputs[0].abs().sum((0, 1)).numpy()
                    )
                )
        prompts = self.tasks[0].ranking.without
        with torch.no_grad():
            for ids, length in zip(np.asarray(prompts.ids), np.asarray(prompts.lengths), strict=True):
                model(torch.tensor(ids[None, :length]).long())
        save_file({name: total / float(np.sum(prompts.lengths)) for name, total in found.items()}, path)
        return path


@dataclasses.dataclass
class Merged:
    """The tensors of a merged model, each made when it is read."""

    plan: Plan
    where: str = "the merged model"
    configuration: str = "config.json"

    def names(self) -> list[str]:
        """Their full HF names."""
        return list(self.plan.host.names)

    def read(self, name: str) -> np.ndarray:
        """One of them."""
        return merged_tensor(self.plan, name, self.plan.host.read(name))


def besides(pair: Pair, neutral: Neutral, is_tiny: bool) -> Iterator[tuple[str, Any]]:
    """Functions that say what a model does when nobody asks for a behaviour."""
    yield "divergence", lambda params: round(float(neutral.divergence(pair, params).mean()), 4)
    if is_tiny:
        facts = dict(questions())
        asked = sorted({p.without for p in behaviour("tiny:title").select("test")})

        def right(params: Params) -> str:
            texts = answer(dataclasses.replace(pair.base_checkpoint, params=params), asked)
            return "".join(str(int(text == facts[q])) for q, (text, _) in zip(asked, texts, strict=True))

        yield "facts", right


def rate(passes: str) -> float:
    """The share of ones."""
    return passes.count("1") / len(passes)


def measure(
    base: str, tasks: list[Task], out: Path, steps: int, chosen: Mapping[str, float], only: list[str], skip: list[str]
) -> dict[str, Any]:
    """Every row with the factor that validation chooses; the file is written after each row."""
    pair = tasks[0].pair
    told = dict(besides(pair, Neutral.of(pair, tasks[0].judges["test"].batch), is_tiny=base.startswith("tiny:")))
    report: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {
        "what": "answers that pass the strict checker, prompt by prompt, of one model that is merged of the experts",
        "queries": {t.name: t.judges["test"].batch.queries.tolist() for t in tasks},
        "expert": {t.name: {split: t.passes(t.pair.expert, split) for split in t.judges} for t in tasks},
        "base": {"passes": {t.name: t.passes(t.pair.base, "test") for t in tasks},
                 **{name: tell(pair.base) for name, tell in told.items()}},
        "experts alone": {t.name: {"passes": {o.name: o.passes(t.pair.expert, "test") for o in tasks},
                                   **{name: tell(t.pair.expert) for name, tell in told.items()}} for t in tasks},
        "rows": {},
        "dtype": "float32",
        **made(),
    }  # fmt: skip
    experts = {t.name: {split: rate(report["expert"][t.name][split]) for split in t.judges} for t in tasks}
    with tempfile.TemporaryDirectory() as folder:
        merger = Merger(base, tasks, Path(folder), steps)
        for row in ROWS:
            wanted = (not only or row.name.startswith(tuple(only))) and not row.name.startswith(tuple(skip or ["-"]))
            if row.name in report["rows"] or not wanted:
                continue
            began = time.perf_counter()
            models = merger.models(row)
            kept: dict[str, Any] = {"seconds of the merge": round(time.perf_counter() - began, 1), "validation": {}}
            factors = row.factors if row.name not in chosen else (chosen[row.name],)
            if len(factors) > 1:
                for factor in factors:
                    scaled = merger.scaled(models, factor)
                    rates = [
                        rate(t.passes(params, "validation")) / experts[t.name]["validation"]
                        for t, params in zip(tasks, scaled, strict=True)
                    ]
                    kept["validation"][f"{factor:g}"] = round(float(np.mean(rates)), 4)
                best = max(kept["validation"].values())
                factors = tuple(f for f in factors if kept["validation"][f"{f:g}"] == best)[:1]  # the first of the best
            scaled = merger.scaled(models, factors[0])
            kept["factor"] = factors[0]
            kept["passes"] = {t.name: t.passes(params, "test") for t, params in zip(tasks, scaled, strict=True)}
            kept |= {name: tell(scaled[0]) for name, tell in told.items()}
            report["rows"][row.name] = kept
            shown = {name: f"{rate(p):.2f}" for name, p in kept["passes"].items()}
            print(f"{row.name}: factor {factors[0]:g}, {shown}, {time.perf_counter() - began:.0f} s", flush=True)
            write(out, report)
    return report


def main() -> None:
    """Merge the experts of one seed in all ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--expert", action="append", required=True, metavar="BEHAVIOUR=FOLDER")
    parser.add_argument("--n-judged", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60, help="of a learned mask")
    parser.add_argument("--factors-of", type=Path, help="result of a run whose factors are taken")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name begins so")
    parser.add_argument("--skip", nargs="+", default=[], help="rows whose name begins so")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    named = [item.split("=", 1) for item in a.expert]
    tasks = [Task(a.base, name, folder, a.n_judged, a.max_new_tokens) for name, folder in named]
    before = json.loads(a.factors_of.read_text())["rows"] if a.factors_of else {}
    measure(a.base, tasks, a.out, a.steps, {name: row["factor"] for name, row in before.items()}, a.only, a.skip)


if __name__ == "__main__":
    main()
