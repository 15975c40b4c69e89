"""`wpjax inspect`."""

from __future__ import annotations

import dataclasses
from textwrap import shorten
from typing import Annotated, Any

import typer

from wpjax.arguments import MODEL, IgnoreConfig, Rank, Setting, TokenizerOf
from wpjax.cli.options import Json
from wpjax.errors import WpjaxError

EXAMPLE = "Example: wpjax inspect tiny:base tiny:expert"


def run(
    base: Annotated[str, typer.Argument(help=MODEL)],
    expert: Annotated[
        str | None, typer.Argument(help="A second model to compare, or a PEFT adapter of the first.")
    ] = None,
    directions: Annotated[
        bool,
        Setting("Also divide the change of each matrix into directions, and say how much of it the largest hold."),
    ] = False,
    rank: Rank = None,
    tokenizer: TokenizerOf = None,
    ignore_config: IgnoreConfig = (),
    as_json: Json = False,
) -> None:
    """Show a model's architecture and components, and what an expert changed of them."""
    from rich.text import Text

    from wpjax.checkpoints.checkpoint import fingerprint
    from wpjax.checkpoints.hf_config import unread_attributes
    from wpjax.cli.console import out, print_json, print_table, progress_bars
    from wpjax.components import KINDS, count_in, unit_shapes
    from wpjax.directions import by_directions, spectra
    from wpjax.pairs import load_model, load_pair

    if directions and expert is None:
        raise WpjaxError("--directions are of what an expert changed: name two models")
    if rank is not None and not directions:
        raise WpjaxError("--rank goes with --directions; drop it, or add that")
    with progress_bars() as progress:
        progress("reading the models", 0, 1)
        pair = load_pair(base, expert, ignore_config=ignore_config, tokenizer=tokenizer) if expert else None
        model = pair.base_checkpoint if pair else load_model(base, ignore_config=ignore_config)
        progress("reading the models", 1, 1)
        spectrum = []
        if pair and directions:
            progress("dividing the change", 0, 1)
            spectrum = spectra(by_directions(pair, rank))
            progress("dividing the change", 1, 1)
    models = [pair.base_checkpoint, pair.expert_checkpoint] if pair else [model]
    model = models[0]  # of a pair, what the two have in common
    cfg = model.cfg
    counts = {kind: count_in(cfg, kind, range(cfg.n_layers)) for kind in KINDS}
    not_read = {
        m.source: [*(f"{name}={value!r}" for name, value in unread_attributes(m.hf_config).items()), *m.left_out]
        for m in models
    }
    summary: dict[str, Any] = {
        "config": dataclasses.asdict(cfg),
        "components": counts,
        "units": {unit: list(shape) for unit, shape in unit_shapes(cfg).items()},
        "fingerprint": fingerprint(cfg, model.params),
        "not_read": not_read,
    }
    norms = pair.diff_norms() if pair else []
    if pair:
        summary["expert_fingerprint"] = pair.fingerprints[1]
        summary["difference"] = [row._asdict() for row in norms]
        summary["notes"] = list(pair.notes)
    if spectrum:
        summary["directions"] = [row._asdict() for row in spectrum]
    if as_json:
        print_json(summary)
        return
    print_table(base, ("", "value"), [(k, str(v)) for k, v in summary["config"].items()])
    print_table("\nComponents", ("kind", "in the model"), [(k, f"{n:,}") for k, n in counts.items() if n])
    out.print(f"\nfingerprint {summary['fingerprint']}")
    for source, names in not_read.items():
        if names:
            what = "not read, as they say nothing about the next token"
            out.print(Text(f"\n{source}: {what}: {', '.join(shorten(n, 60) for n in names)}"))
    if pair:
        print_table(
            f"\nWhat {expert} changed",
            ("parameters of", "number", "changed", "norm of change", "relative"),
            [
                (
                    r.unit,
                    f"{r.n_params:,}",
                    f"{r.n_changed / r.n_params:.1%}",
                    f"{r.delta:.4g}",
                    f"{r.delta / r.base:.2%}",
                )
                for r in norms
            ],
        )
        if spectrum:
            shares = ([f"{share:.1%}" for share in (row.first, row.four, row.kept)] for row in spectrum)
            print_table(
                "\nDirections of the change, and how much of its energy (the squared norm) they hold",
                ("module", "directions", "parameters", "largest a layer", "four a layer", "all of these"),
                [
                    (row.module, f"{row.n_directions:,}", f"{row.n_params:,}", *own)
                    for row, own in zip(spectrum, shares, strict=True)
                ],
            )
        for note in pair.notes:
            out.print(Text(f"\nNote: {note}."))
        out.print("\nOne architecture, one vocabulary: a pair.")
