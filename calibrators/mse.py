"""The range of least expected squared error on the histogram, jointly over both ends when asymmetric.

First the model E(a, b) of :mod:`qdqtool.statistics.distribution` (clipping plus Δ²/12) on a geometric grid over three
decades, refined around its least cell; then the exact error of :func:`qdqtool.arithmetic.affine.expected_error` around
that point, where end codes, the rounded zero point and discrete values count, with minmax, and ranges a step wider,
among the candidates. Sung, Shin, Hwang: Resiliency of deep neural networks under quantization, 2015 (L2-optimal step);
Choukroun et al.: Low-bit quantization of neural networks, 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from qdqtool.arithmetic.affine import expected_error, params_from_range
from qdqtool.arithmetic.channel_error import least_of_statistics
from qdqtool.calibrator_api import Stat
from qdqtool.spec import FloatArray, IntArray, QuantSpec, Range
from qdqtool.statistics.distribution import Side, channels_of, is_zero, tail_error, within
from qdqtool.statistics.histogram import Bins
from qdqtool.statistics.tensor import TensorStatistics

_COARSE = 32  # points of the grid from one cell to the next, about 15 % apart
_GRID: FloatArray = 0.995 ** np.arange(1377.0)  # shares of an observed end, down to 1/1000
_BUDGET = 4000  # codes looked up in one round of exact scoring; three times as many where they may lie on few values
_FEW = 100  # affordable ranges up to which both ends are scaled together
_DISCRETE = 4  # occupied bins for each code up to which values may lie on a grid of their own
_MANY = 1 << 13  # occupied bins above which small values share bins
_FINE = 4095  # steps above which the model alone is exact enough
_FAR = 2.0**-10  # of the greatest magnitude: values below it share bins of
_WIDTH = 2.0**-20  # of it: a quarter of a step even where 8 bits cover 1/1000 of the range


@dataclass(frozen=True)
class Mse:
    """Minimises the expected squared error; never worse than minmax on the same histogram."""

    name: ClassVar[str] = "mse"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES, Stat.HISTOGRAM})

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the range of least error, minmax on a tie; or that of each channel."""
        if spec.granularity.axis is not None:
            return least_of_statistics(channels_of(stats), spec)
        if is_zero(stats):
            return within(stats, 0, 0)
        search = _Search(stats, spec)
        best = search.model()
        candidates = [np.ones(2), best]
        for factors in search.rounds():
            candidates[1:] = [best, search.exact(factors, candidates[-1])]
        inside = [np.concatenate([search.ends(u, v)[end].reshape(1) for u, v in candidates]) for end in (0, 1)]
        lo, hi = (np.concatenate(pair) for pair in zip(inside, search.widened(), strict=True))
        least = int(np.argmin(expected_error(search.bins, lo, hi, spec)))
        return within(stats, lo[least], hi[least]) if least < len(candidates) else Range(lo[least], hi[least])


