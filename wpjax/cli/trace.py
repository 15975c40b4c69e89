"""`wpjax trace`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from wpjax.arguments import INPUT, MEASURED, MODEL, OUTPUT, Dtype, IgnoreConfig, ModelMesh, Overwrite, Seed, Setting
from wpjax.cli.options import Json

if TYPE_CHECKING:
    from wpjax.results.tracing import Tracing

EXAMPLE = "Example: wpjax trace --model HuggingFaceTB/SmolLM2-135M --facts facts.jsonl --out trace"


def run(
    model: Annotated[str, Setting(f"The model: {MODEL}")],
    out: Annotated[Path, Setting("The folder to write: trace.json and pictures.")],
    facts: Annotated[
        Path | None,
        Setting(
            'A file of facts, a line each: {"prompt": "{} is in the city of", "subject": "The Louvre", "target": '
            '"Paris"}; or one of CounterFact, or of ROME\'s known facts.',
            panel=INPUT,
        ),
    ] = None,
    prompt: Annotated[
        str | None, Setting("Instead of a file: one prompt, whose answer is what the model says.", panel=INPUT)
    ] = None,
    subject: Annotated[str | None, Setting("The subject in --prompt.", panel=INPUT)] = None,
    most: Annotated[int | None, Setting("Facts to read, at most: the first ones.", least=1, panel=INPUT)] = None,
    corruption: Annotated[
        Literal["noise", "replacement"],
        Setting(
            "How the subject is corrupted. noise: on its embeddings. replacement: another subject of as many tokens.",
            panel=MEASURED,
        ),
    ] = "noise",
    noise: Annotated[
        float,
        Setting(
            "Standard deviation of the noise, in units of that of the embeddings of all subjects.",
            least=0,
            most=1000,
            panel=MEASURED,
        ),
    ] = 3.0,
    samples: Annotated[int, Setting("Corrupted runs with noise.", least=1, most=1000, panel=MEASURED)] = 10,
    maps: Annotated[
        tuple[str, ...],
        Setting(
            "What is restored, comma-separated: stream, mlp, attn, severed_mlp, severed_attn (the stream, with MLPs or "
            "attention held as corrupted).",
            separator=",",
            panel=MEASURED,
        ),
    ] = ("stream", "mlp", "attn"),
    window: Annotated[
        int, Setting("Layers in which modules are restored together.", least=1, most=1000, panel=MEASURED)
    ] = 10,
    pictures: Annotated[int, Setting("Facts that are drawn one by one, at most.", least=0, panel=OUTPUT)] = 8,
    dtype: Dtype = "float32",
    mesh: ModelMesh = None,
    seed: Seed = 0,
    ignore_config: IgnoreConfig = (),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find where a model recalls facts: corrupt the subject, restore one state at a time (causal tracing).

    Only facts that the model knows are traced: decoded greedily, it completes the prompt by the target.
    """
    from wpjax.errors import FactError
    from wpjax.runtime.files import check_output

    if (facts is None) == (prompt is None) or (prompt is None) != (subject is None):
        raise FactError("give --facts with a file, or --prompt and --subject")
    check_output(out, overwrite, "trace.json", inputs=(model, facts))

    from wpjax.facts.facts import Fact, load_facts

    read = [Fact(prompt, subject)] if prompt is not None and subject is not None else load_facts(facts or Path())[:most]

    from wpjax.cli.console import progress_bars
    from wpjax.facts.tracing import trace_facts
    from wpjax.pairs import load_model
    from wpjax.report.tracing import write_tracing

    with progress_bars() as progress:
        progress("reading the model", 0, 1)
        loaded = load_model(model, dtype, ignore_config, mesh=mesh)
        found = trace_facts(
            loaded,
            read,
            corruption=corruption,
            noise=noise,
            samples=samples,
            maps=maps,
            window=window,
            seed=seed,
            progress=progress,
        )
        files = write_tracing(found, out, overwrite, pictures)
    print_tracing(found, as_json)
    if not as_json:
        from wpjax.cli.words import print_next, print_written

        print()
        print_written(out, about=", ".join(files))
        print_next(["layers", out, "--out", out.with_name(f"{out.name}-layers.json")])


def print_tracing(found: Tracing, as_json: bool) -> None:
    """Print the average indirect effects of each map, at the layer where each kind of token has its largest."""
    from wpjax.cli.console import print_json, print_table
    from wpjax.cli.words import printable
    from wpjax.results.points import in_points
    from wpjax.results.tracing import MAPS
    from wpjax.stats import Interval

    if as_json:
        print_json(found.as_json)
        return
    for name in found.maps:
        of = found.average(name)
        rows = []
        for j, role in enumerate(of.roles):
            layer = int(of.mean[:, j].argmax())
            effect = Interval(*(float(ends[layer, j]) for ends in (of.mean, of.low, of.high)))
            rows.append((role, in_points(effect), str(layer) if effect.mean > 0 else "nothing"))
        print_table(
            f"Restoring {MAPS[name]}: average indirect effect in points of probability (95 % interval over facts)",
            ("token", "largest effect", "layer"),
            rows,
        )
    print()
    for line in found.summary.splitlines():
        print(printable(line))
