"""Which layer loses how much: alone, and with all before it."""

from __future__ import annotations

import math

import onnx
import pytest

from qdqtool import pipeline
from qdqtool.data.batching import Batching
from qdqtool.verification import tensor_error
from tests.builders import feeds, normal, parse


def model() -> onnx.ModelProto:
    weights = {"w": normal(32, 32), "v": normal(32, 32), "u": normal(32, 8)}
    body = "[a] t = MatMul(x, w) [b] s = MatMul(t, v) [c] r = MatMul(s, u) [d] y = Abs(r)"
    proto = parse(body, "float[N, 32] x", "float[N, 8] y", weights)
    return onnx.shape_inference.infer_shapes(proto)


@pytest.fixture(scope="module")
def errors() -> tuple[dict[str, float], dict[str, float]]:
    proto = model()
    data = feeds(proto)
    worse = {"b": {"range": [-0.5, 0.5]}}  # its input is clipped far inside of what is seen
    quantized = pipeline.quantize(proto, data, target="cpu", cache=False, nodes=worse, bias_correction=False).model
    plan = Batching(rows=True, size=8)
    batches = list(plan.batches(plan.samples([data])))
    return tensor_error.local(proto, quantized, batches), tensor_error.cumulative(proto, quantized, batches)


def test_the_layer_at_fault_is_told_from_those_behind_it(errors: tuple[dict[str, float], dict[str, float]]) -> None:
    local, cumulative = errors
    assert local.keys() == cumulative.keys() >= {"t", "s", "r"}
    assert local["r"] > 30
    assert local["t"] > 30
    assert max(local["s"], cumulative["s"], cumulative["r"]) < 15


def test_equal_models_lose_nothing() -> None:
    proto = model()
    plan = Batching(rows=True, size=8)
    batches = list(plan.batches(plan.samples([feeds(proto)])))
    assert set(tensor_error.local(proto, proto, batches).values()) == {math.inf}


def test_an_older_opset_is_raised(errors: tuple[dict[str, float], dict[str, float]]) -> None:
    proto = parse("[a] t = MatMul(x, w) [b] y = Softmax <axis = 1> (t)", "float[N, 8] x", "float[N, 8] y",
                  {"w": normal(8, 8)}, opset=11)  # fmt: skip
    proto = onnx.shape_inference.infer_shapes(proto)
    data = feeds(proto)
    quantized = pipeline.quantize(proto, data, target="cpu", cache=False).model
    plan = Batching(rows=True, size=8)
    found = tensor_error.local(proto, quantized, list(plan.batches(plan.samples([data]))))
    assert 20 < found["t"] < 80


def test_bodies_are_not_looked_into() -> None:
    branches = "then_branch = a () => (float[4] p) { p = Relu(x) }, else_branch = b () => (float[4] q) { q = Abs(x) }"
    body = f"y = If (c) <{branches}>"
    proto = parse(body, "float[4] x, bool c", "float[4] y", {})
    assert tensor_error.local(proto, proto, []) == {}
