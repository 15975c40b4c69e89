"""Outputs: whole or not at all, and nothing of somebody else's is ever deleted."""

import pytest

from wpjax.errors import OutputError
from wpjax.runtime.files import atomic_output, check_output, write_tensors


def write(path, overwrite, marker=None):
    with atomic_output(path, overwrite, marker) as temporary:
        if marker:
            temporary.mkdir()
            (temporary / marker).write_text("new")
        else:
            temporary.write_text("new")


def test_overwrite_replaces_what_it_would_write_and_nothing_else(tmp_path):
    write(tmp_path / "file", False)
    write(tmp_path / "file", True)
    write(tmp_path / "folder", False, "config.json")
    (tmp_path / "folder" / "old").write_text("old")
    write(tmp_path / "folder", True, "config.json")
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["config.json"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("precious")
    for arguments, says in (
        ((tmp_path / "thesis", True), "is a folder"),
        ((tmp_path / "thesis", True, "config.json"), "something else made it"),
        ((tmp_path / "file", True, "config.json"), "is a file"),
        ((tmp_path / "file", False), "exists"),
    ):
        with pytest.raises(OutputError, match=says):
            write(*arguments)
    assert (tmp_path / "thesis" / "chapter").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "thesis"]


@pytest.mark.parametrize("name", ["", "x" * 250, "x" * 5000, "missing/x"])
def test_names_that_cannot_be_written(tmp_path, monkeypatch, name):
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError):
        check_output(Path(name))


def test_a_disk_that_refuses_tensors_is_one_line(tmp_path):
    """safetensors raises an error of its own, not an OSError."""
    import numpy as np

    with pytest.raises(OutputError, match="cannot be written"), atomic_output(tmp_path / "x") as temporary:
        write_tensors(temporary / "missing" / "x", {"a": np.zeros(3)}, {})
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(tmp_path):
    def fail():
        with atomic_output(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())
