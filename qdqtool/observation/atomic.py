"""Files that appear whole under their name, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

STAGING: Final = ".qdqtool-"
"""How the names of folders begin in which files are written; a process that is killed meanwhile leaves one behind."""


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to; the file there takes the target's place at the end, unless an exception comes first.

    Raises:
        OSError: the target's folder does not exist or cannot be written, or the target is a folder.
    """
    with tempfile.TemporaryDirectory(prefix=STAGING, dir=target.parent) as folder:
        staged = Path(folder) / target.name
        yield staged
        os.replace(staged, target)
