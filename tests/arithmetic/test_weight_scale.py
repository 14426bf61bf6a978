"""Scales of least squared error against a search over all, and scales that keep a channel's norm."""

from __future__ import annotations

import numpy as np
import pytest

from qdqtool.arithmetic import affine
from qdqtool.arithmetic.weight_scale import least_squares, norm_kept
from qdqtool.graphs.graph import Array
from qdqtool.spec import FORMATS, QuantizedWeight, QuantParams, QuantSpec, per_channel
from tests.builders import normal


def minmax(values: Array, bits: int) -> QuantParams:
    spec = QuantSpec(FORMATS["int8"], symmetric=True, granularity=per_channel(0), narrow=bits > 2, bits=bits)
    return affine.params_from_range(affine.tensor_range(values, spec), spec, "minmax")


def error(values: Array, params: QuantParams) -> Array:
    found: Array = ((values - affine.fake_quantize(values, params)) ** 2).sum(axis=1)
    return found


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", ["normal", "outlier", "heavy tails"])
def test_scales_are_as_good_as_a_search_over_all(shape: str, bits: int) -> None:
    values = normal(4, 300)
    if shape == "outlier":
        values[:, 7] = 15
    elif shape == "heavy tails":
        values = values**3
    params = minmax(values, bits)
    found = least_squares(values, params)
    best = np.min(
        [error(values, affine.params_from_range(params.range, params.spec))]
        + [
            error(values, QuantParams(params.spec, params.scale * np.float32(share), params.zero_point))
            for share in np.geomspace(0.02, 1, 1000)
        ],
        axis=0,
    )
    assert (error(values, found) <= 1.06 * best).all()
    assert found.method == "mse"


def test_channels_of_zeros_stay_as_they_are() -> None:
    values = normal(3, 20)
    values[1] = 0
    params = minmax(values, 4)
    found = least_squares(values, params)
    assert found.scale[1] == params.scale[1]
    kept = norm_kept(values, QuantizedWeight(affine.quantize(values, found), found))
    assert kept.params.scale[1] == found.scale[1]


def test_norms_about_the_mean_are_kept() -> None:
    values = normal(5, 200) + np.float32(0.3)
    params = minmax(values, 4)
    codes = affine.quantize(values, params)
    kept = norm_kept(values, QuantizedWeight(codes, params))
    np.testing.assert_array_equal(kept.codes, codes)
    spread = affine.dequantize(codes, kept.params).std(axis=1)
    np.testing.assert_allclose(spread, values.std(axis=1), rtol=1e-5)
    assert not np.allclose(affine.dequantize(codes, params).std(axis=1), values.std(axis=1), rtol=1e-3)
