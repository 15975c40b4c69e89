"""`wpjax apply`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from wpjax.arguments import MODEL, OUTPUT, IgnoreConfig, Out, Overwrite, Setting
from wpjax.cli.options import Json

EXAMPLE = "Example: wpjax apply --base BASE --patch title.safetensors --out FOLDER"

Written = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    Setting("Dtype of the weights that are written; that of the model if absent.", panel=OUTPUT),
]
PATCH_FILE = "A patch file, as `wpjax extract` or `wpjax export` writes it."


def run(
    base: Annotated[str, Setting(f"The model that the patches go into; with --undo, the patched one: {MODEL}")],
    patch: Annotated[tuple[str, ...], Setting(f"{PATCH_FILE} Repeat the option for more.")],
    out: Out,
    scale: Annotated[
        tuple[str, ...],
        Setting("The share of its change that a patch makes: one number, or one for each patch.", separator=","),
    ] = ("1",),
    undo: Annotated[
        bool, Setting("Take the patches out again, given the --scale and --on-conflict with which they went in.")
    ] = False,
    on_conflict: Annotated[
        Literal["error", "sum", "first"],
        Setting(
            "What becomes of a component that two patches bring. error; sum: changes add up; first: the first wins."
        ),
    ] = "error",
    form: Annotated[
        Literal["model", "lora", "mask"],
        Setting(
            "What is written. model: a Hugging Face folder; lora: a PEFT folder; mask: a file that says which weights "
            "the components own, to train no others.",
            option="--as",
            panel=OUTPUT,
        ),
    ] = "model",
    rank: Annotated[
        int | None, Setting("Highest rank of a LoRA; as high as it takes if absent.", least=1, panel=OUTPUT)
    ] = None,
    tolerance: Annotated[
        float | None,
        Setting(
            "Relative error of each matrix of a LoRA, if its rank may be that high; 1e-4 if absent.",
            least=0,
            most=1,
            panel=OUTPUT,
        ),
    ] = None,
    dtype: Written = None,
    ignore_config: IgnoreConfig = (),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Put patches into a model, or take them out: written as a Hugging Face folder, as a LoRA, or as a mask."""
    from wpjax.errors import WpjaxError

    scales = _numbers(scale)
    if form != "lora" and (rank is not None or tolerance is not None):
        raise WpjaxError("--rank and --tolerance are for --as lora")
    if form != "model" and (undo or dtype is not None):
        raise WpjaxError(f"--undo and --dtype are for a model, not for --as {form}")
    if form == "mask" and (scales != (1.0,) or on_conflict != "error"):
        raise WpjaxError("a mask has no values: leave out --scale and --on-conflict")

    from wpjax.checkpoints.folder import ADAPTER, MARKER
    from wpjax.runtime.files import check_output

    check_output(out, overwrite, {"model": MARKER, "lora": ADAPTER, "mask": None}[form], [base, *patch])

    from wpjax.checkpoints.rewrite import open_model
    from wpjax.cli.console import print_json, progress_bars
    from wpjax.patchfiles import apply_patches, export_lora, export_mask, load_patch
    from wpjax.patchfiles.export import TOLERANCE

    patches = [load_patch(path) for path in patch]
    names = [name for p in patches for name in p.info.components]
    said: dict[str, Any] = {"out": str(out), "components": names}
    with progress_bars() as progress:
        model = open_model(base, ignore_config)
        if form == "mask":
            n = export_mask(model, patches, out, overwrite=overwrite)
            words = f"which weights {len(names):,} components own, in {n:,} tensors"
        elif form == "lora":
            made = export_lora(
                model,
                patches,
                out,
                scales=scales,
                on_conflict=on_conflict,
                rank=rank,
                tolerance=TOLERANCE if tolerance is None else tolerance,
                overwrite=overwrite,
                progress=progress,
            )
            low, high = min(made.ranks.values()), max(made.ranks.values())
            words = f"LoRA of {len(made.ranks):,} modules, rank {low} to {high}; relative error {made.error:.2g}"
            words += f"; stored whole: {', '.join(made.whole)}" if made.whole else ""
            said |= {"ranks": made.ranks, "error": made.error, "whole": list(made.whole)}
        else:
            found = apply_patches(
                model,
                patches,
                out,
                scales=scales,
                undo=undo,
                on_conflict=on_conflict,
                dtype=dtype,
                overwrite=overwrite,
                progress=progress,
            )
            what = "without" if undo else "with"
            words = f"{base} {what} {len(names):,} components, {found.n_weights:,} weights"
            if found.is_host is False:
                words += "; its other tensors are not those of the patch's host: another dtype, or other patches in it"
            said |= {"n_weights": found.n_weights, "rest_is_the_hosts": found.is_host}
    if as_json:
        print_json(said)
        return
    from wpjax.cli.words import print_next, print_written

    print_written(out, about=words)
    if form == "model" and not undo:
        options = [part for path in patch for part in ("--patch", path)]
        options += [] if scale == ("1",) else ["--scale", ",".join(scale)]
        options += [] if on_conflict == "error" else ["--on-conflict", on_conflict]
        print_next(["apply", "--base", out, *options, "--undo", "--out", out.with_name(f"{out.name}-undone")])


def _numbers(texts: tuple[str, ...]) -> tuple[float, ...]:
    """The values of --scale.

    Raises:
        WpjaxError: one is no number.
    """
    from wpjax.errors import WpjaxError

    try:
        return tuple(float(text) for text in texts)
    except ValueError as error:
        raise WpjaxError(f"--scale {','.join(texts)}: give numbers, separated by commas") from error
