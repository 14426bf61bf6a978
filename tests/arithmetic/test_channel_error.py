"""Expected errors of channels against those of the values themselves."""

from __future__ import annotations

import numpy as np
import pytest

from qdqtool.arithmetic import affine, channel_error
from qdqtool.graphs.graph import Array
from qdqtool.spec import FORMATS, FloatArray, QuantSpec, Range, per_channel
from qdqtool.statistics.channel_statistics import ChannelStatistics
from tests.builders import normal

SCALES = np.array([0.01, 1.0, 5.0, 300.0], np.float32)
KINDS = ("two-sided", "rectified", "heavy tails", "shifted")


def values(kind: str, count: int = 20_000) -> Array:
    """Four channels of different size, (1, channels, values)."""
    x = normal(1, 4, count) * SCALES[:, None]
    made = {
        "two-sided": x,
        "rectified": np.maximum(x, 0),
        "heavy tails": np.abs(x) ** np.float32(1.5) * np.sign(x),
        "shifted": x + 2 * SCALES[:, None],
    }
    return made[kind]


def observed(x: Array) -> ChannelStatistics:
    stats = ChannelStatistics(1)
    stats.observe(x, 1)
    return stats


def spec_of(bits: int) -> QuantSpec:
    return QuantSpec(FORMATS["uint8"], granularity=per_channel(1), bits=bits)


def error(x: Array, chosen: Range, spec: QuantSpec) -> FloatArray:
    left = x.astype(np.float64) - affine.fake_quantize(x, affine.params_from_range(chosen, spec))
    found: FloatArray = (left**2).mean(axis=(0, 2))
    return found


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_histogram_tells_the_error_of_a_range(kind: str, bits: int) -> None:
    x, spec = values(kind), spec_of(bits)
    stats = observed(x)
    for share in (1.0, 0.4):
        chosen = Range(stats.lo * share, stats.hi * share)
        expected = channel_error.of_statistics(stats, chosen, spec)
        np.testing.assert_allclose(expected, error(x, chosen, spec), rtol=0.06)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_ranges_are_about_as_good_as_a_search_over_all(kind: str, bits: int) -> None:
    x, spec = values(kind), spec_of(bits)
    stats = observed(x)
    found = error(x, channel_error.least_of_statistics(stats, spec), spec)
    best = np.min(
        [
            error(x, Range(stats.lo * low, stats.hi * high), spec)
            for low in (np.geomspace(0.1, 1, 20) if kind in ("two-sided", "heavy tails") else (0.5, 1.0))
            for high in np.geomspace(0.1, 1, 20)
        ],
        axis=0,
    )
    assert (found <= 1.15 * best).all()
    assert (found <= 1.05 * error(x, Range(stats.lo, stats.hi), spec)).all()  # the histogram is a coarse one


def test_at_no_bits_the_error_is_what_was_there_and_dead_channels_have_none() -> None:
    x = values("rectified")
    x[:, 2] = 0
    stats = observed(x)
    none = channel_error.of_statistics(stats, Range(stats.lo, stats.hi), spec_of(0))
    np.testing.assert_allclose(none, stats.second_moment, rtol=1e-2)
    for bits in (1, 4):
        found = channel_error.least_of_statistics(stats, spec_of(bits))
        assert found.lo[2] == found.hi[2] == 0
        assert channel_error.of_statistics(stats, found, spec_of(bits))[2] == 0


@pytest.mark.parametrize("least", [False, True])
@pytest.mark.parametrize("count", [9, 300, 5000])
def test_the_error_of_a_weight_is_that_of_its_values(count: int, least: bool) -> None:
    rows = values("two-sided", count)[0].astype(np.float64)
    spec = QuantSpec(FORMATS["int8"], granularity=per_channel(0), bits=4)
    found = channel_error.of_weight(rows, spec, least=least)
    whole = Range(rows.min(axis=1), rows.max(axis=1))
    plain = ((rows - affine.fake_quantize(rows, affine.params_from_range(whole, spec))) ** 2).mean(axis=1)
    if least:
        assert (found <= plain * 1.02).all()
    else:
        np.testing.assert_allclose(found, plain, rtol=0.05 if count > 512 else 1e-5)
    np.testing.assert_allclose(channel_error.of_weight(rows * 4, spec, least=least), 16 * found, rtol=1e-5)


def test_a_weight_without_values_errs_by_nothing() -> None:
    spec = QuantSpec(FORMATS["int8"], granularity=per_channel(0), bits=4)
    assert channel_error.of_weight(np.empty((3, 0)), spec, least=True).tolist() == [0, 0, 0]
    assert channel_error.of_weight(np.empty((0, 7)), spec, least=True).size == 0
