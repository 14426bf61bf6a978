"""Mathematics that calibrators share: partial moments of a histogram, the error of clipping, and ACIQ's optimal clips.

With F the values seen, n the number of steps and Δ = (b - a)/n, a range [a, b] costs about

    E(a, b) = Σ_{x<a} (x - a)² + Σ_{x>b} (x - b)² + Δ²/12 · #{a <= x <= b, x != 0}

where every sum over a tail is T₂ - 2bT₁ + b²T₀ of the tail's moments T: one look-up for each candidate.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qdqtool.errors import StatisticsError
from qdqtool.spec import FloatArray, QuantSpec, Range

if TYPE_CHECKING:
    from qdqtool.statistics.channel_statistics import ChannelStatistics
    from qdqtool.statistics.histogram import Bins
    from qdqtool.statistics.tensor import TensorStatistics


_NEWTON = 100  # more steps than Newton's method needs


class Side(enum.Enum):
    """Which ends of a range are free, and so what a calibrator searches."""

    MAGNITUDE = "one threshold t, the range is [-t, t]"
    POSITIVE = "one threshold t, the range is [0, t]"
    NEGATIVE = "one threshold t, the range is [-t, 0]"
    BOTH = "two ends of their own"

    @classmethod
    def of(cls, stats: TensorStatistics, spec: QuantSpec) -> Side:
        """The side that ``spec`` leaves free for a tensor with these statistics."""
        if spec.symmetric and (spec.format.signed or stats.lo < 0):
            return cls.MAGNITUDE
        if stats.lo >= 0:
            return cls.POSITIVE
        return cls.NEGATIVE if stats.hi <= 0 else cls.BOTH

    def ends(self, threshold: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Both ends for each threshold; float64 of its shape."""
        t = np.asarray(threshold, np.float64)
        return np.where(self is Side.POSITIVE, 0.0, -t), np.where(self is Side.NEGATIVE, 0.0, t)


@dataclass(frozen=True)
class ChannelPriors:
    """What a prior's optimal clip needs of each channel; arrays (channels,).

    Attributes:
        center: float64, where the prior lies: the mean, or 0 where one end of the range is 0 or the range is symmetric.
        b, sigma: float64, mean and root mean square deviation from it; behind a ReLU of the values above 0 alone.
        below, above: bool, whether the range extends below and above the center.
        lo, hi: float64, least and greatest value seen.
    """

    center: FloatArray
    b: FloatArray
    sigma: FloatArray
    below: npt.NDArray[np.bool_]
    above: npt.NDArray[np.bool_]
    lo: FloatArray
    hi: FloatArray

    @classmethod
    def of(cls, stats: TensorStatistics, spec: QuantSpec) -> ChannelPriors:
        """The priors of a tensor's channels.

        Raises:
            StatisticsError: the channels were not observed.
        """
        seen = channels_of(stats)
        signed = spec.symmetric & (spec.format.signed | (seen.lo < 0))
        below, above = (seen.lo < 0) | signed, (seen.hi > 0) | signed
        both = below & above & ~signed
        center = np.where(both, seen.mean, 0.0)
        rectified = seen.lo >= 0
        b = np.where(both, seen.b, np.where(rectified, seen.mean_positive, seen.mean_abs))
        sigma = np.sqrt(np.where(both, seen.variance, np.where(rectified, seen.rms_positive**2, seen.second_moment)))
        return cls(center, b, sigma, below, above, seen.lo, seen.hi)

    def range(self, width: FloatArray, steps: int, clip: Callable[[int, bool], float]) -> Range:
        """[center - α, center + α], or the half of it that has values, α being ``width`` times the prior's clip."""
        alpha = width * np.where(self.below & self.above, clip(steps, False), clip(steps, True))
        lo, hi = np.where(self.below, self.center - alpha, 0.0), np.where(self.above, self.center + alpha, 0.0)
        return Range(np.clip(lo, np.minimum(self.lo, 0), self.hi), np.clip(hi, self.lo, np.maximum(self.hi, 0)))


def channels_of(stats: TensorStatistics) -> ChannelStatistics:
    """Statistics of each channel; StatisticsError where they were not observed."""
    if stats.channels is None:
        raise StatisticsError(
            "a range for each channel needs statistics of each channel, and only the whole tensor was observed; "
            'observe again with granularity = "per_channel" for this tensor'
        )
    return stats.channels


def within(stats: TensorStatistics, lo: npt.ArrayLike, hi: npt.ArrayLike) -> Range:
    """The range [lo, hi] cut at the least and greatest value seen."""
    return Range(np.clip(lo, stats.lo, stats.hi), np.clip(hi, stats.lo, stats.hi))


def is_zero(stats: TensorStatistics) -> bool:
    """Whether nothing but zeros was seen, or nothing at all: every method then returns [0, 0]."""
    return stats.lo == 0 and stats.hi == 0


