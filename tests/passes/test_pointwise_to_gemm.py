"""A 1x1 convolution of one position that is flattened becomes a Gemm, and nothing else does."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qdqtool.passes import InferShapes, PointwiseToGemm

HEAD = """
<ir_version: 8, opset_import: ["" : 17]>
head (float[N,6,4,4] x) => (float[N,5] y) <float[5,6,1,1] w, float[5] b> {
    p = GlobalAveragePool(x)
    c = Conv<kernel_shape=[1,1]>(p, w, b)
    y = Flatten(c)
}
"""


def weights(**shapes: tuple[int, ...]) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("flatten", ["Flatten(c)", "Reshape(c, shape)", "Squeeze(c, axes)"])
def test_classifier_head_becomes_gemm(passes: Any, flatten: str) -> None:
    text = HEAD.replace("Flatten(c)", flatten).replace(
        "float[5] b>", "float[5] b, int64[2] shape = {0, -1}, int64[2] axes = {2, 3}>"
    )
    proto, _ = passes(text, InferShapes(), PointwiseToGemm(), weights=weights(w=(5, 6, 1, 1), b=(5,)))
    assert passes.ops(proto) == ["GlobalAveragePool", "Flatten", "Gemm"]


def test_convolution_without_bias(passes: Any) -> None:
    text = HEAD.replace(", float[5] b", "").replace(", w, b", ", w")
    proto, _ = passes(text, InferShapes(), PointwiseToGemm(), weights=weights(w=(5, 6, 1, 1)))
    assert passes.ops(proto) == ["GlobalAveragePool", "Flatten", "Gemm"]


def test_squeeze_and_excite_keeps_its_convolutions(passes: Any) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    gate (float[N,6,4,4] x) => (float[N,6,4,4] y) <float[6,6,1,1] w, float[6] b> {
        p = GlobalAveragePool(x)
        c = Conv<kernel_shape=[1,1]>(p, w, b)
        s = Sigmoid(c)
        y = Mul(x, s)
    }
    """
    proto, state = passes(text, InferShapes(), PointwiseToGemm(), weights=weights(w=(6, 6, 1, 1), b=(6,)))
    assert passes.ops(proto) == ["GlobalAveragePool", "Conv", "Sigmoid", "Mul"]
    assert not state.skipped


def test_more_than_one_position_is_left_with_a_reason(passes: Any) -> None:
    text = HEAD.replace("GlobalAveragePool(x)", "Relu(x)").replace("float[N,5] y", "float[N,80] y")
    proto, state = passes(text, InferShapes(), PointwiseToGemm(), weights=weights(w=(5, 6, 1, 1), b=(5,)))
    assert passes.ops(proto) == ["Relu", "Conv", "Flatten"]
    assert "single position" in state.skipped[0].reason
