"""Options that several commands share."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

MODEL = "HF folder, .gguf file, hub id (org/name or org/name@revision) or embedded model (tiny:base)."


class Dtype(enum.StrEnum):
    """Precision of weights and matrix products; the residual stream and the score are float32 always."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    bfloat16x2 = "bfloat16x2"


class CausalName(enum.StrEnum):
    """What is made of an anchor's causal tests."""

    require = "require"
    report = "report"
    skip = "skip"


CausalOption = Annotated[
    CausalName,
    typer.Option(
        "--causal",
        help="Steering tests of the anchor, by the checker on generated answers (of other metrics: whether base and "
        "expert differ in the behaviour): require them, report them (the result of one that fails is marked), or skip "
        "them.",
    ),
]
SteeredOption = Annotated[int, typer.Option("--n-steered", min=4, help="Prompts of the steering tests, at most.")]
ResponseTokensOption = Annotated[
    int,
    typer.Option(
        "--response-tokens",
        min=0,
        help="Read the anchor as the mean over so many first tokens of the expert's own answer; 0: at the last prompt "
        "token.",
    ),
]
NewTokensOption = Annotated[
    int,
    typer.Option(
        "--max-new-tokens",
        min=1,
        help="Length of generated answers: for the checker, and what response, decision and kl read.",
    ),
]

BaseOption = Annotated[str, typer.Option("--base", help=f"The base: {MODEL}")]
ExpertOption = Annotated[str, typer.Option("--expert", help="The expert: as the base.")]
BehaviourOption = Annotated[
    str,
    typer.Option(
        "--behaviour",
        help="A built-in behaviour (english_capital, no_comma, title, multiple_sections, quotation, "
        "number_highlighted_sections; tiny:NAME for the embedded models) or a .jsonl file of prompt pairs.",
    ),
]
CheckerOption = Annotated[
    str | None,
    typer.Option("--checker", help="For a .jsonl file: regex:..., contains:..., module:function or a built-in name."),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        help="Precision of weights and matrix products. In bfloat16 small effects drown in rounding; bfloat16x2 keeps "
        "16 bits of the activations for twice the operations.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything random.")]
PromptsOption = Annotated[int, typer.Option("--n-prompts", min=4, help="Prompts, at most.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
IgnoreConfigOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-config", help="An attribute of config.json known not to change the forward pass; repeatable."
    ),
]
OutOption = Annotated[Path, typer.Option("--out", help="What to write.")]
