"""Results are written whole or not at all, and what cannot be written is refused before the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qdqtool.errors import ModelError, QdqError
from qdqtool.report.files import check_folder, check_output, write_text


def test_an_output_may_replace_an_older_one_but_no_input(tmp_path: Path) -> None:
    old, source = tmp_path / "old.onnx", tmp_path / "model.onnx"
    old.touch()
    source.touch()
    check_output(old, [source, "synthetic:3"])
    link = tmp_path / "link.onnx"
    link.symlink_to(source)
    with pytest.raises(ModelError, match="would be overwritten"):
        check_output(link, [source])


def test_read_only_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ModelError, match="read-only"):
        check_output(tmp_path / "x.onnx", [])
    with pytest.raises(QdqError, match="read-only"):
        check_folder(tmp_path / "new" / "deep")


def test_text_is_written_whole(tmp_path: Path) -> None:
    path = write_text("one", tmp_path / "a" / "b" / "report.json")
    write_text("two", path)
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_is_the_tool_s_own_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(QdqError, match="cannot write"):
        write_text("x", tmp_path / "file" / "report.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(QdqError, match="cannot write"):
        write_text("x", tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
