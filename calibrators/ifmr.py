"""Input feature map reconstruction: the range around a percentile that rebuilds the tensor itself with least error.

With p⁺ and p⁻ the two percentiles, widened to contain 0, and factors f_i = start + i·step up to end, the candidates are

    [f_i·p⁻, f_j·p⁺] for all i and j,   [-f_i·t, f_i·t] with t = max(-p⁻, p⁺) when symmetric,

cut at what was seen, and the chosen one has the least Σ (x - x̂)² over the tensor's values x and what they become. The
sum is not run for every pair: the model E(a, b) of :mod:`qdqtool.statistics.distribution` picks the best few, and the
exact error of :func:`qdqtool.arithmetic.affine.expected_error` decides among them. Huawei: Ascend Model Compression
Toolkit (AMCT), "IFMR Algorithm", whose documentation traverses both ends as here, while its published program moves the
upper one alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qdqtool.arithmetic.affine import expected_error, params_from_range
from qdqtool.calibrator_api import Stat
from qdqtool.errors import RecipeError
from qdqtool.spec import FloatArray, QuantSpec, Range
from qdqtool.statistics.distribution import Side, is_zero, mirrored, quantile, tail_error, within
from qdqtool.statistics.tensor import TensorStatistics

_BEST = 16  # candidates of the least modelled error that are scored exactly
_FINE = 4095  # steps above which the model alone is exact enough
_MOST = 1000  # factors of one end


@dataclass(frozen=True)
class Ifmr:
    """Searches factors of a percentile for the least squared error; options and defaults are those of AMCT.

    Where a percentile is exact zero, that end is 0; where both are, the search starts from all that was seen.

    Attributes:
        max_percentile: share of the values that lie under the upper end before the search, above 0.5 and at most 1.
        min_percentile: share of the values that lie above the lower end before the search, likewise.
        search_range_start: least factor, above 0.
        search_range_end: greatest factor; ends beyond what was seen are cut there.
        search_step: distance between two factors.
    """

    max_percentile: float = 0.999999
    min_percentile: float = 0.999999
    search_range_start: float = 0.7
    search_range_end: float = 1.3
    search_step: float = 0.01

    name: ClassVar[str] = "ifmr"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES, Stat.HISTOGRAM})

    def __post_init__(self) -> None:
        for field in ("max_percentile", "min_percentile"):
            if not 0.5 < getattr(self, field) <= 1:
                raise RecipeError(
                    f"ifmr: {field} is {getattr(self, field)}; give a share above 0.5 and at most 1, e.g. 0.999999"
                )
        start, end = self.search_range_start, self.search_range_end
        if not 0 < start <= end < np.inf:
            raise RecipeError(
                f"ifmr: factors are searched from {start} to {end}; give 0 < start <= end, e.g. 0.7 and 1.3"
            )
        if not (end - start) / _MOST <= self.search_step < np.inf or self.search_step == 0:
            raise RecipeError(
                f"ifmr: search_step is {self.search_step}; give one above 0 that makes at most {_MOST} factors from "
                f"{start} to {end}, e.g. 0.01"
            )

    @property
    def factors(self) -> FloatArray:
        """What the percentiles are multiplied by, ascending; float64 (m,)."""
        steps = int((self.search_range_end - self.search_range_start) / self.search_step + 1e-9)
        factors: FloatArray = self.search_range_start + self.search_step * np.arange(steps + 1.0)
        return factors

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the candidate of least error, the narrowest among equals."""
        if is_zero(stats):
            return within(stats, 0, 0)
        least, greatest = stats.lo, stats.hi
        lower = max(quantile(mirrored(stats.bins), 100 * self.min_percentile), 0.0)
        upper = max(quantile(stats.bins, 100 * self.max_percentile), 0.0)
        if lower == upper == 0:
            lower, upper = max(-least, 0.0), max(greatest, 0.0)
        side = Side.of(stats, spec)
        if side is Side.BOTH:
            lo, hi = -self._ends(lower, -least)[:, None], self._ends(upper, greatest)
        else:
            lo, hi = side.ends(self._ends(max(lower, upper), max(-least, greatest)))
        return within(stats, *_reconstructed(stats, lo, hi, spec))

    def _ends(self, percentile: float, seen: float) -> FloatArray:
        return np.unique(np.minimum(self.factors * percentile, seen))


def _reconstructed(stats: TensorStatistics, lo: FloatArray, hi: FloatArray, spec: QuantSpec) -> tuple[float, float]:
    """The ends, among those that ``lo`` and ``hi`` broadcast to, with the least squared error on the histogram."""
    bins = stats.bins
    below, above = tail_error(bins, lo, -1), tail_error(bins, hi, 1)
    lows, highs = np.broadcast_arrays(lo, hi)
    step = params_from_range(Range(lows, highs), spec).scale.astype(np.float64)
    inside = bins.prefix[0, -1] - bins.prefix[0, 0] - below[1] - above[1]
    modelled = below[0] + above[0] + step**2 / 12 * inside
    best = np.argsort(modelled, axis=None, kind="stable")[: _BEST if spec.steps <= _FINE else 1]
    lows, highs = lows.ravel()[best], highs.ravel()[best]
    least = int(np.argmin(expected_error(bins, lows, highs, spec))) if best.size > 1 else 0
    return float(lows[least]), float(highs[least])
