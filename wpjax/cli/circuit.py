"""`wpjax circuit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wpjax.arguments import MEASURED, MODEL, Overwrite, Seed, Setting
from wpjax.cli.options import Json

if TYPE_CHECKING:
    from wpjax.circuits.ioi_study import IOIStudy

EXAMPLE = "Example: wpjax circuit ioi --model HuggingFaceTB/SmolLM2-135M --out ioi.json"


def run(
    task: Annotated[Literal["ioi"], typer.Argument(help="ioi: indirect object identification (arXiv 2211.00593).")],
    model: Annotated[str, Setting(f"The model: {MODEL}")],
    out: Annotated[Path, Setting("The JSON to write; a figure goes beside it.")],
    n_prompts: Annotated[
        int,
        Setting(
            "Prompts that heads and edges are scored on; as many others measure the circuits.", least=2, panel=MEASURED
        ),
    ] = 16,
    method: Annotated[
        Literal["eap", "eap-ig", "eap-ig-activations", "relp", "attnlrp", "masks"],
        Setting(
            "How edges and nodes are scored: eap, eap-ig, eap-ig-activations (gradients), relp, attnlrp (relevance), "
            "or masks (learned).",
            panel=MEASURED,
        ),
    ] = "eap-ig",
    steps: Annotated[
        int | None,
        Setting("Steps of integrated gradients (5), or of learned masks (100).", least=1, panel=MEASURED),
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find the circuit by which a model does a task: its heads, its edges, and how much of the model they are."""
    from wpjax.runtime.files import check_output

    check_output(out, overwrite, inputs=[model], ending=".json")
    check_output(out.with_suffix(".png"), overwrite)

    from wpjax.circuits.ioi_study import ioi_study
    from wpjax.cli.console import print_json, progress_bars
    from wpjax.pairs import load_model
    from wpjax.report.circuits import write_ioi

    with progress_bars() as progress:
        study = ioi_study(
            load_model(model), n_prompts=n_prompts, method=method, steps=steps, seed=seed, progress=progress
        )
    picture = write_ioi(study, out, overwrite)
    if as_json:
        print_json(study.as_json)
        return
    from wpjax.cli.words import print_next, print_written

    print_study(study)
    print()
    print_written(out, picture)
    print_next(["layers", out, "--out", out.with_name(f"{out.stem}-layers.json")])


def print_study(study: IOIStudy) -> None:
    """Print a study as tables, and in words."""
    from wpjax.circuits.ioi import PUBLISHED, published_classes
    from wpjax.circuits.ioi_study import MIN_COPY, MIN_DIRECT
    from wpjax.cli.console import print_table

    clean, abc, right = study.answered
    print(f"IO over S on {right:.0%} of the prompts; logit difference {clean:.2f}, on ABC prompts {abc:.2f}.")
    shown = sorted(study.heads, key=lambda h: -abs(h.direct))[:10]
    classes = published_classes() if study.published is not None else {}
    paper = ("paper",) if classes else ()
    print_table(
        "\nHeads with the strongest direct path to the logits (shares of the gap), and the last token's attention",
        ("head", "direct", "all paths", "to IO", "to S", "copies", "suppresses", *paper),
        [
            (
                h.name + (" *" if h.moves_names else ""), f"{h.direct:+.3f}", f"{h.patched:+.3f}", f"{h.to_io:.2f}",
                f"{h.to_s:.2f}", f"{h.copies:.2f}", f"{h.suppresses:.2f}",
                *([classes.get(h.name, "")] if classes else []),
            )
            for h in shown
        ],
    )  # fmt: skip
    print(f"* name mover: direct >= {MIN_DIRECT}, attends to IO more than to S, copies >= {MIN_COPY}.")
    faithful, worst = study.faithful, max(study.incomplete, default=0.0)
    print(
        f"\nCircuit of {len(study.circuit.members)} heads, all MLPs kept, {faithful.ablation} ablation: F(C) "
        f"{faithful.circuit:.2f} of F(M) {faithful.model:.2f}, {faithful.share:.0%} of what heads do; incompleteness "
        f"up to {worst:.2f} over {len(study.incomplete)} random sets; {', '.join(study.circuit.members[:8])}"
        + (", ..." if len(study.circuit.members) > 8 else "")
    )
    for curve in study.curves:
        print(f"Circuits of {curve.level}: {curve}")
    if study.stability:
        mean, low, high = study.stability
        print(f"The best 1 % of the edges, prompts drawn anew: Jaccard {mean:.2f} [{low:.2f}, {high:.2f}].")
    if study.published is not None:
        p = study.published
        print(
            f"The published 26 heads: F(M) {p.model:.2f} (paper {PUBLISHED['F(M)']}), |F(M) - F(C)| {p.difference:.2f} "
            f"(paper {PUBLISHED['|F(M) - F(C)|']}), IO over S {right:.1%} (paper {PUBLISHED['IO over S']:.1%})."
        )
