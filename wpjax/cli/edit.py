"""`wpjax edit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from wpjax.arguments import (
    INPUT,
    MEASURED,
    MODEL,
    PATCHED,
    RUNNING,
    IgnoreConfig,
    ModelMesh,
    Overwrite,
    Resume,
    Seed,
    Setting,
)
from wpjax.cli.options import Json

if TYPE_CHECKING:
    from wpjax.facts.facts import Fact
    from wpjax.facts.rank_one import FactEdit
    from wpjax.results.edit_scores import EditScores

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
    references: Annotated[
        Path | None,
        Setting("For RS on CounterFact: its attribute_snippets.json, texts about subjects with a target.", panel=INPUT),
    ] = None,
    generation: Annotated[
        bool,
        Setting("Score what the model writes (GE, RS), where facts have prompts for it.", panel=MEASURED),
    ] = True,
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
    mesh: ModelMesh = None,
    resume: Resume = False,
    seed: Seed = 0,
    ignore_config: IgnoreConfig = (),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Rewrite a fact in the weights of one MLP (ROME), as a patch file; or score such edits on a file of facts."""
    import dataclasses
    import json

    from wpjax.errors import FactError
    from wpjax.runtime.files import atomic_output, check_output
    from wpjax.runtime.shards import Shards, check_parts, digest_of

    given = [one is not None for one in (prompt, subject, target)]
    if (facts is None) != all(given) or (facts is not None and any(given)):
        raise FactError("give --prompt, --subject and --target; or --facts with a file")
    if layer != "auto" and not layer.isdecimal():
        raise FactError(f"--layer {layer}: give the number of a layer, or auto")
    ending = ".safetensors" if facts is None else ".json"
    check_output(out, overwrite, inputs=(model, facts, text, references), ending=ending)
    check_parts(out, "edit", resume)

    from wpjax.facts.facts import Fact, each_fact, load_facts, load_references

    snippets = {} if references is None else load_references(references)
    if facts is None:
        read = [Fact(prompt or "", subject or "", "", target or "")]
    else:
        read = load_facts(facts, snippets)[:most]
    if not generation:
        read = [dataclasses.replace(fact, generation=()) for fact in read]

    from wpjax.checkpoints.checkpoint import fingerprint
    from wpjax.cli.console import print_json, progress_bars
    from wpjax.facts.covariance import check_text, default_cache, key_moment
    from wpjax.facts.rank_one import (
        EditSettings,
        check_dense,
        check_layer,
        edit_fact,
        make_task,
        recipe,
        sample_prefixes,
    )
    from wpjax.facts.scores import check_scored, score_edits, target_probabilities
    from wpjax.facts.tracing import best_layer, check_tokenizer
    from wpjax.pairs import load_model
    from wpjax.runtime.cards import public_name

    settings = EditSettings(keys=keys, steps=steps, lr=lr, kl=kl, ridge=ridge)
    with progress_bars() as progress:
        progress("reading the model", 0, 1)
        loaded = load_model(model, ignore_config=ignore_config, mesh=mesh)
        # Before the work: what cannot be used is refused.
        check_tokenizer(loaded)
        check_dense(loaded.cfg)
        check_text(loaded.cfg.d_mlp, text, most_tokens, ridge)
        if layer != "auto" and int(layer) >= loaded.cfg.n_layers:
            raise FactError(f"--layer {layer}: {model} has layers 0 to {loaded.cfg.n_layers - 1}")
        if facts is not None:
            check_scored(loaded, read)
        prefixes = prefix or sample_prefixes(loaded, seed=seed)

        def check(fact: Fact) -> None:
            make_task(loaded, fact, prefixes)
            if layer != "auto":
                check_layer(loaded.cfg, fact, int(layer))

        each_fact(read, check)
        at = best_layer(loaded, read, seed=seed, progress=progress) if layer == "auto" else int(layer)
        moment = key_moment(
            loaded, at, text, most_tokens=most_tokens, cache=cache or default_cache(), progress=progress
        )
        if moment.note:
            progress.note(moment.note)

        def make(fact: Fact) -> FactEdit:
            return edit_fact(loaded, fact, at, moment, settings=settings, prefixes=prefixes, progress=progress)

        made_from = recipe(settings, prefixes, moment) | {"seed": seed}
        if facts is not None:
            documents = [words for texts in snippets.values() for words in texts]
            identity = {
                "model": fingerprint(loaded.cfg, loaded.params),
                "facts": [dataclasses.asdict(fact) for fact in read],
                "documents": digest_of({"texts": documents}),
                "layer": at,
                **made_from,
            }
            with Shards(out, "edit", identity, resume) as shards:
                scores = dataclasses.replace(
                    score_edits(loaded, read, make, documents=documents, seed=seed, done=shards, progress=progress),
                    model=public_name(loaded.source),
                    layer=at,
                    recipe=made_from,
                )
                with atomic_output(out, overwrite) as temporary:
                    temporary.write_text(json.dumps(scores.as_json, indent=1, allow_nan=False) + "\n", encoding="utf-8")
                shards.discard()
        else:
            fact = read[0]
            edit = make(fact)
            ends = [loaded.params, edit.apply(loaded.cfg, loaded.params)]
            p = [float(target_probabilities(loaded, one, [fact.text], [fact.new_target])[0]) for one in ends]
            measured = {"p_target_before": p[0], "p_target_after": p[1], "division": edit.division, "seed": seed}
            edit.save(out, loaded, measured=measured, overwrite=overwrite, ignore_config=ignore_config)
    from wpjax.cli.words import print_next, print_written

    if facts is not None:
        print_scores(scores, as_json)
        if not as_json:
            print()
            print_written(out)
            print_next(["layers", out, "--out", out.with_name(f"{out.stem}-layers.json")])
    elif as_json:
        print_json({"out": str(out), "layer": at, "losses": list(edit.losses), **edit.recipe, **measured})
    else:
        print(
            f"{fact.text!r} -> {fact.new_target!r}: probability {p[0]:.3f}, edited {p[1]:.3f}; layer {at}, loss "
            f"{edit.losses[0]:.2f} to {edit.losses[-1]:.2f} in {len(edit.losses)} steps"
        )
        print()
        print_written(out)
        print_next(["apply", "--base", model, "--patch", out, "--out", out.with_suffix("")])


def print_scores(scores: EditScores, as_json: bool) -> None:
    """Print scores before and after the edits, and what is missing."""
    from wpjax.cli.console import print_json, print_table
    from wpjax.cli.words import printable

    if as_json:
        print_json(scores.as_json)
        return
    n = scores.n_facts
    title = f"{n} fact{'s, each' * (n != 1)} edited alone in layer {scores.layer} (per cent, points; 95 % intervals)"
    print_table(title, ("", "before", "after"), scores.rows)
    if scores.summary:
        print()
    for line in scores.summary.splitlines():
        print(printable(line))
