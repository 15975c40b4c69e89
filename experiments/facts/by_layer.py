r"""Where facts appear to live, and where editing them works: edits in many layers, scored, beside a causal trace.

    python -m experiments.facts.by_layer --model work/smollm2/base --text corpus.txt --most 1 --layers 0,2,4 \
        --facts experiments/facts/facts.jsonl --trace experiments/facts/trace --out experiments/facts/by_layer

It does what `wpjax edit --facts` does for each layer, and then `wpjax layers`; the text is read once for all layers.
What is scored is kept in the folder of `--out`, and not scored again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import wpjax as wp
from experiments.records import write
from wpjax.facts.covariance import default_cache, key_moments
from wpjax.facts.facts import Fact, load_facts
from wpjax.facts.rank_one import EditSettings, FactEdit, edit_fact, recipe, sample_prefixes
from wpjax.facts.scores import score_edits
from wpjax.report.layers import write_layers
from wpjax.results.layers import layer_curves
from wpjax.results.tracing import TRACE, Tracing
from wpjax.runtime.cards import public_name


def run(
    source: str,
    text: Path,
    facts: Sequence[Fact],
    layers: Sequence[int],
    out: Path,
    *,
    prefixes: Sequence[str] = (),
    most_tokens: int = 100_000,
) -> list[Path]:
    """Score edits of facts in each layer.

    Args:
        source: the model.
        text: the text for the second moment of keys.
        facts: the facts.
        layers: the layers.
        out: folder of the scores.
        prefixes: texts to stand before the prompt; without any, the model begins twenty.
        most_tokens: tokens of the text that are read, at most.

    Returns:
        the files of scores.
    """
    files = {layer: out / f"scores-{layer}.json" for layer in layers}
    left = [layer for layer, file in files.items() if not file.exists()]
    model, settings = wp.load_model(source), EditSettings()
    moments = key_moments(model, left, text, most_tokens=most_tokens, cache=default_cache(), progress=say)
    prefixes = tuple(prefixes) or sample_prefixes(model)
    for layer in left:
        moment = moments[layer]

        def make(fact: Fact, layer: int = layer) -> FactEdit:
            return edit_fact(model, fact, layer, moments[layer], settings=settings, prefixes=prefixes)

        scores = score_edits(model, facts, make)
        made_from = recipe(settings, prefixes, moment)
        scores = dataclasses.replace(scores, model=public_name(source), layer=layer, recipe=made_from)
        write(files[layer], scores.as_json)
        print(layer, {name: round(of.mean, 3) for name, of in scores.table().items()}, flush=True)
    return list(files.values())


def say(what: str, done: int, total: int) -> None:
    print(what, done, total, flush=True)


def trace_of(facts: Sequence[Fact], trace: Path) -> Tracing:
    """The trace of some facts of a larger one."""
    whole = Tracing.from_json(trace)
    texts = {fact.text for fact in facts}
    kept = tuple(fact for fact in whole.facts if fact.text in texts)
    return dataclasses.replace(whole, facts=kept, n_read=len(facts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    for name in ("--text", "--facts", "--trace", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--most", type=int, default=1)
    parser.add_argument("--layers", required=True, help="numbers, comma-separated")
    parser.add_argument("--prefix", action="append", default=[])
    parser.add_argument("--most-tokens", type=int, default=100_000)
    given = parser.parse_args()
    given.out.mkdir(exist_ok=True)
    chosen = load_facts(given.facts)[: given.most]
    (given.out / TRACE).write_text(json.dumps(trace_of(chosen, given.trace).as_json), encoding="utf-8")
    numbers = [int(layer) for layer in given.layers.split(",")]
    options = {"prefixes": given.prefix, "most_tokens": given.most_tokens}
    files = run(given.model, given.text, chosen, numbers, given.out, **options)
    write_layers(layer_curves([given.out / TRACE, *files]), given.out.with_suffix(".json"), overwrite=True)
