"""The range of least expected squared error on the histogram, jointly over both ends when asymmetric.

First the model E(a, b) of :mod:`qdqtool.distribution` (clipping plus Δ²/12) on a geometric grid over three decades,
refined around its least cell; then the exact error of :func:`qdqtool.affine.expected_error` around that point, where
end codes, the rounded zero point and discrete values count, with minmax, and ranges a step wider, among the
candidates. Sung, Shin, Hwang:
Resiliency of deep neural networks under quantization, 2015 (L2-optimal step); Choukroun et al.: Low-bit quantization
of neural networks, 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from qdqtool.affine import expected_error, params_from_range
from qdqtool.calibrator_api import Stat
from qdqtool.distribution import Side, is_zero, tail_error, within
from qdqtool.spec import FloatArray, QuantSpec, Range
from qdqtool.statistics import TensorStatistics

_RATIO = 0.85  # of neighbours on the coarse grid
_GRID: FloatArray = _RATIO ** np.arange(44.0)  # down to 1/1000 of an observed end
_BUDGET = 4000  # codes looked up in one round of exact scoring
_DISCRETE = 4  # occupied bins for each code up to which values may lie on a grid of their own
_FINE = 4095  # steps above which the model alone is exact enough


@dataclass(frozen=True)
class Mse:
    """Minimises the expected squared error; never worse than minmax on the same histogram."""

    name: ClassVar[str] = "mse"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES, Stat.HISTOGRAM})

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the range of least error, minmax on a tie."""
        if is_zero(stats):
            return within(stats, 0, 0)
        search = _Search(stats, spec)
        best = search.model(_GRID, np.ones(2))
        for factors in (np.linspace(_RATIO, 1 / _RATIO, 13), np.linspace(0.97, 1.03, 7)):
            best = search.model(factors, best)
        candidates = [np.ones(2), best]
        if spec.steps <= _FINE:
            for factors in search.rounds():
                best = search.exact(factors, best)
            candidates.append(best)
        inside = [np.concatenate([search.ends(u, v)[end].reshape(1) for u, v in candidates]) for end in (0, 1)]
        lo, hi = (np.concatenate(pair) for pair in zip(inside, search.widened(), strict=True))
        least = int(np.argmin(expected_error(stats.bins, lo, hi, spec)))
        return within(stats, lo[least], hi[least]) if least < len(candidates) else Range(lo[least], hi[least])


class _Search:
    """Ranges of one tensor as points (u, v) in (0, 1]²: the lower and upper end as shares of what was observed.

    With one threshold only v counts.
    """

    def __init__(self, stats: TensorStatistics, spec: QuantSpec) -> None:
        self.stats, self.spec, self.side = stats, spec, Side.of(stats, spec)

    def rounds(self) -> tuple[FloatArray, FloatArray]:
        """Factors around the model's best point for two rounds of exact scoring: the fewer codes, the wider."""
        affordable = _BUDGET / self.spec.steps
        points, most = (int(affordable**0.5), 15) if self.side is Side.BOTH else (int(affordable), 61)
        points = max(min(points, most), 3) | 1  # odd: the point itself stays among them
        spread = 1 + 2.4 / self.spec.steps**0.5
        finer = spread ** (1.5 / (points - 1))
        return np.geomspace(1 / spread, spread, points), np.geomspace(1 / finer, finer, points)

    def ends(self, u: npt.ArrayLike, v: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Both ends of the range at shares u and v."""
        if self.side is Side.BOTH:
            return np.asarray(u) * self.stats.lo, np.asarray(v) * self.stats.hi
        return self.side.ends(np.asarray(v) * max(-self.stats.lo, self.stats.hi))

    def widened(self) -> tuple[FloatArray, FloatArray]:
        """Ranges up to one and a half steps wider at either end than what was observed; none with one threshold.

        Values on a grid of their own (pixels scaled to [-1, 1]) can all lie half-way between two codes; then a slightly
        wider range has a third of the error.
        """
        discrete = self.stats.bins.count.size <= _DISCRETE * (self.spec.steps + 1)
        if self.side is not Side.BOTH or self.spec.steps > _FINE or not discrete:
            return np.empty(0), np.empty(0)
        step = (self.stats.hi - self.stats.lo) / self.spec.steps
        more = np.arange(4) * step / 2
        return (self.stats.lo - np.repeat(more, 4))[1:], (self.stats.hi + np.tile(more, 4))[1:]

    def model(self, factors: FloatArray, centre: FloatArray) -> FloatArray:
        """The point among ``factors`` times ``centre`` of least clipping plus uniform rounding error."""
        u, v = self._around(factors, centre)
        lo, hi = self.ends(u, v)
        below, above = tail_error(self.stats.bins, lo, -1), tail_error(self.stats.bins, hi, 1)
        width = np.broadcast_arrays(lo, hi)
        step = params_from_range(Range(*width), self.spec).scale.astype(np.float64)
        inside = self.stats.bins.prefix[0, -1] - self.stats.bins.prefix[0, 0] - below[1] - above[1]
        return _least(below[0] + above[0] + step**2 / 12 * inside, u, v)

    def exact(self, factors: FloatArray, centre: FloatArray) -> FloatArray:
        """The same by the exact error."""
        u, v = self._around(factors, centre)
        lo, hi = np.broadcast_arrays(*self.ends(u, v))
        return _least(expected_error(self.stats.bins, lo.ravel(), hi.ravel(), self.spec).reshape(lo.shape), u, v)

    def _around(self, factors: FloatArray, centre: FloatArray) -> tuple[FloatArray, FloatArray]:
        u, v = (np.minimum(share * factors, 1.0) for share in centre)
        return (u[:, None], v) if self.side is Side.BOTH else (v, v)


def _least(error: FloatArray, u: FloatArray, v: FloatArray) -> FloatArray:
    at = np.unravel_index(int(np.argmin(error)), error.shape)
    return np.array([np.broadcast_to(share, error.shape)[at] for share in (u, v)])
