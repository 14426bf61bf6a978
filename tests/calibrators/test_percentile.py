from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qdqtool.calibrators.percentile import Percentile
from qdqtool.errors import RecipeError
from qdqtool.spec import FORMATS, QuantSpec
from qdqtool.statistics.tensor import TensorStatistics

Observe = Callable[..., TensorStatistics]
ASYMMETRIC, SYMMETRIC = QuantSpec(FORMATS["uint8"]), QuantSpec(FORMATS["int8"], symmetric=True)


@pytest.mark.parametrize("spec", [ASYMMETRIC, SYMMETRIC], ids=str)
def test_hundred_is_minmax_exactly(observe: Observe, spec: QuantSpec) -> None:
    x = np.random.default_rng(3).standard_normal(1001).astype(np.float32)
    chosen = Percentile(100).choose(observe(x), spec)
    assert (chosen.lo, chosen.hi) == (x.min(), x.max())


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_both_tails_agree_with_numpy(observe: Observe, percent: float) -> None:
    x = np.random.default_rng(4).gumbel(size=100_000).astype(np.float32)
    chosen = Percentile(percent).choose(observe(x), ASYMMETRIC)
    expected = np.percentile(x.astype(np.float64), [100 - percent, percent])
    np.testing.assert_allclose([chosen.lo, chosen.hi], expected, rtol=1e-3)


def test_symmetric_counts_magnitudes(observe: Observe) -> None:
    x = np.random.default_rng(5).standard_normal(100_000).astype(np.float32)
    chosen = Percentile(99).choose(observe(x), SYMMETRIC)
    assert chosen.hi == -chosen.lo == pytest.approx(np.percentile(np.abs(x), 99), rel=1e-3)


def test_position_inside_a_bin_is_interpolated(observe: Observe) -> None:
    x = np.linspace(1024, 1025, 1001, dtype=np.float32)  # ten mantissa bits: all but the last value share a bin
    chosen = Percentile(75).choose(observe(x), ASYMMETRIC)
    assert chosen.hi == pytest.approx(1024.75, abs=2e-3)
    assert chosen.lo == pytest.approx(1024.25, abs=2e-3)


@pytest.mark.parametrize("spec", [ASYMMETRIC, SYMMETRIC], ids=str)
def test_mostly_zero_tensor_keeps_the_range_of_its_other_values(observe: Observe, spec: QuantSpec) -> None:
    x = np.zeros(1_000_000, np.float32)
    x[:50] = np.linspace(1, 2, 50)
    assert Percentile(99.9).choose(observe(x), spec).hi == pytest.approx(2, rel=0.01)
    assert Percentile(99.9).choose(observe(-x), spec).lo == pytest.approx(-2, rel=0.01)


def test_negated_data_give_the_negated_range(observe: Observe) -> None:
    x = np.random.default_rng(6).gumbel(size=1000).astype(np.float32)
    there, back = (Percentile(98.7).choose(observe(v), ASYMMETRIC) for v in (x, -x))
    assert (there.lo, there.hi) == (-back.hi, -back.lo)


@pytest.mark.parametrize("percent", [50.0, 0.0, 100.5])
def test_percentile_outside_its_interval_is_refused(percent: float) -> None:
    with pytest.raises(RecipeError, match="percentile"):
        Percentile(percent)
