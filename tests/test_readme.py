"""The README's commands exist and its Python runs; what the documents name is there."""

import re
from pathlib import Path

import pytest

import wpjax

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_ten_lines_print_a_number(capsys):
    assert len(BLOCKS[0].splitlines()) <= 10
    exec(BLOCKS[0], {})
    _, effect, low, high = re.fullmatch(
        r"(L\d\.\w+\.\d) alone recovers ([\d.]+) \[([\d.]+), ([\d.]+)\] of the gap\n", capsys.readouterr().out
    ).groups()
    assert 0.02 < float(low) < float(effect) < float(high) < 1


def test_masks_compose_with_vmap_and_grad(capsys):
    page = (ROOT / "docs" / "jax.md").read_text(encoding="utf-8")
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names := {})
    scores, shape = capsys.readouterr().out.strip().splitlines()
    got = [float(x) for x in scores.strip("[]").split()]
    one_at_a_time = [float(names["score"](mask)) for mask in names["masks"]]
    assert got == pytest.approx(one_at_a_time, rel=1e-4)
    assert shape == "(8, 8)"


def test_set_up_is_two_commands():
    commands = re.findall(r"^python -m pip install .*$", README, re.MULTILINE)
    assert commands == [
        "python -m pip install -e . && wpjax demo",
        "python -m pip install -e '.[test]' && python -m pytest",
    ]


def test_what_contributors_are_pointed_to_is_there():
    """Every file that is named, and every name that is said to stand in one."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:wpjax|tests|experiments)/[^`]*)`", text))
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path
    for name, path in re.findall(r'look at `"?(\w+)"?` in `([^`]+)`', text):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), (name, path)


def test_one_version_everywhere():
    version = re.escape(wpjax.__version__)
    assert re.search(rf'^version = "{version}"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(rf"^## \[{version}\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
