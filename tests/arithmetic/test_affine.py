from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qdqtool.arithmetic import blockwise
from qdqtool.arithmetic.affine import (
    dequantize,
    expected_error,
    fake_quantize,
    params_from_range,
    quantize,
    tensor_range,
)
from qdqtool.spec import FORMATS, Granularity, QuantSpec, Range, Scheme, per_channel
from qdqtool.statistics.tensor import TensorStatistics

Array = npt.NDArray[np.float32]
SMALL = ["int8", "uint8", "int4", "uint4", "int2", "uint2"]
ends = st.floats(-(2.0**100), 2.0**100, width=32)


def interval(lo: float, hi: float) -> Range:
    return Range(np.array(lo), np.array(hi))


@given(a=ends, b=ends, fmt=st.sampled_from([*SMALL, "int16", "uint16"]), symmetric=st.booleans())
@settings(deadline=None)
def test_zero_is_exact_and_the_zero_point_is_a_code(a: float, b: float, fmt: str, symmetric: bool) -> None:
    spec = QuantSpec(FORMATS[fmt], symmetric=symmetric)
    params = params_from_range(interval(min(a, b), max(a, b)), spec)
    assert spec.qmin <= params.zero_point <= spec.qmax
    assert params.scale > 0
    assert fake_quantize(np.zeros(3, np.float32), params).tolist() == [0, 0, 0]


@given(
    x=hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)),
    fmt=st.sampled_from(SMALL),
)
@settings(deadline=None)
def test_values_inside_the_range_err_by_at_most_one_step(x: Array, fmt: str) -> None:
    spec = QuantSpec(FORMATS[fmt])
    params = params_from_range(tensor_range(x, spec), spec)
    error = np.abs(x.astype(np.float64) - fake_quantize(x, params))
    assert error.max() <= params.scale * (1 + 1e-5)  # half a step, and half more at an end that the zero point moved


@given(codes=hnp.arrays(np.int8, 20), scale=st.floats(2.0**-100, 2.0**100, width=32))
def test_codes_survive_a_round_trip(codes: npt.NDArray[np.int8], scale: float) -> None:
    params = params_from_range(interval(-128 * scale, 127 * scale), QuantSpec(FORMATS["int8"]))
    assert np.array_equal(quantize(dequantize(codes, params), params), codes)


@pytest.mark.parametrize(
    ("spec", "lo", "hi", "scale", "zero"),
    [
        (QuantSpec(FORMATS["uint8"]), 0, 255, 1, 0),
        (QuantSpec(FORMATS["uint8"]), 10, 255, 1, 0),  # widened to 0
        (QuantSpec(FORMATS["uint8"]), -255, -10, 1, 255),
        (QuantSpec(FORMATS["int8"]), -128, 127, 1, 0),
        (QuantSpec(FORMATS["int8"], symmetric=True), -1, 12.7, 0.1, 0),
        (QuantSpec(FORMATS["int8"], symmetric=True), 0, 12.7, 0.1, 0),
        (QuantSpec(FORMATS["uint8"], symmetric=True), 0, 25.5, 0.1, 0),
        (QuantSpec(FORMATS["uint8"], symmetric=True), -1, 12.75, 0.1, 128),
        (QuantSpec(FORMATS["int8"], narrow=True), -127, 127, 1, 0),
        (QuantSpec(FORMATS["uint8"]), 0, 0, 1, 0),
    ],
)
def test_scale_and_zero_point(spec: QuantSpec, lo: float, hi: float, scale: float, zero: int) -> None:
    params = params_from_range(interval(lo, hi), spec)
    assert params.scale == np.float32(scale)
    assert params.zero_point == zero


def test_rounding_is_half_to_even_and_saturates() -> None:
    params = params_from_range(interval(0, 255), QuantSpec(FORMATS["uint8"]))
    codes = quantize(np.array([0.5, 1.5, 2.5, -7, 1e9], np.float32), params)
    assert codes.tolist() == [0, 2, 2, 0, 255]
    assert codes.dtype == np.uint8


def test_a_range_that_float32_cannot_divide_keeps_a_normal_scale() -> None:
    params = params_from_range(interval(0, 1e-40), QuantSpec(FORMATS["uint8"]))
    assert params.scale == np.finfo(np.float32).tiny


def test_end_codes_stay_inside_a_bound() -> None:
    for fmt in ("uint8", "uint4", "uint16"):
        params = params_from_range(interval(0, 6), QuantSpec(FORMATS[fmt], bound=(0, 6)))
        assert np.float32(params.scale * np.float32(params.spec.qmax)) <= 6


