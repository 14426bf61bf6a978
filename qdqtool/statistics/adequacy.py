"""Whether calibration data suffice, and what is odd about them: all from what observing recorded of each sample.

*Convergence.* The range of a tensor, widened to 0 as quantization does, counts as found once it is within a tolerance
of the final width. After how many samples that is depends on their order: samples are taken in the order of their
hashes, a random one that sorting the data does not change. What more samples would do needs no order at all: if k
samples reach an end within the tolerance, a random half of all samples misses it with probability 2^-k. Samples so far
are such a half of twice as many, so this estimates the chance that as many again widen the range; where tails are light
and growth slows down it is a little too high. Unlike the count in one order it hardly depends on luck.

*Outliers.* The logarithm of the greatest magnitude in a sample is compared with its median over the samples, in units
of their scaled median absolute deviation (MAD). If values fall off as a power law, the logarithm follows a Gumbel
distribution, whose tail is e^(-x/β) with β = σ_MAD/1.137; any lighter tail gives less. Of n logarithms the greatest
then lies more than β ln(n/α) above the median with probability α.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from qdqtool.spec import FloatArray
from qdqtool.statistics.extremes import Extremes, SampleId
from qdqtool.statistics.randomness import Noise, random_inputs

if TYPE_CHECKING:
    from qdqtool.data.batching import Sample
    from qdqtool.statistics.tensor import Statistics, TensorStatistics

TOLERANCE: Final = 0.1
"""Share of a range's width that does not matter: a range 10 % wider costs 0.8 dB.

