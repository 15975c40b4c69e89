"""What code cites of docs/ is there, and the pages' links lead somewhere."""

import re
from pathlib import Path

import pytest

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
