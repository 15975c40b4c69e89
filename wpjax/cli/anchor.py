"""`wpjax anchor`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

from wpjax.arguments import (
    MEASURED,
    Base,
    BehaviourName,
    Causal,
    Checker,
    Dtype,
    Expert,
    IgnoreConfig,
    Mesh,
    NewTokens,
    NPrompts,
    NSteered,
    Out,
    Overwrite,
    ResponseTokens,
    Seed,
    Setting,
    Split,
    TokenizerOf,
)
from wpjax.cli.options import Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wpjax.metrics.anchor import Anchor
    from wpjax.metrics.diagnostics import SteeringTest

EXAMPLE = (
    "Example: wpjax anchor --base tiny:base --expert tiny:expert --behaviour tiny:title --out title.anchor.safetensors"
)


def run(
    base: Base,
    expert: Expert,
    behaviour: BehaviourName,
    out: Out,
    checker: Checker = None,
    split: Split = "thirds",
    layer: Annotated[int | None, Setting("Layer to use, instead of choosing one.", panel=MEASURED)] = None,
    response_tokens: ResponseTokens = 0,
    n_prompts: NPrompts = 64,
    causal: Causal = "require",
    n_steered: NSteered = 64,
    max_new_tokens: NewTokens = 32,
    tokenizer: TokenizerOf = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    mesh: Mesh = None,
    ignore_config: IgnoreConfig = (),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fit an anchor, the direction that tells whether the behaviour's state has formed, and test it by steering."""
    from wpjax.runtime.files import check_output

    check_output(out, overwrite, inputs=(base, expert, behaviour))

    from wpjax.cli.console import print_json, progress_bars

    with progress_bars() as progress:
        progress.say(f"anchor of {behaviour} in {base} -> {expert}; result: {out}")
        from wpjax import behaviours
        from wpjax.evaluation.fit_anchor import fit_anchor
        from wpjax.forecast import Forecast
        from wpjax.metrics.diagnostics import diagnostics_kept
        from wpjax.pairs import load_pair
        from wpjax.runtime.progress import Schedule

        task = behaviours.behaviour(behaviour, checker, split)
        progress("reading the pair", 0, 1)
        pair = load_pair(base, expert, dtype, ignore_config, tokenizer, mesh)
        if note := pair.mesh_note(mesh):
            progress.note(note)
        progress("reading the pair", 1, 1)
        for note in pair.notes:
            progress.note(note)
        schedule = Schedule(Forecast(pair, task, max_new_tokens).anchor(n_prompts, causal, n_steered))
        progress.planned(schedule)
        update = schedule.watching(progress)
        update("anchor", 0, 1)
        with diagnostics_kept(out):
            anchor = fit_anchor(
                pair,
                task,
                layer=layer,
                n_response=response_tokens,
                n_prompts=n_prompts,
                causal=causal,
                n_steered=n_steered,
                max_new_tokens=max_new_tokens,
                seed=seed,
                progress=update,
            )
        schedule.finish()
    anchor.save(out, overwrite)
    if as_json:
        print_json(
            {
                "layer": anchor.layer,
                "n_response": anchor.n_response,
                "acceptance": anchor.acceptance,
                "diagnostics": [dataclasses.asdict(d) for d in anchor.diagnostics],
            }
        )
    else:
        from wpjax.cli.words import print_next, print_written

        show(anchor)
        print()
        print_written(out)
        asked = ["--base", base, "--expert", expert, "--behaviour", behaviour]
        asked += [] if checker is None else ["--checker", checker]
        asked += [] if split == "thirds" else ["--split", split]
        asked += [] if tokenizer is None else ["--tokenizer", tokenizer]
        asked += [] if dtype == "float32" else ["--dtype", dtype]
        asked += [part for name in ignore_config for part in ("--ignore-config", name)]
        print_next(["sweep", *asked, "--anchor", out, "--out", out.with_name(f"{out.name.split('.')[0]}.nc")])


def show(anchor: Anchor) -> None:
    """Print an anchor's diagnostics, layer by layer."""
    from wpjax.cli.console import print_table

    rows = [
        (
            f"{'*' if d.layer == anchor.layer else ' '} {d.layer}",
            f"{d.stability:.3f}",
            f"{d.gap:.3g} [{d.gap_low:.3g}, {d.gap_high:.3g}]",
            f"{d.specific:.3g} [{d.specific_low:.3g}, {d.specific_high:.3g}]",
            f"{d.signal:.2f}",
            f"{d.base_trace:.2f}",
        )
        for d in anchor.diagnostics
    ]
    where = f"mean of {anchor.n_response} response tokens" if anchor.n_response else "last prompt token"
    print_table(
        f"Anchor of {anchor.behaviour}: layer {anchor.layer}, {where}",
        ("layer", "cosine", "gap, 95 % interval", "without drift", "/ sd", "in base"),
        rows,
    )
    show_steering(anchor)
    passing = [str(d.layer) for d in anchor.diagnostics if not d.verdict()]
    print(
        f"\nlayers that pass: {', '.join(passing)}\ncosine: of directions from random halves of the queries; without "
        "drift: the part of the gap that the instruction makes; / sd: that part in standard deviations over prompts; "
        "in base: the instruction's trace in the base, as a share of the expert's"
    )


def show_steering(anchor: Anchor) -> None:
    """Print the causal tests, one row for each layer that was tried."""
    from wpjax.cli.console import print_table

    tests = [test for test in (d.steering for d in anchor.diagnostics) if test]
    if not tests:
        print("\ncausal tests: skipped")
        return
    print_table(
        "\nPrompts that pass the checker: base steered along the direction, expert without it",
        ("layer", "steered", "at random", "strength", "removed", "at random", "nats a token", ""),
        [
            (
                f"{'*' if t.layer == anchor.layer else ' '} {t.layer}",
                f"{t.steered:.0%}",
                f"{t.steered_random:.0%}",
                f"{t.strength:g}",
                f"{t.removed:.0%}",
                f"{t.removed_random:.0%}",
                f"{t.nll:.2f}, {t.nll_removed:.2f} ({t.nll_expert:.2f})",
                t.outcome,
            )
            for t in tests
        ],
    )
    for line in notes(tests):
        print(line)


def notes(tests: Sequence[SteeringTest]) -> list[str]:
    """What to say of the causal tests beside their figures: why they were not accepted, and answers that were cut."""
    lines = [f"layer {t.layer}: {t.verdict()}" for t in tests if t.verdict()]
    if tests and tests[0].cut > 0:
        n = int(tests[0].max_new_tokens)
        lines.append(
            f"{tests[0].cut:.0%} of the expert's answers were cut at {n} tokens; if the checker needs their end: "
            f"--max-new-tokens {2 * n}"
        )
    return lines
