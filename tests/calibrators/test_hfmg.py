from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdqtool.arithmetic.affine import expected_error
from qdqtool.calibrators.hfmg import Hfmg
from qdqtool.calibrators.mse import Mse
from qdqtool.errors import RecipeError
from qdqtool.spec import FORMATS, QuantSpec, Range
from qdqtool.statistics.distribution import tail_error
from qdqtool.statistics.tensor import TensorStatistics

Array = npt.NDArray[np.float32]
Observe = Callable[..., TensorStatistics]
Sqnr = Callable[[Array, Range, QuantSpec], float]
ASYMMETRIC, SYMMETRIC = QuantSpec(FORMATS["uint8"]), QuantSpec(FORMATS["int8"], symmetric=True)


def skewed(seed: int, size: int = 500) -> Array:
    """A tensor of both signs whose two tails differ."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.standard_t(2, size), -rng.exponential(rng.uniform(0.1, 3), size)]).astype(np.float32)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_no_other_range_as_wide_is_clipped_with_less_error(seed: int) -> None:
    x, bins = skewed(seed), 128
    stats = TensorStatistics()
    stats.observe(x, [(b"0" * 16, 0)])
    lo, hi = Hfmg(bins)._path(stats, ASYMMETRIC)
    edges = np.linspace(float(x.min()), float(x.max()), bins + 1)
    lower, upper = edges[edges <= 0], edges[edges >= 0][::-1]
    cost = tail_error(stats.bins, lower, -1)[0][:, None] + tail_error(stats.bins, upper, 1)[0]
    eaten = np.add.outer(np.arange(lower.size), np.arange(upper.size))
    passed = tail_error(stats.bins, lo, -1)[0] + tail_error(stats.bins, hi, 1)[0]
    for number, found in enumerate(passed):
        assert found <= cost[eaten == number].min() * (1 + 1e-9)


@pytest.mark.parametrize("spec", [ASYMMETRIC, SYMMETRIC], ids=str)
def test_path_narrows_from_all_that_was_seen_and_keeps_zero(observe: Observe, spec: QuantSpec) -> None:
    x = skewed(3)
    lo, hi = Hfmg()._path(observe(x), spec)
    farthest = np.abs(x).max()
    assert [lo[0], hi[0]] == ([-farthest, farthest] if spec.symmetric else [x.min(), x.max()])
    assert (np.diff(hi - lo) < 0).all()
    assert (lo <= 0).all()
    assert (hi >= 0).all()
    assert (hi > lo).all()


@pytest.mark.parametrize("fmt", ["uint8", "uint4", "int8", "int4"])
@pytest.mark.parametrize("name", ["gauss", "laplace", "relu", "t3"])
def test_a_fine_histogram_finds_the_least_squared_error(
    observe: Observe, sqnr_db: Sqnr, many_samples: dict[str, Array], name: str, fmt: str
) -> None:
    x, spec = many_samples[name], QuantSpec(FORMATS[fmt], symmetric=fmt.startswith("int"))
    stats = observe(x)
    assert sqnr_db(x, Hfmg().choose(stats, spec), spec) > sqnr_db(x, Mse().choose(stats, spec), spec) - 0.1


def test_only_the_end_with_the_long_tail_is_eaten(observe: Observe) -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate([-rng.uniform(0, 3, 50_000), rng.exponential(size=50_000)]).astype(np.float32)
    chosen = Hfmg().choose(observe(x), QuantSpec(FORMATS["uint4"]))
    assert chosen.lo < -2.7
    assert chosen.hi < 0.6 * x.max()


def test_cuts_lie_on_edges_of_equal_bins(observe: Observe, samples: dict[str, Array]) -> None:
    x = samples["laplace"]
    chosen = Hfmg(128).choose(observe(x), QuantSpec(FORMATS["uint4"]))
    position = (np.array([chosen.lo, chosen.hi]) - x.min()) / (float(x.max()) - float(x.min())) * 128
    np.testing.assert_allclose(position, np.rint(position), atol=1e-6)
    assert 0 < position[0] < position[1] < 128


@pytest.mark.parametrize("fmt", ["uint2", "uint4", "uint8", "uint16"])
@pytest.mark.parametrize("seed", range(10))
def test_never_worse_than_minmax_on_the_histogram(observe: Observe, seed: int, fmt: str) -> None:
    rng = np.random.default_rng(seed)
    x = rng.choice([rng.standard_normal(50), rng.standard_cauchy(50), rng.integers(-3, 9, 50)])
    stats, spec = observe(x), QuantSpec(FORMATS[fmt])
    chosen = Hfmg().choose(stats, spec)
    mine, minmax = expected_error(stats.bins, np.array([chosen.lo, stats.lo]), np.array([chosen.hi, stats.hi]), spec)
    assert mine <= minmax


@pytest.mark.parametrize("bins", [0, 127, 65537])
def test_number_of_bins_outside_its_interval_is_refused(bins: int) -> None:
    with pytest.raises(RecipeError, match=f"num_of_bins is {bins}; give a number from 128 to 65536"):
        Hfmg(bins)
