"""`wpjax relax`."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Annotated, Literal

from wpjax.arguments import MEASURED, PATCHED, RUNNING, Mesh, Overwrite, Resume, Seed, Setting
from wpjax.cli.options import Json
from wpjax.cli.swept import Given, SweepFile, SweptNewTokens, behaviour_of, pair_of, swept_or_given

EXAMPLE = "Example: wpjax relax title.nc --objective kl+decision --start set_score"


def run(
    result: SweepFile,
    given: Given,
    out: Annotated[
        Path | None, Setting("Where to write; beside the result if absent: title.learned.nc for title.nc.")
    ] = None,
    objective: Annotated[
        str,
        Setting(
            "What to learn the mask for. kl: nearness to the expert, along its answers; decision: the expert's token "
            "where base and expert first part ways; instructed: where the instruction first parts them; partings: its "
            "tokens wherever they part; response: the expert's answers; anchor: the anchor of the sweep; reward: the "
            "checker, on answers that are sampled as it learns (slow). A sum: kl+decision.",
            panel=MEASURED,
        ),
    ] = "kl",
    direction: Annotated[
        Literal["restore", "knockout", "both"],
        Setting(
            "restore: the set should bring the behaviour into the base. knockout: the base's weights should take it "
            "out of the expert. both: the same set should do both.",
            panel=MEASURED,
        ),
    ] = "restore",
    harm: Annotated[
        float,
        Setting(
            "Price of harm: of 1 nat a token of divergence on the prompts without the instruction, where the whole "
            "behaviour is worth 1.",
            least=0,
            panel=MEASURED,
        ),
    ] = 0.0,
    text: Annotated[
        Path | None, Setting("Text file on which harm is measured, too; needs --harm.", panel=MEASURED)
    ] = None,
    n_prompts: Annotated[int, Setting("Most prompts to learn from.", least=4, panel=MEASURED)] = 64,
    prompts_a_step: Annotated[int, Setting("Prompts of each step.", least=1, panel=MEASURED)] = 8,
    n_answers: Annotated[
        int, Setting("With the reward: answers to each prompt of a step.", least=2, panel=MEASURED)
    ] = 4,
    max_new_tokens: SweptNewTokens = None,
    kinds: Annotated[
        tuple[str, ...] | None,
        Setting(
            "Kinds of components that get a gate, comma-separated; they must not overlap. Without it, head, kv_group "
            "and neuron, or of a sweep of directions these.",
            separator=",",
            panel=PATCHED,
        ),
    ] = None,
    parametrisation: Annotated[
        Literal["nested", "hard-concrete", "straight-through"],
        Setting(
            "How gates are made. nested: one ranking for all budgets. hard-concrete, straight-through: gates of 0 and "
            "1, for the one budget that --price sets.",
            panel=PATCHED,
        ),
    ] = "nested",
    price: Annotated[
        float,
        Setting("With hard-concrete and straight-through: price of the whole expert.", least=0, panel=PATCHED),
    ] = 1.0,
    start: Annotated[
        str | None,
        Setting(
            "Ranking of the result to begin with, say set_score or screen; without it, all gates alike.", panel=PATCHED
        ),
    ] = None,
    spread: Annotated[
        float | None,
        Setting(
            "How far that ranking sets the gates apart: the larger, the surer of it the run begins. The reward needs "
            "answers that pass from the start: 4.",
            least=0,
            most=100,
            panel=PATCHED,
        ),
    ] = None,
    steps: Annotated[int, Setting("Steps to take.", least=1, most=10**6, panel=RUNNING)] = 200,
    lr: Annotated[float, Setting("Learning rate.", least=0, most=1e3, panel=RUNNING)] = 0.05,
    restarts: Annotated[
        int,
        Setting(
            "Independent runs with other seeds; the mean of their ranks counts.", least=1, most=1000, panel=RUNNING
        ),
    ] = 1,
    check_every: Annotated[int, Setting("Steps between two looks at hard masks.", least=1, panel=RUNNING)] = 50,
    show: Annotated[int, Setting("Rows to print.", least=1)] = 20,
    resume: Resume = False,
    seed: Seed = 0,
    mesh: Mesh = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Learn by gradient which components carry the behaviour together, and add the ranking `learned` to a result.

    Models, behaviour and checker are those of the sweep, as its file names them.
    """
    from wpjax.errors import WpjaxError
    from wpjax.runtime.files import beginning_of_text, check_output
    from wpjax.runtime.shards import Shards, check_parts

    out = result.with_suffix(".learned.nc") if out is None else out
    check_output(out, overwrite, inputs=(result, *given.inputs, text))
    check_parts(out, "relax", resume)
    if not lr > 0:
        raise WpjaxError(f"--lr {lr:g}: above 0")

    from wpjax.components import check_kind, gated_kinds
    from wpjax.results.sweep_result import SweepResult

    swept = SweepResult.from_netcdf(result)
    asked = swept_or_given(swept, given)
    kinds = kinds or gated_kinds(asked.is_divided)
    for kind in kinds:
        check_kind(kind)
    if start is not None:
        swept.values(start)  # refused before the models are read

    import jax

    import wpjax
    from wpjax.cli.compiled import watch_compilation
    from wpjax.cli.console import progress_bars
    from wpjax.cli.sweep import print_result
    from wpjax.cli.words import print_next, print_written
    from wpjax.evaluation.learned import Aim, add_learned, restarts_at_once
    from wpjax.forecast import Forecast
    from wpjax.relax.learn import RelaxConfig
    from wpjax.relax.parametrisations import make_parametrisation

    aim = Aim(
        objective,
        direction,
        harm,
        "" if text is None else beginning_of_text(text),
        n_prompts,
        prompts_a_step,
        n_answers,
        max_new_tokens or asked.max_new_tokens or 32,
    )
    gates = make_parametrisation(parametrisation, price, spread)
    task = behaviour_of(result, asked, given.has_checker)
    pair = pair_of(asked, mesh)
    watch_compilation()
    batch = task.encode(pair.tokenizer, "sweep", n_prompts)
    pair.check_prompts(batch)
    at_once = restarts_at_once(pair.cfg, aim, batch.with_instruction.ids.shape[1], restarts)
    config = RelaxConfig(steps=steps, lr=lr, seed=seed, restarts=restarts, at_once=at_once)
    settings = {  # everything that the state depends on
        "versions": [wpjax.__version__, jax.__version__, f"{pair.placement} {jax.devices()[0]}"],
        "pair": pair.fingerprints,
        "tokenizer": asked.tokenizer,
        "result": [swept.dataset.attrs["date"], start],
        "behaviour": [(text, dict(p.args)) for text, p in zip(batch.texts, batch.pairs, strict=True)],
        "checker": asked.checker,
        "kinds": kinds,
        "aim": [str(dataclasses.replace(aim, text="")), hashlib.blake2b(aim.text.encode(), digest_size=16).hexdigest()],
        "parametrisation": str(gates),
        "config": str(config),
    }
    with Shards(out, "relax", settings, resume) as shards:
        with progress_bars() as progress, shards.states() as states:
            schedule = Forecast(pair, task, aim.max_new_tokens).learned(aim, config, batch)
            progress.planned(schedule)
            learned = add_learned(
                pair,
                task,
                swept,
                aim,
                gates,
                config,
                kinds=kinds,
                start=start,
                check_every=check_every,
                states=states,
                tell=progress.say,
                progress=schedule.watching(progress),
            )
            schedule.finish()
        learned.to_netcdf(out, overwrite)
        shards.discard()
    print_result(learned, show, as_json, by="learned", path=out)
    if not as_json:
        print()
        print_written(out)
        print_next(["validate", out, "--by", "learned"])
