"""The pages' links lead somewhere, their code runs, their commands exist; what code cites of them is there."""

import importlib
import json
import re
import shlex
from pathlib import Path

import jax
import pytest
import typer

from wpjax.cli import make_app

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments").glob("*/README.md")),
    ROOT / "tpu_scripts" / "README.md",
]
SOURCES = [p for folder in ("wpjax", "experiments", "tests", "docs") for p in (ROOT / folder).rglob("*")]
CITATION = re.compile(r'docs/method\.md,\s+(?:#\s+)?"([^"]+)"')
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


def text_of(path):
    return path.read_text(encoding="utf-8")


def slug(heading):
    """A heading's anchor on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_what_is_cited_of_the_method_is_a_heading_of_it():
    cited = {
        (heading, path.relative_to(ROOT).as_posix())
        for path in (*SOURCES, ROOT / "README.md")
        if path.suffix in (".py", ".md") and path != Path(__file__)
        for heading in CITATION.findall(re.sub(r"\s+", " ", text_of(path)))
    }
    assert len({heading for heading, _ in cited}) > 5  # the pattern still matches what code writes
    assert [(h, where) for h, where in cited if h not in HEADING.findall(text_of(ROOT / "docs" / "method.md"))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    here = text_of(page)
    prose = re.sub(r"```.*?```|`[^`]*`", "", here, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        path, _, anchor = target.partition("#")
        assert not path or (page.parent / path).exists(), target
        if anchor:
            text = text_of(page.parent / path) if path else here
            assert anchor in map(slug, HEADING.findall(text)), target


def test_the_method_names_files_that_there_are():
    named = set(re.findall(r"\b\w[\w/]*\.(?:py|md)\b", text_of(ROOT / "docs" / "method.md")))
    assert "components.py" in named
    assert [n for n in named if not any((ROOT / at / n).exists() for at in ("", "wpjax", "docs"))] == []


def blocks(page, language):
    """The fenced blocks of a page in some language; "" for those without one."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


# The blocks of patches.md take a model of torch; tests/test_patchfiles.py runs them.
WITH_CODE = [page for page in PAGES if page.parent.name == "docs" and page.stem != "patches" and blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    """As a user's does, one block after the other: with JAX's own rules of dtypes, not the strict ones of the tests."""
    monkeypatch.chdir(tmp_path)
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks(page, "python"):
            exec(block, names)
    assert capsys.readouterr().out.strip()


NOTEBOOKS = [
    ("own-pair", r"600 +passes (\S+)", 0.5),
    ("custom-metric", r"the steepest: \S+, (\S+)", 0.01),
    ("learned-mask", r"rank correlation: (\S+)", 0.2),
]


@pytest.mark.parametrize(("name", "figure", "least"), NOTEBOOKS)
def test_a_notebook_runs(name, figure, least, capsys):
    """And comes to a figure as large as it should be."""
    cells = json.loads(text_of(ROOT / "docs" / "notebooks" / f"{name}.ipynb"))["cells"]
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(line for line in cell["source"] if not line.startswith("%")), names)
    assert float(re.search(figure, capsys.readouterr().out)[1]) > least


def commands_of(page):
    """The lines of a page that call wpjax, as lists of words."""
    for block in blocks(page, "(?:bash|sh|console|text)?"):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("  #")[0].split(" && ")[-1].strip()
            if line.startswith("wpjax "):
                yield shlex.split(line)[1:]


def test_commands_of_the_pages_exist():
    """They and their options, in every page."""
    app, n = typer.main.get_command(make_app()), 0
    for page in PAGES:
        for command, *words in commands_of(page):
            known = {"--help"} if command.startswith("-") else options_of(app, command)
            assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, (page, command, words)
            n += 1
    assert n > 30


def options_of(app, command):
    """The long options of a command."""
    return {option for p in app.commands[command].params for option in (*p.opts, *p.secondary_opts)} | {"--help"}


def test_every_public_name_is_on_a_page_of_the_reference():
    shown = {line for page in (ROOT / "docs" / "api").glob("*.md") for line in text_of(page).splitlines()}
    public = re.findall(r"^from \.(\S+) import (\w+) as", text_of(ROOT / "wpjax" / "__init__.pyi"), re.MULTILINE)
    assert len(public) > 50
    assert [name for module, name in public if f"::: wpjax.{module}.{name}" not in shown] == []


def test_every_command_stands_beside_what_it_is_in_python():
    """In the table of the reference; what is named there exists."""
    rows = re.findall(r"^\| (`.*?) \| (.*) \| .*\|$", text_of(ROOT / "docs" / "api" / "index.md"), re.MULTILINE)
    named = {code.split()[0] for commands, _ in rows for code in re.findall(r"`([^`]+)`", commands)}
    assert named == set(typer.main.get_command(make_app()).commands)
    for _, functions in rows:
        for path in re.findall(r"`(wp\.\w+|wpjax(?:\.\w+)+)", functions):
            module, _, name = re.sub(r"^wp\b", "wpjax", path).rpartition(".")
            assert hasattr(importlib.import_module(module), name), path
