"""How good a quantized model is, on samples that chose it and on samples that did not.

Evaluation samples are divided by the hash of their content, so that neither their order nor the batching matters: the
half of least hash selects among assignments, the other half is held out, and judges the one that was selected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnx

from qdqtool import runtime, units
from qdqtool.data import batching
from qdqtool.data.batching import Batch, Batching, Sample
from qdqtool.data.fit import Feeds
from qdqtool.data.source import Data
from qdqtool.errors import DataError
from qdqtool.graphs import model as models
from qdqtool.mixed_precision.results import Quality
from qdqtool.spec import FloatArray
from qdqtool.verification.metric import Array, Metric
from qdqtool.verification.sqnr import Sqnr

FEW: Final = 16
"""Samples on which sensitivities are measured."""


@dataclass(frozen=True)
class Part:
    """Some of the evaluation samples, by position, and what the float model makes of them."""

    positions: frozenset[int]
    outputs: dict[str, Array]
    labels: Array | None
    scores: FloatArray | None


class Judge:
    """Measures quantized models against the float one."""

    def __init__(
        self,
        reference: onnx.ModelProto,
        data: Data,
        *,
        labels: Array | None = None,
        metric: Metric | None = None,
        provider: str = "cpu",
    ) -> None:
        """Divide the samples and run the float model over them.

        Raises:
            DataError: fewer than two samples, or labels that do not fit.
        """
        self._data, self._metric, self._provider = data, metric, provider
        self._labels = None if labels is None else np.asarray(labels)
        session = runtime.session(reference, provider=provider)
        self._names = runtime.comparable(session)

        def run(feeds: Feeds) -> dict[str, Array]:
            return dict(zip(self._names, runtime.run(session, self._names, feeds), strict=True))

        self.plan: Batching = batching.plan_batching(models.inputs(reference), data, run)
        marks = [(s.digest, s.position) for s in self.plan.samples(data)]
        if len(marks) < 2:
            raise DataError(f"{data.description}: a search needs at least two evaluation samples, one of them held out")
        if metric is not None and (labels is None or len(labels) != len(marks)):
            given = "no labels" if labels is None else f"{len(labels)} labels"
            raise DataError(f"there are {given} for {len(marks)} evaluation samples; the metric needs one each")
        self.digests = sorted(mark[0] for mark in marks)
        order = [position for _, position in sorted(marks)]
        half = (len(order) + 1) // 2
        self.few = tuple(order[: min(FEW, half)])
        self.labels_digest = None if labels is None else hashlib.sha256(np.asarray(labels).tobytes()).hexdigest()
        self.selection, self.holdout = (
            self._part(session, frozenset(chosen)) for chosen in (order[:half], order[half:])
        )

    @property
    def split(self) -> str:
        """How the samples were divided, in words."""
        chosen, held = len(self.selection.positions), len(self.holdout.positions)
        return (
            f"{self._data.description}, divided by the hash of their content: {units.count(chosen, 'sample')} to "
            f"choose assignments by, {len(self.few)} of them for sensitivities, and {held} held out"
        )

    def _part(self, session: Any, positions: frozenset[int]) -> Part:
        outputs = self._outputs(session, positions)
        own = None if self._labels is None else self._labels[sorted(positions)]
        return Part(positions, outputs, own, self.scores(outputs, own))

    def scores(self, outputs: Mapping[str, Array], labels: Array | None) -> FloatArray | None:
        """The metric of outputs, of each sample or of all; None without one."""
        if self._metric is None or labels is None:
            return None
        return np.asarray(self._metric(outputs, labels), np.float64)

    def score_at(self, positions: Sequence[int], outputs: Mapping[str, Array]) -> float | None:
        """The metric of outputs for samples at these positions, in this order; None without one."""
        found = self.scores(outputs, None if self._labels is None else self._labels[list(positions)])
        return None if found is None else float(found.mean())

    def samples(self, positions: Sequence[int]) -> list[Sample]:
        """Samples by position, in the order of their hashes."""
        wanted = set(positions)
        found = [sample for sample in self.plan.samples(self._data) if sample.position in wanted]
        return sorted(found, key=lambda sample: (sample.digest, sample.position))

    def judge(self, model: onnx.ModelProto) -> tuple[Quality, Quality]:
        """SQNR and score of a quantized model on the selection samples and on those held out."""
        session = runtime.session(model, provider=self._provider)
        selection, holdout = (self._quality(session, part) for part in (self.selection, self.holdout))
        return selection, holdout

    def _quality(self, session: Any, part: Part) -> Quality:
        outputs = self._outputs(session, part.positions)
        found = []
        for name, want in part.outputs.items():
            total = Sqnr()
            total.add(want, outputs[name])
            found.append(total.db)
        scores = self.scores(outputs, part.labels)
        if scores is None or part.scores is None:
            return Quality(len(part.positions), min(found))
        drops = part.scores - scores
        error = float(drops.std(ddof=1) / np.sqrt(drops.size)) if drops.size > 1 else None
        return Quality(len(part.positions), min(found), float(scores.mean()), float(drops.mean()), error)

    def _outputs(self, session: Any, positions: frozenset[int]) -> dict[str, Array]:
        """Outputs by name over some samples, joined along axis 0 in the data's order."""
        chosen = (sample for sample in self.plan.samples(self._data) if sample.position in positions)
        parts: list[tuple[int, list[Array]]] = []
        for batch in self.plan.batches(chosen):
            values = [batch.real(value) for value in runtime.run(session, self._names, batch.feeds)]
            parts += self._each(batch, values)
        parts.sort(key=lambda part: part[0])
        return {name: joined([values[i] for _, values in parts]) for i, name in enumerate(self._names)}

    def _each(self, batch: Batch, values: Sequence[Array]) -> list[tuple[int, list[Array]]]:
        """Values sample by sample, beside the sample's position."""
        if not self.plan.rows:
            return [(batch.samples[0].position, [np.asarray(value) for value in values])]
        return [
            (sample.position, [value[index : index + 1] for value in values])
            for index, sample in enumerate(batch.samples)
        ]

    def batches(self, positions: Sequence[int]) -> list[Batch]:
        """Some samples in one batch as far as the model takes it."""
        samples = [replace(sample) for sample in self.samples(positions)]
        return list(self.plan.together(len(samples)).batches(samples))


def joined(parts: Sequence[Array]) -> Array:
    """Arrays along axis 0 where their shapes allow it, else their values in one row."""
    if len({part.shape[1:] for part in parts}) == 1 and parts[0].ndim:
        return np.concatenate(parts)
    return np.concatenate([part.reshape(-1) for part in parts])
