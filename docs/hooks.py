"""What the site shows besides the pages of this folder: pages that stand elsewhere, notebooks, the commands' help.

The pages of the repository link to each other as files do, so that the links also lead somewhere where the files are
read. Here they are made to fit the site. Links to code lead nowhere in it; their text stays.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent

ELSEWHERE = {"CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
"""Page in the repository -> page in the site. Pages in docs/ lose the folder, and all others keep their names."""

FOLDERS = ("experiments", "tpu_scripts")
"""Folders whose README.md files and pictures are shown."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that stand outside docs/."""
    for path in [ROOT / name for name in ELSEWHERE if ELSEWHERE[name] != "index.md"]:
        files.append(File.generated(config, ELSEWHERE[path.name], content=path.read_text(encoding="utf-8")))
    for folder in FOLDERS:
        for path in sorted([*(ROOT / folder).rglob("README.md"), *(ROOT / folder).rglob("*.png")]):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.remove(files.get_file_from_path(f"notebooks/{path.name}"))
        text, made = MarkdownExporter().from_notebook_node(nbformat.read(path, as_version=4))
        for name, picture in made["outputs"].items():
            files.append(File.generated(config, f"notebooks/{path.stem}/{name}", content=picture))
        text = text.replace("](output_", f"]({path.stem}/output_")
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make links between files of the repository links between pages of the site."""
    site = page.file.src_uri
    in_repository = {at: name for name, at in ELSEWHERE.items() if at != "index.md"}
    source = in_repository.get(site, site if site.startswith(FOLDERS) else f"docs/{site}")

    def relinked(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if (ROOT / there).is_dir():
            there += "/README.md"
        there = ELSEWHERE.get(there, there.removeprefix("docs/"))
        if files.get_file_from_path(there) is None:
            return text
        target = posixpath.relpath(there, posixpath.dirname(site) or ".") + (f"#{anchor}" if anchor else "")
        return f"{mark}[{text}]({target})"

    return LINK.sub(relinked, markdown)


def commands() -> str:
    """A page with the help of every command, as the terminal shows it."""
    import typer.rich_utils
    from typer.testing import CliRunner

    from wpjax.cli import COMMANDS, make_app

    typer.rich_utils.MAX_WIDTH = 78
    app, runner = make_app(), CliRunner()
    page = ["# Commands", "", "What `wpjax COMMAND --help` prints.", ""]
    for name in COMMANDS:
        text = runner.invoke(app, [name, "--help"], env={"COLUMNS": "78", "NO_COLOR": "1", "TERM": "dumb"}).output
        page += [f"## {name}", "", "```text", *(line.rstrip() for line in text.strip().splitlines()), "```", ""]
    return "\n".join(page)
