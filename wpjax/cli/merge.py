"""`wpjax merge`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wpjax.arguments import IgnoreConfig, Overwrite, Setting
from wpjax.cli.options import Json

if TYPE_CHECKING:
    from wpjax.merging.plan import Plan

EXAMPLE = "Example: wpjax merge merge.yaml --out merged"


def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="A YAML file in mergekit's words: merge_method, base_model, models, parameters, out_dtype."
        ),
    ] = None,
    out: Annotated[Path | None, Setting("The model folder to write.")] = None,
    dry_run: Annotated[bool, Setting("Check everything, print the plan and write nothing.")] = False,
    methods: Annotated[bool, Setting("List the merge methods with their parameters.")] = False,
    masked: Annotated[
        bool,
        Setting(
            "Of score_gated: write the experts with their gates, a folder each, and a recipe with which mergekit "
            "merges them."
        ),
    ] = False,
    unrelated: Annotated[bool, Setting("Merge models of different bases all the same.")] = False,
    ignore_config: IgnoreConfig = (),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge several experts of one base into one model, by a recipe."""
    from wpjax.merging.registry import MergeError

    _leave_torch_out()
    if methods:
        _print_methods(as_json)
        return
    if recipe is None:
        raise MergeError("no recipe; name a YAML file, or list what there is: wpjax merge --methods")
    if out is None and not dry_run:
        raise MergeError("no --out; name the folder to write, or pass --dry-run to see the plan")
    from wpjax.runtime.files import check_output

    if out is not None:
        check_output(out, overwrite, "mergekit.yaml" if masked else "config.json")

    from wpjax.checkpoints.folder import MARKER
    from wpjax.cli.console import print_json, progress_bars
    from wpjax.cli.words import print_written
    from wpjax.merging.card import MERGEKIT
    from wpjax.merging.merge import check_merge, masked_experts, merge
    from wpjax.merging.plan import make_plan
    from wpjax.merging.recipe import read_recipe

    plan = make_plan(read_recipe(recipe), ignore_config=ignore_config, unrelated=unrelated)
    if out is not None:
        check_merge(plan, out, overwrite, MERGEKIT if masked else MARKER)
    if dry_run:
        _print_plan(plan, as_json)
        return
    assert out is not None
    with progress_bars() as progress:
        for note in plan.notes:
            progress.note(note)
        if masked:
            folders = masked_experts(plan, out, overwrite=overwrite, progress=progress)
        else:
            merge(plan, out, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({"out": str(out), "n_merged": len(plan.merged), "kept": plan.kept, "notes": plan.notes})
    elif masked:
        print_written(*folders, about=f"to be merged by mergekit: {out / MERGEKIT} says how")
    else:
        print_written(out, about=_summary(plan))


def _summary(plan: Plan) -> str:
    from wpjax.cli.words import printable

    kept = plan.kept
    stay = f"; {len(kept):,} stay those of {printable(plan.host.source)}" if kept else ""
    return f"{len(plan.merged):,} tensors merged by {plan.recipe.method.name}{stay}"


def _print_plan(plan: Plan, as_json: bool) -> None:
    """Print what would be merged, parameter by parameter."""
    from wpjax.cli.console import print_json, print_table
    from wpjax.cli.words import printable
    from wpjax.merging.merge import peak_bytes

    groups = _groups(plan)
    if as_json:
        tensors = {name: values for name, values in plan.values.items() if values is not None}
        print_json(
            {
                "method": plan.recipe.method.name,
                "host": plan.host.source,
                "experts": [expert.source for expert in plan.experts],
                "tensors": tensors,
                "kept": plan.kept,
                "notes": plan.notes,
                "peak_bytes": peak_bytes(plan),
            }
        )
        return
    method = plan.recipe.method
    print(f"{method.name} ({method.source}) {method.help}")
    print(f"host: {printable(plan.host.source)}; merged: {', '.join(printable(e.source) for e in plan.experts)}")
    print_table("\nWhat is merged", ("tensors", "first", "parameters"), groups)
    for note in plan.notes:
        print(f"note: {printable(note)}")
    print(
        f"\n{_summary(plan)}; computed in float32, stored as {plan.recipe.dtype or 'the host is'}; about "
        f"{peak_bytes(plan) / 2**20:,.0f} MiB of memory for tensors; nothing was written"
    )


def _groups(plan: Plan) -> list[tuple[str, str, str]]:
    """Tensors that are merged alike: how many, the first, and with which parameters."""
    groups: dict[str, list[str]] = {}
    for name, values in plan.values.items():
        text = "stays" if values is None else ", ".join(f"{key.rstrip('_')} {_shown(v)}" for key, v in values.items())
        groups.setdefault(text, []).append(name)
    return [(f"{len(names):,}", names[0], text) for text, names in groups.items()]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _leave_torch_out() -> None:
    """Let transformers, which reads configurations here, not find torch: to import it takes a third of a small merge.

    Nothing in this command needs it, and no code of the user runs in it.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch


def _print_methods(as_json: bool) -> None:
    """Print all merge methods."""
    from wpjax.cli.console import print_json, print_table
    from wpjax.merging.registry import merge_methods

    if as_json:
        print_json(
            {
                m.name: {"help": m.help, "source": m.source, "parameters": {p.name: p.help for p in m.parameters}}
                for m in merge_methods()
            }
        )
        return
    rows = [(m.name, m.help, m.source, ", ".join(p.name for p in m.parameters)) for m in merge_methods()]
    print_table("Merge methods", ("merge_method", "what it does", "source", "parameters"), rows)
