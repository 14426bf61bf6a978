"""The range of everything that was seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdqtool.calibrator_api import Stat
from qdqtool.spec import QuantSpec, Range
from qdqtool.statistics.distribution import channels_of, within
from qdqtool.statistics.tensor import TensorStatistics


@dataclass(frozen=True)
class MinMax:
    """Least and greatest value seen: nothing is clipped, and one outlier widens every step."""

    name: ClassVar[str] = "minmax"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES})

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return [min x, max x], or that of each channel."""
        if spec.granularity.axis is not None:
            seen = channels_of(stats)
            return Range(seen.lo, seen.hi)
        return within(stats, stats.lo, stats.hi)