def test_each_channel_has_its_own_scale() -> None:
    x = np.array([[1, -2], [30, 40]], np.float32)
    spec = QuantSpec(FORMATS["int8"], symmetric=True, granularity=per_channel(0))
    params = params_from_range(tensor_range(x, spec), spec)
    np.testing.assert_allclose(params.scale, [2 / 127, 40 / 127], rtol=1e-6)
    np.testing.assert_allclose(fake_quantize(x, params), x, atol=0.16)


def test_each_block_has_its_own_scale_the_last_one_short() -> None:
    x = np.arange(10, dtype=np.float32).reshape(2, 5)
    spec = QuantSpec(FORMATS["int8"], symmetric=True, granularity=Granularity(Scheme.PER_BLOCK, axis=1, block_size=2))
    params = params_from_range(tensor_range(x, spec), spec)
    np.testing.assert_allclose(params.scale * 127, [[1, 3, 4], [6, 8, 9]], rtol=1e-6)
    np.testing.assert_allclose(fake_quantize(x, params), x, atol=0.04)


@pytest.mark.parametrize("fmt", [*SMALL, "uint16"])
@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
def test_expected_error_is_the_measured_one(fmt: str, share: float) -> None:
    x = np.random.default_rng(0).gumbel(size=100_000).astype(np.float32)
    stats, spec = TensorStatistics(), QuantSpec(FORMATS[fmt], symmetric=fmt.startswith("int"))
    stats.observe(x, [(b"x", 0)])
    lo, hi = share * stats.lo, share * stats.hi
    quantized = fake_quantize(x, params_from_range(interval(lo, hi), spec))
    measured = ((x.astype(np.float64) - quantized) ** 2).mean()
    assert expected_error(stats.bins, lo, hi, spec) == pytest.approx(measured, rel=0.005)


def test_expected_error_of_many_ranges_is_that_of_each() -> None:
    stats, spec = TensorStatistics(), QuantSpec(FORMATS["uint4"])
    stats.observe(np.random.default_rng(1).standard_normal(999), [(b"x", 0)])
    lows, highs = [-1, -2, 0], [3, 1, 2]
    apart = [expected_error(stats.bins, lo, hi, spec)[0] for lo, hi in zip(lows, highs, strict=True)]
    np.testing.assert_allclose(expected_error(stats.bins, lows, highs, spec), apart, rtol=1e-12)


def test_expected_error_beside_a_huge_outlier_keeps_its_precision() -> None:
    x = np.append(np.random.default_rng(2).standard_normal(5000), [3e38, -3e38]).astype(np.float32)
    stats, spec = TensorStatistics(), QuantSpec(FORMATS["uint8"])
    stats.observe(x, [(b"x", 0)])
    inner = expected_error(stats.bins, -4, 4, spec) * x.size - 2 * 3e38**2
    assert np.isfinite(inner).all()
    assert stats.bins.prefix[0, -1] == (x > 0).sum()


def test_expected_error_of_nothing_is_zero() -> None:
    assert expected_error(TensorStatistics().bins, 0, 1, QuantSpec(FORMATS["uint8"])) == 0
    assert expected_error(TensorStatistics().bins, 0, 1, QuantSpec(FORMATS["uint16"])) == 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["int8", "uint8"])
def test_channels_of_unequal_bits_are_those_of_one_width_each(name: str, symmetric: bool) -> None:
    x = np.random.default_rng(0).standard_normal((9, 200)).astype(np.float32)
    spec = QuantSpec(FORMATS[name], symmetric, per_channel(0), narrow=True, bits=4)
    params = params_from_range(tensor_range(x, spec), spec, "", np.arange(9))
    codes = quantize(x, params)
    np.testing.assert_array_equal(codes, blockwise.quantize(x, params))
    for bits in range(9):
        one = spec.of_width(bits)
        alone = params_from_range(tensor_range(x, one), one)
        if bits:
            np.testing.assert_allclose(params.scale[bits], alone.scale[bits], rtol=1e-6)
        np.testing.assert_array_equal(codes[bits], quantize(x, alone)[bits])
        assert np.unique(codes[bits]).size <= 1 << bits
        assert (int(params.qmin[bits]), int(params.qmax[bits])) == (one.qmin, one.qmax)
    assert not dequantize(codes, params)[0].any()
    assert params.mean_bits == 4
