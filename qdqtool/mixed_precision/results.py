"""What a search found, as plain values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qdqtool.passes_api import Skip
from qdqtool.recipe import Recipe
from qdqtool.report.values import plain


@dataclass(frozen=True)
class Quality:
    """A quantized model on one part of the evaluation samples.

    Attributes:
        samples: how many.
        sqnr_db: least SQNR among the outputs, as the runtime fuses the model, in dB.
        score: of the metric; None without one.
        drop: the float model's score on the same samples less that.
        error: standard error of the drop; None where the metric gives no score for each sample.
    """

    samples: int
    sqnr_db: float
    score: float | None = None
    drop: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Trial:
    """An assignment that was quantized as its recipe says, and measured.

    Attributes:
        assignment: layer -> width.
        bytes: of the file.
        bits: mean bits of the weights of the layers searched.
        selection: on the samples by which assignments are chosen.
        holdout: on samples that nothing else looked at.
        latency: time of a run relative to the float model's; None where it was not measured.
    """

    assignment: Mapping[str, str]
    bytes: int
    bits: float
    selection: Quality
    holdout: Quality
    latency: float | None = None

    @property
    def uniform(self) -> str | None:
        """The width that all layers have; None where they differ."""
        found = set(self.assignment.values())
        return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class SearchResult:
    """What :func:`qdqtool.search` gives.

    Attributes:
        goal: as in ``bits=4`` or ``max_drop=0.5``.
        layers: names of the layers searched, in the graph's order.
        widths: names of the widths, ascending.
        operators: layer -> operator.
        elements: layer -> elements of its weight.
        chosen: layer -> width.
        local_db: layer -> width -> SQNR of the outputs in dB with this layer alone quantized.
        cumulative_db: the same with all layers before it at the same width too.
        local_drop: layer -> width -> loss of the metric with this layer alone quantized; empty without a metric.
        best: the model that was written.
        baseline: the widest model that keeps the budget with all layers at one width; None where there is none.
        trials: all models measured, in order.
        recipe: makes the best model again.
        float_bytes: of the float file.
        split: how samples were divided, in words.
        notes: what the user should know.
        skipped: layers that were not searched, and why.
        complete: the search came to its end; False where the time was up.
    """

    goal: str
    layers: tuple[str, ...]
    widths: tuple[str, ...]
    operators: Mapping[str, str]
    elements: Mapping[str, int]
    chosen: Mapping[str, str]
    local_db: Mapping[str, Mapping[str, float]]
    cumulative_db: Mapping[str, Mapping[str, float]]
    local_drop: Mapping[str, Mapping[str, float]]
    best: Trial
    baseline: Trial | None
    trials: tuple[Trial, ...]
    recipe: Recipe
    float_bytes: int
    split: str
    notes: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()
    complete: bool = True
    metric: str | None = field(default=None)

    @property
    def front(self) -> tuple[Trial, ...]:
        """Trials that no other beats in both bytes and SQNR, the smallest first."""
        return front(self.trials)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; infinite figures become the strings "inf" and "-inf"."""
        values = {name: value for name, value in asdict(self).items() if name != "recipe"}
        values["front"] = [asdict(trial) for trial in self.front]
        values["recipe"] = json.loads(self.recipe.to_json())
        found: dict[str, Any] = plain(values)
        return found

    def to_json(self) -> str:
        """The result as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def front(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Trials that no other beats in both bytes and SQNR on the selection samples, the smallest first."""
    found: list[Trial] = []
    for trial in sorted(trials, key=lambda one: (one.bytes, -one.selection.sqnr_db)):
        if not found or trial.selection.sqnr_db > found[-1].selection.sqnr_db:
            found.append(trial)
    return tuple(found)
