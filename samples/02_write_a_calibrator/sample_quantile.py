"""A calibrator of one's own: a quantile of the samples' extremes, so that single bad samples do not count.

With x_i the greatest value of sample i the upper end is the q-th quantile of all x_i, the lower end that of the least
values from below. q = 1 is minmax, q = 0.5 the median sample's extremes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qdqtool.calibrator_api import Stat
from qdqtool.errors import RecipeError
from qdqtool.spec import QuantSpec, Range
from qdqtool.statistics.distribution import within
from qdqtool.statistics.tensor import TensorStatistics


@dataclass(frozen=True)
class SampleQuantile:
    """A quantile of the samples' extremes; a few bad samples do not widen the range.

    Attributes:
        quantile: q, from 0.5 to 1.
    """

    quantile: float = 0.9

    name: ClassVar[str] = "sample_quantile"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES, Stat.SAMPLES})

    def __post_init__(self) -> None:
        if not 0.5 <= self.quantile <= 1:
            raise RecipeError(f"sample_quantile: quantile is {self.quantile}; give one from 0.5 to 1, e.g. 0.9")

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the range between the two quantiles; [0, 0] where nothing finite was seen."""
        del spec  # the range is the same for every number format
        records = stats.records[~np.isnan(stats.records["lo"])]
        if records.size == 0:
            return within(stats, 0, 0)
        lo = np.quantile(records["lo"].astype(np.float64), 1 - self.quantile)
        return within(stats, lo, np.quantile(records["hi"].astype(np.float64), self.quantile))