class _Search:
    """Ranges of one tensor as points (u, v) in (0, 1]²: the lower and upper end as shares of what was observed.

    With one threshold only v counts.
    """

    def __init__(self, stats: TensorStatistics, spec: QuantSpec) -> None:
        self.spec, self.side = spec, Side.of(stats, spec)
        self.lo, self.hi, self.occupied = stats.lo, stats.hi, stats.bins.count.size
        self.bins = _merged_far_below_top(stats.bins.weighted(spec.negative_weight))
        self.discrete = self.occupied <= _DISCRETE * (spec.steps + 1)
        self.affordable = _BUDGET * (3 if self.discrete else 1) // spec.steps
        self.apart = self.side is Side.BOTH and self.affordable > _FEW

    def ends(self, u: npt.ArrayLike, v: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Both ends of the range at shares u and v."""
        if self.side is Side.BOTH:
            return np.asarray(u) * self.lo, np.asarray(v) * self.hi
        return self.side.ends(np.asarray(v) * max(-self.lo, self.hi))

    def model(self) -> FloatArray:
        """The point of the grid with the least clipping plus uniform rounding error.

        Every end is looked up once. Both ends together are searched on every 32nd point first, then around the least.
        """
        lo, hi = self.ends(_GRID, _GRID)
        below, above = tail_error(self.bins, lo, -1), tail_error(self.bins, hi, 1)
        values = self.bins.prefix[0, -1] - self.bins.prefix[0, 0]

        def least(i: IntArray, j: IntArray) -> tuple[int, int]:
            step = params_from_range(Range(*np.broadcast_arrays(lo[i], hi[j])), self.spec).scale.astype(np.float64)
            error = below[0][i] + above[0][j] + step**2 / 12 * (values - below[1][i] - above[1][j])
            at = np.unravel_index(int(np.argmin(error)), error.shape)
            return int(np.broadcast_to(i, error.shape)[at]), int(np.broadcast_to(j, error.shape)[at])

        every = np.arange(_GRID.size)
        if self.side is not Side.BOTH:
            return _GRID[[*least(every, every)]]
        i, j = least(every[::_COARSE, None], every[::_COARSE])
        for window in (np.arange(-_COARSE, _COARSE + 1, 4), np.arange(-4, 5)):
            near_i, near_j = (np.clip(at + window, 0, _GRID.size - 1) for at in (i, j))
            i, j = least(near_i[:, None], near_j)
        return _GRID[[i, j]]

    def rounds(self) -> tuple[FloatArray, ...]:
        """Factors around the model's best point for two rounds of exact scoring: the fewer codes, the wider."""
        if self.spec.steps > _FINE:
            return ()
        points = min(int(self.affordable**0.5), 15) if self.apart else min(self.affordable, 61)
        points = max(points, 3) | 1  # odd: the point itself stays among them
        spread = 1 + 2.4 / self.spec.steps**0.5
        finer = spread ** (1.5 / (points - 1))
        return np.geomspace(1 / spread, spread, points), np.geomspace(1 / finer, finer, points)

    def exact(self, factors: FloatArray, centre: FloatArray) -> FloatArray:
        """The point among ``factors`` times ``centre`` of least exact error, the ends apart where affordable."""
        u, v = (np.minimum(share * factors, 1.0) for share in centre)
        if self.apart:
            u, v = np.repeat(u, v.size), np.tile(v, u.size)
        lo, hi = self.ends(u, v)
        least = int(np.argmin(expected_error(self.bins, lo, hi, self.spec)))
        return np.array([u[least], v[least]])

    def widened(self) -> tuple[FloatArray, FloatArray]:
        """Ranges up to one and a half steps wider at either end than what was observed; none with one threshold.

        Values on a grid of their own (pixels scaled to [-1, 1]) can all lie half-way between two codes; then a slightly
        wider range has a third of the error.
        """
        if self.side is not Side.BOTH or self.spec.steps > _FINE or not self.discrete:
            return np.empty(0), np.empty(0)
        more = np.arange(4) * (self.hi - self.lo) / self.spec.steps / 2
        return (self.lo - np.repeat(more, 4))[1:], (self.hi + np.tile(more, 4))[1:]


def _merged_far_below_top(bins: Bins) -> Bins:
    """The histogram with the bins of values under 1/1000 of the greatest magnitude merged, to a millionth of it wide.

    No more than about 22,500 bins are left, all far finer than a step. A histogram that is small stays as it is, and so
    does the bin of exact zeros.
    """
    if bins.count.size <= _MANY:
        return bins
    top = max(-float(bins.lo[0]), float(bins.hi[-1]))
    far = slice(np.searchsorted(bins.lo, -_FAR * top), np.searchsorted(bins.hi, _FAR * top, side="right"))
    lo, hi, count = bins.lo[far], bins.hi[far], bins.count[far]
    if not count.size:
        return bins
    center = (lo + hi) / 2
    key = np.copysign(np.ceil(np.abs(center) / (_WIDTH * top)), center)
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    merged = (lo[starts], hi[np.append(starts[1:], count.size) - 1], np.add.reduceat(count, starts))
    parts = zip((bins.lo, bins.hi, bins.count), merged, strict=True)
    return Bins(*(np.concatenate([whole[: far.start], part, whole[far.stop :]]) for whole, part in parts))
