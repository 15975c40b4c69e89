"""What a model of the small world does: facts right, tags obeyed, instructions followed.

python -m experiments.tiny_pair.evaluate tiny:base tiny:expert tiny:planted --out evaluation.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from experiments.records import made, table, write
from experiments.tiny_pair.language import TAGS, questions, tagged
from wpjax.behaviours import BUILT_IN, behaviour, strict
from wpjax.checkpoints.checkpoint import Checkpoint
from wpjax.finetuning import answer
from wpjax.pairs import load_model


def evaluate(model: Checkpoint, n_prompts: int = 64) -> dict[str, Any]:
    """Rates over held-out ("test") questions: facts, tags, and for each behaviour strict passes and plain answers."""
    facts = dict(questions())
    report: dict[str, Any] = {}
    held_out = sorted({p.without for p in behaviour("tiny:title").select("test")})
    plain = [text for text, _ in answer(model, held_out)]
    report["facts"] = sum(text == facts[q] for q, text in zip(held_out, plain, strict=True)) / len(held_out)
    turns = [tagged(q, facts[q], b, tag) for q in held_out[:8] for b, tags in TAGS.items() for tag in tags]
    said = [text for text, _ in answer(model, [t.user for t in turns])]
    report["tags"] = sum(t.answer == text for t, text in zip(turns, said, strict=True)) / len(turns)
    for name in BUILT_IN:
        task = behaviour(f"tiny:{name}")
        pairs = task.select("test", n_prompts)
        texts = [text for text, _ in answer(model, [p.with_instruction for p in pairs])]
        rows = list(zip(pairs, texts, strict=True))
        assert task.rewrite is not None
        report[name] = {
            "passes": sum(strict(task.checker, text, p.args) for p, text in rows) / len(rows),
            "exact": sum(text == task.rewrite(p.without, facts[p.without], p.args) for p, text in rows) / len(rows),
            "plain": sum(text == facts[p.without] for p, text in rows) / len(rows),
        }
    return report


def markdown(report: dict[str, Any]) -> str:
    """The report as a table, one line a behaviour, two figures a model."""
    models = report["models"]
    columns = ["instruction", *(f"{name}: {figure}" for name in models for figure in ("passes", "plain"))]
    rows = [
        [name, *(f"{model[name][figure]:.0%}" for model in models.values() for figure in ("passes", "plain"))]
        for name in BUILT_IN
    ]
    rows += [
        [what, *(cell for model in models.values() for cell in (f"{model[key]:.0%}", ""))]
        for what, key in (("none: facts right", "facts"), ("a tag: obeyed to the letter", "tags"))
    ]
    return table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = {
        "models": {source: evaluate(load_model(source)) for source in args.models},
        "dtype": "float32",
    } | made()
    print(markdown(report))
    write(args.out, report)


if __name__ == "__main__":
    main()
