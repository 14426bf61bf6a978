"""What a search has found so far, in a file beside its output, so that an interrupted one goes on.

The file is of one search: its key is a hash of the model, the data, the options and the versions that measured. Every
figure in it is the result of an assignment alone, so that a search that goes on comes to the same end.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from qdqtool.errors import QdqError
from qdqtool.mixed_precision.results import Quality, Trial
from qdqtool.mixed_precision.widths import Assignment
from qdqtool.observation.atomic import replacing

_EVERY: Final = 5.0  # seconds between two writes


class Found:
    """Figures by assignment, kept in a file."""

    def __init__(self, path: Path | None, key: str) -> None:
        """Go on with what ``path`` holds, if it is of the search with this key; None: nothing is kept."""
        self._path, self._key = path, key
        self._values: dict[str, Any] = {}
        self._trials: dict[str, Trial] = {}
        self._written = time.monotonic()
        stored = _read(path) if path is not None else {}
        if stored.get("key") == key:
            self._values = stored["values"]
            self._trials = {name: _trial(values) for name, values in stored["trials"].items()}
        self.resumed = bool(self._values or self._trials)

    def value(self, what: str, assignment: Assignment, measure: Callable[[], Any]) -> Any:
        """A figure of an assignment, measured where it is not known; any JSON value."""
        name = f"{what}:{digest(assignment)}"
        if name not in self._values:
            self._values[name] = measure()
            if time.monotonic() - self._written > _EVERY:
                self.save()
        return self._values[name]

    def known(self, what: str, assignment: Assignment) -> bool:
        """Whether that figure is known."""
        return f"{what}:{digest(assignment)}" in self._values

    def trial(self, assignment: Assignment) -> Trial | None:
        """A trial that was made."""
        return self._trials.get(digest(assignment))

    def keep(self, trial: Trial) -> None:
        """Add a trial and write the file."""
        self._trials[digest(trial.assignment)] = trial
        self.save()

    def save(self) -> None:
        """Write the file; QdqError where that is not possible."""
        self._written = time.monotonic()
        if self._path is None:
            return
        trials = {name: asdict(trial) for name, trial in self._trials.items()}
        text = json.dumps({"key": self._key, "trials": trials, "values": self._values})
        try:
            with replacing(self._path) as staged:
                staged.write_text(text, encoding="utf-8")
        except OSError as error:
            raise QdqError(f"cannot write {self._path}, which keeps what the search found: {error}") from error


def digest(assignment: Assignment) -> str:
    """A name for an assignment."""
    return hashlib.sha256(json.dumps(sorted(assignment.items())).encode()).hexdigest()[:20]


def search_key(parts: object) -> str:
    """Hash of all that the figures depend on; ``parts`` as JSON has them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and {"key", "trials", "values"} <= found.keys()
    return found if whole else {}


def _trial(values: Mapping[str, Any]) -> Trial:
    parts = {name: Quality(**values[name]) for name in ("selection", "holdout")}
    return Trial(**{**values, **parts})
