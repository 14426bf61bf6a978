"""Histogram feature map glutton: a histogram of equal bins is eaten from both ends, always where that costs least.

With B bins over all that was seen and edges e_0 < ... < e_B, the glutton starts at [e_0, e_B] and takes one bin at a
time from one end, never past 0: that of the two whose removal adds less to the clipping error

    C(a, b) = Σ_{x<a} (x - a)² + Σ_{x>b} (x - b)².

Of all the ranges that it passes, the one of least E(a, b) = C(a, b) + Δ²/12 · #{a <= x <= b, x != 0} is chosen, unless
the whole range makes a smaller error yet by :func:`qdqtool.arithmetic.affine.expected_error`. The next bin at an end
never costs less than the one before, so each end has an ascending list of costs and the path is the merge of the two;
and so no other range as wide that ends at edges is clipped with less error. With one threshold the path is that of its
end.

Huawei: Ascend Model Compression Toolkit (AMCT), "HFMG Algorithm": the batches' histograms are merged, and clipping
bounds are searched on the merged one. Ours merge exactly and are re-binned once, a bin's values spread evenly over it
and so over the new bins. AMCT's published program eats equal numbers of values, at the end where they fill more bins;
here the cost of each bin itself is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qdqtool.arithmetic.affine import expected_error, params_from_range
from qdqtool.calibrator_api import Stat
from qdqtool.errors import RecipeError
from qdqtool.spec import FloatArray, QuantSpec, Range
from qdqtool.statistics.distribution import Side, is_zero, tail_error, within
from qdqtool.statistics.tensor import TensorStatistics

_FINE = 4095  # steps above which E alone is exact enough


@dataclass(frozen=True)
class Hfmg:
    """Greedy search on a histogram of equal bins for the cuts of least squared error.

    Attributes:
        num_of_bins: bins that the histogram is re-cut into, from 128 to 65536 (AMCT takes 1024, 2048, 4096 and 8192).
    """

    num_of_bins: int = 4096

    name: ClassVar[str] = "hfmg"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES, Stat.HISTOGRAM})

    def __post_init__(self) -> None:
        if not 128 <= self.num_of_bins <= 65536:
            raise RecipeError(f"hfmg: num_of_bins is {self.num_of_bins}; give a number from 128 to 65536, e.g. 4096")

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the range of least error on the glutton's path, the widest among equals; never worse than minmax."""
        if is_zero(stats):
            return within(stats, 0, 0)
        lo, hi = self._path(stats, spec)
        bins = stats.bins
        below, above = tail_error(bins, lo, -1), tail_error(bins, hi, 1)
        step = params_from_range(Range(lo, hi), spec).scale.astype(np.float64)
        inside = bins.prefix[0, -1] - bins.prefix[0, 0] - below[1] - above[1]
        least = int(np.argmin(below[0] + above[0] + step**2 / 12 * inside))
        if least and spec.steps <= _FINE:
            least *= int(np.argmin(expected_error(bins, lo[[0, least]], hi[[0, least]], spec)))
        return within(stats, lo[least], hi[least])

    def _path(self, stats: TensorStatistics, spec: QuantSpec) -> tuple[FloatArray, FloatArray]:
        """Both ends of every range that the glutton passes, the widest first; float64 (m,)."""
        side = Side.of(stats, spec)
        if side is not Side.BOTH:
            return side.ends(np.linspace(max(-stats.lo, stats.hi), 0, self.num_of_bins + 1)[:-1])
        edges = np.linspace(stats.lo, stats.hi, self.num_of_bins + 1)
        lo, hi = edges[edges <= 0], edges[edges >= 0][::-1]
        costs = [np.diff(tail_error(stats.bins, end, sign)[0]) for end, sign in ((lo, -1), (hi, 1))]
        from_lower = np.argsort(np.concatenate(costs), kind="stable") < lo.size - 1
        eaten = np.concatenate([[0], np.cumsum(from_lower)])
        return lo[eaten], hi[np.arange(eaten.size) - eaten]
