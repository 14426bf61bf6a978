"""Statistics kept by content in a folder, so that nothing is observed twice, and an interrupted run goes on.

An entry's name is a hash of all that the statistics depend on: the prepared model, the data, which samples of them, the
runtime and this program's version. Not the plan: another calibrator, width or target finds what is there, and adds
what is missing. Beside it lies, while a run goes on, what it has found so far.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import qdqtool
from qdqtool.data.batching import Batching
from qdqtool.errors import StatisticsError
from qdqtool.observation import statistics_file
from qdqtool.observation.atomic import STAGING
from qdqtool.observation.calibration import Calibration, ModelKey
from qdqtool.statistics.tensor import Statistics

FOLDER_VARIABLE: Final = "QDQTOOL_CACHE_DIR"
_MOST_BYTES: Final = 2 << 30
_STALE: Final = 3600.0  # seconds: no write takes so long


def default_folder() -> Path | None:
    """Where the operating system wants caches, or what QDQTOOL_CACHE_DIR says; None where the user has no home."""
    import platformdirs

    given = os.environ.get(FOLDER_VARIABLE)
    try:
        folder = Path(given).expanduser() if given else platformdirs.user_cache_path("qdqtool", appauthor=False)
    except RuntimeError:
        return None
    return folder if given or folder.is_absolute() else None  # a "~" that stands for nothing would be a folder's name


@dataclass(frozen=True)
class Cache:
    """Statistics files in ``folder``; those used longest ago go when they take more than ``most_bytes``.

    A folder that cannot be written, or a damaged file in it, costs time and nothing else.
    """

    folder: Path
    most_bytes: int = _MOST_BYTES

    def entry(self, model: ModelKey, data: str, samples: int | None, runtime: str, fenced: Iterable[str] = ()) -> Entry:
        """The entry for statistics of a model over ``data`` (a hash), or over so many samples of them.

        ``fenced`` are tensors that the runtime did not fuse across, which the bits of others depend on.
        """
        made_by = [qdqtool.__version__, statistics_file.VERSION, runtime, sorted(fenced)]
        parts = [*made_by, model.graph, model.weights, data, samples]
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        return Entry(self, name, model, runtime)

    def sizes(self) -> dict[Path, int]:
        """The files that are kept and their bytes, that used longest ago first."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.folder.glob("*.stats"):
                with contextlib.suppress(OSError):  # another process may have removed it
                    found.append((path.stat().st_mtime_ns, path, path.stat().st_size))
        return {path: size for _, path, size in sorted(found)}

    def clear(self) -> int:
        """Remove everything; returns the number of files."""
        self._remove_remains(0)
        return sum(_removed(path) for path in self.sizes())

    def make_room(self) -> None:
        """Keep to ``most_bytes``."""
        self._remove_remains(_STALE)
        sizes = self.sizes()
        total = sum(sizes.values())
        for path, size in sizes.items():
            if total <= self.most_bytes:
                break
            total -= size * _removed(path)

    def _remove_remains(self, seconds: float) -> None:
        """Remove what processes left that were killed while they wrote, more than so many seconds ago."""
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"{STAGING}*"):
                if time.time() - path.stat().st_mtime >= seconds:
                    shutil.rmtree(path, ignore_errors=True)


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Entry:
    """One entry of a cache; a :class:`~qdqtool.observation.observe.Keeper`."""

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

    def partial(self, tensors: Sequence[str], axes: Mapping[str, int], plan: Batching) -> Statistics | None:
        """What an interrupted run found of exactly these tensors, on part of the samples."""
        found = self._read(self._path(tensors))
        if (
            found is None
            or {*found.statistics.tensors} != {*tensors}
            or not found.joins(self._made(Statistics(), plan))
        ):
            return None
        return found.statistics if all(found.has(name, axes.get(name)) for name in tensors) else None

    def keep(self, statistics: Statistics, *, whole: bool, plan: Batching) -> None:
        """Save statistics of a group of tensors, beside those of other tensors if they are on all samples."""
        made = self._made(statistics, plan)
        if not statistics.tensors:
            return
        if whole:
            self._write(self._beside(made), self._path())
        else:
            self._write(made, self._path([*statistics.tensors]))

    def complete(self, calibration: Calibration) -> None:
        """Save it all with where it comes from; what an interrupted run had left goes."""
        self._write(self._beside(calibration), self._path())
        with contextlib.suppress(OSError):
            for path in self.cache.folder.glob(f"{self.name}-*.stats"):
                _removed(path)

    def _made(self, statistics: Statistics, plan: Batching) -> Calibration:
        return Calibration(self.model, statistics, (), plan, self.runtime)

    def _beside(self, made: Calibration) -> Calibration:
        """What is kept by now, perhaps by another process, with what is new."""
        known = self._read(self._path())
        if known is None or not known.joins(made):
            return made
        return replace(made, statistics=known.with_tensors(made.statistics).statistics)

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
            self.cache.make_room()
