"""The figures of the experiments' READMEs are those of the committed results."""

import importlib
import json
from pathlib import Path

import pytest

from experiments.bench import goals
from experiments.machines import plan
from experiments.merging import summary as merging
from experiments.paper import together
from experiments.sets import summary

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

TABLES = [
    ("tiny_pair", "evaluate", "markdown", "evaluation.json"),
    ("tiny_pair", "planted", "markdown", "planted.json"),
    ("planted", "score", "markdown", "results.json"),
    ("planted", "masks", "markdown", "masks.json"),
    ("smollm2", "anchor", "markdown", "anchor.json"),
    ("smollm2", "steering", "markdown", "steering.json"),
    ("smollm2", "steering", "agreement", "steering.json"),
    ("smollm2", "summary", "markdown", "english_capital.json"),
    ("smollm2", "summary", "highest", "english_capital.json"),
    ("smollm2", "evaluate", "markdown", "evaluation.json"),
    ("paper", "replicate", "markdown", "tiny.results.json"),
    ("paper", "replicate", "calibrations", "tiny.results.json"),
    ("paper", "replicate", "markdown", "smollm2.results.json"),
    ("paper", "replicate", "calibrations", "smollm2.results.json"),
    ("paper", "rankings", "markdown", "tiny.rankings.json"),
    ("paper", "rankings", "markdown", "smollm2.rankings.json"),
    ("paper", "on_policy", "markdown", "tiny.on_policy.json"),
    ("paper", "positions", "markdown", "tiny.positions.json"),
    ("paper", "estimate", "markdown", "estimate.json"),
    ("relax", "compare", "markdown", "planted.json"),
    ("relax", "compare", "restarts", "planted.json"),
    ("bench", "heads", "markdown", "heads.json"),
    ("bench", "engine", "markdown", "engine.tiny.json"),
    ("bench", "engine", "markdown", "engine.smollm2.json"),
    ("bench", "profile", "markdown", "profile.tiny.json"),
    ("bench", "profile", "markdown", "profile.smollm2.json"),
    ("bench", "profile", "beside", "profile.sets.json"),
    ("bench", "profile", "beside", "profile.screens.json"),
    ("bench", "shape", "markdown", "shape.tiny.json"),
    ("bench", "shape", "markdown", "shape.smollm2-135m.json"),
    ("bench", "startup", "markdown", "startup.json"),
    ("loading", "measure", "markdown", "1b.json"),
    ("loading", "measure", "markdown", "8b.json"),
    ("sets", "compare", "markdown", "lora_english_capital.json"),
    ("sets", "compare", "markdown", "lora_quotation.json"),
    ("sets", "compare", "markdown", "lora_number_highlighted_sections.json"),
    ("sets", "compare", "markdown", "lora_number_highlighted_sections.seed2.json"),
    ("sets", "compare", "markdown", "large_number_highlighted_sections.seed2.json"),
    ("sets", "compare", "markdown", "many_number_highlighted_sections.seed2.json"),
    ("sets", "spread", "markdown", "spread.json"),
    ("sets", "compare", "markdown", "english_capital.json"),
    ("merging", "llama2_13b", "markdown", "llama2-13b.json"),
    ("sets", "compare", "markdown", "planted.json"),
    ("bench", "merging", "markdown", "merging.json"),
    ("bench", "relax", "markdown", "relax.tiny.json"),
    ("tpu", "compile", "markdown", "programs.json"),
    ("bench", "relax", "markdown", "relax.smollm2.json"),
    ("ioi", "summary", "heads", "smollm2.json"),
    ("ioi", "summary", "sizes", "smollm2.json"),
    ("ioi", "summary", "circuits", "smollm2.json"),
    ("ioi", "summary", "nodes", "smollm2.json"),
    ("ioi", "summary", "heads", "gemma3-270m.json"),
    ("ioi", "summary", "sizes", "gemma3-270m.json"),
    ("ioi", "summary", "circuits", "gemma3-270m.json"),
    ("ioi", "summary", "agreement", "peer.json"),
    ("ioi", "summary", "speed", "peer.json"),
    ("ioi", "known", "markdown", "known.json"),
    ("circuits", "tracr", "markdown", "tracr.json"),
    ("circuits", "addition", "markdown", "addition.json"),
    ("circuits", "addition", "paths", "addition.json"),
    ("facts", "summary", "effects", "trace/trace.json"),
    ("facts", "summary", "totals", "trace/trace.json"),
    ("facts", "summary", "scores", "scores.json"),
    ("facts", "summary", "by_layer", "by_layer.json"),
    ("facts", "speed", "markdown", "speed.json"),
]


def test_rankings_of_both_pairs_together():
    made = together.markdown(EXPERIMENTS / "paper")
    assert made in (EXPERIMENTS / "paper" / "README.md").read_text(encoding="utf-8")


def test_rankings_for_sets_of_all_pairs_together():
    made = summary.markdown(EXPERIMENTS / "sets")
    for page in (EXPERIMENTS / "sets" / "README.md", EXPERIMENTS.parent / "README.md"):
        assert made in page.read_text(encoding="utf-8"), page
    page = (EXPERIMENTS / "sets" / "README.md").read_text(encoding="utf-8")
    for make in (summary.areas, summary.runs):
        assert make(EXPERIMENTS / "sets") in page


@pytest.mark.parametrize("pair", ["tiny", "smollm2"])
def test_merges_of_all_seeds_together(pair):
    page = (EXPERIMENTS / "merging" / "README.md").read_text(encoding="utf-8")
    for make in (merging.markdown, merging.gates, merging.ahead):
        assert make(EXPERIMENTS / "merging", pair) in page


def test_machines_are_those_of_the_planner():
    report = json.loads((EXPERIMENTS / "machines" / "plan.json").read_text(encoding="utf-8"))
    assert plan.markdown(report) in (EXPERIMENTS.parent / "tpu_scripts" / "README.md").read_text(encoding="utf-8")


def test_goals_are_those_of_the_committed_results():
    assert goals.markdown(EXPERIMENTS / "bench") in (EXPERIMENTS / "bench" / "README.md").read_text(encoding="utf-8")


def test_goals_that_no_result_is_about_are_not_measured(tmp_path):
    _, _, *rows = goals.markdown(tmp_path).splitlines()
    assert len(rows) == len(goals.GOALS)
    assert all(row.endswith(" |  | not measured |") for row in rows)


@pytest.mark.parametrize(("experiment", "module", "function", "result"), TABLES)
def test_tables_are_those_of_the_committed_results(experiment, module, function, result):
    folder = EXPERIMENTS / experiment
    make = getattr(importlib.import_module(f"experiments.{experiment}.{module}"), function)
    report = json.loads((folder / result).read_text(encoding="utf-8"))
    assert make(report) in (folder / "README.md").read_text(encoding="utf-8")
