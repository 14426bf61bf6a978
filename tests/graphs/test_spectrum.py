"""Layers around a power spectrum stay float, others do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool import pipeline
from qdqtool.graphs import model as models
from qdqtool.graphs import spectrum
from tests.builders import normal, parse

SQUARE = "p = Mul(re, re) q = Mul(im, im)"
POWER = "p = Pow(re, two) q = Pow(im, two)"
FRONT = """[stft] f = Conv <strides = [4]> (x, basis) re = Slice(f, zero, half, one) im = Slice(f, half, whole, one)
    {square} [sum] e = Add(p, q)"""
VALUES = {
    "basis": normal(16, 1, 8),
    "w": normal(4, 8, 1),
    "v": normal(4, 4, 1),
    "mel": normal(8, 3),
    "two": np.array([2], np.float32),
    "three": np.array([3], np.float32),
}
INTEGERS = "<int64[1] zero = {0}, int64[1] half = {8}, int64[1] whole = {16}, int64[1] one = {1}>"


def left(body: str, **fields: Any) -> dict[str, str]:
    text = (
        f'<ir_version: 8, opset_import: ["": 17]> g (float[N, 1, 64] x) => (float[N, A, B] y) {INTEGERS} {{ {body} }}'
    )
    proto = onnx.parser.parse_model(text)
    used = {name for node in proto.graph.node for name in node.input}
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in VALUES.items() if name in used]
    proto.graph.initializer.extend(constants)
    state, _ = pipeline.dry_run(proto, target="cpu", **fields)
    return {skip.node: skip.reason for skip in state.skipped if "spectrum" in skip.reason}


@pytest.mark.parametrize("square", [SQUARE, POWER])
def test_transform_and_reader_stay_float(square: str) -> None:
    found = left(FRONT.format(square=square) + " m = Sqrt(e) [read] c = Conv(m, w) r = Relu(c) [next] y = Conv(r, v)")
    assert found.keys() == {"stft", "read"}
    assert "are squared" in found["stft"]
    assert "reads a spectrum" in found["read"]


def test_mel_bands_before_a_logarithm_stay_and_layers_behind_it_do_not() -> None:
    front = FRONT.format(square=SQUARE)
    found = left(front + " t = Transpose <perm = [0, 2, 1]> (e) [mel] b = MatMul(t, mel) [log] y = Log(b)")
    assert found.keys() == {"stft", "mel"}
    found = left(front + " l = Log(e) [behind] y = Conv(l, w)")
    assert found.keys() == {"stft"}


@pytest.mark.parametrize(
    "body",
    [
        """[a] f = Conv <strides = [4]> (x, basis) s = Mul(f, f) n = ReduceMean <axes = [1], keepdims = 1> (s)
            d = Sqrt(n) y = Div(f, d)""",
        "[a] f = Conv <strides = [4]> (x, basis) y = Pow(f, three)",
        "[a] f = Conv <strides = [4]> (x, basis) r = Relu(f) y = Mul(r, r)",
    ],
    ids=["a normalization", "another power", "a squared activation function"],
)
def test_other_squares_are_no_spectrum(body: str) -> None:
    assert left(body) == {}


def test_an_output_outside_is_no_spectrum() -> None:
    graph, _ = models.to_graph(
        parse(
            "f = Conv(x, basis) y = Mul(f, f)",
            "float[N, 1, 64] x",
            "float[N, 16, 57] y, float[N, 16, 57] f",
            {"basis": VALUES["basis"]},
        )
    )
    assert spectrum.layers(graph) == {}


def test_the_user_may_quantize_it_all_the_same() -> None:
    body = FRONT.format(square=SQUARE) + " m = Sqrt(e) [read] y = Conv(m, w)"
    assert left(body, nodes={"stft": {"symmetric": False}}).keys() == {"read"}
    assert left(body, nodes_to_quantize=["stft", "read"]) == {}