def partial_moments(bins: Bins, x: npt.ArrayLike) -> FloatArray:
    """Sums of 1, v and v² over the non-zero values v between 0 and x; float64 (3, *x.shape), negative for x < 0.

    Values are spread evenly over their bin, so that a bin is cut at x in proportion.
    """
    x = np.asarray(x, np.float64)
    terms: FloatArray = bins.inside.take(np.searchsorted(bins.hi, x, side="right"), axis=1)
    power, cut, sums = terms[0], np.maximum(x, terms[1]), terms[2:]
    for i, share in enumerate((1, 1 / 2, 1 / 3)):
        power = power * cut
        sums[i] += power * share
    return sums


def mirrored(bins: Bins) -> Bins:
    """The histogram of -x."""
    return type(bins)(-bins.hi[::-1], -bins.lo[::-1], bins.count[::-1])


def magnitudes(bins: Bins) -> Bins:
    """The histogram of |x|."""
    negative = bins.hi <= 0
    lo = np.concatenate([bins.lo[~negative], -bins.hi[negative]])
    order = np.argsort(lo, kind="stable")
    lo = lo[order]
    hi = np.concatenate([bins.hi[~negative], -bins.lo[negative]])[order]
    count = np.concatenate([bins.count[~negative], bins.count[negative]])[order]
    starts = np.flatnonzero(np.diff(lo, prepend=-1.0))
    if not starts.size:
        return bins
    return type(bins)(lo[starts], np.maximum.reduceat(hi, starts), np.add.reduceat(count, starts))


def nonzero(bins: Bins) -> Bins:
    """The histogram without exact zeros."""
    kept = (bins.lo != 0) | (bins.hi != 0)
    return type(bins)(bins.lo[kept], bins.hi[kept], bins.count[kept])


def quantile(bins: Bins, percent: float) -> float:
    """The value that ``percent`` of the values lie under, interpolated inside its bin; 100 is the upper end."""
    if percent >= 100:
        return float(bins.hi[-1])
    seen = np.cumsum(bins.count)
    target = percent / 100 * bins.total
    i = int(np.searchsorted(seen, target))
    share = 1 - (seen[i] - target) / bins.count[i]
    return float(bins.lo[i] + share * (bins.hi[i] - bins.lo[i]))


def tail_error(bins: Bins, end: FloatArray, sign: int) -> tuple[FloatArray, FloatArray]:
    """Squared distance to ``end`` summed over the non-zero values beyond it, and their number.

    ``sign`` is 1 for an upper and -1 for a lower end; both results float64 of ``end``'s shape.
    """
    total = bins.prefix[:, -1 if sign > 0 else 0].reshape(3, *[1] * end.ndim)
    count, first, second = sign * (total - partial_moments(bins, end))
    return np.maximum(second - 2 * end * first + end**2 * count, 0), count


def mean_deviation(bins: Bins, about: float) -> float:
    """E|X - m|."""
    return bins.mean(np.abs(bins.center - about))


@lru_cache(maxsize=64)
def laplace_clip(steps: int, one_sided: bool) -> float:
    """Optimal clip of a Laplace prior in units of b: W(3n²), one-sided W(12n²), W being Lambert's function.

    Banner, Nahshan, Hoffer, Soudry: Post-training 4-bit quantization of convolution networks for rapid-deployment
    (ACIQ), 2019, from 2b²e^(-α/b) + α²/(3n²); published for n = 2^M: 2.83, 3.89, 5.03 at M = 2, 3, 4.
    """
    target = math.log((12 if one_sided else 3) * float(steps) ** 2)
    clip = target
    for _ in range(_NEWTON):  # w + ln w = target, concave in w
        clip = clip * (1 + target - math.log(clip)) / (1 + clip)
    return clip


@lru_cache(maxsize=64)
def gauss_clip(steps: int, one_sided: bool) -> float:
    """Optimal clip of a Gaussian prior in units of σ: the α of least (1 + α²)erfc(α/√2) - √(2/π)αe^(-α²/2) + α²/(3n²).

    The root of its derivative, α·erfc(α/√2) - √(2/π)e^(-α²/2) + α/(3n²) = 0; one-sided 12n² for 3n². ACIQ, 2019 (see
    :func:`laplace_clip`); published for n = 2^M: 1.71, 2.15, 2.56 at M = 2, 3, 4.
    """
    noise = 1 / ((12 if one_sided else 3) * float(steps) ** 2)
    alpha = 0.0
    for _ in range(_NEWTON):  # the derivative is concave in α >= 0, and below 0 left of its root
        tail = math.erfc(alpha / math.sqrt(2))
        slope = alpha * tail - math.sqrt(2 / math.pi) * math.exp(-(alpha**2) / 2) + noise * alpha
        alpha -= slope / (tail + noise)
    return alpha
