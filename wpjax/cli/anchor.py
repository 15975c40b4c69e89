"""`wpjax anchor`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from wpjax.cli.options import (
    BaseOption,
    BehaviourOption,
    CheckerOption,
    Dtype,
    DtypeOption,
    ExpertOption,
    IgnoreConfigOption,
    JsonOption,
    OutOption,
    OverwriteOption,
    PromptsOption,
    SeedOption,
)

if TYPE_CHECKING:
    from wpjax.anchors import Anchor

EXAMPLE = (
    "Example: wpjax anchor --base tiny:base --expert tiny:expert --behaviour tiny:title --out title.anchor.safetensors"
)


def run(
    base: BaseOption,
    expert: ExpertOption,
    behaviour: BehaviourOption,
    out: OutOption,
    checker: CheckerOption = None,
    layer: Annotated[int | None, typer.Option("--layer", help="Use this layer instead of choosing one.")] = None,
    n_prompts: PromptsOption = 64,
    dtype: DtypeOption = Dtype.float32,
    seed: SeedOption = 0,
    ignore_config: IgnoreConfigOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fit the direction that says whether a behaviour's control state has formed, and choose its layer."""
    from wpjax.files import check_output

    check_output(out, overwrite)

    from wpjax import behaviours
    from wpjax.anchors import fit_anchor
    from wpjax.cli.console import print_json
    from wpjax.pairs import load_pair

    task = behaviours.behaviour(behaviour, checker)
    pair = load_pair(base, expert, dtype, tuple(ignore_config or ()))
    anchor = fit_anchor(pair, task, layer=layer, n_prompts=n_prompts, seed=seed)
    anchor.save(out, overwrite)
    if as_json:
        print_json({"layer": anchor.layer, "diagnostics": [dataclasses.asdict(d) for d in anchor.diagnostics]})
    else:
        show(anchor)
        print(f"\nwrote {out}")


def show(anchor: Anchor) -> None:
    """Print an anchor's diagnostics, layer by layer."""
    from wpjax.cli.console import print_table

    rows = [
        (
            f"{'*' if d.layer == anchor.layer else ' '} {d.layer}",
            f"{d.stability:.3f}",
            f"{d.gap:.3g} [{d.gap_low:.3g}, {d.gap_high:.3g}]",
            f"{d.specific:.3g} [{d.specific_low:.3g}, {d.specific_high:.3g}]",
            f"{d.specific / d.specific_sd:.2f}",
            f"{d.base_trace:.2f}",
        )
        for d in anchor.diagnostics
    ]
    print_table(
        f"Anchor of {anchor.behaviour}: layer {anchor.layer}",
        ("layer", "cosine", "gap, 95 % interval", "without drift", "/ sd", "in base"),
        rows,
    )
    passing = [str(d.layer) for d in anchor.diagnostics if not d.verdict()]
    print(
        f"\nlayers that pass: {', '.join(passing)}\ncosine: of directions from random halves of the queries; without "
        "drift: what the instruction makes of the gap; in base: the instruction's trace there, a share of the expert's"
    )
