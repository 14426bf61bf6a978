from __future__ import annotations

from collections.abc import Callable

from qdqtool.calibrators.minmax import MinMax
from qdqtool.spec import FORMATS, QuantSpec
from qdqtool.statistics.tensor import TensorStatistics


def test_range_is_least_and_greatest_value(observe: Callable[..., TensorStatistics]) -> None:
    chosen = MinMax().choose(observe([-1.25, 0.5, 3.75]), QuantSpec(FORMATS["uint8"]))
    assert [chosen.lo, chosen.hi] == [-1.25, 3.75]
    assert chosen.lo.shape == ()
