"""What an assignment costs in accuracy, seen by one float run of the switchboard over a few samples.

The measure is the noise of the outputs relative to their signals, summed over outputs,

    noise = sum_o |y_o - y^_o|^2 / |y_o|^2,

which for one output is 10^(-SQNR/10). Errors of single layers that are small and unrelated add up in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qdqtool import runtime
from qdqtool.data.batching import Batch
from qdqtool.mixed_precision.candidates import Candidates
from qdqtool.mixed_precision.judge import Judge, joined
from qdqtool.mixed_precision.switchboard import Switchboard
from qdqtool.mixed_precision.widths import FLOAT, Assignment
from qdqtool.verification.metric import Array
from qdqtool.verification.sqnr import Sqnr


@dataclass(frozen=True)
class Reference:
    """What the float model gives for a batch: outputs by name, and means of layers by their name."""

    batch: Batch
    outputs: Mapping[str, Array]
    means: Mapping[str, Array]


class Emulator:
    """Runs assignments on the switchboard."""

    def __init__(
        self, candidates: Candidates, batches: Sequence[Batch], judge: Judge, *, correct: bool, provider: str = "cpu"
    ) -> None:
        """Load the switchboard and run the float model once.

        Args:
            candidates: what every layer may become.
            batches: the samples.
            judge: knows their scores.
            correct: layers keep their mean, as bias correction makes them; a batch must hold several samples.
            provider: execution provider.
        """
        self._candidates, self._judge = candidates, judge
        self._board = Switchboard.of(candidates, correct=correct)
        self._session: Any = runtime.session(self._board.proto, provider=provider)
        means = set(self._board.means)
        names = [name for name in runtime.comparable(self._session) if name not in means]
        self._means, self._names = [*self._board.means], names
        self._references = [self._reference(batch) for batch in batches]
        self._float_score = self._score([reference.outputs for reference in self._references])

    def _reference(self, batch: Batch) -> Reference:
        values = runtime.run(self._session, [*self._names, *self._means], batch.feeds)
        outputs = {name: batch.real(value) for name, value in zip(self._names, values, strict=False)}
        means = dict(zip(self._means, values[len(self._names) :], strict=True))
        return Reference(batch, outputs, means)

    def outputs(self, assignment: Assignment) -> list[dict[str, Array]]:
        """Outputs by name, batch by batch; layers that are not named are float."""
        coded = self._candidates.coded
        chosen = {layer: coded[layer, width] for layer, width in assignment.items() if width != FLOAT}
        found = []
        for reference in self._references:
            switches = self._board.feeds(chosen, reference.means)
            values = runtime.run(self._session, self._names, {**reference.batch.feeds, **switches})
            real = [reference.batch.real(value) for value in values]
            found.append(dict(zip(self._names, real, strict=True)))
        return found

    def measure(self, assignment: Assignment) -> tuple[float, float | None]:
        """Noise of the outputs relative to their signals, and loss of the metric (None without one)."""
        outputs = self.outputs(assignment)
        sums = {name: Sqnr() for name in self._names}
        for reference, got in zip(self._references, outputs, strict=True):
            for name, total in sums.items():
                total.add(reference.outputs[name], got[name])
        score = self._score(outputs)
        drop = None if score is None or self._float_score is None else self._float_score - score
        return relative_noise(sums.values()), drop

    def _score(self, outputs: Sequence[Mapping[str, Array]]) -> float | None:
        positions = [sample.position for reference in self._references for sample in reference.batch.samples]
        return self._judge.score_at(positions, {name: joined([one[name] for one in outputs]) for name in self._names})


def relative_noise(sums: Iterable[Sqnr]) -> float:
    """Noise relative to the signal, summed over outputs; an all-zero signal must stay as it is."""
    return sum(one.noise / one.signal if one.signal else (math.inf if one.noise else 0.0) for one in sums)


def decibels(noise: float) -> float:
    """Relative noise as SQNR in dB."""
    return math.inf if noise <= 0.0 else -10 * math.log10(noise) if np.isfinite(noise) else -math.inf