At 1 % nothing would ever converge: maxima grow with the number of values, and of a trained network's tensors a quarter
to a half still grow by that much whenever some hundred samples are doubled.
"""
SETTLED: Final = 0.1
"""Share of the ranges that may still grow where they are called stable."""
FEW: Final = 16
"""Fewer distinct samples are too few to tell anything from."""
_LEAST: Final = 8  # samples from which on a median and its deviations say what is usual
_FALSE_ALARMS: Final = 0.01  # chance of naming any sample where all come from one heavy-tailed distribution
_GUMBEL: Final = 1.137  # scaled MAD of a Gumbel distribution of scale 1
_LEAST_RATIO: Final = 4.0  # a range four times as wide costs every other sample two bits
_SETTERS: Final = 5
_MAD: Final = 1.4826  # of a normal distribution, MAD times this is the standard deviation

Content = Literal["varied", "constant", "zero", "nothing"]


@dataclass(frozen=True)
class TensorAdequacy:
    """How well one tensor's range is known.

    Attributes:
        content: "varied"; "constant" or "zero" where every value was the same; "nothing" where none was finite.
        stable_after: distinct samples, in the order of their hashes, after which the range is within
            :data:`TOLERANCE` of the final one and stays there.
        growth_chance: chance that as many samples again widen the range by more than :data:`TOLERANCE`.
        sole_share: share of the range's width that a single sample adds beyond all others, 0 to 1.
        lo_sample, hi_sample: the sample that holds the least and the greatest value; None where several do (as with
            the zeros of a Relu).
        nan, inf: values that were not finite, and the earliest sample that held one.
    """

    content: Content
    stable_after: int = 0
    growth_chance: float = 0.0
    sole_share: float = 0.0
    lo_sample: SampleId | None = None
    hi_sample: SampleId | None = None
    nan: int = 0
    inf: int = 0
    first_non_finite: SampleId | None = None


@dataclass(frozen=True)
class SetEnds:
    """A sample and the number of ends of ranges that it alone sets."""

    sample: SampleId
    ends: int


@dataclass(frozen=True)
class Outlier:
    """A sample far beyond the others: in how many tensors, and how many times the median magnitude it reaches there."""

    sample: SampleId
    tensors: int
    ratio: float


@dataclass(frozen=True)
class Adequacy:
    """What calibration data are worth.

    Attributes:
        samples: samples observed, repeats included.
        repeats: samples whose content had come before.
        stable_after: distinct samples after which 90 % of the ranges are stable (see :class:`TensorAdequacy`).
        last_stable_after: the same for all ranges.
        growing: number of ranges that as many samples again are expected to widen by more than :data:`TOLERANCE`.
        settled: whether those are at most 10 % of the ranges.
        tensors: every observed tensor.
        setters: samples that set most ends, most first.
        outliers: samples far beyond the others, the worst first.
        random_inputs: inputs that look like random numbers, with their distribution.
    """

    samples: int
    repeats: int = 0
    stable_after: int = 0
    last_stable_after: int = 0
    growing: float = 0.0
    settled: bool = True
    tensors: Mapping[str, TensorAdequacy] = field(default_factory=dict)
    setters: tuple[SetEnds, ...] = ()
    outliers: tuple[Outlier, ...] = ()
    random_inputs: Mapping[str, Noise] = field(default_factory=dict)

    @property
    def distinct(self) -> int:
        """Samples of differing content."""
        return self.samples - self.repeats


def assess(statistics: Statistics, held: Sequence[Sample] = ()) -> Adequacy:
    """Judge calibration data by the statistics made of them.

    Args:
        statistics: of every observed tensor; the order of samples in them does not matter.
        held: some samples themselves, to tell random numbers by; none for merged statistics.
    """
    tensors = statistics.tensors
    seen = Extremes(tensors)
    judged: list[TensorAdequacy] = []
    far: list[dict[int, float]] = []
    limit = math.log(max(seen.count * len(tensors), 1) / _FALSE_ALARMS) / _GUMBEL
    for name, stats in tensors.items():
        lo, hi = seen.of(name)
        judged.append(_judge(stats, lo, hi, seen))
        far.append(_far(np.fmax(np.abs(lo), np.abs(hi)), limit))
    known = [found for found in judged if found.content != "nothing"]
    stable = np.array([found.stable_after for found in known] or [0])
    growing = sum(found.growth_chance for found in known)
    return Adequacy(
        samples=statistics.samples,
        repeats=seen.repeats,
        stable_after=int(np.quantile(stable, 1 - SETTLED, method="inverted_cdf")),
        last_stable_after=int(stable.max()),
        growing=growing,
        settled=growing <= SETTLED * len(known),
        tensors=dict(zip(tensors, judged, strict=True)),
        setters=_setters(known),
        outliers=_outliers(far, seen),
        random_inputs=random_inputs(held),
    )


def _judge(stats: TensorStatistics, lo: FloatArray, hi: FloatArray, seen: Extremes) -> TensorAdequacy:
    """One tensor from the extremes of every sample."""
    first = stats.first_non_finite
    bad: dict[str, Any] = {"nan": stats.nan, "inf": stats.inf}
    bad["first_non_finite"] = None if first is None else SampleId.of(*first)
    if not np.isfinite(lo).any():
        return TensorAdequacy("nothing", **bad)
    least, greatest = float(np.nanmin(lo)), float(np.nanmax(hi))
    content: Content = "varied" if least < greatest else "constant" if least else "zero"
    below, above = np.fmax(-lo, 0), np.fmax(hi, 0)  # how far each sample widens the range from 0
    width = float(below.max() + above.max())
    near_lo, near_hi = (end >= end.max() - TOLERANCE * width for end in (below, above))
    misses = 0.5 ** near_lo.sum() + 0.5 ** near_hi.sum() - 0.5 ** (near_lo | near_hi).sum()
    return TensorAdequacy(
        content,
        stable_after=int(max(near_lo.argmax(), near_hi.argmax())) + 1,
        growth_chance=float(misses),
        sole_share=max(_lead(below), _lead(above)) / width if width else 0.0,
        lo_sample=_only(lo == least, seen),
        hi_sample=_only(hi == greatest, seen),
        **bad,
    )


def _lead(end: FloatArray) -> float:
    """How far the greatest of values that are not negative lies above the next one."""
    others = end.copy()
    others[end.argmax()] = 0
    return float(end.max() - others.max())


def _only(hits: npt.NDArray[np.bool_], seen: Extremes) -> SampleId | None:
    return seen.sample(int(hits.argmax())) if hits.sum() == 1 else None


def _setters(tensors: Sequence[TensorAdequacy]) -> tuple[SetEnds, ...]:
    ends = Counter(end for found in tensors for end in (found.lo_sample, found.hi_sample) if end is not None)
    ordered = sorted(ends.items(), key=lambda item: (-item[1], item[0].digest))
    return tuple(SetEnds(sample, number) for sample, number in ordered[:_SETTERS])


def _far(amplitude: FloatArray, limit: float) -> dict[int, float]:
    """Samples whose amplitude lies ``limit`` deviations above the median of its logarithm, with their ratio to it.

    A tensor that is zero in half of the samples has no usual amplitude, and names none.
    """
    known = amplitude[np.isfinite(amplitude)]
    median = float(np.median(known)) if known.size >= _LEAST else 0.0
    if median <= 0:
        return {}
    with np.errstate(divide="ignore"):  # the logarithm of a sample of zeros is -inf, far on the other side
        deviations = np.abs(np.log(known / median))
    usual = limit * _MAD * float(np.median(deviations))
    least = median * math.exp(min(max(usual, math.log(_LEAST_RATIO)), 700.0))
    return {int(i): float(amplitude[i] / median) for i in np.flatnonzero(amplitude > least)}


def _outliers(far: Sequence[Mapping[int, float]], seen: Extremes) -> tuple[Outlier, ...]:
    ratios: dict[int, list[float]] = {}
    for found in far:
        for index, ratio in found.items():
            ratios.setdefault(index, []).append(ratio)
    named = [Outlier(seen.sample(i), len(values), float(np.median(values))) for i, values in ratios.items()]
    return tuple(sorted(named, key=lambda one: (-one.tensors, -one.ratio, one.sample.digest)))
