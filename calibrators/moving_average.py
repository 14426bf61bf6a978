"""An exponential moving average of each sample's least and greatest value.

With x_i the least (greatest) value of sample i and c the weight of a new sample, r_0 = x_0 and
r_i = (1 - c)·r_(i-1) + c·x_i, so r = (1 - c)^k·x_0 + Σ_{i=1..k} c·(1 - c)^(k-i)·x_i. Jacob et al.: Quantization and
training of neural networks for efficient integer-arithmetic-only inference, 2018, section 3.1.
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
class MovingAverage:
    """Exponential moving average over the samples one by one; by definition it depends on the order of the data.

    Samples run by their position in the data, whatever order they were observed or merged in. Where positions repeat
    (statistics of several data sets were merged) they run in the order merged.

    Attributes:
        constant: weight c of a new sample, above 0 and at most 1 (a momentum of 0.99 is a constant of 0.01).
    """

    constant: float = 0.01

    name: ClassVar[str] = "moving_average"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.SAMPLES})

    def __post_init__(self) -> None:
        if not 0 < self.constant <= 1:
            raise RecipeError(
                f"moving_average: constant is {self.constant}; give a weight above 0 and at most 1, e.g. 0.01"
            )

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the averages of the samples' least and greatest values."""
        del spec
        records = stats.records[~np.isnan(stats.records["lo"])]
        if records.size == 0:
            return within(stats, 0, 0)
        if np.unique(records["position"]).size == records.size:
            records = records[np.argsort(records["position"])]
        age = np.arange(records.size - 1, -1, -1)
        weights = np.where(age == age[0], 1.0, self.constant) * (1 - self.constant) ** age
        return within(stats, weights @ records["lo"].astype(np.float64), weights @ records["hi"].astype(np.float64))
