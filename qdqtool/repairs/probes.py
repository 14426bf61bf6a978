"""Samples on which steps are chosen, and others on which what they gain is reported; how near a model comes on either.

Samples are told apart by the hash of their content, so that equal ones are on one side, and taken in turn in the order
of the hashes, so that neither side depends on the data's order.

The standard error of an SQNR is that of a ratio of sums over n samples, with noise N_i and signal S_i of each and
r = ΣN / ΣS (Cochran, Sampling Techniques, 1977, equation 6.13):

    s(r)² = n / (n - 1) · Σ (N_i - r S_i)² / (ΣS)²,    s(dB) = 10 / ln 10 · s(r) / r
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx

from qdqtool import runtime
from qdqtool.errors import DataError
from qdqtool.observation.observe import HELD

if TYPE_CHECKING:
    from qdqtool.data.batching import Batch, Batching, Sample

_MOST: Final = 32
"""Samples on one side; more would only take longer."""
_LEAST: Final = 16
"""Samples of the calibration data without those that biases are corrected on, at least, or these serve as well."""
_CEILING: Final = 120.0
"""dB that are as good as equal."""


@dataclass(frozen=True)
class Ratio:
    """An SQNR in dB with its standard error over samples."""

    db: float
    error: float

    @property
    def sure(self) -> float:
        """What it is at least, by one standard error."""
        return self.db - self.error if math.isfinite(self.db) else self.db


@dataclass(frozen=True)
class Probes:
    """Samples to choose steps on, others to report on, and what they are in words."""

    choosing: tuple[Sample, ...]
    reporting: tuple[Sample, ...]
    source: str


def divide(samples: Iterable[Sample], *, calibration: bool, source: str) -> Probes:
    """Divide samples in two sides.

    Args:
        samples: of the evaluation data, or of the ``calibration`` data, whose first by hash serve bias correction and
            are left to it where there are enough others.
        calibration: whether ranges were taken from them too.
        source: the data in words.

    Raises:
        DataError: there are not two different samples.
    """
    known = {sample.digest: sample for sample in samples}
    ordered = [known[digest] for digest in sorted(known)]
    if calibration and len(ordered) >= HELD + _LEAST:
        ordered = ordered[HELD:]
    if len(ordered) < 2:
        raise DataError(
            f"{source} holds {len(ordered)} sample that differs from all others; repair needs two at least, one to "
            f"choose on and one to report on (--eval takes more)"
        )
    kept = ordered[: 2 * _MOST]
    return Probes(tuple(kept[0::2]), tuple(kept[1::2]), source)


class Judge:
    """Tells how near quantized models come to the float one on fixed samples, as the runtime fuses them."""

    def __init__(
        self, original: onnx.ModelProto, samples: Sequence[Sample], batching: Batching, provider: str = "cpu"
    ) -> None:
        self.samples, self._provider = len(samples), provider
        self.batches = list(batching.alone().batches(samples))
        active = runtime.session(original, provider=provider)
        self.names = runtime.comparable(active)
        self._wanted = [self._outputs(active, batch) for batch in self.batches]

    def ratios(self, proto: onnx.ModelProto) -> dict[str, Ratio]:
        """The SQNR of every output of a quantized model."""
        active = runtime.session(proto, provider=self._provider)
        powers: dict[str, list[tuple[float, float]]] = {name: [] for name in self.names}
        for batch, wanted in zip(self.batches, self._wanted, strict=True):
            for name, want, got in zip(self.names, wanted, self._outputs(active, batch), strict=True):
                powers[name].append(_powers(want, got))
        return {name: _ratio(np.asarray(found, np.float64)) for name, found in powers.items()}

    def outputs(self, name: str) -> list[Any]:
        """What the float model gives at an output, batch by batch."""
        index = self.names.index(name)
        return [wanted[index] for wanted in self._wanted]

    def _outputs(self, active: Any, batch: Batch) -> list[Any]:
        return [batch.real(value) for value in runtime.run(active, self.names, batch.feeds)]


def _powers(want: Any, got: Any) -> tuple[float, float]:
    """Signal and noise of one output on one sample, where the float model is finite."""
    x, y = np.asarray(want, np.float64), np.asarray(got, np.float64)
    finite = np.isfinite(x)
    x, y = x[finite], y[finite]
    error = x - y
    return float(x @ x), float(error @ error) if np.isfinite(error).all() else math.inf


def _ratio(powers: np.ndarray[Any, np.dtype[np.float64]]) -> Ratio:
    signal, noise = (float(part.sum()) for part in powers.T)
    if noise == 0.0:
        return Ratio(math.inf, 0.0)
    if signal == 0.0 or math.isinf(noise):
        return Ratio(-math.inf, 0.0)
    share, count = noise / signal, len(powers)
    spread = float(((powers[:, 1] - share * powers[:, 0]) ** 2).sum()) * count / max(count - 1, 1)
    return Ratio(-10 * math.log10(share), 10 / math.log(10) * math.sqrt(spread) / signal / share)


def worst(ratios: Mapping[str, Ratio]) -> Ratio:
    """The output that is farthest off; one without noise where the model has none to compare."""
    return min(ratios.values(), key=lambda ratio: ratio.db, default=Ratio(math.inf, 0.0))


def score(ratios: Mapping[str, Ratio], enough: float | None) -> float:
    """One figure for all outputs: their mean in dB, each counted up to what is ``enough`` (None: all of it)."""
    most = _CEILING if enough is None else min(enough, _CEILING)
    found = [max(-_CEILING, min(ratio.sure if enough is not None else ratio.db, most)) for ratio in ratios.values()]
    return sum(found) / len(found) if found else most
