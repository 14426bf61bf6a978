"""Shares of bits against every split there is, and the experiment of the source."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks.bit_allocation import CHANNELS, LEVELS, RATIOS, gaussian_errors, shared_bits, shared_levels
from qdqtool.arithmetic import bit_allocation
from qdqtool.spec import FloatArray, IntArray

ALPHA = arrays(np.float64, st.integers(1, 40), elements=st.sampled_from([0.0]) | st.floats(1e-6, 1e6))
GAUSS = gaussian_errors(256)
WIDTHS = np.arange(9)


@st.composite
def tables(draw: st.DrawFn) -> FloatArray:
    """Errors of a few channels at 0 to 4 bits, falling in no particular way, equal and dead channels among them."""
    rows = draw(st.lists(st.lists(st.floats(1e-6, 1.0), min_size=5, max_size=5), min_size=1, max_size=5))
    made: FloatArray = -np.sort(-(np.array(rows) ** draw(st.integers(1, 6))), axis=1)
    if draw(st.booleans()):
        made[-1] = made[0]
    if draw(st.booleans()):
        made[-1] = 0
    return made


def gaussian(alpha: FloatArray) -> FloatArray:
    """Errors of Gaussian channels at 0 to 8 bits."""
    errors: FloatArray = np.square(alpha)[:, None] * GAUSS[(1 << WIDTHS) - 1]
    return errors


def test_the_error_of_gaussian_levels_is_that_of_the_literature() -> None:
    """Max, Quantizing for minimum distortion, 1960, table II."""
    np.testing.assert_allclose(GAUSS[[1, 3, 7, 15, 31]], [0.3634, 0.1188, 0.03744, 0.01154, 0.003495], rtol=2e-3)


@pytest.mark.parametrize("ratio", RATIOS)
def test_levels_by_the_power_of_two_thirds_are_within_two_percent_of_every_split(ratio: float) -> None:
    levels, _, excess = shared_levels(ratio, GAUSS)
    assert levels.sum() == LEVELS
    assert levels[1] / levels[0] == pytest.approx(ratio ** (2 / 3), rel=0.13)  # whole levels
    assert 1 <= excess <= 1.02


@pytest.mark.parametrize("sigma", CHANNELS)
def test_widths_of_gaussian_channels_are_the_best_of_all(sigma: tuple[float, ...]) -> None:
    found, excess = shared_bits(sigma, 4, GAUSS)
    assert excess == pytest.approx(1, abs=1e-12)
    start = np.clip(bit_allocation.closed_form(np.array(sigma), 4), 0, 8)
    assert np.abs(found - start).max() < 2


@given(tables(), st.integers(0, 4))
def test_widths_are_the_best_of_all_with_their_sum(errors: FloatArray, bits: int) -> None:
    live = int((errors[:, 0] > 0).sum())
    total = min(bits * len(errors), 4 * live)
    found = bit_allocation.mean_width(errors, bits)
    assert found.sum() == total
    assert not found[errors[:, 0] == 0].any()
    rows = np.arange(len(errors))
    splits = (s for s in itertools.product(range(5), repeat=len(errors)) if sum(s) == total)
    best = min(float(errors[rows, list(split)].sum()) for split in splits)
    assert float(errors[rows, found].sum()) == pytest.approx(best, rel=1e-9, abs=1e-15)


@given(ALPHA, st.integers(0, 8), st.sampled_from(["mean_width", "published"]), st.integers(-20, 20))
def test_sums_are_exact_zeros_get_nothing_and_scale_does_not_matter(
    alpha: FloatArray, bits: int, method: str, power: int
) -> None:
    def widths(ranges: FloatArray) -> IntArray:
        published = method == "published"
        return (
            bit_allocation.published(ranges, bits) if published else bit_allocation.mean_width(gaussian(ranges), bits)
        )

    found = widths(alpha)
    live = alpha > 0
    assert found.sum() == min(bits * alpha.size, 8 * int(live.sum()))
    assert not found[~live].any()
    assert found.min() >= 0
    assert found.max() <= 8
    assert widths(alpha * 2.0**power).tolist() == found.tolist()


@given(ALPHA.filter(lambda alpha: bool((alpha > 0).any())), st.integers(1, 8))
def test_the_closed_form_has_the_mean_that_was_asked_for(alpha: FloatArray, bits: int) -> None:
    found = bit_allocation.closed_form(alpha, bits)
    assert found[alpha > 0].sum() == pytest.approx(bits * alpha.size, rel=1e-9, abs=1e-6)
    assert (found[alpha == 0] == -np.inf).all()
    assert bit_allocation.levels(alpha, 16.0).sum() == pytest.approx(16)


def test_wider_channels_get_no_fewer_bits() -> None:
    alpha = np.geomspace(1e-3, 10, 50)
    for found in (bit_allocation.published(alpha, 4), bit_allocation.mean_width(gaussian(alpha), 4)):
        assert (np.diff(found) >= 0).all()
        assert found[0] < 4 < found[-1]


def test_thousands_of_channels_whose_errors_do_not_fall_evenly() -> None:
    """One bit more may gain less than two gain together: the exact search must close that gap, too."""
    rng = np.random.default_rng(0)
    errors = rng.lognormal(size=(4096, 1)) * np.array([1, 0.9, 0.2, 0.18, 0.02, 0.015, 0.003, 0.0025, 0.0003])
    found = bit_allocation.mean_width(errors, 3)
    assert found.sum() == 3 * 4096
    price = bit_allocation._price(errors, 3 * 4096)
    bound = (errors + price * WIDTHS).min(axis=1).sum() - price * 3 * 4096
    assert float(errors[np.arange(4096), found].sum()) == pytest.approx(bound, rel=1e-3)
