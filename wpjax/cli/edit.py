"""`wpjax edit`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from wpjax.arguments import INPUT, MODEL, PATCHED, RUNNING, IgnoreConfig, Overwrite, Seed, Setting
from wpjax.cli.options import Json

if TYPE_CHECKING:
    from wpjax.facts.facts import Fact
    from wpjax.facts.rank_one import FactEdit
    from wpjax.facts.scores import EditScores

EXAMPLE = (
    'Example: wpjax edit --model HuggingFaceTB/SmolLM2-135M --prompt "The Eiffel Tower is in the city of" '
    '--subject "Eiffel Tower" --target " Rome" --text corpus.txt --out edit.safetensors'
)


def run(
    model: Annotated[str, Setting(f"The model: {MODEL}")],
    text: Annotated[
        Path, Setting("A text file like those that the model reads: over it the second moment of keys is taken.")
    ],
    out: Annotated[Path, Setting("The patch file to write; with --facts, a .json file of scores.")],
    prompt: Annotated[
        str | None, Setting("The prompt, with the subject in it, or {} where it stands.", panel=INPUT)
    ] = None,
    subject: Annotated[str | None, Setting("The subject in --prompt.", panel=INPUT)] = None,
    target: Annotated[str | None, Setting("What is to complete --prompt.", panel=INPUT)] = None,
    facts: Annotated[
        Path | None,
        Setting(
            "Instead: a file of facts with target and new_target, or one of CounterFact. Each is edited alone, scored, "
            "and taken out again.",
            panel=INPUT,
        ),
    ] = None,
    most: Annotated[int | None, Setting("Facts to edit, at most: the first ones.", least=1, panel=INPUT)] = None,
    layer: Annotated[
        str,
        Setting(
            "Number of the layer; auto: the one around which restoring MLPs helps most (docs/facts.md).",
            panel=PATCHED,
        ),
    ] = "auto",
    keys: Annotated[
        Literal["mean", "released"],
        Setting(
            "The key that the update is made for. mean: the mean over prefixes everywhere. released: as the released "
            "code of ROME, which mixes it with the key of the bare prompt.",
            panel=PATCHED,
        ),
    ] = "mean",
    steps: Annotated[
        int, Setting("Steps of Adam, at most; the last one only looks at the loss.", least=2, most=10000, panel=PATCHED)
    ] = 20,
    lr: Annotated[float, Setting("Learning rate.", least=0, most=100, panel=PATCHED)] = 0.5,
    kl: Annotated[
        float, Setting("Weight of what the edit changes of '{subject} is a'.", least=0, most=1000, panel=PATCHED)
    ] = 0.0625,
    ridge: Annotated[
        float | None,
        Setting(
            "Added to the diagonal of the keys' second moment, as a share of its mean. Without it, a singular one is "
            "refused.",
            least=0,
            most=1000,
            panel=PATCHED,
        ),
    ] = None,
    prefix: Annotated[
        tuple[str, ...],
        Setting("Text to stand before the prompt; repeat it. Without any, the model begins twenty.", panel=PATCHED),
    ] = (),
    most_tokens: Annotated[
        int, Setting("Tokens of --text that are read, at most.", least=1, most=10**9, panel=RUNNING)
    ] = 100_000,
    cache: Annotated[
        Path | None,
        Setting("Folder that keeps second moments for the next run; one in the user's cache if absent.", panel=RUNNING),
    ] = None,
    seed: Seed = 0,
    ignore_config: IgnoreConfig = (),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Rewrite a fact in the weights of one MLP (ROME), as a patch file; or score such edits on a file of facts."""
    from wpjax.errors import FactError
    from wpjax.runtime.files import check_output

    given = [one is not None for one in (prompt, subject, target)]
    if (facts is None) != all(given) or (facts is not None and any(given)):
        raise FactError("give --prompt, --subject and --target; or --facts with a file")
    if layer != "auto" and not layer.isdecimal():
        raise FactError(f"--layer {layer}: give the number of a layer, or auto")
    if out.suffix != (wanted := ".safetensors" if facts is None else ".json"):
        what = "a patch" if facts is None else "scores"
        raise FactError(f"--out {out}: {what} will be written there; name a {wanted} file")
    check_output(out, overwrite, inputs=(model, facts, text))

    from wpjax.facts.facts import Fact, load_facts

    read = load_facts(facts)[:most] if facts is not None else [Fact(prompt or "", subject or "", "", target or "")]

    from wpjax.cli.console import print_json, progress_bars
    from wpjax.facts.covariance import check_text, default_cache, key_moment
    from wpjax.facts.rank_one import EditSettings, check_dense, check_layer, edit_fact, make_task, sample_prefixes
    from wpjax.facts.scores import check_scored, score_edits, target_probabilities
    from wpjax.facts.tracing import best_layer, check_tokenizer
    from wpjax.pairs import load_model

    if facts is not None:
        check_scored(read)
    settings = EditSettings(keys=keys, steps=steps, lr=lr, kl=kl, ridge=ridge)
    with progress_bars() as progress:
        progress("reading the model", 0, 1)
        loaded = load_model(model, ignore_config=ignore_config)
        check_tokenizer(loaded)
        check_dense(loaded.cfg)
        check_text(loaded.cfg.d_mlp, text, most_tokens, ridge)
        if layer != "auto" and int(layer) >= loaded.cfg.n_layers:
            raise FactError(f"--layer {layer}: {model} has layers 0 to {loaded.cfg.n_layers - 1}")
        for fact in read:  # before the work: some cannot be edited
            make_task(loaded.tokenizer, fact, prefix)
            if layer != "auto":
                check_layer(loaded.cfg, fact, int(layer))
        at = best_layer(loaded, read, seed=seed, progress=progress) if layer == "auto" else int(layer)
        moment = key_moment(
            loaded, at, text, most_tokens=most_tokens, cache=cache or default_cache(), progress=progress
        )
        prefixes = prefix or sample_prefixes(loaded, seed=seed)

        def make(fact: Fact) -> FactEdit:
            return edit_fact(loaded, fact, at, moment, settings=settings, prefixes=prefixes, progress=progress)

        if facts is not None:
            scores = score_edits(loaded, read, make, progress=progress)
            _write_scores(out, scores, {"model": loaded.source, "layer": at, "keys": keys, "seed": seed}, overwrite)
            said: dict[str, Any] = scores.as_json
        else:
            fact = read[0]
            edit = make(fact)
            ends = [loaded.params, edit.apply(loaded.cfg, loaded.params)]
            p = [float(target_probabilities(loaded, one, [fact.text], [fact.new_target])[0]) for one in ends]
            measured = {"p_target_before": p[0], "p_target_after": p[1], "division": edit.division, "seed": seed}
            edit.save(out, loaded, measured=measured, overwrite=overwrite, ignore_config=ignore_config)
            said = {"out": str(out), "layer": at, "losses": list(edit.losses), **measured}
    if as_json:
        print_json(said)
    elif facts is not None:
        print_scores(scores, at)
        print(f"\nwrote {out}")
    else:
        print(
            f"{fact.text!r} -> {fact.new_target!r}: probability {p[0]:.3f}, edited {p[1]:.3f}; layer {at}, loss "
            f"{edit.losses[0]:.2f} to {edit.losses[-1]:.2f} in {len(edit.losses)} steps"
        )
        command = ["wpjax", "apply", "--base", model, "--patch", str(out), "--out", str(out.with_suffix(""))]
        print(f"\nwrote {out}\nnext: {shlex.join(command)}")


def print_scores(scores: EditScores, layer: int) -> None:
    """Print scores before and after the edits, in per cent and points."""
    from wpjax.cli.console import print_table

    tables = [scores.table(when) for when in ("before", "after")]
    rows = [
        (name, *(f"{100 * t[name].mean:.1f}" if name == "S" else _in_points(t[name]) for t in tables))
        for name in tables[1]
    ]
    print_table(f"{len(scores.after['E'])} facts, each edited alone in layer {layer}", ("", "before", "after"), rows)


def _in_points(of: Any) -> str:
    return f"{100 * of.mean:.1f} [{100 * of.low:.1f}, {100 * of.high:.1f}]"


def _write_scores(out: Path, scores: EditScores, about: dict[str, Any], overwrite: bool) -> None:
    """Write scores as JSON, with how they were made."""
    import json

    from wpjax.runtime.cards import public_name
    from wpjax.runtime.files import atomic_output

    content = scores.as_json | {**about, "model": public_name(about["model"])}
    with atomic_output(out, overwrite) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
