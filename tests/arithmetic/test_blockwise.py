"""Scales and codes of weights in blocks: the arithmetic of affine, in less time and memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdqtool.arithmetic import affine
from qdqtool.arithmetic.blockwise import pack, quantize, value_range, weight_params
from qdqtool.spec import FORMATS, PER_TENSOR, Granularity, QuantParams, QuantSpec, Scheme, per_channel
from tests.builders import Array, normal, sqnr


def blocks(size: int, axis: int = 0) -> Granularity:
    return Granularity(Scheme.PER_BLOCK, axis, size)


def spec(name: str, granularity: Granularity = PER_TENSOR, symmetric: bool | None = None, **fields: Any) -> QuantSpec:
    signed = FORMATS[name].signed
    return QuantSpec(FORMATS[name], signed if symmetric is None else symmetric, granularity, **fields)


def params(values: Array, how: QuantSpec, stored: Any = np.float32) -> QuantParams:
    found = weight_params(values, how, stored)
    assert found is not None
    return found


GRANULARITIES = [PER_TENSOR, per_channel(0), per_channel(1), blocks(4, 0), blocks(16, 1), blocks(64, 0), blocks(3, -1)]


@pytest.mark.parametrize("name", ["int8", "uint8", "int4", "uint4", "int2", "uint2"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", [(16, 33), (33, 16), (5, 7, 3)], ids=str)
def test_codes_are_those_of_affine(name: str, granularity: Granularity, shape: tuple[int, ...]) -> None:
    values = normal(*shape)
    found = params(values, spec(name, granularity))
    codes = quantize(values, found)
    np.testing.assert_array_equal(codes, affine.quantize(values, found))
    assert codes.flags.c_contiguous
    assert codes.min() >= found.spec.qmin
    assert codes.max() <= found.spec.qmax
    assert np.abs(affine.dequantize(codes, found) - values).max() <= 0.5001 * found.scale.max()


def test_weights_of_many_pieces_give_the_codes_of_affine() -> None:
    values = normal(700, 600)
    for granularity in (blocks(32), blocks(32, 1), blocks(1000), per_channel(0)):
        found = params(values, spec("uint4", granularity, symmetric=False))
        np.testing.assert_array_equal(quantize(values, found), affine.quantize(values, found))


@settings(deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 9), size=st.sampled_from([1, 2, 16, 32]), axis=st.integers(0, 1))
def test_ranges_are_those_of_affine(rows: int, columns: int, size: int, axis: int) -> None:
    values = normal(rows, columns)
    wanted = affine.tensor_range(values, spec("int4", blocks(size, axis)))
    found = value_range(values, spec("int4", blocks(size, axis)))
    np.testing.assert_array_equal(found.lo, wanted.lo)
    np.testing.assert_array_equal(found.hi, wanted.hi)


def test_all_codes_of_a_symmetric_format_are_in_use() -> None:
    values = np.array([[-8.0], [1.0], [2.0], [3.0], [-4.0], [7.0], [0.0], [1.0]], np.float32)
    found = params(values, spec("int4", blocks(4)))
    np.testing.assert_array_equal(found.scale, [[1.0], [1.0]])
    np.testing.assert_array_equal(quantize(values, found).ravel(), [-8, 1, 2, 3, -4, 7, 0, 1])
    widened = normal(64, 64)
    wider = np.abs(widened.reshape(2, 32, 64)).max(1) / np.float32(7)
    assert (params(widened, spec("int4", blocks(32))).scale <= wider).all()


def test_zero_points_of_an_asymmetric_format() -> None:
    values = np.array([[0.0], [3.0], [-1.0], [2.0]], np.float32)
    found = params(values, spec("uint2", blocks(2)))
    np.testing.assert_array_equal(found.scale.ravel(), [1, 1])
    np.testing.assert_array_equal(found.zero_point.ravel(), [0, 1])
    np.testing.assert_array_equal(affine.dequantize(quantize(values, found), found), values)


def test_blocks_of_zeros_stay_zero() -> None:
    found = params(np.zeros((8, 3), np.float32), spec("uint4", blocks(4)))
    assert (found.scale == 1).all()
    assert not affine.dequantize(quantize(np.zeros((8, 3), np.float32), found), found).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_has_no_scales(bad: float) -> None:
    values = normal(8, 4)
    values[5, 2] = bad
    assert weight_params(values, spec("int8", blocks(4))) is None
    assert weight_params(values, spec("int8", per_channel(1))) is None


def test_a_fixed_range_is_that_of_every_block() -> None:
    found = params(normal(8, 4), spec("int8", blocks(4), fixed=(-1.0, 0.5)))
    np.testing.assert_allclose(found.scale, np.full((2, 4), 1 / 128), rtol=1e-6)
    assert found.method == "set by the user"


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_unsigned_symmetric_format_has_its_zero_in_the_middle(symmetric: bool) -> None:
    found = params(normal(64, 4), spec("uint4", blocks(32), symmetric=symmetric))
    assert bool((found.zero_point == 8).all()) == symmetric
    assert sqnr(normal(64, 4), affine.dequantize(quantize(normal(64, 4), found), found)) > 18


class TestFloat16:
    def test_scales_are_what_float16_holds(self) -> None:
        found = params(normal(64, 8), spec("int4", blocks(32)), np.float16)
        np.testing.assert_array_equal(found.scale.astype(np.float16).astype(np.float32), found.scale)
        assert sqnr(normal(64, 8), affine.dequantize(quantize(normal(64, 8), found), found)) > 18

    @pytest.mark.parametrize("size", [1e-12, 1e-7, 1e-6])
    def test_small_weights_keep_a_scale(self, size: float) -> None:
        values = np.full((32, 1), size, np.float32)
        found = params(values, spec("int4", blocks(32)), np.float16)
        assert (found.scale.astype(np.float16) > 0).all()
        error = np.abs(affine.dequantize(quantize(values, found), found) - values).max()
        assert error <= 0.5001 * found.scale.max()

    def test_large_weights_stay_finite(self) -> None:
        values = np.full((32, 1), 65504, np.float16)
        values[3] = -65504
        found = params(values, spec("int4", blocks(32)), np.float16)
        back = affine.dequantize(quantize(values, found), found)
        assert np.isfinite(back.astype(np.float16)).all()
        np.testing.assert_allclose(back, values.astype(np.float32), rtol=0.15)


def test_temporaries_do_not_grow_with_the_weight() -> None:
    values = normal(2048, 1024)
    how = spec("int4", blocks(32))
    found = params(values, how)
    tracemalloc.start()
    try:
        weight_params(values, how)
        scales = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        codes = quantize(values, found)
        pack(codes, 4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert scales < values.nbytes / 2
    assert peak < 2 * codes.nbytes + 4 * 2**20


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5), (2, 3, 4), (300001,)])
def test_packing_is_that_of_onnx(bits: int, signed: bool, shape: tuple[int, ...]) -> None:
    name = f"{'INT' if signed else 'UINT'}{bits}"
    number_format = FORMATS[name.lower()]
    codes = np.random.default_rng(0).integers(number_format.qmin, number_format.qmax + 1, shape)
    raw = onnx.helper.make_tensor("t", getattr(onnx.TensorProto, name), shape, pack(codes, bits), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(raw).astype(np.int64), codes)
    assert len(pack(codes, bits)) == -(-codes.size * bits // 8)
    for kind in (np.int8, np.uint8):
        assert pack(codes.astype(kind), bits) == pack(codes, bits)
    assert pack(np.asfortranarray(codes), bits) == pack(codes, bits)
