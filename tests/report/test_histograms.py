from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdqtool.report.histograms import BARS, binned
from qdqtool.statistics.tensor import TensorStatistics
from tests.builders import Array
from tests.report.runs import Again, Run


def statistics(values: Array) -> TensorStatistics:
    stats = TensorStatistics()
    stats.observe(values.astype(np.float32), [(b"sample", 0)])
    return stats


def rebinned(values: Array, bars: int) -> Array:
    stats = statistics(values)
    return binned(stats.bins, stats.lo, stats.hi, bars)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50), st.integers(1, 300))
def test_no_value_is_lost(values: list[float], bars: int) -> None:
    assert math.isclose(rebinned(np.array(values), bars).sum(), len(values))


def test_bars_are_numpys_own_but_for_values_at_an_edge() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    found = rebinned(values, 50)
    expected, _ = np.histogram(values, 50)
    assert np.abs(found - expected).max() < 0.002 * values.size


def test_zeros_lie_in_the_bar_that_zero_is_in() -> None:
    values = np.concatenate([np.zeros(1000), np.linspace(-1, 3, 401)])
    found = rebinned(values, 4)
    assert found.argmax() == 1
    np.testing.assert_allclose(found, [100, 1100, 100, 101], atol=2)


def test_one_value_is_one_bar() -> None:
    assert rebinned(np.full(7, 2.5), 10).tolist() == [7.0]


def test_every_observed_tensor_has_the_range_of_the_model_and_of_all_calibrators(finished: Run) -> None:
    stats = finished.state.statistics
    assert stats is not None
    tensors = {one.tensor: one for one in finished.report.tensors if one.kind == "activation"}
    assert finished.data.histograms
    for one in finished.data.histograms:
        assert len(one.counts) <= BARS
        assert math.isclose(sum(one.counts), stats[one.tensor].count, rel_tol=1e-9)
        assert (one.chosen.lo, one.chosen.hi) == (tensors[one.tensor].lo, tensors[one.tensor].hi)
        by_name = {candidate.calibrator: candidate for candidate in one.candidates}
        assert {"minmax", "percentile", "entropy", "mse", "aciq", "auto", "moving_average"} <= by_name.keys()
        assert by_name["minmax"].hi == pytest.approx(max(stats[one.tensor].hi, 0), rel=1e-6)
        assert one.chosen.sqnr_db == pytest.approx(by_name["mse"].sqnr_db, abs=0.5)


def test_weights_alone_have_no_histogram(again: Again) -> None:
    assert again(precision="w4a16").data.histograms == ()
