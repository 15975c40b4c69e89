"""A sweep's arguments in a YAML file, and in the result that they gave."""

import dataclasses
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from wpjax import open_result, read_config, run_study
from wpjax.arguments import SweepConfig, as_read
from wpjax.cli import make_app
from wpjax.errors import WpjaxError

TEXT = """
base: tiny:base
expert: tiny:expert
behaviour: tiny:title
checker: 'contains:<<'
kinds: [head, kv_group]
components: L1.head.0,L2.mlp
ignore_config: [a, b]
anchor: some/anchor.nc
n_prompts: 6
memory_mb: 2.5
set_score: false
"""

CONFIG = SweepConfig(
    "tiny:base", "tiny:expert", "tiny:title", checker="contains:<<", kinds=("head", "kv_group"),
    components=("L1.head.0", "L2.mlp"), ignore_config=("a", "b"), anchor=Path("some/anchor.nc"), n_prompts=6,
    memory_mb=2.5, set_score=False,
)  # fmt: skip


def parsed(*words):
    """The arguments of `wpjax sweep` as its command line reads them."""
    found = get_command(make_app()).commands["sweep"].make_context("sweep", list(words)).params
    lists = {name: tuple(found[name].split(",")) for name in ("kinds", "components") if found[name] is not None}
    expert, *more = found["expert"]  # the option may be repeated
    experts = {"expert": expert, "more_experts": (*more, *(found["more_experts"] or ()))}
    values = {**found, **lists, **experts, "ignore_config": tuple(found["ignore_config"] or ())}
    return as_read({field.name: values[field.name] for field in dataclasses.fields(SweepConfig)})


def test_a_file_says_what_options_say(tmp_path):
    path = tmp_path / "wpjax.yaml"
    path.write_text(TEXT)
    assert read_config(path) == CONFIG
    assert parsed("--config", str(path)) == CONFIG
    other = dataclasses.replace(CONFIG, n_prompts=9, set_score=True, kinds=("mlp",))
    assert read_config(path, n_prompts=9, set_score=True, kinds=("mlp",)) == other
    assert parsed("--config", str(path), "--n-prompts", "9", "--set-score", "--kinds", "mlp") == other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bass: tiny:base", r"'bass' is no argument of a sweep \(did you mean base\?\)"),
        ("base: a\nbase: b", "line 1: the key 'base' stands twice"),
        ("base: [a, b]", "base has one value"),
        ("expert: [a, b]\nmore_experts: [c]", "expert is a list already"),
        ("- base", "not a mapping"),
        ("base: 'a", "not readable as YAML"),
        ("base: a\nexpert: b", "no behaviour; add"),
        ("base: a\nexpert: b\nbehaviour: c\nmetric: nothing", "metric='nothing': there are anchor"),
        ("base: a\nexpert: b\nbehaviour: c\nn_prompts: 1", "n_prompts=1: at least"),
        ("base: a\nexpert: b\nbehaviour: c\nn_prompts: x", "n_prompts|arguments of a sweep"),
    ],
)
def test_a_file_that_cannot_work_is_refused(tmp_path, text, message):
    path = tmp_path / "wpjax.yaml"
    path.write_text(text)
    with pytest.raises(WpjaxError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)


def test_a_result_names_the_command_that_makes_it_again(tmp_path):
    config = SweepConfig(
        "tiny:base", "tiny:expert", "tiny:title", tmp_path / "r.nc", metric="decision", method="screen", causal="skip",
        kinds=("attn", "mlp"), n_prompts=4, max_new_tokens=4, set_score=False, answers=0, memory_mb=64,
    )  # fmt: skip
    run_study(config)
    words = shlex.split(open_result(config.out).dataset.attrs["command"])
    assert words[:2] == ["wpjax", "sweep"]
    assert parsed(*words[2:]) == dataclasses.replace(config, out=None, memory_mb=None)
