"""Where results go: checked before the work, written atomically after it."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from qdqtool.errors import ModelError, QdqError
from qdqtool.graphs import model as models
from qdqtool.passes_api import Callback, Pass, State, Timing


def check_output(path: Path, sources: Iterable[str | Path]) -> None:
    """Refuse, before any work, an output that could not be written or would replace what it is made from.

    Raises:
        ModelError: the path is a folder, its folder does not exist or is read-only, or the file is one of ``sources``.
    """
    if path.is_dir():
        raise ModelError(f"cannot write {path}: it is a folder; name a file with -o")
    if not path.parent.is_dir():
        raise ModelError(f"cannot write {path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ModelError(f"cannot write {path}: the folder {path.parent} is read-only; name another with -o")
    for source in map(Path, sources):
        if path.exists() and source.exists() and path.samefile(source):
            raise ModelError(f"{path} is an input of this run and would be overwritten; name another file with -o")


def check_folder(path: Path) -> None:
    """Refuse, before any work, a folder that could not be made or written; QdqError says why."""
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise QdqError(f"cannot write into {path}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK):
        raise QdqError(f"cannot write into {path}: {nearest} is read-only; name another folder")


def write_text(text: str, path: Path) -> Path:
    """Write a text file atomically, making its folder; QdqError where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".qdqtool-", dir=path.parent) as folder:
            staged = Path(folder) / path.name
            staged.write_text(text, encoding="utf-8")
            os.replace(staged, path)
    except OSError as error:
        raise QdqError(f"cannot write {path}: {error}") from error
    return path


def save_each(folder: Path) -> Callback:
    """A callback that saves the model behind every pass as ``NN-pass-name.onnx``, quantized once it is."""
    numbers = itertools.count(1)

    def save(step: Pass, state: State, _: Timing) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        graph = state.graph if state.quantized is None else state.quantized
        models.save(models.to_proto(graph, state.header), folder / f"{next(numbers):02}-{step.name}.onnx")

    return save
