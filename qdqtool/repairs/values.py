"""What a repair found out and did, as plain values."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdqtool.errors import GateError, QdqError
from qdqtool.pipeline import Result
from qdqtool.recipe import Recipe
from qdqtool.repairs.analysis import Analysis
from qdqtool.report.values import plain


@dataclass(frozen=True)
class Step:
    """A change that was kept.

    Attributes:
        layer: the node for whose sake it was made.
        op: its operator.
        remedy: the kind of change, a name that ``allow`` takes.
        change: what was changed, in words.
        before_db, after_db: SQNR of the worst output on the reporting samples.
        float_db: the same with the layer in float instead, as a yardstick.
        macs: multiply-accumulates of a sample that left integers (negative: came back).
        bytes: by how much the file grew.
    """

    layer: str
    op: str
    remedy: str
    change: str
    before_db: float
    after_db: float
    float_db: float
    macs: int
    bytes: int


@dataclass(frozen=True)
class Left:
    """A layer that was looked at and left as it is."""

    layer: str
    op: str
    reason: str


@dataclass(frozen=True)
class Figures:
    """How near a model is to the float one on the reporting samples.

    Attributes:
        outputs: SQNR in dB of each output, as the runtime fuses the model.
        error_db: standard error of the worst.
        score: of the metric, where one was named.
        drop: by how much the float model's score is higher.
    """

    outputs: Mapping[str, float]
    error_db: float
    score: float | None = None
    drop: float | None = None

    @property
    def worst_db(self) -> float:
        """The SQNR of the worst output."""
        return min(self.outputs.values(), default=float("inf"))


@dataclass(frozen=True)
class Goal:
    """What a repair works towards; without any, until a step gains less than ``min_gain`` dB."""

    min_sqnr: float | None = None
    max_drop: float | None = None
    metric: str | None = None

    @property
    def given(self) -> bool:
        """Whether there is a goal."""
        return self.min_sqnr is not None or self.max_drop is not None

    def missed(self, figures: Figures) -> str | None:
        """What a model falls short of, in words; None where it reaches the goal."""
        broken = []
        if self.min_sqnr is not None and figures.worst_db < self.min_sqnr:
            broken.append(f"an SQNR of {figures.worst_db:.1f} dB is below --min-sqnr {self.min_sqnr:g} dB")
        if self.max_drop is not None and figures.drop is not None and figures.drop > self.max_drop:
            broken.append(f"{self.metric} loses {figures.drop:.4g}, more than --max-drop {self.max_drop:g}")
        return "; ".join(broken) or None


@dataclass(frozen=True)
class Samples:
    """On how many samples steps were chosen, on how many others they are reported, and where these come from."""

    choosing: int
    reporting: int
    source: str


@dataclass(frozen=True)
class Repair:
    """What :func:`qdqtool.repair` gives.

    Attributes:
        given: the quantized model as it came.
        before: the model that steps start from: the same, unless its recipe gives another on these data.
        after: the repaired one.
        steps: what was changed, in order.
        left: layers that were looked at and left alone, with the reason.
        analysis, analysis_after: the error of each layer, before and after.
        recipe: what makes the repaired model.
        difference: the recipe's changes, as TOML to paste into a recipe.
        goal: what was wanted.
        samples: what was measured on.
        tries: how many models were quantized.
        notes: what else the user should know.
        result: the repaired model, verified; None where nothing was repaired.
    """

    given: Figures
    before: Figures
    after: Figures
    steps: tuple[Step, ...]
    left: tuple[Left, ...]
    analysis: Analysis
    analysis_after: Analysis
    recipe: Recipe
    difference: str
    goal: Goal
    samples: Samples
    tries: int
    notes: tuple[str, ...] = ()
    result: Result | None = field(default=None, repr=False)

    @property
    def changed(self) -> bool:
        """Whether anything was repaired."""
        return self.result is not None

    def gate(self) -> None:
        """Raise GateError where the goal is not reached, on samples that no step was chosen on."""
        missed = self.goal.missed(self.after)
        if missed is not None:
            raise GateError(f"{missed}, and nothing more that is allowed helps")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the repaired model atomically; QdqError where nothing was repaired."""
        if self.result is None:
            raise QdqError("nothing was repaired: the quantized model stays as it is")
        return self.result.save(path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the model; infinite figures become the strings "inf" and "-inf"."""
        names = [one.name for one in dataclasses.fields(self) if one.name not in ("recipe", "result")]
        values = {name: getattr(self, name) for name in names}
        found: dict[str, Any] = plain({name: _plain(value) for name, value in values.items()})
        found["recipe"] = json.loads(self.recipe.to_json())
        return found

    def to_json(self) -> str:
        """The same as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value
