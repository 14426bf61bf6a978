"""Ranges that leave out a fixed share of the values.

With F⁻¹ the quantile function, [F⁻¹(1 - p), F⁻¹(p)]; of magnitudes [-F⁻¹(p), F⁻¹(p)] when symmetric. Wu et al.: Integer
quantization for deep learning inference, 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdqtool.calibrator_api import Stat
from qdqtool.errors import RecipeError
from qdqtool.spec import QuantSpec, Range
from qdqtool.statistics.distribution import Side, is_zero, magnitudes, mirrored, nonzero, quantile, within
from qdqtool.statistics.histogram import Bins
from qdqtool.statistics.tensor import TensorStatistics


@dataclass(frozen=True)
class Percentile:
    """The p-th percentile of the values at either end, of their magnitudes when symmetric; interpolated inside a bin.

    An end that falls on exact zero, as it does where nearly all values are 0, is taken among the other values instead.

    Attributes:
        percentile: p, above 50 and at most 100; 100 is minmax exactly.
    """

    percentile: float = 99.99

    name: ClassVar[str] = "percentile"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES, Stat.HISTOGRAM})

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise RecipeError(
                f"percentile: percentile is {self.percentile}; give one above 50 and at most 100, e.g. 99.99"
            )

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the range between the two percentiles."""
        if is_zero(stats) or self.percentile == 100:
            return within(stats, stats.lo, stats.hi)
        if Side.of(stats, spec) is Side.MAGNITUDE:
            return within(stats, *Side.MAGNITUDE.ends(self._upper(magnitudes(stats.bins))))
        return within(stats, -self._upper(mirrored(stats.bins)), self._upper(stats.bins))

    def _upper(self, bins: Bins) -> float:
        found = quantile(bins, self.percentile)
        others = bins if found else nonzero(bins)
        return found if others is bins or not others.total else quantile(others, self.percentile)
