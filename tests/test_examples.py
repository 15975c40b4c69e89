"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import wpjax

PACKAGE = Path(wpjax.__file__).parent
PROMPT = re.compile(r"^ *>>> ", re.MULTILINE)


def module_name(path):
    return ".".join(("wpjax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


# Found by their text: importing every module to look for examples would slow every collection down.
PROMPTS = {module_name(p): len(PROMPT.findall(p.read_text(encoding="utf-8"))) for p in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("name", [name for name, n in PROMPTS.items() if n])
def test_examples_of_a_module(name, tmp_path, monkeypatch):
    """JAX promotes dtypes strictly here (see conftest); what passes so gives the same without."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for example in doctest.DocTestFinder().find(module, name):
        runner.run(example)
    assert (runner.failures, runner.tries) == (0, PROMPTS[name])  # doctest overlooks what a decorator hides
