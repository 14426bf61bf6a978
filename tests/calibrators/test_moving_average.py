from __future__ import annotations

import numpy as np
import pytest

from qdqtool.calibrators.moving_average import MovingAverage
from qdqtool.errors import RecipeError
from qdqtool.spec import FORMATS, QuantSpec
from qdqtool.statistics.tensor import TensorStatistics

SPEC = QuantSpec(FORMATS["uint8"])


def seen(values: list[float], position: int) -> TensorStatistics:
    stats = TensorStatistics()
    stats.observe(np.array(values, np.float32), [(b"%d" % position, position)])
    return stats


def test_each_sample_moves_the_average_by_its_weight() -> None:
    stats = seen([-1, 2], 0) | seen([-3, 4], 1) | seen([0, 8], 2)
    chosen = MovingAverage(constant=0.25).choose(stats, SPEC)
    assert chosen.lo == pytest.approx(0.75 * (0.75 * -1 + 0.25 * -3) + 0.25 * 0)
    assert chosen.hi == pytest.approx(0.75 * (0.75 * 2 + 0.25 * 4) + 0.25 * 8)


def test_default_weight_of_a_new_sample_is_one_percent() -> None:
    assert MovingAverage().choose(seen([0, 1], 0) | seen([0, 2], 1), SPEC).hi == pytest.approx(1.01)


def test_samples_run_in_the_order_of_the_data_however_they_were_merged() -> None:
    parts = [seen([-i, 2.0 * i], i) for i in (1, 2, 3)]
    forward, backward = parts[0] | parts[1] | parts[2], parts[2] | (parts[1] | parts[0])
    assert str(MovingAverage(0.3).choose(forward, SPEC)) == str(MovingAverage(0.3).choose(backward, SPEC))


def test_data_sets_with_equal_positions_run_in_the_order_merged() -> None:
    first, second = seen([0, 1], 0), seen([0, 2], 0)
    assert MovingAverage(0.25).choose(first | second, SPEC).hi == pytest.approx(1.25)
    assert MovingAverage(0.25).choose(second | first, SPEC).hi == pytest.approx(1.75)


def test_sample_without_finite_values_is_skipped() -> None:
    stats = seen([0, 1], 0) | seen([np.nan, np.inf], 1)
    assert MovingAverage(0.5).choose(stats, SPEC).hi == 1


@pytest.mark.parametrize("constant", [0.0, -0.1, 1.5])
def test_weight_outside_its_interval_is_refused(constant: float) -> None:
    with pytest.raises(RecipeError, match="constant"):
        MovingAverage(constant)
