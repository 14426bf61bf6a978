"""Statistics kept by content in a folder, so that nothing is observed twice, and an interrupted run goes on.

An entry's name is a hash of all that the statistics depend on: the prepared model, the data, which samples of them, the
runtime and the version of the format. Not the plan: another calibrator, width or target finds what is there, and adds
what is missing. Beside it lies, while a run goes on, what it has found so far.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qdqtool import statistics_file
from qdqtool.batching import Batching
from qdqtool.calibration import Calibration, ModelKey
from qdqtool.errors import StatisticsError
from qdqtool.statistics import Statistics

FOLDER_VARIABLE: Final = "QDQTOOL_CACHE_DIR"
_MOST_BYTES: Final = 2 << 30


def default_folder() -> Path:
    """Where the operating system wants caches, or what QDQTOOL_CACHE_DIR says."""
    import platformdirs

    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given) if given else platformdirs.user_cache_path("qdqtool", appauthor=False)


@dataclass(frozen=True)
class Cache:
    """Statistics files in ``folder``; those used longest ago go when they take more than ``most_bytes``.

    A folder that cannot be written, or a damaged file in it, costs time and nothing else.
    """

    folder: Path
    most_bytes: int = _MOST_BYTES

    def entry(self, model: ModelKey, data: str, samples: int | None, runtime: str) -> Entry:
        """The entry for statistics of a model over ``data`` (a hash), or over so many samples of them."""
        parts = [statistics_file.VERSION, model.graph, model.weights, data, samples, runtime]
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        return Entry(self, name, model, runtime)

    def files(self) -> list[Path]:
        """What is kept, that used longest ago first."""
        found = []
        for path in self.folder.glob("*.stats"):
            with contextlib.suppress(OSError):  # another process may have removed it
                found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def clear(self) -> int:
        """Remove everything; returns the number of files."""
        files = self.files()
        for path in files:
            path.unlink(missing_ok=True)
        return len(files)

    def _make_room(self) -> None:
        files = self.files()
        sizes = {path: path.stat().st_size for path in files if path.exists()}
        total = sum(sizes.values())
        for path, size in sizes.items():
            if total <= self.most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


@dataclass(frozen=True)
class Entry:
    """One entry of a cache; a :class:`~qdqtool.observe.Keeper`."""

    cache: Cache
    name: str
    model: ModelKey
    runtime: str

    def load(self) -> Calibration | None:
        """What is kept; None where nothing is."""
        found = self._read(self._path())
        if found is not None:
            with contextlib.suppress(OSError):
                os.utime(self._path())
        return found

    def partial(self, tensors: Sequence[str]) -> Statistics | None:
        """What an interrupted run found of exactly these tensors, on part of the samples."""
        found = self._read(self._path(tensors))
        return None if found is None or {*found.statistics.tensors} != {*tensors} else found.statistics

    def keep(self, statistics: Statistics, *, whole: bool, plan: Batching) -> None:
        """Save statistics of a group of tensors, beside those of other tensors if they are on all samples."""
        tensors = [*statistics.tensors]
        known = self._read(self._path()) if whole else None
        made = Calibration(self.model, statistics, (), plan, self.runtime)
        if known is not None:
            made = known.with_tensors(statistics)
        self._write(made, self._path(() if whole else tensors))

    def complete(self, calibration: Calibration) -> None:
        """Save it all with where it comes from; what an interrupted run had left goes."""
        self._write(calibration, self._path())
        for path in self.cache.folder.glob(f"{self.name}-*.stats"):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _path(self, tensors: Sequence[str] = ()) -> Path:
        part = f"-{hashlib.sha256(json.dumps(sorted(tensors)).encode()).hexdigest()[:16]}" if tensors else ""
        return self.cache.folder / f"{self.name}{part}.stats"

    def _read(self, path: Path) -> Calibration | None:
        try:
            found = statistics_file.read(path)
        except StatisticsError:
            return None
        return found if found.model == self.model else None

    def _write(self, calibration: Calibration, path: Path) -> None:
        with contextlib.suppress(OSError, StatisticsError):
            self.cache.folder.mkdir(parents=True, exist_ok=True)
            statistics_file.write(calibration, path)
            self.cache._make_room()
