"""The merge of code, mathematics and instruction experts of Llama-2-13B: the recipes, the commands, and what they cost.

    python -m experiments.merging.llama2_13b --work work/llama --out experiments/merging/llama2-13b.json

Writes a recipe for each method under `--work`, and prints the commands that measure the experts, merge them and judge
the results by lm-eval. It runs none of them: it takes a GPU with 80 GB, and the experts' licences. Costs are counted
from the shapes alone, at the rate that is given.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiments.paper.estimate import Shape
from experiments.records import table, write
from wpjax.merging.recipe import recipe_of

BASE = "meta-llama/Llama-2-13b-hf"
EXPERTS = {
    "instruct": "WizardLMTeam/WizardLM-13B-V1.2",
    "math": "vanillaOVO/WizardMath-13B-V1.0",
    "code": "layoric/llama-2-13b-code-alpaca",
}
"""The three experts of the papers on TIES, DARE and DELLA."""

SHAPE = Shape(40, 5120, 40, 40, 128, 13824, 32000, False, 30)

METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lambda": 0.5},
    "ties": {"density": 0.2},
    "dare_ties": {"density": 0.2, "lambda": 0.7},
    "della_linear": {"density": 0.3, "lambda": 0.7},
    "breadcrumbs": {"density": 0.5, "lambda": 0.7},
    "tsv": {},
    "score_gated": {"conflict": "largest"},
    "score_gated, random": {"control": "random"},
    "score_gated, norm of the change": {"control": "delta"},
}
"""Recipes: name -> parameters."""

TASKS = {"ifeval": ("instruct", 541, 128, 512), "gsm8k": ("math", 1319, 1024, 256), "mbpp": ("code", 500, 512, 256)}
"""Tasks of lm-eval: the expert that should do well, questions, tokens of a prompt and of an answer, about."""

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 64, 192, 64
"""Of a sweep."""


class Cost(NamedTuple):
    """What a step takes.

    Attributes:
        step: its name.
        operations: floating-point operations; 0 where the time is that of reading files.
        bytes: memory of the device, or of the host for a merge.
    """

    step: str
    operations: float
    bytes: float


def recipe(name: str, work: Path) -> dict[str, Any]:
    """A recipe of wpjax, which is one of mergekit too unless the method is `score_gated`."""
    method, models = name.split(",")[0], []
    for expert, source in EXPERTS.items():
        own: dict[str, Any] = {"weight": 1.0} if method not in ("tsv",) else {}
        if method == "score_gated":
            own = {"scores": str(work / f"{expert}.nc"), "share": 0.1}
        models.append({"model": source, "parameters": own})
    content = {"merge_method": method, "base_model": BASE, "models": models, "parameters": METHODS[name]}
    recipe_of(content)  # refuses what `wpjax merge` would refuse
    return content | {"out_dtype": "bfloat16"}


def file_name(name: str) -> str:
    """The name of a recipe as a name of files."""
    return name.replace(", ", "-").replace(" ", "-")


def commands(work: Path) -> list[str]:
    """What to run, in this order. The .jsonl files are the user's: questions of each kind, with and without what asks
    for the behaviour (README, "Your own behaviour")."""
    sweeps = [
        f"wpjax sweep --base {BASE} --expert {source} --behaviour {work}/{name}.jsonl --metric decision "
        f"--method screen --n-prompts {PROMPTS} --dtype bfloat16 --out {work}/{name}.nc"
        for name, source in EXPERTS.items()
    ]
    merges = [f"wpjax merge {work}/{file_name(name)}.yaml --out {work}/{file_name(name)}" for name in METHODS]
    judged = [
        f"lm_eval --model vllm --model_args pretrained={work}/{file_name(name)},dtype=bfloat16 "
        f"--tasks {','.join(TASKS)} --confirm_run_unsafe_code --output_path {work}/{file_name(name)}.json"
        for name in METHODS
    ]
    return [*sweeps, *merges, *judged]


def costs() -> list[Cost]:
    """What each step takes: of one expert's sweep, one merge, one model judged."""
    weights = 2 * SHAPE.parameters  # bytes in bfloat16
    token = 2 * SHAPE.parameters  # operations
    answers = PROMPTS * (PROMPT_TOKENS + ANSWER_TOKENS) * token * 2
    passes = PROMPTS * (PROMPT_TOKENS + ANSWER_TOKENS) * token * 4 * 2  # a forward and a backward pass of both models
    largest = SHAPE.vocab * SHAPE.d_model
    judged = sum(n * (prompt + new) * token for _, n, prompt, new in TASKS.values())
    return [
        Cost("sweep of one expert by screens", 3 * passes + answers, 2 * weights * 4 / 3),
        Cost("one merge, on the host", 0.0, 4.0 * largest * (2 + 2 * len(EXPERTS))),
        Cost("one model judged by lm-eval", float(judged), weights * 4 / 3),
    ]


def report(rate: float) -> dict[str, Any]:
    """The costs at a rate."""
    steps = {c.step: {"operations": c.operations, "bytes": c.bytes, "seconds": c.operations / rate} for c in costs()}
    return {"rate": rate, "parameters": SHAPE.parameters, "steps": steps}


def markdown(found: dict[str, Any]) -> str:
    """One line a step."""
    rows = [
        [
            name,
            f"{step['bytes'] / 2**30:.0f} GiB",
            f"{step['operations'] / 1e15:,.1f}" if step["operations"] else "",
            f"{step['seconds'] / 60:.1f}" if step["operations"] else "as fast as the files are read and written",
        ]
        for name, step in found["steps"].items()
    ]
    return table(["step", "memory", "10¹⁵ operations", f"minutes at {found['rate'] / 1e12:,.0f} · 10¹² a second"], rows)


def main() -> None:
    """Write the recipes, print commands and costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where the recipes are written; none are if absent")
    parser.add_argument("--rate", type=float, default=1e14, help="operations a second; a tenth of an H100's peak")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        for name in METHODS:
            text = yaml.safe_dump(recipe(name, args.work), sort_keys=False)
            (args.work / f"{file_name(name)}.yaml").write_text(text, encoding="utf-8")
    print("\n".join(commands(args.work or Path("work/llama"))))
    found = report(args.rate)
    print(markdown(found))
    write(args.out, found)


if __name__ == "__main__":
    main()
